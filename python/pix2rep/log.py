"""What a run tells: lines on the screen, a progress bar, RUN/log.jsonl, TensorBoard where wanted."""

import contextlib
import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from pix2rep.disk import atomic, explained, make_folder

if TYPE_CHECKING:  # commands that only look at files do not wait for it
    import torch

LINE_EVERY = 10.0  # seconds between lines where there is no terminal

console = Console(stderr=True)


def say(message: str) -> None:
    """One line for the user on stderr, as it stands (no wrapping, no markup)."""
    with contextlib.suppress(OSError):  # stderr may be a file on a full disk: a lost line is no reason to lose the run
        console.print(message, markup=False, highlight=False, soft_wrap=True)


def table_console() -> Console:
    """For results, on stdout."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=140)  # a log file has no width; 80 would fold the table


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def show_logging() -> None:
    """Send what pix2rep's modules log (info and above) through `say`, so that it does not tear the progress bar."""
    logger = logging.getLogger("pix2rep")
    if not any(isinstance(handler, _Handler) for handler in logger.handlers):
        logger.addHandler(_Handler())
        logger.setLevel(logging.INFO)
        logger.propagate = False


class RunLog:
    """Append events to a JSONL file, one object a line: {"event": ..., "time": Unix seconds, ...}.

    On a resume, rows of steps after `step` are dropped first: the resumed run takes these steps again.
    """

    def __init__(self, path: Path, step: int = 0, tensorboard: Path | None = None):
        if step and path.is_file():
            kept = [line for line, row in _rows(path) if row.get("step", 0) <= step]
            with atomic(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        make_folder(path.parent)
        self.path = path
        # Unbuffered: what a full disk refused must not be tried again when the file is closed.
        self._file = open(path, "ab" if step else "wb", buffering=0)  # noqa: SIM115 (open as long as the run)
        self._board = _tensorboard(tensorboard, step) if tensorboard else None

    def write(self, event: str, **values: Any) -> None:
        """Append one row. Raises `disk.DiskFull` where there is no space; no part of the row is then left."""
        row = json.dumps({"event": event, "time": round(time.time(), 3), **_finite(values)}, allow_nan=False) + "\n"
        end, rest = os.fstat(self._file.fileno()).st_size, row.encode()
        try:
            with explained(self.path):
                while rest:
                    rest = rest[self._file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            raise
        if self._board and event == "step":
            for name, value in values.items():
                if name != "step":
                    self._board.add_scalar(name, value, values["step"])

    def close(self) -> None:
        self._file.close()
        if self._board:
            self._board.close()


class Progress:
    """A bar on a terminal (loss, images/s, time left, peak memory), elsewhere a line now and then. A context manager."""

    def __init__(self, total: int, done: int):
        self.total, self.first, self.done = total, done, done
        self.started, self._line_at = time.perf_counter(), -math.inf
        self._bar = None
        if console.is_terminal:
            columns = "loss {task.fields[loss]}", "{task.fields[rate]} images/s", "peak {task.fields[memory]} MiB"
            self._bar = RichProgress(
                TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), *map(TextColumn, columns), console=console
            )
            self._task = self._bar.add_task("", total=total, completed=done, loss="-", rate="-", memory="-")

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, done: int) -> None:
        self.done = done
        if self._bar:
            self._bar.update(self._task, completed=done)

    def show(self, loss: float, rate: float, memory: float) -> None:
        """`rate` in images/s, `memory` in MiB."""
        if self._bar:
            self._bar.update(self._task, loss=f"{loss:.4f}", rate=f"{rate:.0f}", memory=f"{memory:.0f}")
        elif time.perf_counter() - self._line_at >= LINE_EVERY or self.done == self.total:
            self._line_at = time.perf_counter()
            left = (self._line_at - self.started) / max(1, self.done - self.first) * (self.total - self.done)
            say(f"step {self.done}/{self.total}  loss {loss:.4f}  {rate:.0f} images/s  {_clock(left)} left  peak {memory:.0f} MiB")


def peak_memory(device: "torch.device") -> float:
    """MiB: the most that PyTorch has held on a CUDA device, the most that the process has been resident with on the CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes, Linux KiB


def _tensorboard(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("pretrain.tensorboard must be false where tensorboard is not installed; pip install tensorboard") from error
    return SummaryWriter(str(folder), purge_step=step + 1)


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a log.jsonl; what a kill or a power cut left of a line is passed over."""
    return [row for _, row in _rows(Path(path))]


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict):
                yield line, row


def _finite(value: Any) -> Any:
    """JSON knows no NaN: non-finite numbers become text."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
