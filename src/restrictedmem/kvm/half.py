"""Halves of slots as this process maps them; a shared half shows a memfd of the owner.

A request for a slot brings its memfd as a descriptor, which another process looks at first
(``checker``). Most VMMs have one memfd for all slots. So the engine keeps a memfd open for as long
as a slot shows it. Further requests may name it by device and inode number, which no other file can
have meanwhile.
"""

import fcntl
import os
from collections.abc import Callable
from errno import EINVAL, ESTALE
from typing import Final, final

from restrictedmem.abi import memory
from restrictedmem.abi.stat import Identity
from restrictedmem.fd import OwnedFd
from restrictedmem.units import PAGE_SIZE

_F_ADD_SEALS: Final = 1033
_F_GET_SEALS: Final = 1034
_F_SEAL_SHRINK: Final = 2


class Half:
    """One half of a slot, mapped whole into this process.

    Its alignment lets huge pages of its file be mapped as one.
    """

    __slots__ = ("address", "locked", "mapping", "offset", "size", "unlocked_because")

    def __init__(self, fd: int, offset: int, size: int, alignment: int = 0) -> None:
        """Map ``size`` bytes of ``fd`` from byte ``offset`` on; the caller keeps ``fd``.

        ``alignment`` is that of ``memory.Mapping``; 0 means the one that fits ``size``.

        Raises:
            OSError: ENOMEM.
        """
        self.size = size
        self.offset = offset
        self.mapping = memory.Mapping(fd, offset, size, alignment or alignment_for(size))
        #: Address of the half in this process.
        self.address = self.mapping.address
        #: How many bytes are locked; and why, if none are.
        self.locked = 0
        self.unlocked_because = ""

    def lock(self) -> None:
        """Lock the pages of the half as they come, all or none.

        If a limit forbids it, note why.
        """
        try:
            memory.mlock_onfault(self.address, self.size)
            self.locked = self.size
        except OSError as error:
            self.unlocked_because = os.strerror(error.errno or 0)

    def write(self, start: int, data: bytes) -> None:
        """Write content at a byte offset of the half."""
        self.mapping.memory[start : start + len(data)] = data

    def close(self) -> None:
        """Unmap the half.

        Preconditions: nobody uses its address any more.
        """
        self.mapping.close()


def alignment_for(size: int) -> int:
    """Return how a half of ``size`` bytes has to be aligned.

    A small half has no huge page, and the padding of many would use up vm.max_map_count.
    """
    return memory.PMD_SIZE if size >= memory.PMD_SIZE else PAGE_SIZE


@final
class SharedFile:
    """A memfd that cannot shrink any more. It is closed with the last half that shows it."""

    __slots__ = ("_all", "_fd", "_size", "_users", "hugetlb", "identity")

    def __init__(
        self, fd: OwnedFd, identity: Identity, size: int, of: dict[Identity, "SharedFile"]
    ) -> None:
        """Own ``fd``, of which ``size`` bytes stay for good.

        ``of`` contains this object until it is closed.
        """
        self._fd = fd
        self._size = size
        self._users = 0
        self._all = of
        self.identity = identity
        #: Whether its pages are huge ones; a part of a huge page cannot be dropped.
        self.hugetlb = memory.is_hugetlbfs(fd.fileno())

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._fd.fileno()

    def check(self, end: int) -> None:
        """Check that the memfd reaches to a byte.

        Raises:
            OSError: EINVAL when it ends before.
        """
        # The memfd may have grown.
        if end > self._size:
            self._size = os.fstat(self.fileno()).st_size
            _check_size(end, self._size)

    def get(self) -> None:
        """Take a reference."""
        self._users += 1

    def put(self) -> None:
        """Drop a reference; close the memfd with the last one."""
        self._users -= 1
        if not self._users:
            del self._all[self.identity]
            self._fd.close()


