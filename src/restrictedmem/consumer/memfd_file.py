"""A restricted file in its consumer's process: the memfd and the sequence page."""

import os
from contextlib import ExitStack
from dataclasses import replace
from typing import final

from restrictedmem.abi.memory import PMD_ORDER, Mapping
from restrictedmem.consumer.consumer import Bound
from restrictedmem.fd import OwnedFd
from restrictedmem.mm.backing import Allocator, MappedBacking, take_over
from restrictedmem.mm.pages import Pages
from restrictedmem.mm.pin import PinnedBacking
from restrictedmem.mm.sequence import InvalidationSequence
from restrictedmem.service.wire import BindingFlag
from restrictedmem.units import PAGE_SHIFT, PageRange


@final
class MemfdFile:
    """The memfd and the sequence page of a restricted file.

    It is shared by all windows of the file in this process. The last ``put`` closes both.
    """

    __slots__ = (
        "_bound",
        "_users",
        "blksize",
        "ino",
        "is_guest_memfd",
        "memfd",
        "order",
        "pinned",
        "sequence",
    )

    def __init__(self, bound: Bound) -> None:
        """Own both descriptors of ``bound``, which are closed if this fails.

        Raises:
            OSError: ENOMEM.
        """
        self._users = 0
        self._bound = bound
        self.ino = bound.ino
        self.is_guest_memfd = bool(bound.flags & BindingFlag.GUEST_MEMFD)
        self.pinned = bool(bound.flags & BindingFlag.PIN)
        hugepage = bool(bound.flags & BindingFlag.HUGEPAGE)
        #: The order of the folio that a block becomes when it is taken whole.
        self.order = max(bound.order, PMD_ORDER if hugepage else 0)
        with ExitStack() as undo:
            undo.callback(bound.memfd.close)
            undo.callback(bound.sequence.close)
            self.sequence = InvalidationSequence(bound.sequence, writable=False)
            self.memfd = take_over(
                bound.memfd, limit=bound.limit, base_order=bound.order, hugepage=hugepage
            )
            #: Bytes of the largest folio that is possible.
            self.blksize = self.memfd.blksize
            undo.pop_all()

    def copy(self) -> "MemfdFile":
        """Return another object for the same file, for a window that shares its own with none.

        Raises:
            OSError: EMFILE, ENOMEM.
        """
        with ExitStack() as undo:
            memfd, sequence = (
                undo.enter_context(OwnedFd(os.dup(fd)))
                for fd in (self.memfd.fileno(), self.sequence.fd.fileno())
            )
            undo.pop_all()
        return MemfdFile(replace(self._bound, memfd=memfd, sequence=sequence))

    def pages(self, window: PageRange, mapping: Mapping) -> Pages:
        """Return the ``Pages`` of a window, which ``mapping`` maps.

        If the service has asked for pinning, the pages are pinned. The ``Pages`` of a pinned file
        own the memfd. So such a file has only one window, and the caller must close its ``Pages``.

        Raises:
            OSError: of a pinned file, as ``PinnedBacking``.
        """
        backing: Allocator = MappedBacking(self.memfd, mapping, window.start << PAGE_SHIFT)
        if self.pinned:
            backing = PinnedBacking(backing, mapping.address, window, self.sequence)
        return Pages(backing, window, self.sequence)

    @property
    def used(self) -> bool:
        """Whether any window uses the file."""
        return self._users > 0

    @property
    def closed(self) -> bool:
        """Whether the last user has gone."""
        return self.sequence.fd.closed

    def get(self) -> None:
        """Add a user."""
        self._users += 1

    def put(self) -> None:
        """Remove a user; after the last one both descriptors are closed."""
        self._users -= 1
        if not self._users:
            self.sequence.close()
            self.memfd.close()
