"""The cgroup that memory is charged to, and a cgroup for each client's uid of ``serve``.

The modules are ``service.cgroup`` and ``service.client_cgroups``.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import suppress
from errno import EBUSY, ECONNABORTED, ENODEV, ENOENT, ENOTCONN
from pathlib import Path
from typing import Any, Final, final

import pytest

from outcomes import Errno, outcome
from processes import exists, family
from restrictedmem import guests
from restrictedmem.abi import process
from restrictedmem.protocol import exits, guest_abi
from restrictedmem.service import cgroup, client_cgroups, ending, oom
from restrictedmem.service.cgroup import Cgroup
from restrictedmem.service.client import Service
from restrictedmem.service.client_cgroups import ClientCgroups
from restrictedmem.vmm import elf
from restrictedmem.vmm.vm import Vm
from restrictedmem.vmm.vmm import Vmm
from test_proc_text import instead
from test_serve import CLIENT, SERVICE_USER, Server, place, served
from users import as_user
from waiting import PATIENCE, wait_until

__all__ = ["place"]

V1 = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:5 - cgroup cgroup rw,memory"
V1_CPU = "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu"
NO_SOURCE = "33 26 0:30 / /x rw -  - tmpfs  rw"
V2 = "30 26 0:24 / /run/a\\040b rw,relatime - cgroup2 none rw,nsdelegate"
PART = "30 26 0:24 /docker/1 /sys/fs/cgroup rw,relatime - cgroup2 none rw"
OUTSIDE = "30 26 0:24 /../.. /mnt rw,relatime - cgroup2 none rw"


@pytest.mark.parametrize(
    ("own", "mounts", "found"),
    [
        (
            ["4:memory:/a/b", "1:cpu:/", "0::/c"],
            [V1_CPU, V2, V1],
            Cgroup(1, "/a/b", Path("/sys/fs/cgroup/memory/a/b")),
        ),
        (["4:cpu,memory:/", "0::/c"], [V1], Cgroup(1, "/", Path("/sys/fs/cgroup/memory"))),
        (["1:cpu:/x", "0::/c"], [NO_SOURCE, V1, V2], Cgroup(2, "/c", Path("/run/a b/c"))),
        # A container sees its part.
        (["0::/docker/1/c"], [PART], Cgroup(2, "/docker/1/c", Path("/sys/fs/cgroup/c"))),
        (["0::/docker/12"], [PART], None),
        (["0::/c"], [OUTSIDE, PART, V2], Cgroup(2, "/c", Path("/run/a b/c"))),
        # Memory is with version 1, whose mount is not here.
        (["4:memory:/", "0::/"], [V2], None),
        (["1:cpu:/"], [V1, V2], None),
        (
            ["0::/\r\udcff"],
            [V2],
            Cgroup(2, "/\r\N{REPLACEMENT CHARACTER}", Path("/run/a b/\r\udcff")),
        ),
        (None, [V2], None),
    ],
    ids=[
        "v1",
        "v1 root",
        "v2",
        "part",
        "neighbour",
        "outside",
        "unmounted",
        "none",
        "no text",
        "no proc",
    ],
)
def test_the_cgroup_that_memory_is_charged_to(
    own: list[str] | None,
    mounts: list[str],
    found: Cgroup | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module, name, lines in ((process, "cgroup", own), (cgroup, "mountinfo", mounts)):
        table = tmp_path / name
        if lines is not None:
            table.write_bytes(os.fsencode("".join(f"{line}\n" for line in lines)))
        instead(monkeypatch, module, table)
    assert Cgroup.own() == found


@pytest.mark.parametrize(
    ("version", "limit", "kills"),
    [(1, "memory.limit_in_bytes", "memory.oom_control"), (2, "memory.max", "memory.events")],
)
def test_its_limit_and_its_count_of_kills(
    version: int, limit: str, kills: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "a" / "b"
    directory.mkdir(parents=True)
    monkeypatch.setattr(Cgroup, "own", lambda: Cgroup(version, "/x/b", directory))
    assert ending._counter() == ("/x/b", str(directory / kills))
    (directory / limit).write_text("max\n", encoding="ascii")
    assert oom._memory() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    (tmp_path / "a" / limit).write_text("8192\n", encoding="ascii")
    assert oom._memory() == 8192


def test_without_a_cgroup_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cgroup, "own", lambda: None)
    assert ending.OomKills().since() == ""
    assert oom._memory() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


LIMIT: Final = 128 << 20
_PIECE: Final = 4 << 20
#: The uid of this process, whose client goes on, and of the one that fills memory.
HERE: Final = "restrictedmem-0"
THERE: Final = f"restrictedmem-{CLIENT}"
#: Where ``serve`` goes itself, with version 2.
LEAF: Final = "restrictedmem-serve"


@pytest.fixture
def ground() -> Generator[Path, None, None]:
    """Make a cgroup for ``serve``, and end what is left in it."""
    own = Cgroup.own()
    assert own is not None
    made = own.directory / f"test-{os.getpid()}"
    made.mkdir()
    yield made
    wait_until(lambda: outcome(lambda: _remove(made)) is None, f"the end of {made}")


def _remove(group: Path) -> None:
    for child in group.iterdir():
        if child.is_dir():
            _remove(child)
    for pid in members(group):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    group.rmdir()


def is_empty(group: Path) -> bool:
    """Say whether the kernel would remove a cgroup, or has removed it.

    In version 2 the kernel says so in cgroup.events. Exiting processes count there, although
    cgroup.procs does not list them.
    """
    try:
        events = group / "cgroup.events"
        return not members(group) and not (
            events.exists() and "populated 1" in events.read_text(encoding="ascii")
        )
    except OSError:
        return not group.exists()


def members(group: Path) -> set[int]:
    return {int(pid) for pid in (group / "cgroup.procs").read_text(encoding="ascii").split()}


def of_clients(ground: Path) -> set[str]:
    """Return the names of the cgroups that are there for clients."""
    return {path.name for path in ground.glob("restrictedmem-*")} - {LEAF}


def limit_of(group: Path) -> int:
    names = ("memory.max", "memory.limit_in_bytes")
    return next(
        int((group / name).read_text(encoding="ascii")) for name in names if (group / name).exists()
    )


def within(ground: Path) -> list[str]:
    """Return what starts a command in a cgroup, or where a ``serve`` before it has gone."""
    leaf = ground / LEAF
    return [
        "sh",
        "-c",
        'echo 0 >"$0/cgroup.procs" && exec "$@"',
        str(leaf if leaf.exists() else ground),
    ]


def serve(place: str, ground: Path, limit: int) -> Server:
    return Server(
        "--client-memory",
        str(limit),
        "--user",
        SERVICE_USER,
        socket_path=place,
        within=within(ground),
    )


def allocate(service: Service) -> int | None:
    """Allocate until that fails, and return the errno."""
    fd = service.memfd_restricted()
    for start in range(0, 2 * LIMIT, _PIECE):
        try:
            os.posix_fallocate(fd, start, _PIECE)
        except OSError as error:
            return error.errno
    return None


def load(service: Service) -> int | None:
    """Do the same with a guest on the kernel engine, whose pages count for no process."""
    base = guest_abi.PRIVATE_BASE
    with Vm(service, engine="kernel") as vm:
        vm.set_user_memory_region(
            slot=0,
            guest_phys_addr=base,
            memory_size=2 * LIMIT,
            restricted_fd=service.memfd_restricted(),
        )
        vm.set_memory_attributes(base, 2 * LIMIT, private=True)
        for start in range(0, 2 * LIMIT, _PIECE):
            try:
                vm.launch_update(base + start, bytes(_PIECE))
            except OSError as error:
                return error.errno
    return None


@pytest.mark.requires("root", "memory-cgroup", "fuse")
@pytest.mark.parametrize("fill", [allocate, pytest.param(load, marks=pytest.mark.requires("kvm"))])
def test_memory_that_runs_out_is_one_clients(
    fill: Callable[[Service], int | None], place: str, ground: Path
) -> None:
    server = serve(place, ground, LIMIT)

    def attack() -> tuple[int, int | None]:
        with Service.connect(place) as service:
            return limit_of(ground / THERE), fill(service)

    with served(server) as (service, _), Vmm(1 << 20, service) as vmm:
        vmm.load(elf.parse(guests.path("spin").read_bytes()), ["exit", "7"])
        before = family(service)
        assert as_user(attack, CLIENT) in ((LIMIT, ENOTCONN), (LIMIT, ECONNABORTED))
        assert all(map(exists, before))
        assert {found.pid for found in before} <= members(ground / HERE)
        assert isinstance(vmm.vcpus[0].run(), exits.Hypercall)
        assert service.status()["last_error"] == ""
        wait_until(lambda: is_empty(ground / THERE), "the end of the other client's processes")
        # Memory that the kernel still holds for a client is charged to it, also when it comes
        # again.
        with served(server):
            assert of_clients(ground) == {HERE, THERE}
    wait_until(lambda: is_empty(ground / HERE), "the end of all processes")
    assert server.stop() == 0
    assert of_clients(ground) == set()


@pytest.mark.requires("root", "memory-cgroup", "fuse")
def test_a_later_serve_finds_what_an_earlier_one_left(place: str, ground: Path) -> None:
    first = serve(place, ground, LIMIT)
    with served(first) as (service, _):
        before = family(service)
        assert first.stop() == 0
        assert limit_of(ground / HERE) == LIMIT
        (ground / "restrictedmem-12").mkdir()
        second = serve(place, ground, 2 * LIMIT)
        with served(second):
            assert limit_of(ground / HERE) == 2 * LIMIT
            assert all(map(exists, before))
            assert members(ground / HERE) > {found.pid for found in before}
            assert of_clients(ground) == {HERE}
    wait_until(lambda: is_empty(ground / HERE), "the end of all processes")
    assert second.stop() == 0
    assert of_clients(ground) == set()


@pytest.mark.requires("root", "memory-cgroup", "fuse")
def test_there_is_one_serve_in_a_cgroup(place: str, ground: Path) -> None:
    server = serve(place, ground, LIMIT)
    command = [
        *within(ground),
        sys.executable,
        "-m",
        "restrictedmem",
        "serve",
        "--socket",
        f"{place}2",
        "--client-memory",
        "128M",
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE)
    words = "flock: Resource temporarily unavailable (another serve makes cgroups there)"
    first, hint = done.stderr.splitlines()
    assert (done.returncode, first) == (1, f"error: --client-memory: {ground}: {words}")
    assert "Delegate=memory" in hint
    assert server.stop() == 0


@final
class Tree:
    """A directory that stands for a cgroup.

    A directory made in it gets the files the kernel would make.
    """

    def __init__(self, place: Path, version: int, *swap: str) -> None:
        self.place = place
        limit = "memory.max" if version == 2 else "memory.limit_in_bytes"
        self.files = dict.fromkeys(
            ("cgroup.procs", "cgroup.type", "cgroup.subtree_control", limit, *swap), ""
        )
        self.files |= {"cgroup.controllers": "cpu memory\n", "memory.stat": "anon 4096\nshmem 0\n"}
        self.written: list[tuple[str, str]] = []
        self._mkdir = os.mkdir
        self.mkdir(place)

    def mkdir(self, path: Path, *arguments: Any) -> None:
        self._mkdir(path, *arguments)
        for name, text in self.files.items():
            (Path(path) / name).write_text(text, encoding="ascii")

    def write(self, path: Path, text: str) -> None:
        assert path.exists(), path
        self.written.append((str(path.relative_to(self.place)), text))

    def groups(self) -> set[str]:
        return {path.name for path in self.place.iterdir() if path.is_dir()}


@pytest.fixture
def tree(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    version, *swap = request.param
    made = Tree(tmp_path / "own", version, *swap)
    monkeypatch.setattr(Cgroup, "own", lambda: Cgroup(version, "/own", made.place))
    monkeypatch.setattr(os, "mkdir", made.mkdir)
    monkeypatch.setattr(Path, "rmdir", shutil.rmtree)
    monkeypatch.setattr(client_cgroups, "_write", made.write)
    return made


V2_TREE: Final = (2, "memory.swap.max")


@pytest.mark.parametrize(
    ("tree", "before", "limits"),
    [
        (
            V2_TREE,
            [("restrictedmem-serve/cgroup.procs", "0"), ("cgroup.subtree_control", "+memory")],
            [("memory.max", "4096"), ("memory.swap.max", "0")],
        ),
        (
            (2,),
            [("restrictedmem-serve/cgroup.procs", "0"), ("cgroup.subtree_control", "+memory")],
            [("memory.max", "4096")],
        ),
        (
            (1, "memory.memsw.limit_in_bytes"),
            [],
            [
                ("memory.memsw.limit_in_bytes", "-1"),
                ("memory.limit_in_bytes", "4096"),
                ("memory.memsw.limit_in_bytes", "4096"),
            ],
        ),
        ((1,), [], [("memory.limit_in_bytes", "4096")]),
    ],
    indirect=["tree"],
    ids=["v2", "v2 without swap", "v1", "v1 without swap"],
)
def test_what_is_written(
    tree: Tree, before: list[tuple[str, str]], limits: list[tuple[str, str]]
) -> None:
    (tree.place / "cgroup.procs").write_text(f"{os.getpid()}\n", encoding="ascii")
    with ClientCgroups(4096) as made:
        # It was tried with root's.
        assert tree.written == before + [
            (f"restrictedmem-0/{name}", value) for name, value in limits
        ]
        assert tree.groups() <= {LEAF}
        tree.written.clear()
        for _ in range(2):
            made.open(5).close()
        assert tree.written == [(f"restrictedmem-5/{name}", value) for name, value in limits]
        made.leave(5)
    assert tree.groups() <= {LEAF}


@pytest.mark.parametrize("tree", [V2_TREE], indirect=True)
def test_the_last_cgroups_stay(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that ends its services cannot have what it left in the kernel charged to all."""
    monkeypatch.setattr(client_cgroups, "_KEPT", 2)
    with ClientCgroups(4096) as made:
        for uid in (5, 6, 5, 7):
            made.open(uid).close()
            made.leave(uid)
        assert tree.groups() == {LEAF, "restrictedmem-5", "restrictedmem-7"}
        tree.written.clear()
        made.open(6).close()
        assert ("restrictedmem-6/memory.max", "4096") in tree.written
    assert "restrictedmem-6" in tree.groups()


