"""The attributes of a restricted file that are no business of the shim: mode, owner, times.

Both postings forward setattr to the inner tmpfs inode, so what tmpfs does with them
(setattr_prepare, setattr_copy) is what they do.
"""

import stat
import time
from dataclasses import dataclass
from errno import EPERM
from typing import final

from restrictedmem.failure import failed


@final
@dataclass(slots=True)
class Inode:
    """Mode, owner and times (nanoseconds since 1970) of one file."""

    uid: int
    gid: int
    mode: int
    atime: int
    mtime: int
    ctime: int

    @classmethod
    def make(cls, uid: int, gid: int) -> "Inode":
        """Make the inode of a new file: shmem_file_setup gives mode 0777, with the creator's ids."""
        now = time.time_ns()
        return cls(uid, gid, stat.S_IFREG | 0o777, now, now, now)

    def modified(self) -> None:
        """Note that content or size changed."""
        self.mtime = self.ctime = time.time_ns()

    def chmod(self, mode: int, fsuid: int) -> None:
        """Change the permission bits.

        Raises:
            OSError: EPERM for who is neither owner nor root.
        """
        self._require_owner(fsuid)
        self.mode = stat.S_IFREG | stat.S_IMODE(mode)
        self.ctime = time.time_ns()

    def chown(self, uid: int | None, gid: int | None, fsuid: int, fsgid: int) -> None:
        """Change owner or group; ``None`` leaves one as it is.

        Raises:
            OSError: EPERM; who is not root may only name itself and the group it acts with.
        """
        if fsuid and (uid not in (None, self.uid) or gid not in (None, self.gid, fsgid)):
            raise failed("fchown", EPERM, "not the owner's to give")
        self._require_owner(fsuid)
        self.uid = self.uid if uid is None else uid
        self.gid = self.gid if gid is None else gid
        self.ctime = time.time_ns()

    def utimens(self, atime: int | None, mtime: int | None, fsuid: int) -> None:
        """Set access and modification time; ``None`` leaves one as it is.

        Raises:
            OSError: EPERM for who is neither owner nor root.
        """
        self._require_owner(fsuid)
        self.atime = self.atime if atime is None else atime
        self.mtime = self.mtime if mtime is None else mtime
        self.ctime = time.time_ns()

    def _require_owner(self, fsuid: int) -> None:
        if fsuid not in (0, self.uid):
            raise failed("setattr", EPERM, "not the owner")
