"""One row, one operation on a descriptor: what each kind of descriptor answers."""

import os
import re
from dataclasses import dataclass
from typing import Any

from descriptor_operations import Operation
from outcomes import Errno
from restrictedmem.abi.memory import FallocMode

KEEP = int(FallocMode.KEEP_SIZE)


class _Same:
    """Stands for the proposal's answer, in another column."""


class _Unsaid:
    """Stands for an answer that nobody states."""


SAME, UNSAID = _Same(), _Unsaid()

_RELEASE = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])


def since(release: tuple[int, int], answer: object, before: object) -> object:
    """Return this kernel's answer; kernels before a release gave ``before``.

    The answers were seen on 6.1, 6.12, 6.18 and 7.3.
    """
    return answer if release <= _RELEASE else before


@dataclass(frozen=True)
class Row:
    """One operation and its outcomes.

    ``gmem`` is guest_memfd with flags 0, ``gmem_mmap`` with MMAP (None: the same).
    """

    id: str
    operation: Operation
    proposal: object
    key: str = ""
    here: object = SAME
    memfd: object = UNSAID
    secret: object = UNSAID
    gmem: object = UNSAID
    gmem_mmap: object = None

    def expected(self, subject: str) -> object:
        columns: dict[str, object] = {
            "v9": self.here,
            "v10": self.here,
            "memfd": self.memfd,
            "secret": self.secret,
            "gmem": self.gmem,
            "gmem-mmap": self.gmem if self.gmem_mmap is None else self.gmem_mmap,
        }
        found = columns[subject]
        return self.proposal if found is SAME else found


def row(
    id: str, operation: Operation, proposal: object, *, all_same: bool = False, **columns: Any
) -> Row:
    """Write a row; ``all_same``: secret and both kinds of guest_memfd answer as the proposal."""
    if all_same:
        columns = {"secret": SAME, "gmem": SAME, **columns}
    return Row(id, operation, proposal, **columns)


def refused(id: str, operation: Operation, errno: int, **columns: Any) -> Row:
    """Write a row for an operation that the proposal refuses.

    Secret and guest_memfd refuse it too, unless a column says otherwise.
    """
    return row(id, operation, Errno(errno), all_same=True, **columns)