@final
class SharedFiles:
    """The memfds that slots of one VM show."""

    def __init__(self, seal: Callable[[int], None]) -> None:
        """``seal`` seals a memfd against shrinking (``forbid_shrinking``)."""
        self._seal = seal
        self._all: dict[Identity, SharedFile] = {}

    def of_fd(self, fd: int, end: int) -> SharedFile:
        """Seal the memfd behind a descriptor against shrinking, and return it.

        The caller keeps the descriptor, and makes a half show the memfd at once.

        Raises:
            OSError: EINVAL when it ends before byte ``end``, is no memfd, or is sealed against
                seals; EMFILE; what ``seal`` raises.
        """
        # Check before the seal, which would stay, and after it: until then the memfd can shrink.
        _check_size(end, _look(fd)[1])
        # This also checks that the descriptor may write, so it is called even for a sealed memfd.
        # Below, the memfd may be found under another descriptor, which may write.
        self._seal(fd)
        identity, size = _look(fd)
        _check_size(end, size)
        found = self._all.get(identity)
        if found is None:
            found = self._all[identity] = SharedFile(OwnedFd(os.dup(fd)), identity, size, self._all)
        return found

    def of_guest_memfd(self, fd: int) -> SharedFile:
        """Return the guest_memfd of the service behind a descriptor, which the caller keeps.

        Raises:
            OSError: EMFILE.
        """
        identity, size = _look(fd)
        found = self._all.get(identity)
        if found is None:
            found = self._all[identity] = SharedFile(OwnedFd(os.dup(fd)), identity, size, self._all)
        return found

    def of_name(self, identity: Identity, end: int) -> SharedFile:
        """Return the memfd with a device and an inode number.

        Raises:
            OSError: ESTALE when no slot shows it; EINVAL when it ends before byte ``end``.
        """
        known = self._all.get(identity)
        if known is None:
            raise OSError(ESTALE, "no slot shows that memfd: send its descriptor")
        known.check(end)
        return known


@final
class SharedHalf(Half):
    """A shared half: a part of a memfd of the owner."""

    __slots__ = ("file",)

    def __init__(self, file: SharedFile, offset: int, size: int) -> None:
        """Map ``size`` bytes of ``file`` from byte ``offset`` on.

        Raises:
            OSError: ENOMEM; EINVAL for a memfd that is sealed against writing.
        """
        file.get()
        try:
            super().__init__(file.fileno(), offset, size)
        except BaseException as error:
            file.put()
            if isinstance(error, PermissionError):
                raise OSError(
                    EINVAL, "shared memory must be a memfd that is not sealed against writing"
                ) from None
            raise
        self.file = file

    def close(self) -> None:
        """Unmap the half, and let go of the file."""
        super().close()
        self.file.put()


def identity_of(fd: int) -> Identity:
    """Return the device and inode number of a memfd."""
    return _look(fd)[0]


def _look(fd: int) -> tuple[Identity, int]:
    found = os.fstat(fd)
    return (found.st_dev, found.st_ino), found.st_size


def _check_size(end: int, size: int) -> None:
    if end > size:
        raise OSError(EINVAL, "the shared half ends past its memfd")


def is_memfd(fd: int) -> bool:
    """Say whether a descriptor is a memfd's.

    The kernel answers this alone. fstat(2) and fstatfs(2) would ask a file system.
    """
    try:
        fcntl.fcntl(fd, _F_GET_SEALS)
    except OSError:
        return False
    return True


def forbid_shrinking(fd: int) -> None:
    """Seal a memfd of the owner against shrinking.

    An access to a mapping past the memfd's end would raise SIGBUS. The seal takes the lock of the
    memfd's inode. An owner's write to the memfd holds this lock until the page that it writes from
    comes.

    Raises:
        OSError: EINVAL when it is no memfd, is sealed against seals, or is open only for reading.
    """
    try:
        fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK)
    except OSError:
        raise OSError(
            EINVAL, "shared memory must be a memfd that can be sealed against shrinking"
        ) from None
