"""A descriptor under test, and what an owner can do to it.

Each method makes one system call, notes it, and returns its answer: a number, a text, or a tuple of
them, so that answers can be compared. The calls that treat it as a handle are in ``handles``, those
on a mapping of it in ``mappings``.
"""

import os
import resource
import signal
import stat
import tempfile
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Final, final

from restrictedmem.abi import memory
from restrictedmem.conformance import calls
from restrictedmem.conformance.case import UnsupportedError
from restrictedmem.conformance.outcome import outcome, spell
from restrictedmem.conformance.steps import Steps
from restrictedmem.units import PAGE_SIZE

#: The size of a file that has it from creation.
SIZE: Final = 4 * PAGE_SIZE
_SECOND: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Creation:
    """The way to create descriptors of a kind.

    ``make`` takes creation flags and a size, which most kinds ignore; ``says`` is the call in C.
    """

    make: Callable[[int, int], int]
    says: Callable[[int, int], str]
    #: The creation flags of the column.
    flags: int = 0
    #: The creation flags that the kernel says it takes.
    offered: int = 0
    #: The VM that makes them; -1 for kinds that need none.
    vm: int = -1
    #: Takes a descriptor and a number of pages; opens the file that has these pages, where this is
    #: not the descriptor's own.
    backing: Callable[[int, int], AbstractContextManager[int]] | None = None


