"""The common part of backings whose pages, small or huge, lie in a memfd."""

import fcntl
import os
import resource
from abc import ABC, abstractmethod
from collections.abc import Callable
from errno import EFBIG, EINTR, ENOSPC
from typing import Final

from restrictedmem import sync
from restrictedmem.abi import memory
from restrictedmem.failure import failed
from restrictedmem.fd import OwnedFd
from restrictedmem.mm.folios import NOT_TOLD
from restrictedmem.units import MAX_FILE_BYTES, PAGE_SIZE

_SECTOR: Final = 512
#: Bytes of one allocation, which takes a tenth of a second. No folio crosses a multiple of it; a
#: folio of 1 GiB covers several.
_PIECE: Final = 256 << 20
#: Consumers have the memfd. With F_SEAL_WRITE or F_SEAL_FUTURE_WRITE a consumer could forbid the
#: owner to punch; F_SEAL_SEAL prevents that. F_SEAL_GROW is missing because it would turn an errno
#: of hugetlbfs into EPERM.
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


def make_memfd(folio: int, flags: int = 0) -> OwnedFd:
    """Make the memfd of a file's pages, which no process can shrink or seal.

    Its size is the largest possible one in whole folios of ``folio`` bytes. This process's limit on
    file sizes (RLIMIT_FSIZE) bounds it. Every allocation beyond it is EFBIG, as for any file under
    that limit. ``flags`` are those of memfd_create.

    Raises:
        OSError: as memfd_create(2).
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A limit of 2^63 or more is negative here, like RLIM_INFINITY.
    most = MAX_FILE_BYTES if limit < 0 else min(limit, MAX_FILE_BYTES)
    fd = memory.memfd_create("restrictedmem", flags)
    try:
        os.ftruncate(fd.fileno(), most & -folio)
        fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        fd.close()
        raise
    return fd


def never() -> bool:
    """Say no: the caller still waits."""
    return False


class InMemfd(ABC):
    """A memfd that is made when it is first needed, and a limit on the bytes in it.

    The memfd's own size is the largest possible one (``make_memfd``) and never changes. A
    restricted file's size is a number that the shim alone keeps, and get_page ignores it
    (``SGP_WRITE`` in v9 and v10). Many descriptors never have a page. They get no memfd.
    """

    __slots__ = ("_fd", "_mutex", "limit")

    def __init__(self, fd: OwnedFd | None, limit: int | None) -> None:
        """Make an empty backing, or take over a memfd that another process made.

        ``limit`` bounds the bytes held. Every process that allocates must have the same limit.
        """
        self._fd = fd
        self._mutex = sync.mutex()
        self.limit = limit

    @property
    @abstractmethod
    def base_order(self) -> int:
        """Return the order of the smallest folio."""

    @abstractmethod
    def _make(self) -> OwnedFd:
        """Make the memfd, empty and of its full size."""

    @abstractmethod
    def _allocate(self, offset: int, length: int) -> None:
        """Allocate the pages of a range; on failure, some may stay allocated.

        Raises:
            OSError: ENOSPC, ENOMEM; EINVAL.
        """

    @abstractmethod
    def _held_of(self, start: int, length: int) -> int:
        """Return the bytes held in a range of whole smallest folios.

        Raises:
            OSError: one of ``NOT_TOLD`` where the kernel does not tell.
        """

    def fileno(self) -> int:
        """Return the memfd, made now if there was none.

        Raises:
            OSError: EMFILE, ENFILE, ENOMEM; ENODEV where the kernel has no huge pages of the size.
        """
        if self._fd is None:
            # A consumer may bind while the owner allocates for the first time. Two memfds would
            # have different content.
            with self._mutex:
                if self._fd is None:
                    self._fd = self._make()
        return self._fd.fileno()

    def charge(self, offset: int, length: int) -> None:
        """Check the limit for all pages that a byte range touches.

        Raises:
            OSError: ENOSPC beyond the limit.
        """
        limit = self.limit
        if limit is None:
            return
        size = PAGE_SIZE << self.base_order
        start = offset & -size
        held, wanted = self.resident(), -(-(offset + length - start) // size) * size
        if held + wanted > limit:
            try:
                wanted -= self._held_of(start, wanted)
            except OSError as error:
                # The kernel has no other count of preallocated pages in a range. So the whole range
                # is charged.
                if error.errno not in NOT_TOLD:
                    raise
        if held + wanted > limit:
            raise failed(
                "fallocate",
                ENOSPC,
                f"descriptor would hold {held + wanted} bytes, the limit is {limit}",
            )

    def allocate(self, offset: int, length: int, abandoned: Callable[[], bool] = never) -> None:
        """Allocate every page that the range touches, piece by piece (see ``Backing``).

        Raises:
            OSError: EFBIG, or ENOSPC beyond a limit, before anything is allocated; EINTR when it
                was ``abandoned``.
        """
        end = offset + length
        size = os.fstat(self.fileno()).st_size
        if size < min(end, MAX_FILE_BYTES & -(PAGE_SIZE << self.base_order)):
            raise failed("fallocate", EFBIG, f"the service's limit on file sizes is {size} bytes")
        self.charge(offset, length)
        while offset < end:
            # The kernel would notice by itself, and undo all, if the caller's own thread made the
            # call. This is checked before the first piece, too, because the request may have waited
            # long.
            if length > _PIECE and abandoned():
                raise failed("fallocate", EINTR, "its caller was killed")
            after = end if end - offset <= _PIECE else (offset & -_PIECE) + _PIECE
            self._allocate(offset, after - offset)
            offset = after

    def punch(self, offset: int, length: int) -> None:
        """Free the folios that an aligned range covers whole, and zero the parts of others.

        See ``Backing``.
        """
        if self._fd is not None:
            memory.fallocate(self._fd.fileno(), memory.PUNCH, offset, length)

    def renew(self) -> Callable[[], None]:
        """Start again, and return a function that frees the old pages (see ``Backing``)."""
        fd = self._leave()

        def free() -> None:
            if fd is not None:
                with fd:
                    memory.fallocate(fd.fileno(), memory.PUNCH, 0, MAX_FILE_BYTES)

        return free

    def release(self, offset: int, length: int) -> None:  # noqa: B027 not for a subclass to fill
        """Do nothing: this backing holds no references (see ``Allocator``)."""

    def resident(self) -> int:
        """Return the bytes held (see ``Backing``).

        Any thread may call this, without any lock of the file.
        """
        with self._mutex:
            return 0 if self._fd is None else os.fstat(self._fd.fileno()).st_blocks * _SECTOR

    def close(self) -> None:
        """Close the memfd; nothing is held until another one is made."""
        fd = self._leave()
        if fd is not None:
            fd.close()

    def _leave(self) -> OwnedFd | None:
        # Another thread may call ``resident`` at this moment: fstat on an O_PATH descriptor asks
        # the service for the attributes of a file even after its last close.
        with self._mutex:
            fd, self._fd = self._fd, None
        return fd
