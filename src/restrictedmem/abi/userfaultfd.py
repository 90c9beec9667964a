"""userfaultfd(2): the call alone; whoever has the descriptor can hold up a page fault."""

import os
from typing import Final

from restrictedmem.abi._syscall import syscall
from restrictedmem.fd import OwnedFd

SYS_userfaultfd: Final = {"x86_64": 323, "aarch64": 282}
UFFD_USER_MODE_ONLY: Final = 1


def userfaultfd(flags: int) -> OwnedFd:
    """Make a userfaultfd, close-on-exec; the caller owns it.

    Raises:
        OSError: EPERM without CAP_SYS_PTRACE where vm.unprivileged_userfaultfd is 0, unless UFFD_USER_MODE_ONLY; ENOSYS.
    """
    return OwnedFd(syscall("userfaultfd", SYS_userfaultfd.get(os.uname().machine, -1), flags | os.O_CLOEXEC))
