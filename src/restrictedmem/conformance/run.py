"""A run of the suite: each column in a process of its own, some at the same time."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import IO, Final, final

from restrictedmem.conformance.case import Case
from restrictedmem.conformance.columns import Column
from restrictedmem.conformance.result import Result, Verdict
from restrictedmem.patience import Patience
from restrictedmem.service.exec_service import PACKAGE_ROOT

#: Seconds that one case may take, with the opening of its column where it is the first.
DEADLINE: Final = 60.0
#: Bytes of a worker's last words that a result has.
_WORDS: Final = 400

_PYTHON: Final = (
    sys.executable,
    "-I",
    "-c",
    "import sys; sys.path.insert(0, sys.argv.pop(1)); import restrictedmem.{module} as module;"
    " module.{function}()",
)


def run(columns: Sequence[Column], cases: Sequence[Case], jobs: int) -> Iterator[Result]:
    """Run cases on columns, ``jobs`` columns at the same time; yield results as they come.

    Each column runs the cases of its families, in a process of its own. A case whose process dies,
    or says nothing for too long, has failed; a new process runs the cases after it. When the
    iterator is closed, the processes are killed.
    """
    found: SimpleQueue[Result | BaseException | None] = SimpleQueue()
    stop = threading.Event()

    def run_column(column: Column) -> None:
        mine = [case for case in cases if case.family in column.families]
        try:
            while mine and not stop.is_set():
                done = _run_worker(column, mine, found.put, stop)
                mine = mine[done:]
        except BaseException as error:  # noqa: BLE001  the caller's thread raises it
            found.put(error)
        finally:
            found.put(None)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for column in columns:
                pool.submit(run_column, column)
            left = len(columns)
            while left:
                each = found.get()
                if each is None:
                    left -= 1
                elif isinstance(each, BaseException):
                    raise each
                else:
                    yield each
        finally:
            stop.set()


def _run_worker(
    column: Column, cases: Sequence[Case], put: Callable[[Result], None], stop: threading.Event
) -> int:
    """Run cases in a new process until it ends; return the number of cases that have a result."""
    with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as words:
        asked.write("".join(f"{case.id}\n" for case in cases).encode())
        asked.seek(0)
        worker = subprocess.Popen(
            _command(column),
            stdin=asked,
            stdout=subprocess.PIPE,
            stderr=words,
            start_new_session=True,
        )
        done = 0
        try:
            assert worker.stdout is not None
            lines = _Lines(worker.stdout)
            for case in cases:
                line = lines.next(stop)
                if stop.is_set():
                    return done
                if line is None:
                    put(Result(case.id, column.name, Verdict.FAIL, why=_end(worker, words)))
                    return done + 1
                put(Result.load(json.loads(line)))
                done += 1
            return done
        finally:
            _kill(worker)


def _command(column: Column) -> list[str]:
    """Return the command of a column's process."""
    worker = [
        *(part.format(module="conformance.worker", function="main") for part in _PYTHON),
        PACKAGE_ROOT,
        column.name,
    ]
    if not column.under:
        return worker
    outer = [part.format(module="cli.main", function="run") for part in _PYTHON]
    return [*outer, PACKAGE_ROOT, *column.under, *worker]


def _end(worker: subprocess.Popen[bytes], words: IO[bytes]) -> str:
    """Say how a process ended that owed a result."""
    status = worker.poll()
    if status is None:
        return f"no answer within {DEADLINE:g} s"
    words.seek(max(0, words.seek(0, os.SEEK_END) - _WORDS))
    last = words.read().decode(errors="replace").strip().rpartition("\n")[2]
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return f"the process of the case ended: {how}" + (f"; {last}" if last else "")


def _kill(worker: subprocess.Popen[bytes]) -> None:
    """Kill a process and what it has started, and reap it."""
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    if worker.stdout is not None:
        worker.stdout.close()


@final
class _Lines:
    """Lines of a pipe, each of which has to come within the deadline."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._fd = pipe.fileno()
        self._got = b""

    def next(self, stop: threading.Event) -> bytes | None:
        """Return the next line; None at the end of the pipe or of the deadline, or to stop."""
        patience = Patience(DEADLINE)
        while b"\n" not in self._got:
            if not self._ready(patience, stop):
                return None
            piece = os.read(self._fd, 1 << 16)
            if not piece:
                return None
            self._got += piece
        line, _, self._got = self._got.partition(b"\n")
        return line

    def _ready(self, patience: Patience, stop: threading.Event) -> bool:
        return not stop.is_set() and patience.wait(self._fd, select.POLLIN)
