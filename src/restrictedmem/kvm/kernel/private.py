"""Private memory: one guest_memfd for each restricted file, with the file's offsets."""

import mmap
import os
from collections import Counter
from collections.abc import Callable, Iterable
from errno import EINVAL, ENOSPC, EOPNOTSUPP, ESTALE
from functools import partial
from typing import Final, final

from restrictedmem import sync
from restrictedmem.abi.kvm import GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP
from restrictedmem.consumer import Bound
from restrictedmem.devkvm import GuestMemfd, VmFd, address_of
from restrictedmem.kvm.engine import Binder
from restrictedmem.service.wire import BindingFlag
from restrictedmem.units import MAX_FILE_BYTES, PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, PageRange, pgoff_t

_WHOLE: Final = PageRange(pgoff_t(0), pgoff_t(MAX_FILE_BYTES >> PAGE_SHIFT))


@final
class PrivateFile:
    """A restricted file's content in this VM, kept until the VM ends."""

    def __init__(
        self,
        ino: int,
        binding: int,
        memfd: GuestMemfd,
        size: int,
        limit: int | None,
        *,
        ranged: bool = False,
    ) -> None:
        """``size`` is the guest_memfd's, in bytes."""
        self.ino = ino
        #: Whether each slot has a binding of its own. If not, the first binding stays, for all.
        self.ranged = ranged
        self.bindings = {binding}
        self.memfd = memfd
        self.size = size
        self.limit = limit
        #: Pages freed by the owner.
        self.freed = 0
        #: The windows that slots show, each with the number of its slots; and the pages of all.
        self.shown: Counter[PageRange] = Counter()
        self._shown_pages = 0

    @property
    def binding(self) -> int:
        """A binding of the file; it may be any of them."""
        return next(iter(self.bindings))

    def check_limit(self, window: PageRange) -> None:
        """Check that the file has room for a further slot: guests allocate without asking.

        Raises:
            OSError: ENOSPC when the file could hold more than its limit: all pages of its slots,
                and those that are left of deleted slots.
        """
        if self.limit is None:
            return
        wanted = self._shown_pages + len(window)
        held = self.memfd.resident_pages(0, 0)
        if held + wanted > self.limit >> PAGE_SHIFT:
            left = held - sum(map(self._resident, _merged([*self.shown, window])))
            if left + wanted > self.limit >> PAGE_SHIFT:
                raise OSError(
                    ENOSPC,
                    "the file's slots, and pages left by deleted ones, must fit the service's "
                    "limit: guest_memfd grows without asking",
                )

    def show(self, window: PageRange) -> None:
        """Note the window of a new slot."""
        self.shown[window] += 1
        self._shown_pages += len(window)

    def hide(self, window: PageRange) -> None:
        """Note that a slot goes; its pages stay."""
        self._shown_pages -= len(window)
        self.shown[window] -= 1
        if not self.shown[window]:
            del self.shown[window]

    def _resident(self, span: PageRange) -> int:
        return self.memfd.resident_pages(span.start << PAGE_SHIFT, len(span) << PAGE_SHIFT)

    def punch(self, span: PageRange) -> None:
        """Free the pages of a range, and take them away from every vCPU."""
        self.freed += self._resident(span)
        self.memfd.punch_hole(span.start << PAGE_SHIFT, len(span) << PAGE_SHIFT)


def _check(bound: Bound) -> Bound:
    """Return a binding of a restricted file.

    Raises:
        OSError: EOPNOTSUPP for a guest_memfd of the service's, whose pages are converted in place.
    """
    if bound.flags & BindingFlag.GUEST_MEMFD:
        bound.memfd.close()
        bound.sequence.close()
        raise OSError(EOPNOTSUPP, "the kernel engine has no conversion in place")
    return bound


def _merged(spans: Iterable[PageRange]) -> list[PageRange]:
    """Return the pages of some ranges as ranges that do not overlap."""
    found: list[PageRange] = []
    for span in sorted(spans, key=lambda span: span.start):
        if found and span.start <= found[-1].end:
            found[-1] = PageRange(found[-1].start, max(found[-1].end, span.end))
        else:
            found.append(span)
    return found


