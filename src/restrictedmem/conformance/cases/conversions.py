"""Conversions and punches under a guest, as the kernel's private_mem_conversions_test makes them.

The selftest compares every byte of each half. Its loop that makes every other page of a range
shared never runs for a range of several pages; the cases here do what it says.
"""

from collections.abc import Callable, Generator, Iterator
from itertools import product
from typing import Final

from restrictedmem.conformance.case import Case, Family
from restrictedmem.conformance.machines import DATA, PRIVATE, Machine
from restrictedmem.conformance.outcome import outcome
from restrictedmem.protocol.guest_abi import MAP_GPA_RANGE_ENCRYPTED
from restrictedmem.units import PAGE_SIZE

P: Final = PAGE_SIZE
MB: Final = 1 << 20
_SIZE: Final = 2 * MB + P
#: The ranges of the selftest, by the name of their size and place.
_RANGES: Final = {
    "page": (0, P),
    "2m": (0, 2 * MB),
    "second-page": (P, P),
    "2m-from-second-page": (P, 2 * MB),
    "last-page": (2 * MB, P),
}

#: What was looked at, what was there, and what ought to be there.
Check = tuple[str, object, object]


def all_right(checks: Iterator[Check]) -> str:
    """Return the first check that fails, as text; go no further."""
    for what, seen, wanted in checks:
        if seen != wanted:
            return f"{what}: {seen}, not {wanted}"
    return "as expected"


def _scenario(body: Callable[[Machine], Iterator[Check]]) -> Callable[[Machine], object]:
    return lambda m: all_right(body(m))


def _two_halves(m: Machine) -> int:
    """Make a slot of ``_SIZE`` whose pages are shared; return the private file."""
    fd = m.private_file(_SIZE)
    m.set_region(size=_SIZE, shared=0, private=fd)
    m.set_attributes(DATA, _SIZE, 0)
    return fd


def _convert(m: Machine, fd: int, start: int, size: int, attributes: int, backed: bool) -> None:
    """Convert a range; with ``backed``, also allocate or free its private pages."""
    m.set_attributes(DATA + start, size, attributes)
    if backed:
        (m.allocate if attributes else m.punch)(fd, start, size)


def _shared_at_first(m: Machine) -> Generator[Check]:
    _two_halves(m)
    m.fill(DATA, _SIZE, 0xAA)
    yield "the host's view", m.host_sees(0, _SIZE), "0xaa"
    m.host_fill(0, _SIZE, 0xCC)
    yield "the guest's view", m.sees(DATA, _SIZE), "0xcc"


def _converted(start: int, size: int, backed: bool) -> Callable[[Machine], Iterator[Check]]:
    """Return what the selftest does with a range."""

    def body(m: Machine) -> Iterator[Check]:
        fd = _two_halves(m)
        m.host_fill(0, _SIZE, 0xCC)
        at = DATA + start
        m.fill(at, size, 0x11)
        _convert(m, fd, start, size, PRIVATE, backed)
        m.fill(at, size, 0x22)
        yield "the shared half, behind private pages", m.host_sees(start, size), "0x11"
        yield "private pages", m.sees(at, size), "0x22"
        yield from _neighbours(m, start, size)
        yield from _every_other(m, fd, start, size, backed)
        _convert(m, fd, start, size, 0, backed)
        m.fill(at, size, 0x33)
        yield "pages that are shared again", m.host_sees(start, size), "0x33"
        m.host_fill(start, size, 0x44)
        yield "the host's bytes", m.sees(at, size), "0x44"
        yield from _neighbours(m, start, size)
        _convert(m, fd, 0, _SIZE, 0, True)
        yield "private pages after a punch", m.held(fd), 0

    return body


def _neighbours(m: Machine, start: int, size: int) -> Iterator[Check]:
    if start:
        yield "pages below", m.sees(DATA, start), "0xcc"
    if end := _SIZE - start - size:
        yield "pages above", m.sees(DATA + start + size, end), "0xcc"


