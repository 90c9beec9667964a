"""Being left alone by other processes, and giving up what a process of a service does not need any more."""

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
    """Become another user when asked, give up every capability that is not in the mask ``keep``, and gain none by exec."""
    kept = process.effective_capabilities() & keep
    if become is not None:
        uid, gid = become
        process.prctl(process.PR_SET_KEEPCAPS, 1)
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        # Another uid resets it (to fs.suid_dumpable).
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

    Not new privileges: ``Way.FUSERMOUNT`` has still to run a set-uid program.

    Raises:
        OSError: EPERM when this process is dumpable all the same.
    """
    process.prctl(process.PR_SET_DUMPABLE, 0)
    # Against accidents: a seccomp filter may have answered in the kernel's place, and could here,
    # too.
    if process.prctl(process.PR_GET_DUMPABLE):
        raise failed("prctl(PR_SET_DUMPABLE)", EPERM, "the process is dumpable still")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The owner's limit on file sizes is the kernel's to apply, to the owner's calls; under it no
    # memfd here could have its size.
    _, largest = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
