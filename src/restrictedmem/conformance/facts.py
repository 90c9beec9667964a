"""The differences between versions of Linux, each with its source.

The suite recognises a fact by the kernel's answer, never by the number of a version: vendors carry
changes to older kernels. ``versions`` is a note for the reader.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Fact:
    """One change of the kernel that a program can see."""

    id: str
    says: str
    #: The versions of mainline Linux with the earlier answer.
    versions: str
    source: str
    #: Year and month of the change.
    date: str


OVERLAP_IN_FILE: Final = Fact(
    "overlap-in-file",
    "A slot whose range of a guest_memfd is bound already was EINVAL, and is EEXIST now.",
    "6.8 to 7.1",
    "virt/kvm/guest_memfd.c, kvm_gmem_bind",
    "2026-06",
)

FACTS: Final = (OVERLAP_IN_FILE,)
