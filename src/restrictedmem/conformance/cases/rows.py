"""Short ways to write a case of a descriptor."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from restrictedmem.conformance.case import Case, Family, NotApplicable
from restrictedmem.conformance.files import File
from restrictedmem.conformance.outcome import Errno
from restrictedmem.units import PAGE_SHIFT, PAGE_SIZE

#: The selftest of guest_memfd.
GMEM_TEST: Final = "tools/testing/selftests/kvm/guest_memfd_test.c"
#: The selftest of memfd_secret.
MM_TEST: Final = "tools/testing/selftests/mm/memfd_secret.c"
#: The two postings of memfd_restricted.
POSTING: Final = "memfd_restricted v9 and v10, mm/restrictedmem.c"


def file(
    id: str,
    does: Callable[[File], object],
    expected: Mapping[str, object],
    source: str,
    covers: tuple[str, ...] = (),
    *,
    divergence: str = "",
) -> Case:
    """Write a case of a descriptor."""
    return Case(id, Family.FILE, does, expected, source, covers, divergence=divergence)


def unaligned(*, by_message: bool) -> Sequence[int]:
    """Return all numbers below a page, or 24 of them where a call is a message to a process.

    The 24 are the powers of two, and what these lack of a page.
    """
    powers = [1 << bit for bit in range(PAGE_SHIFT)]
    some = sorted({*powers, *(PAGE_SIZE - power for power in powers)})
    return some if by_message else range(1, PAGE_SIZE)


def private(answer: object) -> dict[str, object]:
    """Return one answer for the private kinds: the proposal, memfd_secret and guest_memfd."""
    return dict.fromkeys(("proposal", "secret", "gmem"), answer)


def everywhere(answer: object) -> dict[str, object]:
    """Return one answer for every kind."""
    return {**private(answer), "memfd": answer}


def refused(errno: int, **others: Any) -> dict[str, object]:
    """Return an errno for the private kinds, and answers of others."""
    return {**private(Errno(errno)), **others}


def mapped(answer: object, why: str = "it cannot be mapped") -> dict[str, object]:
    """Return one answer for each kind that can be mapped; the others have none."""
    return {
        "memfd": answer,
        "secret": answer,
        "gmem-mapped": answer,
        "gmem-unmapped": NotApplicable(why),
        "proposal": NotApplicable(why),
    }


def by_fuse(answer: object) -> dict[str, object]:
    """Return one answer for the files of this project, which FUSE serves."""
    return {"descriptor": answer, "in-place": answer}


def only_gmem(answer: object, why: str) -> dict[str, object]:
    """Return an answer of guest_memfd; for the others the case makes no sense."""
    return {**everywhere(NotApplicable(why)), "gmem": answer}
