"""Each way to mount: the same descriptor, the same end, and nothing left in sight."""

import glob
import os
import re
import shutil
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from errno import EACCES, EINVAL, ENOTCONN, EPERM
from functools import partial
from pathlib import Path

import pytest

from outcomes import Errno, outcome
from processes import exists, family, wait_gone
from restrictedmem.abi import memory
from restrictedmem.abi.memory import FallocMode
from restrictedmem.abi.process import CLONE_NEWNS, CLONE_NEWUSER, unshare
from restrictedmem.fd import receive_with_fds, send_with_fds
from restrictedmem.fs import mounter
from restrictedmem.fs.mount_ways import Way, mount_fusermount
from restrictedmem.service.client import Service
from restrictedmem.units import PAGE_SIZE as PAGE
from restrictedmem.vmm.vmm import Vmm
from users import ORDINARY, as_user
from waiting import wait_until

pytestmark = pytest.mark.requires("fuse", "root")

KEEP_SIZE = int(FallocMode.KEEP_SIZE)
_RESTRICTIONS = os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC

#: How to become somebody for whom this way is the first that works.
WAYS = [
    pytest.param(Way.OWN, 0, True, id="OWN"),
    pytest.param(Way.USERNS, ORDINARY, True, id="USERNS"),
    pytest.param(
        Way.FUSERMOUNT, ORDINARY, False, id="FUSERMOUNT", marks=pytest.mark.requires("fusermount")
    ),
]
each_way = pytest.mark.parametrize(("way", "uid", "namespaces"), WAYS)


