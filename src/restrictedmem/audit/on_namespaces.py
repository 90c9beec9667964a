"""Routes by namespaces: the maker of a user namespace opens it by a file handle.

The user who made a user namespace has every capability in it, wherever it is. Linux 6.18 opens any
namespace by its number (open_by_handle_at on nsfs). So this user may enter the user namespace, and
then the mount namespaces that it owns. There the user could choose the files that a process
executes.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from errno import EPERM
from functools import partial
from typing import Final

from restrictedmem.abi.process import CLONE_NEWNS, CLONE_NEWUSER, setns, unshare
from restrictedmem.audit import syscalls
from restrictedmem.audit.attacker import Attacker
from restrictedmem.audit.attempt import Route
from restrictedmem.audit.on_processes import NAMES, powers
from restrictedmem.audit.pattern import Buffer
from restrictedmem.fd import OwnedFd
from restrictedmem.probe import in_child

#: How many numbers before the newest namespace's are tried: on all CPUs together (``_LAST``), and
#: on each CPU at least (``_LEAST``). A CPU takes numbers from a batch of its own (DEFINE_COOKIE).
_LAST: Final = 1000
_LEAST: Final = 100
#: A little less than the inode number of the first namespace that is not the kernel's own
#: (PROC_DYNAMIC_FIRST).
_FIRST_INODE: Final = 0xF000_0000 - 10


def find(kind: int, name: str) -> Iterator[OwnedFd]:
    """Open by handle each namespace of a kind except this process's own; the caller owns them.

    Raises:
        OSError: EOPNOTSUPP where namespaces have no handles; EPERM where no namespace can be made.
    """
    mine = os.readlink(f"/proc/self/ns/{name}")
    cpus = os.sched_getaffinity(0)
    for cpu in cpus:
        # A new namespace has the CPU's newest number.
        newest, newest_inode = in_child(partial(_made, name, cpu))
        for number in range(newest, max(0, newest - max(_LEAST, _LAST // len(cpus))), -1):
            for inode in range(_FIRST_INODE, newest_inode + 10):
                fd = syscalls.open_namespace(number, kind, inode)
                if fd is not None:
                    if os.readlink(f"/proc/self/fd/{fd.fileno()}") == mine:
                        fd.close()
                    else:
                        yield fd
                    break


def _made(name: str, cpu: int) -> tuple[int, int]:
    os.sched_setaffinity(0, {cpu})
    unshare(CLONE_NEWUSER | CLONE_NEWNS)
    return syscalls.namespace_handle(f"/proc/self/ns/{name}")


def _mounts(_: Attacker) -> Iterator[Buffer]:
    """Enter a mount namespace that this process may open."""
    refusal: OSError = PermissionError(EPERM, "no mount namespace can be opened by handle")
    for namespace in find(CLONE_NEWNS, "mnt"):
        with namespace:
            try:
                in_child(partial(setns, namespace.fileno(), CLONE_NEWNS))
            except OSError as error:
                refusal = error
            else:
                yield b""
                return
    raise refusal


def _users(owner: Attacker) -> Iterator[Buffer]:
    """Enter each user namespace that opens; try mount namespaces and ``powers`` there."""
    mounts = list(find(CLONE_NEWNS, "mnt"))
    allowed: list[str] = []
    for namespace in find(CLONE_NEWUSER, "user"):
        with namespace, suppress(OSError):
            allowed += in_child(lambda: _inside(namespace, mounts, owner))  # noqa: B023  called at once
    for fd in mounts:
        fd.close()
    if not allowed:
        raise PermissionError(EPERM, "no user namespace that can be entered allows anything")
    yield ", ".join(allowed).encode()


def _inside(namespace: OwnedFd, mounts: list[OwnedFd], owner: Attacker) -> list[str]:
    setns(namespace.fileno(), CLONE_NEWUSER)
    allowed: list[str] = []
    for fd in mounts:
        with suppress(OSError):
            setns(fd.fileno(), CLONE_NEWNS)
            allowed.append("a mount namespace")
    for process in NAMES:
        for title, look in powers():
            with suppress(OSError):
                allowed += [f"{title} of the {process}" for _ in look(owner.processes[process])]
    return allowed


def routes() -> Iterator[Route]:
    """Yield the routes by handles."""
    yield Route("machine", "mount namespaces by handle", _mounts, power=True, root=True)
    yield Route("machine", "user namespaces by handle", _users, power=True, root=True)
