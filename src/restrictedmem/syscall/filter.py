"""The calls of a program that stop for the supervisor, as few as classic BPF can tell apart.

A filter sees the architecture, the number and the arguments of a call, and no memory. Number 451 is
that of v9 and v10 in both tables of x86. Since Linux 6.5 it is cachestat's, which the supervisor
tells apart.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from errno import ENOSYS
from typing import Final

from restrictedmem.abi.seccomp import (
    AUDIT_ARCH,
    SECCOMP_RET_ALLOW,
    SECCOMP_RET_ERRNO,
    SECCOMP_RET_USER_NOTIF,
    X32_BIT,
    assemble,
    jump_if_any,
    jump_unless,
    keep,
    load,
    ret,
    sock_filter,
)

MAP_PRIVATE: Final = 0x02
MAP_TYPE: Final = 0x0F
MAP_FIXED: Final = 0x10
MAP_ANONYMOUS: Final = 0x20
MAP_HUGETLB: Final = 0x4_0000
MAP_FIXED_NOREPLACE: Final = 0x10_0000
#: glibc's loader sets this flag on everything that it maps, and the kernel ignores it. So programs
#: start even if the supervisor is gone.
_MAP_DENYWRITE: Final = 0x0800


@dataclass(frozen=True, slots=True)
class Table:
    """The numbers of one architecture's calls that are of interest."""

    arch: int
    mmap: int
    fstatfs: int
    #: i386 has a second fstatfs, with the size of the struct between its arguments.
    fstatfs64: int | None = None
    #: i386 also has an old mmap, whose arguments are in a struct that no filter sees. It always
    #: stops.
    old_mmap: int | None = None


#: For each machine, the tables of the programs that it runs. aarch64 is untried.
TABLES: Final[dict[str, tuple[Table, ...]]] = {
    "x86_64": (
        Table(AUDIT_ARCH["x86_64"], mmap=9, fstatfs=138),
        Table(AUDIT_ARCH["i386"], mmap=192, fstatfs=100, fstatfs64=269, old_mmap=90),
    ),
    "aarch64": (Table(AUDIT_ARCH["aarch64"], mmap=222, fstatfs=44),),
}


def program(machine: str, number: int) -> list[sock_filter]:
    """Return the filter of a machine, with memfd_restricted's number.

    Raises:
        KeyError: for a machine whose numbers are not known.
    """
    found = [load("arch")]
    for table in TABLES[machine]:
        found += assemble(
            jump_unless(table.arch, "another architecture"),
            load("nr"),
            *_calls(table, number),
            ret(SECCOMP_RET_ALLOW),
            "another architecture",
        )
    return [*found, ret(SECCOMP_RET_ALLOW)]


def _calls(table: Table, number: int) -> Iterator[sock_filter]:
    stop = [ret(SECCOMP_RET_USER_NOTIF)]
    private = assemble(
        load("arg3"),
        jump_if_any(MAP_ANONYMOUS | _MAP_DENYWRITE, "allow"),
        keep(MAP_TYPE),
        jump_unless(MAP_PRIVATE, "allow"),
        *stop,
        "allow",
        ret(SECCOMP_RET_ALLOW),
    )
    rules: list[tuple[int | None, list[sock_filter]]] = [
        (number, stop),
        (table.fstatfs, stop),
        (table.fstatfs64, stop),
        (table.old_mmap, stop),
        (table.mmap, private),
    ]
    if table.arch == AUDIT_ARCH["x86_64"]:
        # No kernel had the call in the table of x32. The arguments that such a program passes by
        # reference would have to be read otherwise.
        rules.append((number | X32_BIT, [ret(SECCOMP_RET_ERRNO | ENOSYS)]))
    for call, body in rules:
        if call is not None:
            yield from assemble(jump_unless(call, "another call"), *body, "another call")
