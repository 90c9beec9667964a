"""What the routes by the machine and by sockets ask for."""

import os
import stat
from collections.abc import Callable, Generator
from contextlib import contextmanager
from errno import ECHILD, ECONNREFUSED, EIO, ENOSPC, EPERM
from pathlib import Path
from typing import Any, Final, NoReturn

import pytest

from outcomes import Errno, outcome
from planting import always, stub
from restrictedmem.abi import memory, process
from restrictedmem.audit import on_host, on_namespaces, on_sockets, syscalls
from restrictedmem.fd import OwnedFd
from restrictedmem.probe import in_child
from restrictedmem.service import wire

MIB: Final = 1 << 20


def held() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


# The machine.


def test_flags_of_routes_that_only_root_has() -> None:
    came = {route.name: (route.power, route.root, route.open_by) for route in on_host.routes()}
    physical = ["/dev/mem", "/dev/kmem", "/dev/port", "/proc/kcore", "/proc/vmcore"]
    above = "a service in a user namespace of the owner's"
    assert came == {
        **dict.fromkeys([*physical, "/proc/kpageflags", "mknod mem"], (False, True, "")),
        **dict.fromkeys(["bpf, a kprobe's program", "tracefs"], (True, True, "")),
        "perf_event_open, a whole CPU": (True, True, ""),
        above: (False, False, "Owners of a user namespace"),
    }
    assert [(route.power, route.root) for route in on_namespaces.routes()] == [(True, True)] * 2
    assert {(route.power, route.root) for route in on_sockets.routes()} == {(True, False)}


