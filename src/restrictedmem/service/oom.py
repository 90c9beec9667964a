"""The kernel's choice of a process to kill when memory runs out.

It should be the service whose files hold the most. Pages of a memfd count for the processes that
map them (oom_badness() in mm/oom_kill.c). Pages that were only allocated count for none. So if a
service has filled the memory of all, the kernel would kill another client's engine instead. A
service therefore says in oom_score_adj how much its files hold.
"""

import os
from contextlib import suppress
from typing import Final, Self, final

from restrictedmem import sync
from restrictedmem.fd import OwnedFd
from restrictedmem.service.cgroup import Cgroup

#: oom_score_adj of a process that counts as if it had all memory (OOM_SCORE_ADJ_MAX).
_ALL: Final = 1000


@final
class OomScore:
    """This process's oom_score_adj, which follows the bytes that its files hold."""

    def __init__(self, file: OwnedFd, total: int) -> None:
        """Own ``file``; ``total`` is the number of bytes that counts as all memory."""
        self._file = file
        self._total = total
        self._least = self._written = int(os.pread(file.fileno(), 16, 0))
        self._mutex = sync.mutex()
        self._held = 0

    @classmethod
    def open(cls) -> Self:
        """Open this process's own oom_score_adj.

        Raises:
            OSError: EACCES for a user who is not root, in a process that is not dumpable.
        """
        return cls(
            OwnedFd(os.open("/proc/self/oom_score_adj", os.O_RDWR | os.O_CLOEXEC)), _memory()
        )

    def account(self, change: int) -> None:
        """Note that ``change`` more bytes are held; any thread may call this."""
        with self._mutex:
            self._held += change
            wanted = min(_ALL, self._least + _ALL * self._held // self._total)
            # Root may have set a minimum meanwhile. That must not fail an owner's request.
            with suppress(OSError):
                if wanted != self._written:
                    os.pwrite(self._file.fileno(), str(wanted).encode(), 0)
                    self._written = wanted


def _memory() -> int:
    """Return the bytes that this process may share with others.

    They are the machine's memory, or the least limit of this process's cgroups.
    """
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    own = Cgroup.own()
    if own is not None:
        name = "memory.max" if own.version == 2 else "memory.limit_in_bytes"
        for directory in (own.directory, *own.directory.parents):
            # "max" is no limit. The root cgroup of version 2 has no such file, nor have the
            # directories above.
            with suppress(OSError, ValueError):
                found.append(int((directory / name).read_text(encoding="ascii")))
    return max(min(found), 1)
