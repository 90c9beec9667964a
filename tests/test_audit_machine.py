"""The leftovers of attempts at the machine.

The attempt in a namespace has to wait for its engine.
"""

import os
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from planting import always, stub
from restrictedmem.audit import on_host
from restrictedmem.service.client import Service


@contextmanager
def one(what: object) -> Generator[object]:
    yield what


def owner_with(pid: Callable[[], int]) -> Any:
    guest = stub(vmm=stub(vm=stub(statistics=lambda: {"pid": pid()})))
    return stub(another=always(one(guest)))


def pipes_written_to(pid: int) -> set[str]:
    """The pipes that a process could keep others waiting at."""
    found = set[str]()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        # The one that lists them is closed by now.
        with suppress(FileNotFoundError):
            flags = Path(f"/proc/{pid}/fdinfo/{fd}").read_text(encoding="ascii").split()[3]
            if int(flags, 8) & os.O_ACCMODE == os.O_WRONLY:
                found.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return {name for name in found if name.startswith("pipe:")}


def test_a_service_in_a_namespace_lasts_while_it_is_looked_at_and_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def look(pid: int) -> Iterator[bytes]:
        # It would wait for its own end of the pipe, and for ever.
        own = (pipes_written_to(os.getpid()) - at_first) & pipes_written_to(pid)
        if own:
            os.kill(pid, signal.SIGKILL)
        yield b"%d" % len(own)

    monkeypatch.setattr(on_host, "enter_user_namespace", always(None))
    monkeypatch.setattr(Service, "start", lambda: one(stub()))
    monkeypatch.setattr(on_host, "of_process", look)
    before, at_first = os.listdir("/proc/self/fd"), pipes_written_to(os.getpid())
    assert list(on_host._namespace_above(owner_with(os.getpid))) == [b"0"]
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    assert os.listdir("/proc/self/fd") == before


def test_a_service_that_does_not_start_in_a_namespace_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: int) -> None:
        raise OSError(28, "no namespace")

    monkeypatch.setattr(on_host, "enter_user_namespace", refuse)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="a service cannot start") as caught:
        list(on_host._namespace_above(owner_with(os.getpid)))
    assert caught.value.errno == 28
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    assert os.listdir("/proc/self/fd") == before
