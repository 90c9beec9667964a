"""A host with SEV-SNP: RMP and direct map, in step with what a VM maps and loses.

docs/understand/platform.md says what this models and what it does not. Each GiB of a file lies in a
GiB of physical memory of its own, in the order of first use. So the same calls always have the same
result. The pages of one folio are contiguous there, but so are pages of several folios.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from errno import EFAULT
from typing import Final, final

from restrictedmem import sync
from restrictedmem.platform.direct_map import PMD_ORDER, PTE_ORDER, PUD_ORDER
from restrictedmem.platform.sev import Sev
from restrictedmem.units import PAGE_SHIFT, PageRange, gfn_t

_PMD_PAGES: Final = 1 << PMD_ORDER
_PUD_PAGES: Final = 1 << PUD_ORDER
#: Address space identifier of the only guest.
_ASID: Final = 1
#: Calls that are remembered for stories, stories in a report, and calls in each story.
_REMEMBERED: Final = 1 << 16
_STORIES: Final = 16
_TOLD_CALLS: Final = 16
_SIZES: Final = {PUD_ORDER: "1G", PMD_ORDER: "2M", PTE_ORDER: "4K"}


class _Befell(Enum):
    MAPPED = "mapped into the guest"
    TOLD = "told that it goes"
    FREED = "freed, and written by the host"


@final
@dataclass(frozen=True, slots=True)
class _EngineCall:
    """One call of the engine, for stories."""

    number: int
    ino: int
    span: PageRange
    what: _Befell
    detail: str

    def __str__(self) -> str:
        return f"{self.number}. {self.span} {self.what.value}{self.detail}"


@final
@dataclass(frozen=True, slots=True)
class Violation:
    """Adjacent pages of a file that violate a rule of the platform in the same way.

    ``story`` says what happened to the first of them.
    """

    rule: str
    ino: int
    start: int
    npages: int
    story: list[str]


@final
class Snp:
    """Direct map and RMP under one VM (``Platform``).

    ``_lock`` is the last lock in the lock order. It is held for one call, never across a wait.
    """

    __slots__ = ("_calls", "_count", "_frames", "_lock", "_name", "_violated", "_violations", "sev")

    def __init__(self, *, unmap: bool) -> None:
        """Begin with memory that belongs to the host; ``unmap`` is that of ``Sev``."""
        self.sev = Sev(unmap=unmap)
        self._name = "snp-unmapped" if unmap else "snp"
        self._lock = sync.mutex()
        #: The GiB of physical memory that holds each GiB of a file. GiB 0 is not used.
        self._frames: dict[tuple[int, int], int] = {}
        self._calls = deque[_EngineCall](maxlen=_REMEMBERED)
        self._count = 0
        self._violated = 0
        self._violations: list[Violation] = []

    def prepare(self, ino: int, span: PageRange, gfn: gfn_t, order: int) -> None:
        """Assign the pages that are not assigned yet (``sev_gmem_prepare``).

        A block of 2 MiB that lies whole in the range and in one folio gets one entry. All other
        pages get entries of 4 KiB.
        """
        with self._lock:
            self._remember(ino, span, _Befell.MAPPED, f" from gfn {gfn:#x} on, order {order}")
            for frame in range(span.start >> PUD_ORDER, (span.end - 1 >> PUD_ORDER) + 1):
                self.sev.direct_map.add(
                    self._frames.setdefault((ino, frame), len(self._frames) + 1) << PUD_ORDER
                )
            for pgoff, start, end in self._blocks(ino, span):
                gpa = gfn + pgoff - span.start << PAGE_SHIFT
                whole = (
                    end - start == _PMD_PAGES
                    and order >= PMD_ORDER
                    and not gpa >> PAGE_SHIFT & _PMD_PAGES - 1
                )
                if whole and self.sev.is_shared(start):
                    self._assign(start, gpa, PMD_ORDER)
                else:
                    self._prepare_small(ino, pgoff, range(start, end), gpa)

    def _prepare_small(self, ino: int, pgoff: int, pfns: range, gpa: int) -> None:
        for index, pfn in enumerate(pfns):
            entry, wanted = self.sev.rmp.lookup(pfn), gpa + (index << PAGE_SHIFT)
            if not entry.assigned:
                self._assign(pfn, wanted, PTE_ORDER)
                continue
            if entry.gpa + ((pfn & (1 << entry.order) - 1) << PAGE_SHIFT) != wanted:
                self._violate("assigned to the guest at another address", ino, pgoff + index, 1)
                raise OSError(
                    EFAULT, f"page {pgoff + index:#x} is assigned to the guest at another address"
                )
            if entry.order == PMD_ORDER and len(pfns) < _PMD_PAGES:
                # A private access through 4 KiB of an entry of 2 MiB is #NPF with the SIZEM bit.
                # The host then does this.
                self.sev.psmash(pfn & -_PMD_PAGES)

    def _assign(self, pfn: int, gpa: int, order: int) -> None:
        self.sev.make_private(pfn, gpa, order, _ASID)
        # A guest of this project accepts memory lazily, at its first touch.
        self.sev.rmp.pvalidate(pfn, order)

    def invalidate(self, ino: int, span: PageRange, order: int | None) -> None:
        """Take pages back, and merge direct map entries where a whole block comes back.

        Entries are merged only if the block is known to be of one folio.
        """
        with self._lock:
            self._remember(
                ino,
                span,
                _Befell.TOLD,
                ", of no folio" if order is None else f", of a folio of order {order}",
            )
            for _, start, end in self._blocks(ino, span):
                if not self.sev.is_shared(start):
                    self.sev.reclaim(start, end)
                if (
                    order is not None
                    and order >= PMD_ORDER
                    and end - start == _PMD_PAGES
                    and self.sev.is_shared(start)
                ):
                    self.sev.direct_map.merge(start, PMD_ORDER)
                    if order >= PUD_ORDER and not end & _PUD_PAGES - 1:
                        self.sev.direct_map.merge(start, PUD_ORDER)

    def freed(self, ino: int, span: PageRange) -> None:
        """Let the host write to each page, as it does when it clears a page for its next user."""
        with self._lock:
            self._remember(ino, span, _Befell.FREED)
            for pgoff, start, end in self._blocks(ino, span):
                if self.sev.is_shared(start):
                    continue
                for first, last in _runs(
                    pfn
                    for pfn in range(start, end)
                    if pfn not in self.sev.leaked and self._write_faults(pfn)
                ):
                    entry = self.sev.rmp.lookup(first)
                    whose = (
                        f"is the guest's (gpa {entry.gpa:#x})"
                        if entry.assigned
                        else "lies in 2 MiB with a page of the guest's"
                    )
                    self._violate(
                        f"the host writes to a page that {whose}",
                        ino,
                        pgoff + first - start,
                        last - first,
                    )

    def _write_faults(self, pfn: int) -> bool:
        # Pages that are absent from the direct map are assigned. So the RMP alone decides.
        order, _ = self.sev.direct_map.lookup(pfn)
        return self.sev.rmp.write_faults(pfn, order)

    def _blocks(self, ino: int, span: PageRange) -> Iterator[tuple[int, int, int]]:
        """Yield a range cut at 2 MiB: page of the file, first pfn, pfn after the last.

        Parts that were never used are left out.
        """
        pgoff = int(span.start)
        while pgoff < span.end:
            frame = self._frames.get((ino, pgoff >> PUD_ORDER))
            end = min(span.end, (pgoff | (_PUD_PAGES if frame is None else _PMD_PAGES) - 1) + 1)
            if frame is not None:
                start = frame << PUD_ORDER | pgoff & _PUD_PAGES - 1
                yield pgoff, start, start + end - pgoff
            pgoff = end

    def _remember(self, ino: int, span: PageRange, what: _Befell, detail: str = "") -> None:
        self._count += 1
        self._calls.append(_EngineCall(self._count, ino, span, what, detail))

    def _violate(self, rule: str, ino: int, start: int, npages: int) -> None:
        self._violated += npages
        if len(self._violations) < _STORIES:
            story = [
                call
                for call in self._calls
                if call.ino == ino and call.span.start <= start < call.span.end
            ]
            before = [call.what for call in story if call.what is not _Befell.FREED]
            if before and before[-1] is _Befell.MAPPED and story[-1].what is _Befell.FREED:
                rule += ", and nobody was told that it goes"
            self._violations.append(
                Violation(rule, ino, start, npages, [str(call) for call in story[-_TOLD_CALLS:]])
            )

    def report(self) -> dict[str, object]:
        """Return counts since the start, and the first violated rules (``Platform``)."""
        with self._lock:
            direct_map, rmp = self.sev.direct_map, self.sev.rmp
            counts = {
                "entries": direct_map.entries(),
                "splits": direct_map.splits,
                "merges": direct_map.merges,
                "removals": direct_map.removals,
                "restores": direct_map.restores,
            }
            return {
                "platform": self._name,
                "direct_map": {
                    name: {size: found[order] for order, size in _SIZES.items()}
                    for name, found in counts.items()
                },
                "absent_pages": direct_map.absent(),
                "rmp_operations": dict(rmp.operations),
                "assigned_pages": len(rmp.all_assigned()),
                "leaked_pages": len(self.sev.leaked),
                "violated_pages": self._violated,
                "violations": [asdict(violation) for violation in self._violations],
            }


def _runs(pfns: Iterator[int]) -> Iterator[tuple[int, int]]:
    """Yield runs of adjacent pages: the first page, and the page after the last."""
    first = last = -1
    for pfn in pfns:
        if pfn != last:
            if first >= 0:
                yield first, last
            first = pfn
        last = pfn + 1
    if first >= 0:
        yield first, last
