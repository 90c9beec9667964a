"""Command lines as processes, a directory of bad inputs for them, and what has to come of each."""

import os
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from restrictedmem import guests
from restrictedmem.service.report import Report

#: Numbers that are for no slice and no offset.
HUGE = (1 << 63, (1 << 64) - 1)
#: Where they are put in a guest: of its header, and of its first program header.
FIELDS = {
    "phoff": (32, "<Q"),
    "offset": (64 + 8, "<Q"),
    "paddr": (64 + 24, "<Q"),
    "filesz": (64 + 32, "<Q"),
    "memsz": (64 + 40, "<Q"),
}
READY = struct.pack("=II", 1 << 16, 0)
ANSWERS = {
    "silent": b"",
    "nested": READY + b"[" * 100_000,
    "number": READY + b"1",
    "object": READY
    + b'{"way": "x", "api": "v10", "design": "v10", "socket": "@x", "key": "no hex"}',
    "errno": struct.pack("=II", (1 << 32) - 1, 0),
}
REPORT = Report(0, bytes(48), bytes(64), bytes(16), "software", "v10", "1", bytes(32))
COMMAND = [sys.executable, "-m", "restrictedmem"]
#: Commands that run at the same time, for the cases.
_AT_ONCE = 3


@dataclass(frozen=True)
class Case:
    """A command line, in which IN is a directory of inputs, and what has to come of it."""

    words: str
    status: int
    #: A pattern of the line after ``error: ``; empty when nothing is printed.
    line: str
    #: A part of the hint in a second line, if there has to be one.
    hint: str | None = None
    environment: dict[str, str] = field(default_factory=dict[str, str])
    #: How a shell starts it.
    start: str = 'exec "$@"'
    #: The beginning of stdout.
    out: str = ""

    def __str__(self) -> str:
        return " ".join([*self.start.replace('exec "$@"', "").split(), self.words])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory of files and sockets that nothing can be made of."""
    place = tmp_path_factory.mktemp("inputs")
    (place / "empty").touch()
    (place / "text").write_text("text")
    (place / "odd").write_text("abc")
    (place / "report").write_bytes(REPORT.pack() + bytes(64))
    (place / "nested").write_text("[" * 60_000)
    guest = guests.path("spin").read_bytes()
    for name, (at, layout) in FIELDS.items():
        for value in HUGE:
            changed = bytearray(guest)
            struct.pack_into(layout, changed, at, value)
            (place / f"{name}-{value:#x}").write_bytes(changed)
    with ExitStack() as stack:
        for name, answer in ANSWERS.items():
            stack.enter_context(answering(place / f"{name}.socket", answer))
        yield place


@contextmanager
def answering(path: Path, answer: bytes) -> Generator[None]:
    """Listen on a socket, and give whoever connects an answer with a descriptor."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with suppress(OSError):
                while True:
                    with listener.accept()[0] as client:
                        if answer:
                            socket.send_fds(client, [answer], [0, 0])

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.fixture(scope="module")
def found(
    request: pytest.FixtureRequest, inputs: Path
) -> Iterator[Callable[[Case], subprocess.CompletedProcess[str]]]:
    """Return what came of a case; those of the file that were chosen run side by side."""
    specs: list[Any] = [
        getattr(item, "callspec", None)
        for item in request.session.items
        if item.path == request.path
    ]
    chosen = [
        spec.params["case"]
        for spec in specs
        if spec is not None and isinstance(spec.params.get("case"), Case)
    ]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        futures: dict[int, Future[subprocess.CompletedProcess[str]]] = {
            id(case): pool.submit(run, case, inputs) for case in chosen
        }
        yield lambda case: futures[id(case)].result()


def run(case: Case, inputs: Path) -> subprocess.CompletedProcess[str]:
    words = [
        word.replace("IN/", f"{inputs}/").replace("${IFS}", " ") for word in case.words.split()
    ]
    start = case.start.replace("IN/", f"{inputs}/")
    outer = {name: value for name, value in os.environ.items() if name != "RESTRICTEDMEM_SERVER"}
    inner = {name: value.replace("IN/", f"{inputs}/") for name, value in case.environment.items()}
    return subprocess.run(
        ["sh", "-c", start, "sh", *COMMAND, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        env={**outer, **inner},
    )


def check(case: Case, done: subprocess.CompletedProcess[str], inputs: Path) -> None:
    line, *more = done.stderr.replace(str(inputs), "IN").splitlines() or [""]
    assert re.fullmatch(f"error: {case.line}" if case.line else "", line), done.stderr
    assert done.returncode == case.status
    assert done.stdout.startswith(case.out)
    assert case.out or not done.stdout
    # A second line is a hint, and there is no third.
    assert [each.startswith("hint: ") for each in more] in ([], [True]), done.stderr
    if case.hint is not None:
        assert more
        assert case.hint in more[0]
