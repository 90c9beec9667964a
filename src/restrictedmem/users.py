"""Whether a uid says who somebody is.

In a user namespace every uid that is not mapped there looks like one, the overflow uid: strangers
of all kinds, root often, and maybe this process itself (user_namespaces(7)).
"""

import os
from typing import Final

#: DEFAULT_OVERFLOWUID, where /proc does not say it.
_OVERFLOW: Final = 65534
#: Of them all, -1 is no uid.
_UIDS: Final = (1 << 32) - 1


def is_known(uid: int) -> bool:
    """Say whether a uid is that of one user, as this process sees it, and not of whoever is not mapped."""
    return uid != _overflow_uid() or _all_are_mapped()


def is_own(uid: int) -> bool:
    """Say whether a uid is that of this process, and of nobody else."""
    return uid == os.geteuid() and is_known(uid)


def _overflow_uid() -> int:
    try:
        with open("/proc/sys/kernel/overflowuid", encoding="ascii") as file:
            return int(file.read())
    except OSError:
        return _OVERFLOW


def _all_are_mapped() -> bool:
    # What the parent namespace does not map can be in no map below it.
    try:
        with open("/proc/self/uid_map", encoding="ascii") as file:
            return sum(int(line.split()[2]) for line in file) >= _UIDS
    except OSError:
        return False