def test_a_file_of_the_machine_is_read_from_its_beginning(tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(bytes(MIB + 1))
    # An open that waits would wait for ever.
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    before = held()
    assert [len(chunk) for chunk in on_host._file(str(large), stub())] == [MIB]
    assert in_child(lambda: list(on_host._file(str(fifo), stub()))) == [b""]
    assert held() == before


def test_a_device_of_memory_is_made_and_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[tuple[int, int]]()

    def mknod(path: str, mode: int, device: int) -> None:
        asked.append((mode, device))
        Path(path).write_bytes(b"physical memory")

    monkeypatch.setattr(os, "mknod", mknod)
    assert list(on_host._made_device(stub())) == [b"physical memory"]
    # Documentation/admin-guide/devices.txt: 1 is memory devices, 1 of them /dev/mem.
    assert asked == [(stat.S_IFCHR | 0o600, os.makedev(1, 1))]


def test_powers_over_the_machine_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[object]()
    made = stub(close=lambda: asked.append("closed"))

    def perf_event_open(pid: int, cpu: int) -> object:
        asked.append((pid, cpu))
        return made

    monkeypatch.setattr(syscalls, "bpf_prog_load", lambda: made)
    monkeypatch.setattr(syscalls, "perf_event_open", perf_event_open)
    assert list(on_host._bpf(stub())) == [b""]
    assert list(on_host._perf(stub())) == [b""]
    assert asked == ["closed", (-1, 0), "closed"]


@pytest.mark.parametrize(
    ("error", "number"), [(OSError(ENOSPC, "no"), ENOSPC), (OSError("no"), EPERM), (None, ECHILD)]
)
def test_a_service_that_cannot_start_says_why(
    error: OSError | None, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def enter(_: int) -> None:
        if error is None:
            os._exit(1)
        raise error

    monkeypatch.setattr(on_host, "enter_user_namespace", enter)
    with pytest.raises(OSError, match="cannot start in a user namespace") as caught:
        list(on_host._namespace_above(stub()))
    assert caught.value.errno == number


def test_a_service_is_started_in_a_mount_namespace_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[int]()

    def enter(flags: int) -> NoReturn:
        asked.append(flags)
        raise OSError(ENOSPC, "no")

    monkeypatch.setattr(on_host, "enter_user_namespace", enter)
    reader, writer = map(OwnedFd, os.pipe())
    with reader, writer:
        on_host._inside(stub(), writer.fileno(), -1)
        assert os.read(reader.fileno(), 100) == b"-%d\n" % ENOSPC
    assert asked == [process.CLONE_NEWNS]


# Sockets.


def test_requests_of_consumers_have_valid_bodies() -> None:
    bodies = {call.name: body for call, body in on_sockets._CONSUMERS}
    assert wire.LAUNCH.unpack(bodies["LAUNCHED"]) == (2, b"kernel".ljust(16, b"\0"), bytes(48))
    assert len(bodies["SIGN"]) == 64
    assert bodies["REPORT"] == b"{}"
    assert wire.NUMBER.unpack(bodies["UNBIND"]) == (1,)
    assert bodies["FORK"] == wire.NUMBER.pack(1) + b"kvm {}"


def service_with(key: bytes) -> Any:
    return stub(info={"socket": "@name", "key": key.hex()}, token_for=always(b"t" * 16))


@contextmanager
def channels(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[[wire.Call, bytes], bytes]
) -> Generator[list[tuple[object, ...]]]:
    """Note the names and the requests."""
    notes = list[tuple[object, ...]]()

    def connect(name: str) -> object:
        def call(
            what: wire.Call, body: bytes = b"", fds: object = ()
        ) -> tuple[bytes, list[OwnedFd]]:
            notes.append((what.name, body))
            return answer(what, body), []

        notes.append(("connect", name))
        return stub(call=call, close=lambda: notes.append(("close",)))

    monkeypatch.setattr(on_sockets, "_connect", connect)
    yield notes


def test_keys_that_are_almost_right_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    key = bytes(range(1, 17))
    numbers = iter(range(1, 1000))

    def refuse(*_: object) -> bytes:
        raise OSError(next(numbers), "refused")

    owner: Any = stub(service=service_with(key))
    with channels(monkeypatch, refuse) as notes:
        came = outcome(lambda: list(on_sockets._guess(owner)))
    guesses = [note[1] for note in notes if note[0] == "CONNECT"]
    assert came == Errno(len(guesses))
    assert notes.count(("close",)) == len(guesses)
    assert guesses[:4] == [b"", key[:-1], key + b"\0", bytes(16)]
    changed = [
        [at for at in range(16) if guess[at] != key[at]]
        for guess in guesses[-16:]
        if isinstance(guess, bytes)
    ]
    assert changed == [[at] for at in range(16)]
    assert all(isinstance(guess, bytes) and len(guess) == 16 for guess in guesses[4:])
    assert len({*guesses}) == 4 + 100 + 16


def test_a_key_that_opens_ends_the_guessing(monkeypatch: pytest.MonkeyPatch) -> None:
    with channels(monkeypatch, always(b"")) as notes:
        owner: Any = stub(service=service_with(bytes(16)))
        assert list(on_sockets._guess(owner)) == [b"a key that is none"]
    assert [note[0] for note in notes] == ["connect", "CONNECT", "close"]


NAMES: Final = """Num RefCount Protocol Flags Type St Inode Path
0: 2 0 10000 5 01 100 @restrictedmem/17/abc
1: 2 0 10000 5 01 101 @restrictedmem/18/abc
2: 2 0 10000 5 01 102 /run/17/socket
3: 2 0 10000 5 01 103
4: 2 0 10000 5 01 104 @another/170/17
5: 2 0 10000 5 01 105 @19
"""


@pytest.mark.parametrize(
    ("pids", "opens", "came", "tried"),
    [
        ([1], None, Errno(ECONNREFUSED), []),
        ([17], None, Errno(EIO), ["@restrictedmem/17/abc", "@another/170/17"]),
        ([18], None, Errno(EIO), ["@restrictedmem/18/abc"]),
        ([19], None, Errno(EIO), ["@19"]),
        (
            [17, 18],
            None,
            Errno(EIO),
            ["@restrictedmem/17/abc", "@restrictedmem/18/abc", "@another/170/17"],
        ),
        ([17], "@restrictedmem/17/abc", [b"token"], ["@restrictedmem/17/abc"]),
    ],
)
def test_names_with_the_pid_of_a_trusted_process_are_tried(
    pids: list[int],
    opens: str | None,
    came: object,
    tried: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "unix").write_text(NAMES)
    monkeypatch.setattr(on_sockets, "_NAMES", str(tmp_path / "unix"))
    owner: Any = stub(processes=dict(enumerate(pids)))

    def answer(*_: object) -> bytes:
        if opens is None:
            raise OSError(EIO, "refused")
        return b"token"

    with channels(monkeypatch, answer) as notes:
        assert outcome(lambda: list(on_sockets._by_name(owner))) == came
    assert notes == [
        note for name in tried for note in (("connect", name), ("TOKEN", b""), ("close",))
    ]


def test_a_bind_presents_the_descriptors_token(monkeypatch: pytest.MonkeyPatch) -> None:
    owner: Any = stub(service=service_with(b"k" * 16), fd=7)
    with channels(monkeypatch, lambda what, _: what.name.encode()) as notes:
        assert list(on_sockets._bind(owner)) == [b"BIND"]
    whole = b"t" * 16 + bytes(24)
    assert notes == [
        ("connect", "@name"),
        ("CONNECT", b"k" * 16),
        ("BIND", whole),
        ("close",),
    ]


def test_descriptors_that_come_with_a_reply_are_read_and_closed() -> None:
    before = held()
    files = [memory.memfd_create("came") for _ in range(2)]
    for number, file in enumerate(files):
        os.write(file.fileno(), b"%d" % number)
    channel: Any = stub(call=always((b"reply", files)))
    assert list(on_sockets._call(channel, wire.TOKEN, b"")) == [b"reply", b"0", b"1"]
    assert held() == before
