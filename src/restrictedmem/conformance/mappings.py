"""A mapping of a descriptor under test, and what its owner can do to it."""

import ctypes
import mmap as python_mmap
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Final, final

from restrictedmem.abi import memory, userfaultfd
from restrictedmem.conformance import calls
from restrictedmem.conformance.case import UnsupportedError
from restrictedmem.conformance.files import SIZE, File, pipe
from restrictedmem.conformance.steps import Steps
from restrictedmem.units import PAGE_SIZE

R: Final = python_mmap.PROT_READ
W: Final = python_mmap.PROT_WRITE
X: Final = python_mmap.PROT_EXEC
SHARED: Final = python_mmap.MAP_SHARED
PRIVATE: Final = python_mmap.MAP_PRIVATE
_PROTECTIONS: Final = {R: "PROT_READ", W: "PROT_WRITE", X: "PROT_EXEC"}
_FLAGS: Final = {
    0: "0",
    SHARED: "MAP_SHARED",
    PRIVATE: "MAP_PRIVATE",
    calls.MAP_SHARED_VALIDATE: "MAP_SHARED_VALIDATE",
}
_MODES: Final = {1: "MISSING", 2: "WP", 4: "MINOR"}
#: Bytes that cases move by a call.
_FEW: Final = 8
#: A directory of /sys/kernel/mm.
HUGE_PAGES: Final = "transparent_hugepage"


@final
class Mapping:
    """Bytes of a descriptor, at an address of this process."""

    def __init__(
        self, steps: Steps, fd: int, length: int, prot: int, flags: int, offset: int, at: int
    ) -> None:
        self.steps, self.length = steps, length
        names = [name for bit, name in _PROTECTIONS.items() if prot & bit] or ["PROT_NONE"]
        kind = _FLAGS[flags & ~calls.MAP_HUGETLB]
        huge = " | MAP_HUGETLB" if flags & calls.MAP_HUGETLB else ""
        fixed, where = (calls.MAP_FIXED, "aligned") if at else (0, "NULL")
        self.address = self.steps.call(
            f"p = mmap({where}, {length:#x}, {' | '.join(names)}, {kind}{huge}, fd, {offset:#x})",
            lambda: calls.mmap(at, length, prot, flags | fixed, fd, offset),
            hex,
        )

    def close(self) -> None:
        """Unmap it."""
        calls.munmap(self.address, self.length)

    def _byte(self, offset: int) -> ctypes.c_ubyte:
        return ctypes.c_ubyte.from_address(self.address + offset)

    def load(self, offset: int = 0) -> int:
        """Read a byte. Where no page can be had, the process gets a signal."""
        return self.steps.call(f"p[{offset:#x}]", lambda: self._byte(offset).value)

    def store(self, value: int, offset: int = 0) -> int:
        """Write a byte and read it. Where no page can be had, the process gets a signal."""

        def act() -> int:
            self._byte(offset).value = value
            return self._byte(offset).value

        return self.steps.call(f"p[{offset:#x}] = {value:#x}", act)

    def fill(self, value: int, offset: int = 0, length: int = SIZE) -> None:
        """Write one value to a range."""
        self.steps.call(
            f"memset(p + {offset:#x}, {value:#x}, {length:#x})",
            lambda: ctypes.memset(self.address + offset, value, length),
            lambda _: "p",
        )

    def values(self, offset: int = 0, length: int = SIZE) -> str:
        """Return the different bytes of a range, sorted."""
        return self.steps.call(
            f"bytes of p[{offset:#x}] to p[{offset + length:#x}]",
            lambda: " ".join(
                f"{value:#04x}"
                for value in sorted(set(ctypes.string_at(self.address + offset, length)))
            ),
        )

    def madvise(self, advice: int, offset: int = 0, length: int = SIZE) -> None:
        """Call madvise(2)."""
        self.steps.call(
            f"madvise(p + {offset:#x}, {length:#x}, {advice})",
            lambda: calls.madvise(self.address + offset, length, advice),
        )

    def advised(self, advice: int, setting: str) -> None:
        """Call madvise(2) where the kernel has a directory below /sys/kernel/mm.

        Raises:
            UnsupportedError: where it has not.
        """
        if setting and not os.path.isdir(f"/sys/kernel/mm/{setting}"):
            raise UnsupportedError(f"the kernel has no /sys/kernel/mm/{setting}")
        self.madvise(advice)

    def mlock(self) -> None:
        """Lock four pages."""
        self.steps.call(f"mlock(p, {SIZE:#x})", lambda: calls.mlock(self.address, SIZE))

    def mprotect(self, prot: int) -> None:
        """Change the protection of the first page."""
        self.steps.call(
            f"mprotect(p, 0x1000, {prot})", lambda: calls.mprotect(self.address, PAGE_SIZE, prot)
        )

    def msync(self) -> None:
        """Write the first page back."""
        self.steps.call(
            "msync(p, 0x1000, MS_SYNC)",
            lambda: calls.msync(self.address, PAGE_SIZE, calls.MS_SYNC),
        )

    def mincore(self, length: int = SIZE) -> str:
        """Return which pages the file has in memory, a digit for each."""
        return self.steps.call(
            f"mincore(p, {length:#x}, vec)",
            lambda: "".join(str(page) for page in memory.mincore(self.address, length)),
        )

    def own_memory(self, *, write: bool = False) -> int:
        """Read or write its first byte by /proc/self/mem; return the number of bytes."""
        fd = os.open("/proc/self/mem", os.O_RDWR if write else os.O_RDONLY)
        try:
            if write:
                return self.steps.call(
                    'pwrite(open("/proc/self/mem"), "x", 1, p)',
                    lambda: os.pwrite(fd, b"x", self.address),
                )
            return self.steps.call(
                'pread(open("/proc/self/mem"), buf, 1, p)',
                lambda: len(os.pread(fd, 1, self.address)),
            )
        finally:
            os.close(fd)

    def process_vm_readv(self) -> int:
        """Read it as another process would; return the number of bytes.

        Raises:
            UnsupportedError: where the kernel lacks the call.
        """
        need_process_vm_readv()
        return self.steps.call(
            "process_vm_readv(getpid(), {buf, 8}, 1, {p, 8}, 1, 0)",
            lambda: calls.process_vm_readv(os.getpid(), self.address, _FEW),
        )

    def write_from(self) -> int:
        """Write from it to a pipe; return the number of bytes."""
        with pipe() as (_, into):
            return self.steps.call(
                "write(pipe, p, 8)", lambda: calls.write_from(into, self.address, _FEW)
            )

    def read_into(self) -> int:
        """Read from a pipe into it; return the number of bytes."""
        with pipe(bytes(_FEW)) as (source, _):
            return self.steps.call(
                "read(pipe, p, 8)", lambda: calls.read_into(source, self.address, _FEW)
            )

    def vmsplice(self) -> int:
        """Give its first page to a pipe; return the number of bytes."""
        with pipe() as (_, into):
            return self.steps.call(
                "vmsplice(pipe, {p, 4096}, 1, 0)",
                lambda: calls.vmsplice(into, self.address, PAGE_SIZE),
            )

    def userfaultfd(self, mode: int) -> int:
        """Register it with a userfaultfd in some mode; return 0."""
        with userfaultfd.userfaultfd(userfaultfd.UFFD_USER_MODE_ONLY) as fd:
            userfaultfd.UFFDIO_API(fd, userfaultfd.uffdio_api(api=userfaultfd.UFFD_API, features=0))
            self.steps.call(
                f"ioctl(uffd, UFFDIO_REGISTER, {{p, {SIZE:#x}, MODE_{_MODES[mode]}}})",
                lambda: userfaultfd.UFFDIO_REGISTER(
                    fd, userfaultfd.uffdio_register(start=self.address, len=SIZE, mode=mode)
                ),
            )
        return 0