def _every_other(m: Machine, fd: int, start: int, size: int, backed: bool) -> Iterator[Check]:
    """Make the odd pages of a private range shared, and look at both kinds."""
    odd = range(start + P, start + size, 2 * P)
    with m.steps.summed(f"make each of {len(odd)} odd pages shared, look at it, and fill it"):
        for page in odd:
            _convert(m, fd, page, P, 0, backed)
            yield "an odd page of the shared half", m.host_sees(page, P), "0x11"
            m.host_fill(page, P, 0x33)
    for first, wanted in ((start, "0x22"), (start + P, "0x33")):
        if count := len(range(first, start + size, 2 * P)):
            seen = m.sees(DATA + first, P, count, 2 * P)
            yield f"every other page from page {first // P}", seen, wanted
    with m.steps.summed("look at each page of the shared half"):
        for page in range(start, start + size, P):
            wanted = "0x33" if page in odd else "0x11"
            yield f"page {page // P} of the shared half", m.host_sees(page, P), wanted


def _punched(whole: bool) -> Callable[[Machine], Iterator[Check]]:
    """Return punches of each range, of which the guest has filled all or just that range."""

    def body(m: Machine) -> Iterator[Check]:
        fd = m.private_file(_SIZE)
        m.set_region(size=_SIZE, shared=0, private=fd)
        m.make_private(DATA, _SIZE)
        for name, (start, size) in _RANGES.items():
            m.punch(fd, 0, _SIZE)
            yield f"{name}: pages", m.held(fd), 0
            first, count = (0, _SIZE) if whole else (start, size)
            m.fill(DATA + first, count, 0xCC)
            yield f"{name}: filled", m.sees(DATA + first, count), "0xcc"
            m.punch(fd, start, size)
            yield f"{name}: punched", m.sees(DATA + start, size), "0x0"
            if whole:
                yield from _neighbours(m, start, size)

    return body


def _after_the_vm(m: Machine) -> object:
    fd = m.private_file(_SIZE)
    m.set_region(size=_SIZE, private=fd, shared=0)
    m.make_private(DATA, _SIZE)
    m.fill(DATA, _SIZE, 1)
    m.end()
    return (
        outcome(lambda: m.punch(fd, 0, _SIZE)),
        outcome(lambda: m.allocate(fd, 0, _SIZE)),
        m.held(fd),
    )


def _with_an_offset(m: Machine) -> object:
    """Punch the page that a slot shows, and pages of the same number that it does not show."""
    fd = m.private_file(8 * MB)
    m.set_region(size=4 * MB, private=fd, offset=4 * MB)
    m.make_private(DATA, 4 * MB)
    m.fill(DATA, 8 * P, 7)
    m.punch(fd, 3 * P, P)
    kept = m.sees(DATA, 8 * P)
    m.punch(fd, 4 * MB + 3 * P, P)
    return kept, m.sees(DATA + 3 * P, P), m.sees(DATA, 3 * P), m.sees(DATA + 4 * P, 4 * P)


def _of_two_slots(m: Machine) -> object:
    """Punch over the border of two slots that show one file in the other order."""
    fd = m.private_file(8 * P)
    m.set_region(11, DATA + 4 * P, 4 * P, private=fd)
    m.set_region(12, DATA, 4 * P, private=fd, offset=4 * P)
    m.make_private(DATA, 8 * P)
    m.fill(DATA, 8 * P, 7)
    m.punch(fd, 3 * P, 2 * P)
    return tuple(m.sees(DATA + page * P, P) for page in range(8))


def _of_many_slots(m: Machine) -> object:
    """Show two files page by page in turns, and punch each; return the slots that lost a page."""
    files = [m.private_file(12 * P) for _ in range(2)]
    for page in range(12):
        m.set_region(page, DATA + page * P, P, private=files[page % 2], offset=page * P)
    m.make_private(DATA, 12 * P)
    m.fill(DATA, 12 * P, 7)
    m.punch(files[0], 4 * P, P)
    m.punch(files[1], 4 * P, 2 * P)
    return tuple(page for page in range(12) if m.sees(DATA + page * P, P) == "0x0")


def _across_slots(m: Machine) -> object:
    """Convert a range that two slots and a gap lie in."""
    fd = m.private_file(8 * P)
    m.set_region(11, DATA, 2 * P, shared=0, private=fd)
    m.set_region(12, DATA + 4 * P, 4 * P, shared=4 * P, private=fd, offset=4 * P)
    m.set_attributes(DATA, 8 * P, 0)
    m.set_attributes(DATA + P, 4 * P)
    m.fill(DATA, 2 * P, 7)
    m.fill(DATA + 4 * P, 4 * P, 7)
    return tuple(m.host_sees(page * P, P) for page in (0, 1, 4, 5))


