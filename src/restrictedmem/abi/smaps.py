"""/proc/self/smaps, which an undumpable process may read without privileges.

Such a process may not read /proc/self/pagemap (proc_pid_smaps(5)).
"""

from collections.abc import Iterator
from typing import Final

_PATH: Final = "/proc/self/smaps"
_HUGE: Final = b"ShmemPmdMapped:"


def large_mappings(start: int, end: int) -> Iterator[int]:
    """Yield the addresses of shmem mappings in a range that 2 MiB entries map whole.

    ``start`` and ``end`` are addresses of this process. The call costs a walk over all page tables
    of the process.

    Raises:
        OSError: ENOENT where /proc is another file system.
    """
    first = last = 0
    with open(_PATH, "rb") as smaps:
        for line in smaps:
            if not line[0:1].isupper():
                first, last = (int(address, 16) for address in line.split(None, 1)[0].split(b"-"))
            elif (
                start <= first
                and last <= end
                and line.startswith(_HUGE)
                and int(line.split()[1]) << 10 == last - first
            ):
                yield first
