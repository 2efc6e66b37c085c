"""Processes that take work from one list, each piece once. One that dies or hangs costs the piece it held; another is started for the rest.

A CUDA fault ends every later call of its process, so nothing that may fault runs in the process that writes the results.
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

TICK_S = 5


class Queue:
    """A list of names in a folder, handed out in order to any number of processes, and a journal of what became of each."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    @classmethod
    def start(cls, folder: Path, names: Sequence[str]) -> "Queue":
        folder.mkdir(parents=True, exist_ok=True)
        for log in folder.glob("worker*.log"):
            log.unlink()
        (folder / "names.json").write_text(json.dumps(list(names)))
        (folder / "next").write_text("0")
        (folder / "journal.jsonl").write_text("")
        return cls(folder)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.folder / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def take(self) -> str | None:
        """The next name, which this process then holds; None when none is left."""
        names = json.loads((self.folder / "names.json").read_text())
        with self._locked():
            index = int((self.folder / "next").read_text())
            if index >= len(names):
                return None
            (self.folder / "next").write_text(str(index + 1))
            self._append({"held": names[index], "pid": os.getpid(), "at": time.time()})
        return names[index]

    def left(self) -> list[str]:
        """What nobody took."""
        with self._locked():
            return json.loads((self.folder / "names.json").read_text())[int((self.folder / "next").read_text()) :]

    def record(self, name: str, pid: int | None = None, **outcome) -> None:
        with self._locked():
            self._append({"done": name, "pid": pid or os.getpid(), **outcome})

    def _append(self, entry: dict) -> None:
        with open(self.folder / "journal.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")

    def journal(self) -> list[dict]:
        with self._locked():
            return [json.loads(line) for line in (self.folder / "journal.jsonl").read_text().splitlines()]

    def outcomes(self) -> dict[str, dict]:
        """What was recorded of each name, the last word."""
        return {e["done"]: e for e in self.journal() if "done" in e}

    def held(self, pid: int) -> dict | None:
        """What a process took and has not finished."""
        entries = [e for e in self.journal() if e["pid"] == pid]
        done = {e["done"] for e in entries if "done" in e}
        return next((e for e in reversed(entries) if "held" in e and e["held"] not in done), None)


def work(
    queue: Queue, command: Sequence[str], workers: int, seconds: float, hang_s: float, environment: dict[str, str] | None = None, cwd=None,
    tick: Callable[[], None] | None = None,
) -> list[str]:  # fmt: skip
    """Run `workers` processes of `command` until the queue is empty or the time is up; returns what is to be said of those that failed to start.

    `tick` is called every few seconds, to write what there is so far.

    What a process held when it died, hung for `hang_s` or ran out of time is recorded with an "outcome" of "died", "hung" or "out of time".
    """
    deadline, logs, running, idle_deaths, said = time.monotonic() + seconds, queue.folder, {}, 0, []
    ticked = time.monotonic()

    def launch(number):
        log = open(logs / f"worker{number}.log", "a")  # noqa: SIM115 - the process holds it
        given = os.environ | (environment or {}) | {"PIX2REP_QUEUE": str(queue.folder)}
        running[number] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=given, cwd=cwd, start_new_session=True)
        log.close()

    for number in range(workers):
        launch(number)
    while running:
        time.sleep(0.2)
        late = time.monotonic() > deadline
        if tick and time.monotonic() - ticked > TICK_S:
            tick()
            ticked = time.monotonic()
        for number, process in list(running.items()):
            held, ended = queue.held(process.pid), process.poll()
            hung = held is not None and time.time() - held["at"] > hang_s
            if ended is None and (late or hung):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                held = queue.held(process.pid)  # it may have finished meanwhile
            elif ended is None:
                continue
            del running[number]
            if held:
                why = "out of time" if late and not hung else "hung" if ended is None else "died"
                queue.record(held["held"], process.pid, outcome=why, why=_last_words(logs / f"worker{number}.log", process.returncode))
            elif ended:
                idle_deaths += 1
                said.append(_last_words(logs / f"worker{number}.log", process.returncode))
            if (held or ended) and not late and queue.left() and idle_deaths < 3:
                launch(number)
    return said


def _last_words(log: Path, code: int) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"exit code {code}: {lines[-1][:200] if lines else ''}"
