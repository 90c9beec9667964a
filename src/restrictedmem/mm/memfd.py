"""What backings have in common whose pages lie in a memfd, small ones or huge."""

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
#: Bytes that are allocated at once: a tenth of a second. No folio crosses a multiple of it, or it
#: is as large.
_PIECE: Final = 256 << 20
#: Consumers have it, and with F_SEAL_WRITE or F_SEAL_FUTURE_WRITE one could forbid the owner to
#: punch. F_SEAL_GROW is not among them: it would turn an errno of hugetlbfs into EPERM.
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


def make_memfd(folio: int, flags: int = 0) -> OwnedFd:
    """Make the memfd of a file's pages, which nobody can shrink or seal.

    It has the largest size there may be, in whole folios of so many bytes: no more than this
    process's limit on file sizes. Beyond that every allocation is EFBIG, as of any file that its
    owner makes under the limit. ``flags`` are memfd_create's.

    Raises:
        OSError: as memfd_create(2).
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    # One of 2^63 and more is negative here, as RLIM_INFINITY is.
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
    """Say no: somebody waits."""
    return False


class InMemfd(ABC):
    """A memfd that is made when it is first asked for, and how much of it there may be.

    Its own size is the largest there may be (``make_memfd``), for the length of its life: a
    restricted file's size is a number of the shim alone, and get_page ignores it (``SGP_WRITE`` in
    v9 and v10). Most of many descriptors never have a page, and so no memfd.
    """

    __slots__ = ("_fd", "_mutex", "limit")

    def __init__(self, fd: OwnedFd | None, limit: int | None) -> None:
        """Make an empty backing, or take over a memfd that another process made.

        ``limit`` bounds the bytes held; every process that allocates must have the same.
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
        """Make the memfd, of its full size and empty."""

    @abstractmethod
    def _allocate(self, offset: int, length: int) -> None:
        """Make the pages of a range present, all or as many as there are.

        Raises:
            OSError: ENOSPC, ENOMEM; EINVAL.
        """

    @abstractmethod
    def _held_of(self, start: int, length: int) -> int:
        """Return the bytes held of a range of whole smallest folios.

        Raises:
            OSError: one of ``NOT_TOLD`` where the kernel does not tell.
        """

    def fileno(self) -> int:
        """Return the memfd, made now when there was none.

        Raises:
            OSError: EMFILE, ENFILE, ENOMEM; ENODEV where the kernel has no huge pages of the size.
        """
        if self._fd is None:
            # A consumer may bind while the owner allocates for the first time: two memfds would be
            # two contents.
            with self._mutex:
                if self._fd is None:
                    self._fd = self._make()
        return self._fd.fileno()

    def charge(self, offset: int, length: int) -> None:
        """Check that the pages which a byte range touches may be held.

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
                # Nothing else counts preallocated pages of a range: all of it is charged.
                if error.errno not in NOT_TOLD:
                    raise
        if held + wanted > limit:
            raise failed(
                "fallocate",
                ENOSPC,
                f"descriptor would hold {held + wanted} bytes, the limit is {limit}",
            )

    def allocate(self, offset: int, length: int, abandoned: Callable[[], bool] = never) -> None:
        """Make every page that the range touches present, piece by piece (see ``Backing``).

        Raises:
            OSError: EFBIG, ENOSPC beyond a limit, before anything is allocated; EINTR when it was
                ``abandoned``.
        """
        end = offset + length
        size = os.fstat(self.fileno()).st_size
        if size < min(end, MAX_FILE_BYTES & -(PAGE_SIZE << self.base_order)):
            raise failed("fallocate", EFBIG, f"the service's limit on file sizes is {size} bytes")
        self.charge(offset, length)
        while offset < end:
            # The kernel would notice by itself, and undo all, if the caller's own thread were in
            # it. Before the first piece too: there may have been a long wait.
            if length > _PIECE and abandoned():
                raise failed("fallocate", EINTR, "its caller was killed")
            after = end if end - offset <= _PIECE else (offset & -_PIECE) + _PIECE
            self._allocate(offset, after - offset)
            offset = after

    def punch(self, offset: int, length: int) -> None:
        """Free what an aligned range covers whole, and zero what it has of the rest (see ``Backing``)."""
        if self._fd is not None:
            memory.fallocate(self._fd.fileno(), memory.PUNCH, offset, length)

    def renew(self) -> Callable[[], None]:
        """Begin anew, and return what frees the pages there were (see ``Backing``)."""
        fd = self._leave()

        def free() -> None:
            if fd is not None:
                with fd:
                    memory.fallocate(fd.fileno(), memory.PUNCH, 0, MAX_FILE_BYTES)

        return free

    def release(self, offset: int, length: int) -> None:  # noqa: B027 not for a subclass to fill
        """Do nothing: pages are not held (see ``Allocator``)."""

    def resident(self) -> int:
        """Return the bytes held (see ``Backing``); for any thread, under no lock of the file."""
        with self._mutex:
            return 0 if self._fd is None else os.fstat(self._fd.fileno()).st_blocks * _SECTOR

    def close(self) -> None:
        """Close the memfd; nothing is held from then on, until another one is asked for."""
        fd = self._leave()
        if fd is not None:
            fd.close()

    def _leave(self) -> OwnedFd | None:
        # Somebody may just look at what it holds: an O_PATH descriptor asks for the attributes of a
        # file that is closed, too.
        with self._mutex:
            fd, self._fd = self._fd, None
        return fd
