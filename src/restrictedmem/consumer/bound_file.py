"""A window of a restricted file in a consumer's process: its pages, where they are mapped, and what is told of them."""

import fcntl
from collections.abc import Callable
from contextlib import ExitStack, suppress
from errno import EACCES, EINVAL, ENOTTY
from typing import Final, Protocol, Self, final

from restrictedmem import sync
from restrictedmem.abi.kvm import EHWPOISON
from restrictedmem.abi.memory import PMD_SIZE, Mapping
from restrictedmem.consumer.consumer import Bound, Consumer
from restrictedmem.consumer.memfd_file import MemfdFile
from restrictedmem.failure import failed
from restrictedmem.fs.filesystem import PROVE, TOKEN_BYTES
from restrictedmem.units import PAGE_SHIFT, PAGE_SIZE, PageRange, pgoff_t

#: Seconds after which a fault looks again: an invalidation that this consumer is not told of ends
#: without a word too.
_LOOK_AGAIN: Final = 0.001


def file_is_restrictedmem(fd: int) -> bool:
    """Say whether a descriptor is a restricted one, of whatever service; for owners, since no consumer ever has one.

    Raises:
        OSError: EBADF.
    """
    try:
        fcntl.ioctl(fd, PROVE, bytes(TOKEN_BYTES))
    except OSError as error:
        if error.errno in (ENOTTY, EINVAL):
            return False
        # No service has given that token out.
        if error.errno == EACCES:
            return True
        raise
    return False


