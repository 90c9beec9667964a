"""Cases of pages that stay in place and in memory: compaction, migration and reclaim."""

from collections.abc import Callable
from typing import Final

from restrictedmem.conformance import placement
from restrictedmem.conformance.case import Case, NotApplicable
from restrictedmem.conformance.cases.rows import file
from restrictedmem.conformance.files import File
from restrictedmem.conformance.placement import MOVED, STAYED, SWAPPED

_UNSEEN: Final = NotApplicable("its owner can touch no page, so no frame of it can be seen")
_SUPERVISED: Final = NotApplicable("its service belongs to the supervisor, which has no consumer")


def _place(
    id: str,
    does: Callable[[File], str],
    memfd: str,
    descriptor: str,
    in_place: object,
    source: str,
) -> Case:
    """Write a case whose pages stay, except those of a memfd and of an unpinned descriptor."""
    return file(
        id,
        does,
        {
            "memfd": memfd,
            "descriptor": descriptor,
            "descriptor-pinned": STAYED,
            "secret": STAYED,
            "gmem-shared": STAYED,
            "gmem": _UNSEEN,
            "in-place": in_place,
            "syscall": _SUPERVISED,
            "proposal": _UNSEEN,
        },
        source,
    )


CASES: Final[tuple[Case, ...]] = (
    _place(
        "place-compaction",
        placement.after_compaction,
        MOVED,
        MOVED,
        MOVED,
        "Documentation/admin-guide/sysctl/vm.rst, compact_memory; AS_UNMOVABLE",
    ),
    _place(
        "place-collapse",
        placement.after_collapse,
        MOVED,
        MOVED,
        STAYED,
        "madvise(2), MADV_COLLAPSE; guest_memfd_test.c test_collapse",
    ),
    _place(
        "place-move-pages",
        placement.after_move_pages,
        MOVED,
        MOVED,
        MOVED,
        "move_pages(2); virt/kvm/guest_memfd.c kvm_gmem_migrate_folio; mm/secretmem.c",
    ),
    _place(
        "place-pageout",
        placement.after_pageout,
        SWAPPED,
        STAYED,
        NotApplicable("its page cache is written back to the service, which is no swap area"),
        "madvise(2), MADV_PAGEOUT; AS_UNEVICTABLE",
    ),
)
