"""A test of whether a uid stands for one user.

In a user namespace every uid that is not mapped there looks like the overflow uid. That uid may
stand for strangers of all kinds, often for root, and maybe for this process itself
(user_namespaces(7)).
"""

import os
from typing import Final

#: DEFAULT_OVERFLOWUID, for when /proc does not say it.
_OVERFLOW: Final = 65534
#: The number of uids; -1 is not a uid.
_UIDS: Final = (1 << 32) - 1


def is_known(uid: int) -> bool:
    """Say whether a uid stands for one user here, and not for all unmapped users."""
    return uid != _overflow_uid() or _all_are_mapped()


def is_own(uid: int) -> bool:
    """Say whether a uid is that of this process's user, and of nobody else."""
    return uid == os.geteuid() and is_known(uid)


def _overflow_uid() -> int:
    try:
        with open("/proc/sys/kernel/overflowuid", encoding="ascii") as file:
            return int(file.read())
    except OSError:
        return _OVERFLOW


def _all_are_mapped() -> bool:
    # A uid that the parent namespace does not map can be in no map below it.
    try:
        with open("/proc/self/uid_map", encoding="ascii") as file:
            return sum(int(line.split()[2]) for line in file) >= _UIDS
    except OSError:
        return False
