"""Files that are whole or absent, folders that one process writes at a time: what a kill, a full disk or a second run must not spoil.

Every temporary is locked while it is written, so that `clear` can tell what a killed process left from what a live one is writing.
The kernel gives locks back when a process dies.
"""

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk is full, as far as the user's quota goes",
    errno.EFBIG: "the disk is full, as far as the largest allowed file goes",
}
TEMPORARY = re.compile(r"\.[0-9a-f]{8}-.+")
FORGOTTEN = 86_400.0  # seconds after which a temporary counts as left behind where the file system has no locks
_BLOCK = 2**16  # bytes
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # some network file systems
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


class DiskFull(OSError):
    """No space left for a file, which the message names; what was there before is untouched."""


class InUse(OSError):
    """Another process writes to the folder."""


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` (same suffixes; an empty file) to write to; it replaces `path` when the block ends.

    A block that raises leaves `path` as it was. The folder is made where it is missing; the bytes are on the disk before the name is, and
    the name is when this returns. Raises DiskFull where there is no space, whatever the block raised for it.
    """
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}-{path.name}")
    descriptor = None
    try:
        make_folder(path.parent)
        with explained(path):
            descriptor = os.open(temporary, os.O_CREAT | os.O_RDWR, 0o666)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with explained(path, descriptor):
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync(path.parent)
    finally:
        if descriptor is not None:
            os.close(descriptor)
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def explained(path: Path, descriptor: int | None = None) -> Iterator[None]:
    """Turn what a full disk raises while `path` is written into DiskFull. descriptor: of the file, to ask it where the error says nothing."""
    try:
        yield
    except Exception as error:
        reason = _full(error, descriptor)
        if reason is None or isinstance(error, DiskFull):
            raise
        raise DiskFull(f"{path} cannot be written: {reason}") from error


def _full(error: BaseException | None, descriptor: int | None) -> str | None:
    silent = getattr(error, "errno", None) is None
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return FULL[error.errno]
        error = error.__cause__ or error.__context__
    if silent and descriptor is not None:  # NumPy and other compiled writers keep errno to themselves: one more block shows it
        try:
            os.pwrite(descriptor, bytes(_BLOCK), os.fstat(descriptor).st_size)
        except OSError as found:
            return FULL.get(found.errno)
    return None


def make_folder(folder: str | Path) -> None:
    """mkdir -p; every new name is on the disk when this returns."""
    missing, folder = [], Path(folder)
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        with explained(new):
            new.mkdir(exist_ok=True)
            _sync(new.parent)


def clear(folder: str | Path) -> None:
    """Remove the temporaries below `folder` that killed processes left; never one that a live process is writing."""
    for path in Path(folder).rglob(".????????-*"):
        if TEMPORARY.fullmatch(path.name) and path.is_file() and _left(path):
            path.unlink(missing_ok=True)


def _left(path: Path) -> bool:
    try:
        with open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except (BlockingIOError, FileNotFoundError, PermissionError):
        return False
    except OSError:  # no locks here
        return time.time() - path.stat().st_mtime > FORGOTTEN


@contextlib.contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """Hold the file `path` (made where it is missing, left behind) until the block ends or the process dies.

    Raises InUse, which names `what` and the process that holds it. Where the file system has no locks: a warning, and on.
    """
    with explained(path):
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (held as long as the block)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise InUse(f"{what} is being written by {holder}; wait until it ends, or stop it") from error
        except OSError as error:
            log.warning("no locks on the file system of %s (%s): see to it that no second process writes to %s", path, error.strerror, what)
        with contextlib.suppress(OSError):  # for a reader only
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%F %T')}\n".encode())
        yield


@contextlib.contextmanager
def replaced(folder: str | Path, own: tuple[str, ...]) -> Iterator[Path]:
    """Yield the new folder FOLDER.partial, which takes the place of `folder` in one step when the block ends.

    Until then, and for ever when the block raises or the process is killed, `folder` is as it was, and what was finished stays in
    FOLDER.partial until the next call. own: patterns of the files that belong to the old contents; all others go with the new.
    Raises InUse where another process is in such a block.
    """
    folder = Path(folder)
    new, old = folder.with_name(f"{folder.name}.partial"), folder.with_name(f"{folder.name}.old")
    with lock(folder.with_name(f"{folder.name}.lock"), str(folder)):
        if old.is_dir() and not folder.is_dir():  # killed between two renames: both folders are complete
            os.rename(new if new.is_dir() else old, folder)
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        make_folder(new)
        try:
            yield new
            with explained(new):
                _carry(folder, new, own)
        except BaseException as error:
            if not any(path.is_file() for path in new.rglob("*")):
                shutil.rmtree(new, ignore_errors=True)
            elif isinstance(error, DiskFull):
                kept = f"{folder} is as it was; " if folder.is_dir() else ""
                raise DiskFull(f"{error}; {kept}what was finished is in {new}. Free some space, then start again") from error
            raise
        _publish(new, folder, old)


def _carry(source: Path, target: Path, own: tuple[str, ...]) -> None:
    """Files that somebody else put into `source`."""
    for path in source.rglob("*"):
        copy = target / path.relative_to(source)
        if path.is_dir() or copy.exists() or any(path.relative_to(source).match(pattern) for pattern in own):
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, copy)
        except OSError:
            shutil.copy2(path, copy)


def _publish(new: Path, folder: Path, old: Path) -> None:
    if not folder.is_dir():
        os.rename(new, folder)
    elif not _exchange(new, folder):
        os.rename(folder, old)
        os.rename(new, folder)
    with contextlib.suppress(OSError):  # a power cut now would bring the old results back, as whole as the new
        _sync(folder.parent)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where system or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0


def _sync(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)