def need_process_vm_readv() -> None:
    """Read memory of this process by process_vm_readv.

    Raises:
        UnsupportedError: where the kernel lacks the call.
    """
    known = ctypes.create_string_buffer(_FEW)
    try:
        calls.process_vm_readv(os.getpid(), ctypes.addressof(known), _FEW)
    except OSError as error:
        raise UnsupportedError(f"process_vm_readv: {error.strerror}") from error


@contextmanager
def mapping(
    file: File,
    prot: int = R | W,
    flags: int = SHARED,
    length: int = SIZE,
    offset: int = 0,
    at: int = 0,
    fd: int | None = None,
) -> Generator[Mapping]:
    """Map a descriptor, over what lies at an address if one is given.

    ``fd`` is the descriptor that has the file's pages, where this is not the file's own.

    Raises:
        OSError: as mmap(2).
    """
    made = Mapping(file.steps, file.fd if fd is None else fd, length, prot, flags, offset, at)
    try:
        yield made
    finally:
        made.close()


def maps(prot: int, flags: int, length: int = PAGE_SIZE, offset: int = 0) -> Callable[[File], int]:
    """Return an operation that sets a size, maps the descriptor and unmaps it; it returns 0."""

    def operation(file: File) -> int:
        file.resize()
        with mapping(file, prot, flags, length, offset):
            return 0

    return operation


def on_mapping(
    act: Callable[[Mapping], object], prot: int = R | W, flags: int = SHARED, length: int = SIZE
) -> Callable[[File], object]:
    """Return an operation that sets four pages as size, maps them and does something with them."""

    def operation(file: File) -> object:
        file.resize(SIZE)
        with mapping(file, prot, flags, length) as made:
            return act(made)

    return operation


def in_child(
    act: Callable[[Mapping], object], prot: int = R | W, flags: int = SHARED, length: int = SIZE
) -> Callable[[File], object]:
    """Return an operation as ``on_mapping`` does, that acts in a child: a signal is an answer."""
    return on_mapping(lambda made: made.steps.in_child(lambda: act(made)), prot, flags, length)
