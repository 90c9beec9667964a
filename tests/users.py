"""Running part of a test as a user who is not root.

On some machines only root can reach the devices and the interpreter.
"""

import ctypes
import os
import pickle
import stat
import sys
import tempfile
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from errno import EPERM
from pathlib import Path
from typing import NoReturn, TypeVar

from outcomes import checked
from restrictedmem.abi import seccomp
from restrictedmem.abi.process import (
    CLONE_NEWNS,
    CLONE_NEWUSER,
    PR_SET_DUMPABLE,
    PR_SET_NO_NEW_PRIVS,
    prctl,
    setns,
    unshare,
)
from restrictedmem.fd import OwnedFd
from restrictedmem.fs.mount_ways import DEVICE

#: An ordinary user; in most systems its name is nobody.
ORDINARY = 65534

MS_BIND, MS_REC, MS_PRIVATE = 1 << 12, 1 << 14, 1 << 18
_MNT_DETACH = 2
_CLONE_NEWNET = 0x4000_0000
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_SYS_UNSHARE = {"x86_64": 272, "aarch64": 97}
_FUSE_DEVICE = os.makedev(10, 229)
_ROOT = Path(__file__).parent.parent
_libc = ctypes.CDLL(None, use_errno=True)

T = TypeVar("T")


def as_user(
    body: Callable[[], T], uid: int = ORDINARY, *, fuse: bool = True, namespaces: bool = True
) -> T:
    """Run ``body`` in a child that became another user; return its value or raise its exception.

    It needs root.

    With ``fuse`` the child can open /dev/fuse. The device itself stays as it is, because the child
    has a mount namespace of its own. Without ``namespaces`` the child cannot make a user namespace,
    as in a container with the usual seccomp profile.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _answer(body, lambda: become(uid, fuse=fuse, namespaces=namespaces), writer)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    assert answer, f"the user's process died of {status}"
    failed, value = pickle.loads(answer)
    if failed:
        raise AssertionError(f"as uid {uid}: {value}")
    result: T = value
    return result


def _answer(body: Callable[[], object], change: Callable[[], None], writer: int) -> NoReturn:
    try:
        change()
        answer: tuple[bool, object] = False, body()
    except BaseException:
        answer = True, traceback.format_exc()
    try:
        os.write(writer, pickle.dumps(answer))
    finally:
        os._exit(0)


def become(uid: int, *, fuse: bool, namespaces: bool = True) -> None:
    """Turn this process into another user's, as one that logged in."""
    unshare(CLONE_NEWNS)
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    open_the_way({os.path.realpath(path) for path in (sys.base_prefix, sys.prefix, _ROOT)})
    put_device(0o666 if fuse else 0o600)
    if not namespaces:
        forbid_user_namespaces()
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    # The change of the uid has cleared it.
    prctl(PR_SET_DUMPABLE, 1)


@contextmanager
def own_network() -> Generator[None]:
    """Enter a new network namespace, without other processes' abstract sockets.

    Programs started later are in it too. It needs root.
    """
    with OwnedFd(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)) as before:
        unshare(_CLONE_NEWNET)
        try:
            yield
        finally:
            setns(before.fileno(), _CLONE_NEWNET)


def enter_user_namespace(inside: int | None) -> None:
    """Enter a user namespace that maps this process's uid alone, to the uid ``inside``, or none."""
    own = os.geteuid(), os.getegid()
    unshare(CLONE_NEWUSER)
    if inside is not None:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{inside} {own[0]} 1"),
            ("gid_map", f"{inside} {own[1]} 1"),
        ):
            Path(f"/proc/self/{name}").write_text(text, encoding="ascii")


def open_the_way(paths: set[str]) -> None:
    """Mount directories that lead only to ``paths`` over directories that others may not search."""
    closed = {path: door for path in paths for door in [_closed_door(path)] if door is not None}
    rooms = {path: os.open(path, os.O_PATH | os.O_DIRECTORY) for path in closed}
    for door in set(closed.values()):
        mount("tmpfs", door, "tmpfs", 0)
    for path, room in rooms.items():
        os.makedirs(path, exist_ok=True)
        mount(f"/proc/self/fd/{room}", path, None, MS_BIND)
        os.close(room)


def _closed_door(path: str) -> str | None:
    return next(
        (
            str(parent)
            for parent in reversed(Path(path).parents)
            if not parent.stat().st_mode & 0o001
        ),
        None,
    )


def put_device(mode: int) -> None:
    """Put a /dev/fuse with this mode into this process's mount namespace.

    The machine's own has mode 0600 or 0666, as its distribution likes.
    """
    place = tempfile.mkdtemp()
    mount("tmpfs", place, "tmpfs", 0)
    node = os.path.join(place, "fuse")
    os.mknod(node, stat.S_IFCHR, _FUSE_DEVICE)
    os.chmod(node, mode)
    mount(node, DEVICE, None, MS_BIND)
    checked(_libc.umount2(place.encode(), _MNT_DETACH))
    os.rmdir(place)


def forbid_user_namespaces() -> None:
    """Make unshare(CLONE_NEWUSER) fail with EPERM in this process and its children.

    Set-uid programs still work, because root installs the filter.
    """
    program = seccomp.assemble(
        seccomp.load("nr"),
        seccomp.jump_unless(_SYS_UNSHARE[os.uname().machine], "allow"),
        seccomp.load("arg0"),
        seccomp.jump_if_any(CLONE_NEWUSER, "refuse"),
        "allow",
        seccomp.ret(seccomp.SECCOMP_RET_ALLOW),
        "refuse",
        seccomp.ret(seccomp.SECCOMP_RET_ERRNO | EPERM),
    )
    _install(program)


def forbid(number: int, calls: Sequence[int]) -> None:
    """Make system calls fail here and in all children, as in a container or on an older kernel."""
    program = [seccomp.load("nr")]
    for call in calls:
        program += seccomp.assemble(
            seccomp.jump_unless(call, "another call"),
            seccomp.ret(seccomp.SECCOMP_RET_ERRNO | number),
            "another call",
        )
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    _install([*program, seccomp.ret(seccomp.SECCOMP_RET_ALLOW)])


def _install(program: list[seccomp.sock_filter]) -> None:
    instructions = (seccomp.sock_filter * len(program))(*program)
    fprog = seccomp.sock_fprog(len=len(program), filter=ctypes.addressof(instructions))
    checked(
        _libc.prctl(
            _PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), ctypes.byref(fprog), 0, 0
        )
    )


def mount(source: str | None, target: str, kind: str | None, flags: int) -> None:
    """mount(2)."""
    encoded = [text.encode() if text is not None else None for text in (source, target, kind)]
    checked(_libc.mount(*encoded, ctypes.c_ulong(flags), None))