def _by_hypercall(m: Machine) -> Generator[Check]:
    fd = _two_halves(m)
    m.host_fill(0, _SIZE, 0xCC)
    for name, (start, size) in _RANGES.items():
        for attributes in (MAP_GPA_RANGE_ENCRYPTED, 0):
            asked = m.map_gpa_range(DATA + start, size // P, attributes)
            wanted = f"HYPERCALL MAP_GPA_RANGE {DATA + start:#x} {size // P} {attributes:#x}"
            yield f"{name}: the exit", asked, wanted
            _convert(m, fd, start, size, PRIVATE if attributes else 0, True)
            yield f"{name}: the guest's answer", m.go_on(0), 0
            view = m.sees(DATA + start, size)
            yield f"{name}: the guest's view", view, "0x0" if attributes else "0xcc"


_TEST: Final = "private_mem_conversions_test.c "
_RIGHT: Final = {"gmem": "as expected", "proposal": "as expected"}
_HALVES: Final = ("halves",)
_REACHED: Final = ("private-memory",)

CASES: Final = (
    Case(
        "convert-shared-at-first",
        Family.VM,
        _scenario(_shared_at_first),
        _RIGHT,
        _TEST + "guest_test_explicit_conversion",
        ("PMC-0",),
        _HALVES,
    ),
    *(
        Case(
            f"convert-{name}{'-backed' if backed else ''}",
            Family.VM,
            _scenario(_converted(*place, backed)),
            _RIGHT,
            _TEST + "guest_test_explicit_conversion",
            tuple(f"PMC-r-{number}" for number in range(1, 11)),
            _HALVES,
        )
        for (name, place), backed in product(_RANGES.items(), (False, True))
    ),
    *(
        Case(
            f"punch-under-guest-{'full' if whole else 'precise'}",
            Family.VM,
            _scenario(_punched(whole)),
            _RIGHT,
            _TEST + "guest_test_punch_hole",
            ("PMC-PUNCH",),
            _REACHED,
        )
        for whole in (False, True)
    ),
    Case(
        "file-after-vm",
        Family.VM,
        _after_the_vm,
        {
            "gmem": (None, None, _SIZE // P),
            "in-place": (None, None, 0),
            "proposal": (None, None, _SIZE // P),
        },
        _TEST + "__test_mem_conversions",
        ("PMC-END-1", "PMC-END-2"),
    ),
    Case(
        "punch-with-offset",
        Family.VM,
        _with_an_offset,
        {"gmem": ("0x7", "0x0", "0x7", "0x7"), "proposal": ("0x7", "0x0", "0x7", "0x7")},
        "virt/kvm/guest_memfd.c kvm_gmem_invalidate_begin; v10 3/9",
        needs=_REACHED,
    ),
    Case(
        "punch-of-two-slots",
        Family.VM,
        _of_two_slots,
        dict.fromkeys(("gmem", "proposal"), ("0x0", *(("0x7",) * 6), "0x0")),
        "virt/kvm/guest_memfd.c kvm_gmem_invalidate_begin; v10 3/9",
        needs=_REACHED,
    ),
    Case(
        "punch-of-many-slots",
        Family.VM,
        _of_many_slots,
        {"gmem": (4, 5), "proposal": (4, 5)},
        "virt/kvm/guest_memfd.c kvm_gmem_invalidate_begin; v10 3/9",
        needs=_REACHED,
    ),
    Case(
        "convert-across-slots",
        Family.VM,
        _across_slots,
        dict.fromkeys(("gmem", "proposal"), ("0x7", "0x0", "0x0", "0x7")),
        "virt/kvm/kvm_main.c kvm_vm_set_mem_attributes; v10 2/9; v9 5/8",
        needs=_HALVES,
    ),
    Case(
        "convert-by-hypercall",
        Family.VM,
        _scenario(_by_hypercall),
        _RIGHT,
        _TEST + "handle_exit_hypercall",
        needs=(*_HALVES, "hypercall"),
    ),
)
