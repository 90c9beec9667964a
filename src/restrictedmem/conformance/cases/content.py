"""Cases about a descriptor's content: read, write, and the calls between files."""

from errno import EINVAL, ESPIPE
from typing import Final

from restrictedmem.conformance.case import Case, Family
from restrictedmem.conformance.outcome import Errno

CASES: Final = (
    Case(
        "read",
        Family.FILE,
        lambda f: f.read(64),
        {"proposal": Errno(EINVAL), "secret": Errno(EINVAL), "gmem": Errno(EINVAL), "memfd": 0},
        source="guest_memfd_test.c test_file_read_write; read(2)",
        covers=("GM-RW-1",),
    ),
    Case(
        "pread",
        Family.FILE,
        lambda f: f.pread(64, 0),
        {"proposal": Errno(ESPIPE), "secret": Errno(ESPIPE), "gmem": Errno(ESPIPE), "memfd": 0},
        source="guest_memfd_test.c test_file_read_write",
        covers=("GM-RW-3",),
    ),
)