class NotifierOps(Protocol):
    """What a consumer does about a window (``struct restrictedmem_notifier_ops``), called by the notify thread, which all files share.

    Ranges are pages of the file and may reach beyond the window; ``order`` is as in
    ``mm.notifier.Notifier``, whose rules hold.
    """

    def invalidate_start(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        """Return when nothing that is installed leads to the range, and no access to it is under way."""
        ...

    def invalidate_end(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        """Go on."""
        ...

    def error(self, start: pgoff_t, end: pgoff_t) -> None:
        """Let go of pages that the machine has lost; ``get_page`` refuses them until they are punched."""
        ...


@final
class BoundFile:
    """A window of a file whose ops are called by the service; itself the ``Notifier`` in between, which keeps the account of pages."""

    def __init__(
        self, bound: Bound, window: PageRange, ops: NotifierOps, unbind: Callable[[], None]
    ) -> None:
        """Map the window; ``bound``'s descriptors are this object's from now on.

        Raises:
            OSError: ENOMEM.
        """
        self.ino = bound.ino
        self.window = window
        self._ops = ops
        self._unbind = unbind
        with ExitStack() as made:
            self._file = MemfdFile(bound)
            self._file.get()
            made.callback(self._file.put)
            start, size = window.start << PAGE_SHIFT, len(window) << PAGE_SHIFT
            alignment = max(PMD_SIZE, self._file.blksize)
            self._mapping = Mapping(self._file.memfd.fileno(), start, size, alignment)
            made.callback(self._mapping.close)
            self._pages = self._file.pages(window, self._mapping)
            made.pop_all()
        self._sequence = self._file.sequence
        self._settled = sync.condition(sync.mutex())
        # Pages that the machine has lost and nobody has punched since.
        self._lost: set[int] = set()

    @classmethod
    def register_notifier(
        cls, consumer: Consumer, token: bytes, window: PageRange, ops: NotifierOps
    ) -> Self:
        """Register a notifier for the whole file, pages of which are to be taken from ``window`` (``Consumer.register_notifier``)."""
        return consumer.register_notifier(
            token, lambda bound: cls(bound, window, ops, lambda: consumer.unbind(bound.number))
        )

    @classmethod
    def bind(
        cls,
        consumer: Consumer,
        token: bytes,
        window: PageRange,
        ops: NotifierOps,
        *,
        exclusive: bool = True,
    ) -> Self:
        """Bind a window of a file (``Consumer.bind``)."""

        def make(bound: Bound) -> Self:
            return cls(bound, window, ops, lambda: consumer.unbind(bound.number))

        return consumer.bind(token, window, make, exclusive=exclusive)

    # Taking pages.

    def get_page(self, pgoff: pgoff_t) -> int:
        """Take a page, allocated when it is missing, and return the order of its folio (``restrictedmem_get_page``).

        What is done with it has to stand the test of ``retry``, or to go through ``fault``.

        Raises:
            OSError: EAGAIN while the page is being invalidated; EHWPOISON for one that the machine
                has lost; EFAULT outside the window; ENOSPC, ENOMEM.
        """
        self._check(pgoff)
        return self._pages.get_page(pgoff)

    def get_page_noalloc(self, pgoff: pgoff_t) -> int:
        """Take a page that is there and return the order of its folio (``restrictedmem_get_page_noalloc``).

        Raises:
            OSError: ENOENT where none is; else as ``get_page``.
        """
        self._check(pgoff)
        return self._pages.get_page_noalloc(pgoff)

    def put_page(self, pgoff: pgoff_t) -> None:
        """Give a page back that is not used any more; what was written stays in the file (but docs/understand/designs.md, ``lazy``)."""
        self._pages.put_page(pgoff)

    def _check(self, pgoff: pgoff_t) -> None:
        if pgoff in self._lost:
            raise failed("get_page", EHWPOISON, "the machine has lost the page")

    def page(self, pgoff: pgoff_t) -> memoryview:
        """Return a page's content, to be read or written while the page is installed (``fault``), and then released."""
        start = (pgoff - self.window.start) << PAGE_SHIFT
        return self._mapping.memory[start : start + PAGE_SIZE]

    # The fault path.

    def snapshot(self) -> int:
        """Return the file's invalidation sequence, to be read before ``get_page``."""
        return self._sequence.snapshot()

    def retry(self, snapshot: int, pgoff: pgoff_t, order: int = 0) -> bool:
        """Say whether the folio of ``order`` that was taken since ``snapshot`` must not be installed (``mmu_invalidate_retry_gfn``)."""
        start = pgoff_t(pgoff & -(1 << order))
        return self._sequence.retry(snapshot, start, pgoff_t(start + (1 << order)))

    def fault(self, pgoff: pgoff_t, lock: sync.Mutex, install: Callable[[int], None]) -> int:
        """Take a page and have it installed, with its order, by ``install`` under ``lock`` (``kvm_faultin_pfn``); returns the retries.

        ``lock`` is the one under which the notifier's ``invalidate_start`` and ``error`` take away
        what is installed.

        Raises:
            OSError: as ``get_page``, but EAGAIN.
        """
        retries = 0
        while True:
            snapshot = self.snapshot()
            with suppress(BlockingIOError):
                order = self.get_page(pgoff)
                with lock:
                    self._check(pgoff)
                    if not self.retry(snapshot, pgoff, order):
                        install(order)
                        return retries
            retries += 1
            with self._settled:
                self._settled.wait_for(lambda: not self._sequence.busy(), _LOOK_AGAIN)

    # What the service says (``Notifier``).

    def invalidate_start(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        """Have the consumer let go of a range, then give its pages back."""
        self._ops.invalidate_start(start, end, order)
        self._pages.invalidate_start(PageRange(start, end))
        self._lost -= {pgoff for pgoff in self._lost if start <= pgoff < end}

    def invalidate_end(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        """Let faults go on."""
        self._pages.invalidate_end(PageRange(start, end))
        self._ops.invalidate_end(start, end, order)
        with self._settled:
            self._settled.notify_all()

    def error(self, start: pgoff_t, end: pgoff_t) -> None:
        """Refuse pages until they are punched, and have the consumer let go of them."""
        lost = self.window.clip(PageRange(start, end))
        self._lost |= set(range(lost.start, lost.end))
        self._ops.error(start, end)

    def page_count(self, start: pgoff_t, end: pgoff_t) -> int:
        """Return how many pages of a range are taken."""
        return self._pages.count(PageRange(start, end))

    def close(self) -> None:
        """Unbind, unmap and close; nothing is installed any more by then, or the design tells the notifier now."""
        self._unbind()
        self._pages.close()
        self._mapping.close()
        self._file.put()
