"""The attributes of a restricted file that do not concern the shim: mode, owner, times.

Both postings call setattr of the inner tmpfs inode. So this module does what tmpfs does
(setattr_prepare, setattr_copy).
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
        """Make the inode of a new file: mode 0777 and the creator's ids, as shmem_file_setup."""
        now = time.time_ns()
        return cls(uid, gid, stat.S_IFREG | 0o777, now, now, now)

    def modified(self) -> None:
        """Update the times after content or size changed."""
        self.mtime = self.ctime = time.time_ns()

    def chmod(self, mode: int, fsuid: int) -> None:
        """Change the permission bits.

        Raises:
            OSError: EPERM if the caller is neither the file's owner nor root.
        """
        self._require_owner(fsuid)
        self.mode = stat.S_IFREG | stat.S_IMODE(mode)
        self.ctime = time.time_ns()

    def chown(self, uid: int | None, gid: int | None, fsuid: int, fsgid: int) -> None:
        """Change owner or group; ``None`` changes nothing.

        Raises:
            OSError: EPERM. A caller that is not root may only name itself and its own fsgid.
        """
        if fsuid and (uid not in (None, self.uid) or gid not in (None, self.gid, fsgid)):
            raise failed("fchown", EPERM, "only root may give it to another user or group")
        self._require_owner(fsuid)
        self.uid = self.uid if uid is None else uid
        self.gid = self.gid if gid is None else gid
        self.ctime = time.time_ns()

    def utimens(self, atime: int | None, mtime: int | None, fsuid: int) -> None:
        """Set access and modification time; ``None`` changes nothing.

        Raises:
            OSError: EPERM if the caller is neither the file's owner nor root.
        """
        self._require_owner(fsuid)
        self.atime = self.atime if atime is None else atime
        self.mtime = self.mtime if mtime is None else mtime
        self.ctime = time.time_ns()

    def _require_owner(self, fsuid: int) -> None:
        if fsuid not in (0, self.uid):
            raise failed("setattr", EPERM, "not the owner")
