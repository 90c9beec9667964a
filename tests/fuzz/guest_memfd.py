"""Target: what the kernel and an owner ask of a guest_memfd, against a naive model of its pages."""

import errno
import os
from collections.abc import Sequence
from contextlib import closing
from typing import Final

from fuzz.source import Source
from restrictedmem.abi import fuse
from restrictedmem.abi.kvm import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_SET_MEMORY_ATTRIBUTES2,
    kvm_memory_attributes2,
)
from restrictedmem.abi.memory import FallocMode
from restrictedmem.fs.filesystem import FileSystem, Request
from restrictedmem.fs.owner_abi import name_of
from restrictedmem.units import PAGE_SIZE

_MOST_PAGES: Final = 16
_LIMIT: Final = _MOST_PAGES * PAGE_SIZE
_PUNCH: Final = int(FallocMode.PUNCH_HOLE)
_KEEP_SIZE: Final = int(FallocMode.KEEP_SIZE)
_ZERO, _PRESERVE = 1, 2
#: Bits of the byte that says how a conversion is asked for; the two lowest are its flags.
_PRIVATE, _UNALIGNED, _RESERVED, _ERROR_OFFSET, _UNKNOWN_FLAG, _SHORT = (
    1 << bit for bit in range(2, 8)
)


class _Model:
    """The content of a file, and its private pages."""

    def __init__(self, pages: int, flags: int) -> None:
        self.pages = pages
        self.content = bytearray(pages * PAGE_SIZE)
        self.private = set(range(pages) if not flags & GUEST_MEMFD_FLAG_INIT_SHARED else ())

    def some_private(self, start: int, end: int) -> bool:
        return any(
            page * PAGE_SIZE < end and start < (page + 1) * PAGE_SIZE for page in self.private
        )

    def clear(self, pages: Sequence[int]) -> None:
        for page in pages:
            self.content[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = bytes(PAGE_SIZE)

    def error_of_conversion(self, how: int, start: int, count: int) -> int:
        """Return the errno of a conversion of ``count`` pages; 0 for none."""
        flags = how & (_ZERO | _PRESERVE)
        odd = how & (_UNALIGNED | _RESERVED | _ERROR_OFFSET | _UNKNOWN_FLAG | _SHORT)
        if odd or flags == _ZERO | _PRESERVE or not count or start + count > self.pages:
            return errno.EINVAL
        return errno.EOPNOTSUPP if how & _PRIVATE and flags & _ZERO else 0

    def convert(self, how: int, pages: Sequence[int]) -> list[int]:
        """Convert, and return the pages that change."""
        changed = [page for page in pages if (page in self.private) != bool(how & _PRIVATE)]
        self.private.symmetric_difference_update(changed)
        if how & _ZERO:
            self.clear(changed)
        return changed


class _File:
    """A guest_memfd and its model; each call does the same to both, and compares."""

    def __init__(self, pages: int, flags: int) -> None:
        self.filesystem = FileSystem("v10", memory_max=_LIMIT, max_files=1)
        self.filesystem.drop_pages = self._drop
        self.model = _Model(pages, flags)
        #: The bytes that the page cache was told to drop, and whether they become private.
        self.dropped: list[tuple[int, int]] = []
        self._leaves = False
        create = fuse.fuse_create_in(flags=os.O_RDWR, mode=0o600, umask=0, open_flags=0)
        name = name_of(pages * PAGE_SIZE, flags)
        error, entry = self._ask(fuse.Opcode.CREATE, bytes(create) + name + b"\0", fuse.ROOT_ID)
        assert not error
        self.nodeid, *_ = fuse.ENTRY_OUT.unpack_from(entry)

    def _ask(self, opcode: int, body: bytes, nodeid: int = 0) -> tuple[int, bytes]:
        request = Request(opcode, 1, nodeid or self.nodeid, 1000, 1000, 0, body)
        try:
            reply = self.filesystem.handle(request)
        except OSError as error:
            return error.errno or -1, b""
        assert reply is not None
        return 0, reply

    def _drop(self, nodeid: int, start: int, length: int) -> None:
        """Be the kernel that drops pages: it writes back what is dirty, and reads nothing more."""
        assert nodeid == self.nodeid
        self.dropped.append((start, start + length))
        if self._leaves:
            for page in range(start // PAGE_SIZE, (start + length) // PAGE_SIZE):
                assert self._read(page * PAGE_SIZE, 1) == (errno.EIO, b"")
                if page not in self.model.private:
                    self.write_back(page, 7, bytes([page]), fuse.FUSE_WRITE_CACHE)

    def _read(self, start: int, length: int, flags: int = 0) -> tuple[int, bytes]:
        return self._ask(fuse.Opcode.READ, fuse.READ_IN.pack(0, start, length, flags, 0, 0, 0))

    def read(self, start: int, end: int, flags: int) -> None:
        error, content = self._read(start, end - start, flags)
        if flags & fuse.FUSE_READ_LOCKOWNER:
            assert error == errno.EINVAL
        elif self.model.some_private(start, end):
            assert error == errno.EIO
        else:
            assert (error, content) == (0, bytes(self.model.content[start:end]))

    def write_back(self, page: int, skip: int, data: bytes, flags: int) -> None:
        start = page * PAGE_SIZE + skip
        asked = fuse.WRITE_IN.pack(0, start, len(data), flags, 0, 0, 0)
        error, reply = self._ask(fuse.Opcode.WRITE, asked + data)
        if not flags & fuse.FUSE_WRITE_CACHE:
            assert error == errno.EINVAL
        elif self.model.some_private(start, start + len(data)):
            assert error == errno.EIO
        else:
            assert (error, fuse.WRITE_OUT.unpack(reply)) == (0, (len(data), 0))
            self.model.content[start : start + len(data)] = data

    def fallocate(self, mode: int, start: int, end: int) -> None:
        """Allocate or punch bytes, of which there is one or more: fallocate(2) checks that."""
        asked = fuse.FALLOCATE_IN.pack(0, start, end - start, mode, 0)
        error, _ = self._ask(fuse.Opcode.FALLOCATE, asked)
        if not mode & _KEEP_SIZE or mode & ~(_KEEP_SIZE | _PUNCH):
            assert error == errno.EOPNOTSUPP
        elif (start | end) % PAGE_SIZE:
            assert error == errno.EINVAL
        elif not mode & _PUNCH:
            assert error == (errno.EINVAL if end > self.model.pages * PAGE_SIZE else 0)
        else:
            assert not error
            last = min(end // PAGE_SIZE, self.model.pages)
            self.model.clear(range(start // PAGE_SIZE, last))

    def convert(self, how: int, start: int, count: int) -> None:
        asked = kvm_memory_attributes2(
            offset=start * PAGE_SIZE + bool(how & _UNALIGNED),
            size=count * PAGE_SIZE,
            attributes=8 if how & _PRIVATE else 0,
            flags=how & (_ZERO | _PRESERVE) | (4 if how & _UNKNOWN_FLAG else 0),
            error_offset=bool(how & _ERROR_OFFSET),
        )
        asked.reserved[10] = bool(how & _RESERVED)
        body = bytes(asked)[: -1 if how & _SHORT else None]
        head = fuse.fuse_ioctl_in(
            fh=0,
            flags=0,
            cmd=KVM_SET_MEMORY_ATTRIBUTES2.request,
            arg=0,
            in_size=len(body),
            out_size=len(body),
        )
        expected = self.model.error_of_conversion(how, start, count)
        self.dropped, self._leaves = [], bool(how & _PRIVATE)
        error, reply = self._ask(fuse.Opcode.IOCTL, bytes(head) + body)
        assert error == expected
        if error:
            assert not self.dropped
            return
        assert reply[fuse.IOCTL_OUT.size :] == body
        changed = self.model.convert(how, range(start, start + count))
        hull = [(changed[0] * PAGE_SIZE, (changed[-1] + 1) * PAGE_SIZE)] if changed else []
        assert self.dropped == hull

    def check(self) -> None:
        """Compare every page."""
        for page in range(self.model.pages):
            self.read(page * PAGE_SIZE, (page + 1) * PAGE_SIZE, 0)

    def close(self) -> None:
        self._ask(fuse.Opcode.RELEASE, b"")
        self.filesystem.handle(Request(fuse.Opcode.FORGET, 1, self.nodeid, 0, 0, 0, b""))
        assert not self.filesystem.files()


def guest_memfd(data: bytes) -> None:
    """Read, write back, allocate, punch and convert, as a kernel and an owner may."""
    source = Source(data)
    flags = GUEST_MEMFD_FLAG_MMAP | (source.number(1) & 1) * GUEST_MEMFD_FLAG_INIT_SHARED
    pages = 1 + source.number(1) % _MOST_PAGES
    with closing(_File(pages, flags)) as file:
        while source:
            _call(file, source, pages)
        file.check()


def _call(file: _File, source: Source, pages: int) -> None:
    kind, page, count = source.number(1), source.number(1) % (pages + 1), source.number(1)
    start, end = page * PAGE_SIZE, min(page + count, pages) * PAGE_SIZE
    match kind % 4:
        case 0 if start < end:
            file.read(start, end, source.number(1))
        case 1 if page < pages:
            skip = source.number(2) % PAGE_SIZE
            content = bytes([count]) * min(source.number(2), pages * PAGE_SIZE - start - skip)
            file.write_back(page, skip, content, source.number(1))
        case 2 if count:
            skip = source.number(1) & 1
            file.fallocate(source.number(1), start + skip, start + skip + count * PAGE_SIZE)
        case 3:
            file.convert(source.number(1), page, count)
        case _:
            pass