@final
class GuestMemfdHalf:
    """A private half in a guest_memfd (``PrivateHalf``)."""

    __slots__ = ("_unbind", "binding", "file", "ino", "mapping", "window")

    def __init__(
        self, file: PrivateFile, window: PageRange, binding: int, unbind: Callable[[], None]
    ) -> None:
        """Show ``window`` of a file; closing the half calls ``unbind``."""
        self.file = file
        self.ino = file.ino
        self.binding = binding
        self.window = window
        self._unbind = unbind
        #: A mapping of the window, if the kernel allows one. An access to it is SIGBUS, unless the
        #: VM may be debugged.
        self.mapping: mmap.mmap | None = None
        if file.memfd.flags & GUEST_MEMFD_FLAG_MMAP:
            self.mapping = file.memfd.mmap(window.start << PAGE_SHIFT, self.locked)
        file.show(window)

    @property
    def locked(self) -> int:
        """How many bytes are locked: all, because guest_memfd is neither swapped nor moved."""
        return len(self.window) << PAGE_SHIFT

    @property
    def unlocked_because(self) -> str:
        """Empty, because all bytes are locked."""
        return ""

    @property
    def address(self) -> int:
        """Where the mapping lies in this process, 0 without one."""
        return 0 if self.mapping is None else address_of(self.mapping)

    def allocate(self, start: int, size: int) -> None:
        """Allocate pages from a byte offset of the window on.

        Raises:
            OSError: ENOMEM.
        """
        self.file.memfd.allocate((self.window.start << PAGE_SHIFT) + start, size)

    def _readable(self) -> mmap.mmap:
        if self.mapping is None or not self.file.memfd.flags & GUEST_MEMFD_FLAG_INIT_SHARED:
            raise OSError(EOPNOTSUPP, "private memory cannot be read by its engine")
        return self.mapping

    def read(self, start: int, size: int) -> bytes:
        """Return content from a byte offset of the window on; missing pages stay missing.

        Raises:
            OSError: EOPNOTSUPP unless the VM may be debugged.
        """
        mapping, found = self._readable(), bytearray()
        first = self.window.start << PAGE_SHIFT
        while size:
            piece = min(size, PAGE_SIZE - (start & PAGE_MASK))
            there = self.file.memfd.resident_pages(first + (start & ~PAGE_MASK), PAGE_SIZE)
            found += mapping[start : start + piece] if there else bytes(piece)
            start, size = start + piece, size - piece
        return bytes(found)

    def write(self, start: int, data: bytes) -> None:
        """Change content from a byte offset of the window on.

        Raises:
            OSError: EOPNOTSUPP unless the VM may be debugged.
        """
        self._readable()[start : start + len(data)] = data

    def close(self) -> None:
        """Unmap the window, and unbind it (``PrivateHalf``)."""
        self.file.hide(self.window)
        if self.mapping is not None:
            self.mapping.close()
        self._unbind()