@pytest.mark.parametrize("tree", [V2_TREE], indirect=True)
def test_a_cgroup_stays_while_files_are_charged_to_it(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client keeps memfds that its engines have filled: a new cgroup would not count them."""
    monkeypatch.setattr(client_cgroups, "_KEPT", 0)
    with ClientCgroups(4096) as made:
        made.open(5).close()
        stat = tree.place / "restrictedmem-5" / "memory.stat"
        stat.write_text("anon 0\nshmem 4096\n", encoding="ascii")
        made.leave(5)
        assert "restrictedmem-5" in tree.groups()
        made.open(5).close()
        stat.write_text("anon 4096\nshmem 0\n", encoding="ascii")
        # It is in use again.
        made.open(6).close()
        assert "restrictedmem-5" in tree.groups()
        stat.write_text("anon 0\nshmem 4096\n", encoding="ascii")
        made.leave(5)
        stat.write_text("anon 4096\nshmem 0\n", encoding="ascii")
        made.leave(6)
        assert tree.groups() == {LEAF}


@pytest.mark.parametrize("tree", [V2_TREE], indirect=True)
def test_who_is_started_where_serve_goes_uses_the_cgroup_above(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cgroup, "own", lambda: Cgroup(2, "/own", tree.place / LEAF))
    with ClientCgroups(4096) as made:
        made.open(5).close()
        assert tree.groups() == {LEAF, "restrictedmem-5"}


@pytest.mark.parametrize("tree", [V2_TREE], indirect=True)
@pytest.mark.parametrize(
    ("name", "text", "errno", "words"),
    [
        (
            "cgroup.controllers",
            "cpu\n",
            ENODEV,
            "cgroup: No such device (it has no memory controller)",
        ),
        (
            "cgroup.procs",
            "1234567\n{own}\n",
            EBUSY,
            "cgroup: Device or resource busy (process 1234567 is in it, too)",
        ),
    ],
)
def test_where_none_can_be_made(tree: Tree, name: str, text: str, errno: int, words: str) -> None:
    (tree.place / name).write_text(text.format(own=os.getpid()), encoding="ascii")
    with pytest.raises(OSError, match=re.escape(words)) as caught:
        ClientCgroups(4096)
    assert (caught.value.errno, caught.value.filename) == (errno, str(tree.place))
    assert tree.written == []


@pytest.mark.parametrize("tree", [V2_TREE], indirect=True)
def test_the_root_may_have_processes(tree: Tree) -> None:
    (tree.place / "cgroup.type").unlink()
    (tree.place / "cgroup.procs").write_text("1234567\n", encoding="ascii")
    with ClientCgroups(4096):
        assert ("cgroup.subtree_control", "+memory") in tree.written


def test_without_a_memory_controller_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cgroup, "own", lambda: None)
    assert outcome(lambda: ClientCgroups(4096)) == Errno(ENOENT)
