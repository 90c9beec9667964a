"""What the routes by processes and namespaces ask of the kernel."""

import fcntl
import os
import resource
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from errno import EACCES, EBADF, EINVAL, EIO, ENOENT, ENOMEM, EPERM
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from outcomes import Errno, outcome
from planting import always, stub
from restrictedmem.abi import memory, process
from restrictedmem.audit import on_namespaces, on_processes, syscalls
from restrictedmem.audit.attacker import fork_twin
from restrictedmem.child import end_child
from restrictedmem.fd import OwnedFd
from restrictedmem.probe import in_child

_NS_GET_NSTYPE: Final = 0xB703


def held() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


@contextmanager
def a_twin(keep: Callable[[], object] = lambda: None) -> Generator[int]:
    twin = fork_twin(keep)
    try:
        yield twin
    finally:
        end_child(twin)


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    """A file at which an open that waits would wait for ever."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


# Processes.


def test_a_call_without_content_is_made() -> None:
    asked = list[int]()
    assert list(on_processes._nothing(asked.append)(7)) == [b""]
    assert asked == [7]


def test_a_process_runs_on_after_it_was_attached() -> None:
    with a_twin() as twin:
        try:
            on_processes._attach(twin)
        except PermissionError as error:
            pytest.skip(f"ptrace: {error.strerror}")
        assert process.status(twin, b"TracerPid:") == [b"0"]
        assert process.status(twin, b"State:")[0] in (b"R", b"S")


def test_every_descriptor_below_64_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[tuple[int, int]]()

    def pidfd_getfd(pid: int, number: int) -> OwnedFd:
        asked.append((pid, number))
        if number == 7:
            return OwnedFd(os.dup(file.fileno()))
        if number == 8:
            return OwnedFd(os.open("/", os.O_RDONLY))
        raise OSError(EBADF, "not open")

    monkeypatch.setattr(syscalls, "pidfd_getfd", pidfd_getfd)
    with memory.memfd_create("given") as file:
        os.write(file.fileno(), b"given")
        before = held()
        assert list(on_processes._getfd(5)) == [b"given"]
        assert held() == before
    assert asked == [(5, number) for number in range(64)]


def test_a_file_of_proc_is_read_and_a_directory_listed() -> None:
    own, before = os.getpid(), held()
    assert list(on_processes._proc_file("comm")(own)) == [Path("/proc/self/comm").read_bytes()]
    (names,) = on_processes._proc_file("ns")(own)
    assert sorted(bytes(names).split(b"\0")) == sorted(
        map(os.fsencode, os.listdir("/proc/self/ns"))
    )
    assert held() == before


def test_no_file_of_proc_is_waited_for(fifo: Path) -> None:
    with OwnedFd(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)) as reader, a_twin() as twin:
        look = on_processes._proc_file(f"fd/{reader.fileno()}")
        assert in_child(lambda: list(look(twin))) == [b""]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "listdir", always([str(reader.fileno())]))
            assert in_child(lambda: list(on_processes._opened("fd")(twin))) == []


def test_each_open_file_is_read_once() -> None:
    with (
        memory.memfd_create("one") as one,
        memory.memfd_create("other") as other,
        OwnedFd(os.dup(one.fileno())),
        OwnedFd(os.open("/", os.O_RDONLY)),
    ):
        for file in (one, other):
            os.write(file.fileno(), b"content of %d" % file.fileno())
        chunks = list(on_processes._opened("fd")(os.getpid()))
        assert [chunks.count(b"content of %d" % file.fileno()) for file in (one, other)] == [1, 1]


def test_links_of_proc_are_looked_at_and_behind() -> None:
    names = [name for name, _ in on_processes._proc()]
    assert names[:2] == ["mem", "task/PID/mem"]
    assert names[-4:] == ["fd/", "fd/*", "map_files/", "map_files/*"]
    others = {*os.listdir("/proc/self")} - {"mem", "task", "net", "attr", "fd", "map_files"}
    assert names[2:-4] == sorted(others)


@pytest.mark.parametrize("name", on_processes._NAMESPACES)
def test_namespaces_have_the_kernels_numbers(name: str) -> None:
    with OwnedFd(os.open(f"/proc/self/ns/{name}", os.O_RDONLY)) as namespace:
        assert fcntl.ioctl(namespace, _NS_GET_NSTYPE) == on_processes._NAMESPACES[name]


def test_powers_over_a_process_of_ones_own() -> None:
    """Each call is one that the kernel allows somebody, or refuses for want of a privilege."""
    known = {
        *{"PTRACE_ATTACH", "PTRACE_SEIZE", "pidfd_getfd 0 to 63", "open /proc/PID/mem to write"},
        *{"kcmp", "move_pages", "get_robust_list", "process_madvise", "perf_event_open"},
        *{"prlimit, RLIMIT_CORE", *(f"setns {name}" for name in on_processes._NAMESPACES)},
    }
    looks = dict(on_processes.powers())
    assert looks.keys() == known
    # Of a process in the same user namespace, at an address where it has nothing; and a user
    # without capabilities enters no namespace.
    refusals: dict[str, set[object]] = {
        **{name: {Errno(EPERM), Errno(EACCES)} for name in known},
        "setns user": {Errno(EINVAL)},
        "process_madvise": {Errno(ENOMEM), Errno(EPERM)},
        # Not every machine has it.
        "perf_event_open": {Errno(EPERM), Errno(EACCES), Errno(ENOENT)},
    }
    for name, look in looks.items():
        with a_twin() as twin, memory.memfd_create("kept"):
            before = held()
            came = outcome(partial(in_child, partial(chunks_of, look, twin)))
            assert isinstance(came, list) or came in refusals[name], (name, came)
            assert held() == before


def chunks_of(look: on_processes.Look, pid: int) -> list[bytes]:
    return [bytes(chunk) for chunk in look(pid)]


@pytest.mark.requires("root")
def test_a_core_file_may_have_a_gib() -> None:
    look = dict(on_processes.powers())["prlimit, RLIMIT_CORE"]
    with a_twin() as twin:
        assert list(look(twin)) == [b""]
        assert resource.prlimit(twin, resource.RLIMIT_CORE) == (1 << 30, 1 << 30)


def test_power_is_what_is_more_than_a_look() -> None:
    routes = list(on_processes.routes())
    assert {route.target for route in routes} == {
        f"{name}{where}" for name in ("engine", "service", "spawner") for where in ("", " /proc")
    }
    for route in routes:
        look = route.target.endswith("/proc") or route.name == "process_vm_readv"
        assert route.power is not look, route
        assert route.root
        assert not route.control


# Namespaces.


@pytest.mark.parametrize(
    ("cpus", "newest", "numbers"),
    [
        ({3}, 5000, range(5000, 4000, -1)),
        ({3, 5}, 5000, range(5000, 4500, -1)),
        (set(range(20)), 5000, range(5000, 4900, -1)),
        ({3}, 3, range(3, 0, -1)),
    ],
)
def test_the_newest_numbers_of_each_cpu_are_tried(
    cpus: set[int], newest: int, numbers: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[tuple[int, int, int]]()
    made = list[tuple[object, ...]]()

    def open_namespace(number: int, kind: int, inode: int) -> None:
        asked.append((number, kind, inode))

    def made_in_child(make: Any) -> tuple[int, int]:
        made.append(make.args)
        return newest, 0xF000_0000 - 19

    monkeypatch.setattr(os, "sched_getaffinity", {0: cpus}.get)
    monkeypatch.setattr(on_namespaces, "in_child", made_in_child)
    monkeypatch.setattr(syscalls, "open_namespace", open_namespace)
    assert list(on_namespaces.find(7, "mnt")) == []
    # Inode numbers from ten below the first to ten above the newest.
    assert asked == [(number, 7, 0xF000_0000 - 10) for number in numbers] * len(cpus)
    assert made == [("mnt", cpu) for cpu in cpus]


def test_a_namespace_is_found_once_and_ones_own_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    first = 0xF000_0000 - 10
    asked = list[tuple[int, int]]()

    def open_namespace(number: int, _: int, inode: int) -> OwnedFd | None:
        asked.append((number, inode))
        path = {(2, first): "/proc/self/ns/mnt", (1, first + 1): os.devnull}.get((number, inode))
        return None if path is None else OwnedFd(os.open(path, os.O_RDONLY))

    monkeypatch.setattr(os, "sched_getaffinity", always({0}))
    monkeypatch.setattr(on_namespaces, "in_child", always((2, first - 7)))
    monkeypatch.setattr(syscalls, "open_namespace", open_namespace)
    before = held()
    (found,) = on_namespaces.find(process.CLONE_NEWNS, "mnt")
    with found:
        assert os.readlink(f"/proc/self/fd/{found.fileno()}") == os.devnull
    assert held() == before
    # Both numbers end at the inode that opens; three are tried.
    assert asked == [(2, first), (1, first), (1, first + 1)]


def test_a_namespace_is_made_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[object]()

    def sched_setaffinity(pid: int, cpus: set[int]) -> None:
        asked.append((pid, cpus))

    monkeypatch.setattr(os, "sched_setaffinity", sched_setaffinity)
    monkeypatch.setattr(on_namespaces, "unshare", asked.append)
    monkeypatch.setattr(syscalls, "namespace_handle", asked.append)
    on_namespaces._made("mnt", 5)
    # CLONE_NEWUSER and CLONE_NEWNS of <linux/sched.h>.
    assert asked == [(0, {5}), 0x1000_0000 | 0x2_0000, "/proc/self/ns/mnt"]


@pytest.mark.parametrize(
    ("answers", "came", "asked"),
    [
        ([], Errno(EPERM), 0),
        ([EACCES, EIO], Errno(EIO), 2),
        ([EACCES, None, EIO], [b""], 2),
    ],
)
def test_one_mount_namespace_that_can_be_entered_is_enough(
    answers: list[int | None], came: object, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered = list[tuple[object, ...]]()

    def find(kind: int, name: str) -> Iterator[OwnedFd]:
        assert (kind, name) == (process.CLONE_NEWNS, "mnt")
        for _ in answers:
            yield OwnedFd(os.open(os.devnull, os.O_RDONLY))

    def in_child(enter: Any) -> None:
        entered.append(enter.args)
        number = answers[len(entered) - 1]
        if number is not None:
            raise OSError(number, "refused")

    monkeypatch.setattr(on_namespaces, "find", find)
    monkeypatch.setattr(on_namespaces, "in_child", in_child)
    before = held()
    assert outcome(lambda: list(on_namespaces._mounts(stub()))) == came
    assert [kind for _, kind in entered] == [process.CLONE_NEWNS] * asked
    assert held() == before


#: What each user namespace allows, or its refusal.
ANSWERS: Final[list[tuple[list[list[str] | int], object]]] = [
    ([EPERM, EPERM], Errno(EPERM)),
    ([[], []], Errno(EPERM)),
    ([["a"], EPERM, ["b", "c"]], [b"a, b, c"]),
]


@pytest.mark.parametrize(("answers", "came"), ANSWERS)
def test_every_user_namespace_is_tried(
    answers: list[list[str] | int], came: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter(answers)

    def find(kind: int, name: str) -> Iterator[OwnedFd]:
        user = (kind, name) == (process.CLONE_NEWUSER, "user")
        assert user or (kind, name) == (process.CLONE_NEWNS, "mnt")
        for _ in answers if user else range(2):
            yield OwnedFd(os.open(os.devnull, os.O_RDONLY))

    def in_child(_: object) -> list[str]:
        answer = next(left)
        if isinstance(answer, int):
            raise OSError(answer, "refused")
        return answer

    monkeypatch.setattr(on_namespaces, "find", find)
    monkeypatch.setattr(on_namespaces, "in_child", in_child)
    before = held()
    assert outcome(lambda: list(on_namespaces._users(stub()))) == came
    assert held() == before


def test_inside_a_namespace_each_power_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = list[tuple[int, int]]()

    def setns(fd: int, kind: int) -> None:
        entered.append((fd, kind))
        if fd == 2:
            raise OSError(EPERM, "refused")

    def look(pid: int) -> Iterator[bytes]:
        if pid == 20:
            raise OSError(EPERM, "refused")
        yield b""

    monkeypatch.setattr(on_namespaces, "setns", setns)
    monkeypatch.setattr(on_namespaces, "powers", lambda: iter([("look", look)]))
    fds: Any = [stub(fileno=always(number)) for number in (1, 2, 3)]
    owner: Any = stub(processes={"engine": 10, "service": 20, "spawner": 30})
    assert on_namespaces._inside(fds[0], fds[1:], owner) == [
        "a mount namespace",
        "look of the engine",
        "look of the spawner",
    ]
    assert entered == [
        (1, process.CLONE_NEWUSER),
        (2, process.CLONE_NEWNS),
        (3, process.CLONE_NEWNS),
    ]
