"""Runs that end at the k-th thing they do to the file system: killed by SIGKILL, or refused with ENOSPC from there on.

As a script it takes jobs, a JSON object a line, from stdin: {"how": "kill" | "full" | null, "at": k, "call": name of a function here,
"arguments": [...]}. The first one it does itself, so that all is imported; for each of the others it forks a process. It answers a line each,
[exit status or -signal, operations, error].
"""

import builtins
import errno
import io
import json
import os
import signal
import sys

ALLOCATING = {"open", "write", "fsync", "link", "mkdir"}  # what a full disk refuses
CALLS = ("open", "fsync", "replace", "rename", "link", "unlink", "mkdir", "rmdir")


class Disk:
    """Counts operations on the file system; at number `at` the process is killed (in the middle of a write), or the disk is full from there on."""

    def __init__(self, how: str | None, at: int):
        self.how, self.at, self.count, self.trace = how, at, 0, []

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self._counted(name, getattr(os, name)))
        builtins.open = io.open = self._opened(open)

    def _counted(self, name, real):
        def call(*arguments, **options):
            if name != "open" or arguments[1] & os.O_CREAT:
                self(name, arguments[0])
            if name != "fsync":  # nobody pulls the plug here
                return real(*arguments, **options)

        return call

    def _opened(self, real):
        def call(path, mode="r", *arguments, **options):
            file = real(path, mode, *arguments, **options)
            return file if mode in ("r", "rb", "r+b") or isinstance(path, int) else Written(file, self, path)

        return call

    def __call__(self, name: str, path, torn=lambda: None) -> None:
        self.trace.append(f"{name} {os.path.basename(str(path))}")
        number, self.count = self.count, self.count + 1
        if self.how == "kill" and number == self.at:
            torn()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "full" and number >= self.at and name in ALLOCATING:
            torn()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Written:
    """A file whose first write (a log's every write) is an operation, done by half where it is the last."""

    def __init__(self, file, disk: Disk, path):
        self.__dict__ |= {"file": file, "disk": disk, "path": path, "fresh": True}

    def write(self, data):
        def half():
            self.file.write(data[: len(data) // 2])
            self.file.flush()

        if self.fresh or str(self.path).endswith(".jsonl"):
            self.__dict__["fresh"] = False
            self.disk("write", self.path, half)
        elif self.disk.how == "full" and self.disk.count > self.disk.at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def pretrain(data, run_dir, overrides, resume):
    from pix2rep import pretrain
    from pix2rep.config import load

    pretrain.PAUSE = 0
    pretrain.run(data, run_dir, load(None, overrides), resume)


def backbone(config):
    """As small as a backbone can be."""
    from torch import nn

    network = nn.Conv2d(1, config.features, 3, padding=1)
    network.out_channels = config.features
    return network


def results(run_dir, name, text):
    """What `pix2rep probe` does to RUN/probe: pictures, models and tables of one name, `text` in all of them."""
    from pathlib import Path

    from pix2rep import disk

    with disk.replaced(Path(run_dir) / "probe", ("results.*", "models/*.safetensors")) as folder:
        for path in (f"models/{name}.safetensors", f"models/{name}-2.safetensors", "results.csv", "results.json"):
            with disk.atomic(folder / path) as temporary:
                temporary.write_text(json.dumps({"text": text}))


def forked(job: dict) -> list:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        disk, error = Disk(job["how"], job["at"]), None
        disk.install()
        try:
            globals()[job["call"]](*job["arguments"])
        except BaseException as raised:
            error = f"{type(raised).__name__}: {raised}"
        os.write(write, json.dumps([disk.trace, error]).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        told = json.loads(pipe.read() or b"[null, null]")
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), *told]


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    for number, line in enumerate(sys.stdin):
        job = json.loads(line)
        if not number:
            globals()[job["call"]](*job["arguments"])
        print(json.dumps(forked(job) if number else [0, [], None]), file=answers, flush=True)


if __name__ == "__main__":
    main()