@pytest.fixture(autouse=True)
def _own_place(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have mount points in a directory of the test's own: another test's may come and go."""
    with tempfile.TemporaryDirectory(prefix="ways-") as place:
        Path(place).chmod(0o1777)
        monkeypatch.setenv("TMPDIR", place)
        monkeypatch.setattr(tempfile, "tempdir", place)
        yield


def mounts() -> tuple[list[str], list[str]]:
    """Return what shows of a mount: lines of mountinfo, and the ordinary user's mount points."""
    lines = (
        Path("/proc/self/mountinfo")
        .read_text(encoding="utf-8", errors="surrogateescape")
        .splitlines()
    )
    # A mount whose server is dead is nobody's.
    points = [
        path
        for path in glob.glob(f"{tempfile.gettempdir()}/restrictedmem-*")
        if _owner(path) in (ORDINARY, Errno(ENOTCONN))
    ]
    others = re.compile(r" /\S*/restrictedmem-[0-9a-f]{16} ")
    own = f" {tempfile.gettempdir()}/"
    return [
        line
        for line in lines
        if "restrictedmem" in line and (own in line or not others.search(line))
    ], points


def wait_for_no_mount() -> None:
    """Wait until nothing shows of a mount: the unmounter may still be at it."""
    wait_until(lambda: mounts() == ([], []), "the mount and its directory to go")


def _owner(path: str) -> object:
    return outcome(lambda: os.stat(path).st_uid)


@each_way
def test_the_descriptor_is_the_same(way: Way, uid: int, namespaces: bool) -> None:
    def body() -> dict[str, object]:
        with Service.start() as service:
            assert service.info["way"] == service.status()["way"] == way.value
            wait_for_no_mount()
            fd = service.memfd_restricted()
            found: dict[str, object] = {
                "name": os.readlink(f"/proc/self/fd/{fd}"),
                "created": (os.fstat(fd).st_size, os.fstat(fd).st_uid, os.fstat(fd).st_nlink),
                "ftruncate": [
                    outcome(partial(os.ftruncate, fd, size))
                    for size in (PAGE + 1, 4 * PAGE, 4 * PAGE)
                ],
                "fallocate": outcome(lambda: memory.fallocate(fd, KEEP_SIZE, 0, 3 * PAGE)),
                "allocated": os.fstat(fd).st_blocks * 512,
                "punch": outcome(lambda: memory.fallocate(fd, memory.PUNCH, 0, PAGE)),
                "left": os.fstat(fd).st_blocks * 512,
                "read": outcome(lambda: os.read(fd, 1)),
                "write": outcome(lambda: os.write(fd, b"x")),
                "size": os.fstat(fd).st_size,
                "flags": os.fstatvfs(fd).f_flag & _RESTRICTIONS,
            }
            os.close(fd)
            return found

    assert as_user(body, uid, namespaces=namespaces) == {
        "name": "/restrictedmem (deleted)",
        "created": (0, uid, 0),
        "ftruncate": [Errno(EINVAL), None, Errno(EPERM)],
        "fallocate": None,
        "allocated": 3 * PAGE,
        "punch": None,
        "left": 2 * PAGE,
        "read": Errno(EINVAL),
        "write": Errno(EINVAL),
        "size": 4 * PAGE,
        "flags": _RESTRICTIONS,
    }
    wait_for_no_mount()


@each_way
def test_it_ends_with_the_last_descriptor(way: Way, uid: int, namespaces: bool) -> None:
    def body() -> None:
        service = Service.start()
        fd, relatives = service.memfd_restricted(), family(service)
        service.close()
        os.posix_fallocate(fd, 0, PAGE)
        assert all(map(exists, relatives))
        os.close(fd)
        wait_gone(relatives)

    as_user(body, uid, namespaces=namespaces)


@each_way
@pytest.mark.parametrize("victim", [0, 1], ids=["spawner", "service"])
def test_a_killed_service_leaves_enotconn(
    way: Way, uid: int, namespaces: bool, victim: int
) -> None:
    def body() -> dict[str, object]:
        with Service.start() as service:
            fd = service.memfd_restricted()
            os.ftruncate(fd, PAGE)
            relatives = family(service)
            os.kill(relatives[victim].pid, signal.SIGKILL)
            wait_gone(relatives, 1)
            calls: dict[str, Callable[[], object]] = {
                "fstat": lambda: os.fstat(fd),
                "ftruncate": lambda: os.ftruncate(fd, PAGE),
                "fallocate": lambda: memory.fallocate(fd, KEEP_SIZE, 0, PAGE),
                "punch": lambda: memory.fallocate(fd, memory.PUNCH, 0, PAGE),
                "prove": lambda: service.token_for(fd),
                "create": service.memfd_restricted,
                "close": lambda: os.close(fd),
            }
            return {name: outcome(call) for name, call in calls.items()}

    names = ("fstat", "ftruncate", "fallocate", "punch", "prove", "create")
    assert as_user(body, uid, namespaces=namespaces) == {
        **dict.fromkeys(names, Errno(ENOTCONN)),
        "close": None,
    }
    wait_for_no_mount()


@each_way
def test_a_vm_has_its_memory(way: Way, uid: int, namespaces: bool) -> None:
    def body() -> tuple[str, int]:
        with Service.start() as service, Vmm(1 << 20, service) as vmm:
            memory.fallocate(vmm.restricted_fd, memory.PUNCH, 0, PAGE)
            return vmm.way, vmm.statistics()["invalidations"]

    assert as_user(body, uid, namespaces=namespaces) == (way.value, 1)


@each_way
@pytest.mark.parametrize("other", [0, ORDINARY, ORDINARY - 1], ids=["root", "nobody", "another"])
def test_what_another_user_can_do_with_it(way: Way, uid: int, namespaces: bool, other: int) -> None:
    """Only root's own mount lets everybody in.

    The other ways let in the uid and gid that made it.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def owner() -> None:
        with Service.start() as service:
            fd = service.memfd_restricted()
            send_with_fds(theirs, b".", [fd])
            theirs.recv(1)
            os.close(fd)

    def receiver() -> object:
        def use() -> int:
            os.ftruncate(fd.fileno(), PAGE)
            return os.fstat(fd.fileno()).st_size

        return outcome(use)

    child = os.fork()
    if child == 0:
        try:
            ours.close()
            as_user(owner, uid, namespaces=namespaces)
        except BaseException:
            # The end of the stream tells that it failed.
            traceback.print_exc()
        finally:
            os._exit(0)
    theirs.close()
    with closing(ours):
        word, fds = receive_with_fds(ours, 1)
        assert word, "the owner ended without a descriptor"
        with fds[0] as fd:
            expected: object = PAGE if way is Way.OWN or other == uid else Errno(EACCES)
            assert as_user(receiver, other) == expected
            ours.send(b".")
            os.waitpid(child, 0)


def test_root_of_a_user_namespace_without_the_mounts_takes_the_next_way() -> None:
    """CAP_SYS_ADMIN alone is not enough.

    It must be over the mount namespace (``unshare --user`` without ``--mount``).
    """

    def body() -> str:
        uid = os.geteuid()
        unshare(CLONE_NEWUSER)
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"0 {uid} 1"),
            ("gid_map", f"0 {uid} 1"),
        ):
            Path(f"/proc/self/{name}").write_text(text, encoding="ascii")
        way, device, root = mounter.mount_first()
        root.close()
        device.close()
        return way.name

    assert as_user(body) == Way.USERNS.name


def test_root_of_a_container_mounts_itself() -> None:
    def body() -> tuple[str, int]:
        uid = os.geteuid()
        unshare(CLONE_NEWUSER | CLONE_NEWNS)
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"0 {uid} 1"),
            ("gid_map", f"0 {uid} 1"),
        ):
            Path(f"/proc/self/{name}").write_text(text, encoding="ascii")
        with Service.start() as service:
            fd = service.memfd_restricted()
            os.ftruncate(fd, PAGE)
            return service.info["way"], os.fstat(fd).st_size

    assert as_user(body) == (Way.OWN.value, PAGE)


#: A fusermount3 that kills the process that mounts, its parent. Either part waits a while for the
#: other.
_KILLS = r"""#!/bin/sh
await() { for _ in $(seq 50); do [ -e "$0.$1" ] && break; sleep 0.01; done; }
case WHEN,$1 in
    before,-o) kill -9 $PPID; await unmounted; HONEST "$@"; touch "$0.mounted" ;;
    before,-u) HONEST "$@"; touch "$0.unmounted"; await mounted ;;
    after,-o) HONEST "$@"; kill -9 $PPID ;;
    after,-u) HONEST "$@" ;;
esac
"""


@pytest.mark.requires("fusermount")
@pytest.mark.parametrize("when", ["before", "after"])
def test_nothing_is_left_of_a_start_that_was_killed(when: str) -> None:
    """Whether fusermount3 has mounted by then, or is about to."""

    def body(place: str) -> int:
        os.environ["PATH"] = f"{place}:{os.environ['PATH']}"
        child = os.fork()
        if child == 0:
            try:
                mount_fusermount()
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        wait_for_no_mount()
        return status

    with tempfile.TemporaryDirectory() as place:
        helper = Path(place, "fusermount3")
        helper.write_text(
            _KILLS.replace("WHEN", when).replace("HONEST", str(shutil.which("fusermount3"))),
            encoding="ascii",
        )
        for path in (helper, helper.parent):
            path.chmod(0o777)
        assert as_user(lambda: body(place), namespaces=False) == signal.SIGKILL
