"""A consumer's window of a restricted file: pages, their mapping and the callbacks."""

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
from restrictedmem.fs.owner_abi import PROVE, TOKEN_BYTES
from restrictedmem.units import PAGE_SHIFT, PAGE_SIZE, PageRange, pgoff_t

#: Seconds after which a fault looks again. The service does not tell this consumer of every
#: invalidation, nor of its end.
_LOOK_AGAIN: Final = 0.001


def file_is_restrictedmem(fd: int) -> bool:
    """Say whether a descriptor is a restricted one, of whatever service.

    This is for owners, since a consumer never has such a descriptor.

    Raises:
        OSError: EBADF.
    """
    try:
        fcntl.ioctl(fd, PROVE, bytes(TOKEN_BYTES))
    except OSError as error:
        if error.errno in (ENOTTY, EINVAL):
            return False
        # EACCES: no service has given out this token.
        if error.errno == EACCES:
            return True
        raise
    return False


class NotifierOps(Protocol):
    """A consumer's callbacks for a window (``struct restrictedmem_notifier_ops``).

    The notify thread, which all files share, calls them. Ranges are pages of the file and may reach
    beyond the window. ``order`` is as in ``mm.notifier.Notifier``, whose rules hold here, too.
    """

    def invalidate_start(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        """Zap the range, and return when no access to it is under way any more."""
        ...

    def invalidate_end(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        """Go on."""
        ...

    def error(self, start: pgoff_t, end: pgoff_t) -> None:
        """Let go of pages that the machine has lost.

        ``get_page`` refuses them until they are punched.
        """
        ...


@final
class BoundFile:
    """A window of a file, with ops that the service calls.

    This object is the ``Notifier`` between the service and the ops. It also counts the window's
    pages.
    """

    def __init__(
        self, bound: Bound, window: PageRange, ops: NotifierOps, unbind: Callable[[], None]
    ) -> None:
        """Map the window, and own the descriptors of ``bound`` from now on.

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
        # Pages that the machine has lost and that were not punched since.
        self._lost: set[int] = set()

    @classmethod
    def register_notifier(
        cls, consumer: Consumer, token: bytes, window: PageRange, ops: NotifierOps
    ) -> Self:
        """Register a notifier for the whole file (``Consumer.register_notifier``).

        Pages can be taken from ``window``.
        """
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
        """Take a page and return the order of its folio (``restrictedmem_get_page``).

        A missing page is allocated. Before the caller maps or uses the page, it must check
        ``retry``, or use ``fault`` instead.

        Raises:
            OSError: EAGAIN while the page is being invalidated; EHWPOISON for a page that the
                machine has lost; EFAULT outside the window; ENOSPC, ENOMEM.
        """
        self._check(pgoff)
        return self._pages.get_page(pgoff)

    def get_page_noalloc(self, pgoff: pgoff_t) -> int:
        """Take a present page and return its order (``restrictedmem_get_page_noalloc``).

        The order is that of the page's folio.

        Raises:
            OSError: ENOENT for a missing page; else as ``get_page``.
        """
        self._check(pgoff)
        return self._pages.get_page_noalloc(pgoff)

    def put_page(self, pgoff: pgoff_t) -> None:
        """Give back a page that is not used any more.

        Its content stays in the file (with one exception: docs/understand/designs.md, ``lazy``).
        """
        self._pages.put_page(pgoff)

    def _check(self, pgoff: pgoff_t) -> None:
        if pgoff in self._lost:
            raise failed("get_page", EHWPOISON, "the machine has lost the page")

    def page(self, pgoff: pgoff_t) -> memoryview:
        """Return a page's content, which may be used while the page is installed.

        The caller reads or writes it between ``fault`` and the next zap, and then releases it.
        """
        start = (pgoff - self.window.start) << PAGE_SHIFT
        return self._mapping.memory[start : start + PAGE_SIZE]

    # The fault path.

    def snapshot(self) -> int:
        """Return the file's invalidation sequence; call this before ``get_page``."""
        return self._sequence.snapshot()

    def retry(self, snapshot: int, pgoff: pgoff_t, order: int = 0) -> bool:
        """Say whether a folio of ``order``, taken since ``snapshot``, must not be installed.

        This is ``mmu_invalidate_retry_gfn``.
        """
        start = pgoff_t(pgoff & -(1 << order))
        return self._sequence.retry(snapshot, start, pgoff_t(start + (1 << order)))

    def fault(self, pgoff: pgoff_t, lock: sync.Mutex, install: Callable[[int], None]) -> int:
        """Take a page, call ``install`` with its order under ``lock``, and return the retries.

        This is ``kvm_faultin_pfn``. ``lock`` must be the lock under which the notifier's
        ``invalidate_start`` and ``error`` remove translations.

        Raises:
            OSError: as ``get_page``, but not EAGAIN.
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

    # The service's callbacks (``Notifier``).

    def invalidate_start(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        """Call the consumer's ``invalidate_start``, then give the range's pages back."""
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
        """Refuse pages until they are punched, and call the consumer's ``error``."""
        lost = self.window.clip(PageRange(start, end))
        self._lost |= set(range(lost.start, lost.end))
        self._ops.error(start, end)

    def page_count(self, start: pgoff_t, end: pgoff_t) -> int:
        """Return how many pages of a range are taken."""
        return self._pages.count(PageRange(start, end))

    def close(self) -> None:
        """Unbind, unmap and close.

        The caller has zapped the window already, except where the design tells the notifier at
        teardown.
        """
        self._unbind()
        self._pages.close()
        self._mapping.close()
        self._file.put()
