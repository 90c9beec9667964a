"""Protection from other processes, and the privileges that a service's process drops."""

import os
import resource
from errno import EPERM
from typing import Final

from restrictedmem.abi import process
from restrictedmem.failure import failed

_TRACED: Final = (
    "the service is being traced; strace -f does that, strace without -f and "
    "restrictedmem exec -- strace -f PROG do not"
)


def drop_privileges(become: tuple[int, int] | None, keep: int) -> None:
    """Become another user if asked, drop all capabilities but ``keep``, and gain none by exec.

    ``keep`` is a mask.
    """
    kept = process.effective_capabilities() & keep
    if become is not None:
        uid, gid = become
        process.prctl(process.PR_SET_KEEPCAPS, 1)
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        # The change of uid resets it (to fs.suid_dumpable).
        process.prctl(process.PR_SET_DUMPABLE, 0)
    process.set_capabilities(kept)
    process.prctl(process.PR_SET_NO_NEW_PRIVS, 1)


def refuse_tracer() -> None:
    """Make sure that nobody traces this process.

    Raises:
        OSError: EPERM.
    """
    if process.tracer_pid():
        raise failed("start", EPERM, _TRACED)


def harden() -> None:
    """Refuse dumps, traces and core files.

    New privileges are not refused, because ``Way.FUSERMOUNT`` has still to run a set-uid program.

    Raises:
        OSError: EPERM when this process is still dumpable.
    """
    process.prctl(process.PR_SET_DUMPABLE, 0)
    # This only finds accidents: a seccomp filter may have answered in the kernel's place, and could
    # do so here, too.
    if process.prctl(process.PR_GET_DUMPABLE):
        raise failed("prctl(PR_SET_DUMPABLE)", EPERM, "the process is still dumpable")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The kernel applies the owner's limit on file sizes to the owner's calls. Under that limit no
    # memfd here could have its size.
    _, largest = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
