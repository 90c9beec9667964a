"""Halves of slots as this process maps them; the shared ones show memfds of the owner's.

A slot brings its memfd as a descriptor, which another process looks at first (``checker``). Most
VMMs have one memfd for all slots. So the engine keeps a memfd open for as long as a slot shows it,
and further slots may name it by device and inode number, which no other file can have meanwhile.
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
    """One half of a slot, mapped whole into this process, and so that huge pages of its file can be mapped as one."""

    __slots__ = ("address", "locked", "mapping", "offset", "size", "unlocked_because")

    def __init__(self, fd: int, offset: int, size: int, alignment: int = 0) -> None:
        """Map ``size`` bytes of ``fd`` from byte ``offset`` on; the descriptor stays the caller's. ``alignment``: ``memory.Mapping``.

        Raises:
            OSError: ENOMEM.
        """
        self.size = size
        self.offset = offset
        self.mapping = memory.Mapping(fd, offset, size, alignment or alignment_for(size))
        #: Where the half lies in this process.
        self.address = self.mapping.address
        #: Bytes locked; when 0, why.
        self.locked = 0
        self.unlocked_because = ""

    def lock(self) -> None:
        """Lock the half as its pages come, all of it or nothing; where the limit forbids it, remember why."""
        try:
            memory.mlock_onfault(self.address, self.size)
            self.locked = self.size
        except OSError as error:
            self.unlocked_because = os.strerror(error.errno or 0)

    def write(self, start: int, data: bytes) -> None:
        """Write content at a byte offset of the half."""
        self.mapping.memory[start : start + len(data)] = data

    def close(self) -> None:
        """Unmap the half; nobody may use its address any more."""
        self.mapping.close()


def alignment_for(size: int) -> int:
    """Return how a half is to be aligned: a small one has no huge page, and of many the padding would use up vm.max_map_count."""
    return memory.PMD_SIZE if size >= memory.PMD_SIZE else PAGE_SIZE


@final
class SharedFile:
    """A memfd that cannot shrink any more, closed with the last half that shows it."""

    __slots__ = ("_all", "_fd", "_size", "_users", "hugetlb", "identity")

    def __init__(
        self, fd: OwnedFd, identity: Identity, size: int, of: dict[Identity, "SharedFile"]
    ) -> None:
        """Own ``fd``, of which ``size`` bytes are there for good; ``of`` has it until it is closed."""
        self._fd = fd
        self._size = size
        self._users = 0
        self._all = of
        self.identity = identity
        #: Whether its pages are huge ones, of which a part cannot be dropped.
        self.hugetlb = memory.is_hugetlbfs(fd.fileno())

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._fd.fileno()

    def check(self, end: int) -> None:
        """Check that it reaches to a byte.

        Raises:
            OSError: EINVAL.
        """
        # It may have grown.
        if end > self._size:
            self._size = os.fstat(self.fileno()).st_size
            _check_size(end, self._size)

    def get(self) -> None:
        """Use it."""
        self._users += 1

    def put(self) -> None:
        """Use it no more."""
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
        """Return the memfd behind a descriptor, which stays the caller's, sealed against shrinking; to be shown by a half at once.

        Raises:
            OSError: EINVAL when it ends before byte ``end``, is no memfd, or is sealed against
                seals; EMFILE; what ``seal`` raises.
        """
        # Before the seal, which would stay, and again after it: until then the memfd can be shrunk.
        _check_size(end, _look(fd)[1])
        # Sealed or not: this asks for the right to write, too, which who has another descriptor of
        # the memfd may have.
        self._seal(fd)
        identity, size = _look(fd)
        _check_size(end, size)
        found = self._all.get(identity)
        if found is None:
            found = self._all[identity] = SharedFile(OwnedFd(os.dup(fd)), identity, size, self._all)
        return found

    def of_name(self, identity: Identity, end: int) -> SharedFile:
        """Return the memfd of a device and an inode number.

        Raises:
            OSError: ESTALE when no slot shows it; EINVAL when it ends before byte ``end``.
        """
        known = self._all.get(identity)
        if known is None:
            raise OSError(ESTALE, "no slot shows that memfd: it has to be sent")
        known.check(end)
        return known


@final
class SharedHalf(Half):
    """A part of a memfd of the owner's."""

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
    """Return which file a memfd is."""
    return _look(fd)[0]


def _look(fd: int) -> tuple[Identity, int]:
    found = os.fstat(fd)
    return (found.st_dev, found.st_ino), found.st_size


def _check_size(end: int, size: int) -> None:
    if end > size:
        raise OSError(EINVAL, "the shared half ends past its memfd")


def is_memfd(fd: int) -> bool:
    """Say whether a descriptor is a memfd's: the kernel alone answers, where fstat(2) and fstatfs(2) would ask a file system."""
    try:
        fcntl.fcntl(fd, _F_GET_SEALS)
    except OSError:
        return False
    return True


def forbid_shrinking(fd: int) -> None:
    """Seal a memfd of the owner's against shrinking: a mapping past its end would be SIGBUS for whoever touches it.

    This takes the lock of the memfd's inode. An owner's write to it holds that, for as long as its
    page that it writes from does not come.

    Raises:
        OSError: EINVAL when it is no memfd, is sealed against seals, or is open to be read alone.
    """
    try:
        fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK)
    except OSError:
        raise OSError(
            EINVAL, "shared memory must be a memfd that can be sealed against shrinking"
        ) from None