@final
class File:
    """A descriptor of some column, of four pages where a size is fixed at creation.

    The descriptors that this object makes are its own, and are closed with it.
    """

    def __init__(self, creation: Creation, steps: Steps, size: int = SIZE) -> None:
        self.creation, self.steps = creation, steps
        self.fd = self._create("fd", creation.flags, size)

    def _create(self, name: str, flags: int, size: int = SIZE) -> int:
        text = f"{name} = {self.creation.says(flags, size)}"
        return self.steps.call(text, lambda: self.creation.make(flags, size))

    def create(self, flags: int = 0, size: int = SIZE) -> int:
        """Create another descriptor with further flags, and close it; return 0."""
        os.close(self._create("fd2", self.creation.flags | flags, size))
        return 0

    @contextmanager
    def another(self, size: int = SIZE) -> Generator["File"]:
        """Create another descriptor of the kind."""
        file = File(self.creation, self.steps, size)
        try:
            yield file
        finally:
            file.close()

    def resize(self, size: int = PAGE_SIZE) -> None:
        """Give the file its size where it takes one (guest_memfd has had it since creation)."""
        with suppress(OSError):
            self.ftruncate(size)

    # Content.

    def read(self, count: int) -> int:
        """Return the number of bytes read."""
        return self.steps.call(f"read(fd, buf, {count})", lambda: len(os.read(self.fd, count)))

    def readv(self, count: int) -> int:
        """Return the number of bytes read."""
        vector = [bytearray(count)]
        return self.steps.call(
            f"readv(fd, &(struct iovec){{buf, {count}}}, 1)", lambda: os.readv(self.fd, vector)
        )

    def pread(self, count: int, offset: int) -> int:
        """Return the number of bytes read."""
        return self.steps.call(
            f"pread(fd, buf, {count}, {offset:#x})", lambda: len(os.pread(self.fd, count, offset))
        )

    def preadv(self, count: int, offset: int) -> int:
        """Return the number of bytes read."""
        vector = [bytearray(count)]
        return self.steps.call(
            f"preadv(fd, &(struct iovec){{buf, {count}}}, 1, {offset:#x})",
            lambda: os.preadv(self.fd, vector, offset),
        )

    def write(self, count: int) -> int:
        """Return the number of bytes written."""
        data = bytes(count)
        return self.steps.call(f"write(fd, buf, {count})", lambda: os.write(self.fd, data))

    def transfer_at_nothing(self, call: str) -> int:
        """Read or write at an address where no memory is; return the number of bytes."""
        return self.steps.call(
            f"{call}(fd, (void *)8, 64)", lambda: calls.transfer(call, self.fd, 8, 64)
        )

    def writev(self, count: int) -> int:
        """Return the number of bytes written."""
        vector = [bytes(count)]
        return self.steps.call(
            f"writev(fd, &(struct iovec){{buf, {count}}}, 1)", lambda: os.writev(self.fd, vector)
        )

    def pwrite(self, count: int, offset: int) -> int:
        """Return the number of bytes written."""
        data = bytes(count)
        return self.steps.call(
            f"pwrite(fd, buf, {count}, {offset:#x})", lambda: os.pwrite(self.fd, data, offset)
        )

    def pwritev(self, count: int, offset: int) -> int:
        """Return the number of bytes written."""
        vector = [bytes(count)]
        return self.steps.call(
            f"pwritev(fd, &(struct iovec){{buf, {count}}}, 1, {offset:#x})",
            lambda: os.pwritev(self.fd, vector, offset),
        )

    def lseek(self, whence: int) -> int:
        """Return the position."""
        return self.steps.call(f"lseek(fd, 0, {whence})", lambda: calls.lseek(self.fd, 0, whence))

    def splice_out(self, offset: int | None = None) -> int:
        """Return the number of bytes moved to a pipe."""
        with pipe() as (_, into):
            return self.steps.call(
                f"splice(fd, {_at(offset)}, pipe, NULL, 4096, 0)",
                lambda: os.splice(self.fd, into, PAGE_SIZE, offset_src=offset),
            )

    def splice_in(self, offset: int | None = None) -> int:
        """Return the number of bytes moved from a pipe."""
        with pipe(b"content") as (source, _):
            return self.steps.call(
                f"splice(pipe, NULL, fd, {_at(offset)}, 7, 0)",
                lambda: os.splice(source, self.fd, 7, offset_dst=offset),
            )

    def sendfile_from(self, offset: int | None = None) -> int:
        """Return the number of bytes sent to a pipe."""
        with pipe() as (_, into):
            return self.steps.call(
                f"sendfile(pipe, fd, {_at(offset)}, 4096)",
                lambda: os.sendfile(into, self.fd, offset, PAGE_SIZE),  # type: ignore[call-overload, no-any-return, unused-ignore]
            )

    def sendfile_into(self) -> int:
        """Return the number of bytes sent from a file of tmpfs or a disk."""
        with _source() as source:
            return self.steps.call(
                "sendfile(fd, file, &(off_t){0}, 7)", lambda: os.sendfile(self.fd, source, 0, 7)
            )

    def copy_out(self) -> int:
        """Return the number of bytes copied to a file of another file system."""
        with tempfile.TemporaryFile() as target:
            return self.steps.call(
                "copy_file_range(fd, NULL, file, NULL, 4096, 0)",
                lambda: os.copy_file_range(self.fd, target.fileno(), PAGE_SIZE),
            )

    def copy_in(self) -> int:
        """Return the number of bytes copied from a file of another file system."""
        with _source() as source:
            return self.steps.call(
                "copy_file_range(file, NULL, fd, NULL, 7, 0)",
                lambda: os.copy_file_range(source, self.fd, 7),
            )

    def copy_between(self) -> int:
        """Return the number of bytes copied to another file of the kind."""
        with self.another() as other:
            return self.steps.call(
                "copy_file_range(fd, &(off_t){0}, fd2, &(off_t){0}, 4096, 0)",
                lambda: os.copy_file_range(self.fd, other.fd, PAGE_SIZE, 0, 0),
            )

    def readahead(self) -> int:
        """Read the first page ahead."""
        return self.steps.call(
            "readahead(fd, 0, 4096)", lambda: calls.readahead(self.fd, 0, PAGE_SIZE)
        )

    def fadvise(self, advice: int) -> int:
        """Advise about the first page; return 0."""
        self.steps.call(
            f"posix_fadvise(fd, 0, 4096, {advice})",
            lambda: os.posix_fadvise(self.fd, 0, PAGE_SIZE, advice),
        )
        return 0

    # Size and space.

    def ftruncate(self, size: int) -> None:
        """Set the size."""
        self.steps.call(f"ftruncate(fd, {size:#x})", lambda: os.ftruncate(self.fd, size))

    def sizes(self, *sizes: int) -> tuple[object, int]:
        """Set each size in turn; return the outcome of the last call, and the size after it."""
        last: object = None
        for size in sizes:
            last = outcome(partial(self.ftruncate, size))
        return last, self.stat().st_size

    def truncate_by_path(self) -> int:
        """Set the size by the file's name in /proc; return the size after it."""
        path = f"/proc/self/fd/{self.fd}"
        self.steps.call('truncate("/proc/self/fd/N", 4096)', lambda: os.truncate(path, PAGE_SIZE))
        return self.stat().st_size

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        """Allocate or punch."""
        self.steps.call(
            f"fallocate(fd, {mode:#x}, {offset:#x}, {length:#x})",
            lambda: memory.fallocate(self.fd, mode, offset, length),
        )

    def over_limit(self, body: Callable[[], object], limit: int = PAGE_SIZE) -> str:
        """Do something in a child under RLIMIT_FSIZE: the outcome, and the number of SIGXFSZ."""

        def limited() -> tuple[object, int]:
            heard: list[int] = []
            signal.signal(signal.SIGXFSZ, lambda number, _: heard.append(number))
            self.steps.call(
                f"setrlimit(RLIMIT_FSIZE, {{{limit:#x}, …}})",
                lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)),
            )
            return outcome(body), len(heard)

        return self.steps.in_child(limited)

    def held(self) -> tuple[int, int]:
        """Return size and pages, by fstat."""
        found = self.stat()
        return found.st_size, found.st_blocks * 512 // PAGE_SIZE

    def cached(self, offset: int = 0, length: int = SIZE) -> int:
        """Return the number of pages that a range has (cachestat(2)).

        Raises:
            UnsupportedError: where no file has cachestat.
        """
        with memory.memfd_create("probe") as probe:
            try:
                memory.resident_pages(probe.fileno(), 0, PAGE_SIZE)
            except OSError as error:
                raise UnsupportedError("the kernel has no cachestat (Linux 6.5)") from error
        return self.steps.call(
            f"cachestat(fd, {{{offset:#x}, {length:#x}}}, &cs, 0)",
            lambda: memory.resident_pages(self.fd, offset, length),
        )

    # Attributes.

    def stat(self) -> os.stat_result:
        """Return what fstat(2) returns."""
        return self.steps.call("fstat(fd, &st)", lambda: os.fstat(self.fd), lambda _: "0")

    def fields(self) -> tuple[str, int, int, int, int, int, int, int]:
        """Return mode, links, uid, gid, size, blocks, block size and device number.

        User and group are counted from the caller's.
        """
        found = self.stat()
        return (
            stat.filemode(found.st_mode),
            found.st_nlink,
            found.st_uid - os.geteuid(),
            found.st_gid - os.getegid(),
            found.st_size,
            found.st_blocks,
            found.st_blksize,
            found.st_rdev,
        )

    def fresh_times(self) -> bool:
        """Say whether a new file has three equal times."""
        found = self.stat()
        return found.st_atime_ns == found.st_mtime_ns == found.st_ctime_ns > 0

    def size_moves_times(self) -> tuple[bool, bool, bool]:
        """Set the size; say whether atime stays, mtime goes on, and ctime is equal to mtime."""
        before = self.stat()
        self.ftruncate(PAGE_SIZE)
        after = self.stat()
        return (
            after.st_atime_ns == before.st_atime_ns,
            after.st_mtime_ns >= before.st_mtime_ns,
            after.st_ctime_ns == after.st_mtime_ns,
        )

    def identity(self) -> tuple[bool, bool, bool]:
        """Say whether inode and device stay, another file's inode differs, its device does not."""
        before = self.stat()
        self.resize()
        with suppress(OSError):
            self.fallocate(int(memory.FallocMode.KEEP_SIZE), 0, PAGE_SIZE)
        after = self.stat()
        with self.another() as other:
            second = other.stat()
        same = (before.st_ino, before.st_dev) == (after.st_ino, after.st_dev)
        return same, second.st_ino != after.st_ino, second.st_dev == after.st_dev

    def statfs(self) -> tuple[str, int, int]:
        """Return f_type, f_bsize and f_namelen."""
        kind, size, name = self.steps.call("fstatfs(fd, &st)", lambda: calls.fstatfs(self.fd))
        return f"{kind:#x}", size, name

    def chmod(self) -> str:
        """Set the mode 0640; return the mode after it."""
        self.steps.call("fchmod(fd, 0640)", lambda: os.fchmod(self.fd, 0o640))
        return stat.filemode(self.stat().st_mode)

    def chown(self) -> tuple[int, int]:
        """Set owner and group; return how far they are from what was set.

        Only root may give a file away.
        """
        uid, gid = (os.getuid(), os.getgid()) if os.geteuid() else (12, 34)
        self.steps.call(f"fchown(fd, {uid}, {gid})", lambda: os.fchown(self.fd, uid, gid))
        found = self.stat()
        return found.st_uid - uid, found.st_gid - gid

    def utimens(self) -> tuple[int, int]:
        """Set two times; return them, in nanoseconds."""
        times = (_SECOND + 1, 2 * _SECOND + 2)
        self.steps.call(
            "futimens(fd, (struct timespec[]){{1, 1}, {2, 2}})",
            lambda: os.utime(self.fd, ns=times),
        )
        found = self.stat()
        return found.st_atime_ns, found.st_mtime_ns

    def listxattr(self) -> int:
        """Return the number of extended attributes."""
        return self.steps.call(
            "flistxattr(fd, list, sizeof(list))", lambda: len(os.listxattr(self.fd))
        )

    def setxattr(self) -> int:
        """Set an extended attribute; return 0."""
        self.steps.call(
            'fsetxattr(fd, "user.x", "1", 1, 0)', lambda: os.setxattr(self.fd, "user.x", b"1")
        )
        return 0

    def getxattr(self) -> int:
        """Return the size of an extended attribute."""
        return self.steps.call(
            'fgetxattr(fd, "user.x", buf, sizeof(buf))',
            lambda: len(os.getxattr(self.fd, "user.x")),
        )

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)


def answers_of(act: Callable[[int], object], values: Iterable[int]) -> str:
    """Do something with each value; return the different answers, sorted, as text."""
    found = {spell(outcome(partial(act, value))) for value in values}
    return ", ".join(sorted(found))


@contextmanager
def pipe(content: bytes = b"") -> Generator[tuple[int, int]]:
    """Make a pipe that holds some bytes: its reader and its writer."""
    reader, writer = os.pipe()
    try:
        os.write(writer, content)
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


@contextmanager
def _source() -> Generator[int]:
    """Make a file with seven bytes of content."""
    with tempfile.TemporaryFile() as source:
        source.write(b"content")
        source.flush()
        yield source.fileno()


def _at(offset: int | None) -> str:
    return "NULL" if offset is None else f"&(off_t){{{offset}}}"
