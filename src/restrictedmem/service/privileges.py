"""Giving up what a process of a service does not need any more."""

import os

from restrictedmem.abi import process


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