@final
class PrivateFiles:
    """The restricted files of one VM.

    A binding of a whole file stays for as long as the file's content, although slots come and go.
    So every punch of the owner reaches the content. In the design ``bindings``, a binding is told
    of its own range alone, so each slot has its own. When such a slot goes, the content of its
    range goes, too: a later punch would not be heard here.
    """

    def __init__(self, vm: VmFd, binder: Binder, flags: int) -> None:
        """Know no file yet; ``flags`` are those of every guest_memfd."""
        self._vm = vm
        self._binder = binder
        self._flags = flags
        #: The VM's thread changes it; the thread that answers the service iterates over it, too.
        self._by_ino: dict[int, PrivateFile] = {}
        self._mutex = sync.mutex()
        # By binding: its file, and the range that it is told of.
        self._bindings: dict[int, tuple[PrivateFile, PageRange]] = {}

    def bind(self, token: bytes, window: PageRange) -> GuestMemfdHalf:
        """Make a half that shows ``window`` of a file (``Engine``).

        Raises:
            OSError: EINVAL as ``Binder.bind``; ENOSPC for more than the service's limit; EOPNOTSUPP
                for a guest_memfd of the service's.
        """
        bound = self._binder.bind(token, window, _check)
        # The memfd's size never changes, while the restricted file's does. A file of huge pages
        # ends with a whole huge page.
        size = os.fstat(bound.memfd.fileno()).st_size
        bound.memfd.close()
        bound.sequence.close()
        file = self._by_ino.get(bound.ino)
        try:
            if file is None:
                ranged = bool(bound.flags & BindingFlag.RANGE)
                memfd = self._vm.create_guest_memfd(size, self._flags)
                file = PrivateFile(bound.ino, bound.number, memfd, size, bound.limit, ranged=ranged)
                with self._mutex:
                    self._by_ino[bound.ino] = file
        except BaseException:
            self._binder.unbind(bound.number)
            raise
        if file.ranged:
            return self._show(file, bound.number, window)
        if bound.number not in file.bindings:
            self._binder.unbind(bound.number)
        return self._show(file, file.binding, window)

    def bind_again(self, ino: int, window: PageRange) -> GuestMemfdHalf:
        """Make a half that shows ``window`` of a file that a slot shows (``Engine``).

        Raises:
            OSError: ESTALE when no slot shows the file; else as ``bind``.
        """
        file = self._by_ino.get(ino)
        if file is None or not file.shown:
            raise OSError(ESTALE, "no slot shows that restricted file: a token has to say which")
        binding = file.binding
        if file.ranged:
            binding = self._binder.bind_again(binding, window, lambda number: number)
        return self._show(file, binding, window)

    def _show(self, file: PrivateFile, binding: int, window: PageRange) -> GuestMemfdHalf:
        self._bindings[binding] = file, window if file.ranged else _WHOLE
        file.bindings.add(binding)
        let_go = (
            partial(self._let_go, binding) if file.ranged else partial(self._let_go_if_empty, file)
        )
        try:
            if window.end << PAGE_SHIFT > file.size:
                raise OSError(EINVAL, f"{window} is no range of a file")
            file.check_limit(window)
            return GuestMemfdHalf(file, window, binding, let_go)
        except BaseException:
            let_go()
            raise

    def _let_go(self, binding: int) -> None:
        self._binder.unbind(binding)
        file, window = self._bindings.pop(binding)
        file.bindings.remove(binding)
        file.punch(window)

    def _let_go_if_empty(self, file: PrivateFile) -> None:
        """Forget a file without slots and content, such as one whose first slot failed."""
        if not file.shown and not file.memfd.resident_pages(0, 0):
            self._binder.unbind(file.binding)
            del self._bindings[file.binding]
            with self._mutex:
                del self._by_ino[file.ino]
                file.memfd.close()

    def unbind(self) -> None:
        """Unbind and close every file.

        Preconditions: no slot shows a file any more.
        """
        # Punches come until the last binding is gone.
        for binding in self._bindings:
            self._binder.unbind(binding)
        self._bindings.clear()
        self.close()

    def close(self) -> None:
        """Close every guest_memfd."""
        with self._mutex:
            for file in self._by_ino.values():
                file.memfd.close()
            self._by_ino.clear()

    def resident(self, binding: int, span: PageRange) -> int:
        """Count the pages that are held in a range of a binding's file."""
        found = self._bindings.get(binding)
        if found is None:
            return 0
        file, window = found
        inside = window.clip(span)
        return (
            file.memfd.resident_pages(inside.start << PAGE_SHIFT, len(inside) << PAGE_SHIFT)
            if len(inside)
            else 0
        )

    def punch(self, binding: int, span: PageRange) -> bool:
        """Free a range of a binding's file; return False if there is no such binding."""
        found = self._bindings.get(binding)
        if found is None:
            return False
        file, window = found
        if len(inside := window.clip(span)):
            file.punch(inside)
        return True

    def resident_pages(self) -> int:
        """Count the pages that the VM's files have."""
        with self._mutex:
            return sum(file.memfd.resident_pages(0, 0) for file in self._by_ino.values())

    @property
    def freed_pages(self) -> int:
        """Count the pages that the owner has freed."""
        with self._mutex:
            return sum(file.freed for file in self._by_ino.values())
