"""Where things lie in the guests that the fuzzer makes: pages, by number, from ``BASE`` on."""

from typing import Final

from restrictedmem.protocol import guest_abi

PAGE: Final = 4096
BASE: Final = guest_abi.PRIVATE_BASE

#: A slot with both halves: code that brings a vCPU to its first exit, the stack, and the first half
#: of programs.
FRONT_SLOT: Final = range(10)
STACK: Final = range(6, 8)
CODE: Final = range(8, 12)
#: A slot without a shared half, where programs go on: one time in some it is missing until it is
#: asked for.
TAIL_SLOT: Final = range(10, 12)
#: A slot with both halves, and those of its pages that hold data.
BOTH_SLOT: Final = range(12, 24)
BOTH: Final = range(20, 24)
#: A slot without a shared half, and one without a private half.
LONE: Final = range(24, 26)
WINDOW: Final = range(26, 28)
#: KVM_MEM_READONLY.
ROM: Final = range(28, 29)
#: No slot: MMIO, and what its attribute forbids to be MMIO.
HOLE: Final = range(29, 31)
DATA: Final = range(BOTH.start, HOLE.stop)
#: Pages that no program uses. They are converted and punched while it runs, beside the pages that
#: it uses (``mmu.FAULT_AROUND``).
SPARE: Final = (*range(1, 6), *range(12, 20))
#: From the first to the last page whose private half programs see, those between included.
PRIVATE_RUN: Final = range(STACK.start, LONE.stop)

#: Pages with a private half, and those with a shared one too, that programs see.
PRIVATE: Final = (*STACK, *CODE, *BOTH, *LONE)
TWO_HALVES: Final = (*STACK, *CODE[:2], *BOTH)
#: Whether each page is private when no program needs it otherwise; and the attribute under which it
#: has nothing to show.
AT_REST: Final = {
    page: page in PRIVATE or page == HOLE[1] for page in (*PRIVATE, *WINDOW, *ROM, *HOLE)
}
MISSING: Final = {
    **dict.fromkeys((*TAIL_SLOT, *LONE), False),
    **dict.fromkeys((*WINDOW, *ROM, *HOLE), True),
}


def address(page: int) -> int:
    """Return the guest address of a page."""
    return BASE + page * PAGE


def page_of(gpa: int) -> int:
    """Return the page that a guest address lies in; any number for an address elsewhere."""
    return (gpa - BASE) // PAGE


#: Where data begin. A storm changes what lies before: no program may read it.
FIRST_DATA: Final = address(DATA.start)
