"""FUSE requests on restricted files: decode, execute, encode.

A restricted file refuses the file operations that it lacks, in the way that the kernel refuses them
for a file without those operations. The table of refusals, and of the operations that FUSE itself
answers instead, is in docs/reference/divergences.md.
"""

import ctypes
import os
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from errno import (
    EACCES,
    EFBIG,
    EINVAL,
    ENFILE,
    ENOENT,
    ENOMEM,
    ENOSYS,
    ENOTTY,
    ENXIO,
    EPERM,
)
from functools import partial
from typing import Final, NamedTuple, TypeVar, final

from restrictedmem import sync
from restrictedmem.abi import fuse, process
from restrictedmem.abi.fuse import AttrValid, InitFlag, Opcode, OpenFlag
from restrictedmem.abi.kvm import KVM_SET_MEMORY_ATTRIBUTES2, kvm_memory_attributes2
from restrictedmem.abi.memory import FallocMode
from restrictedmem.fs import guest_memfd_requests
from restrictedmem.fs.owner_abi import HUGEPAGE_MODE, NAME, PROVE, TOKEN_BYTES, parse_name
from restrictedmem.fs.usage import Usage
from restrictedmem.mm import designs
from restrictedmem.mm.backing import make_backing
from restrictedmem.mm.guest_memfd_file import GuestMemfdFile
from restrictedmem.mm.inode import Inode
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.units import PAGE_SHIFT, PAGE_SIZE, PageRange

#: No file reaches this offset (MAX_LFS_FILESIZE); the kernel requests nothing beyond it.
_FILE_END: Final = 1 << 63
_HUGE_REQUEST: Final = 64 << 20
_NANO: Final = 1_000_000_000
# DIRECT_IO without DIRECT_IO_ALLOW_MMAP, which is not negotiated: MAP_SHARED is ENODEV. STREAM
# takes away seeking, pread and pwrite, as for a file without FMODE_LSEEK. NOFLUSH keeps close()
# from waiting for this process.
_OPEN_FLAGS: Final = OpenFlag.DIRECT_IO | OpenFlag.NONSEEKABLE | OpenFlag.STREAM | OpenFlag.NOFLUSH
_ROOT_ATTR: Final = fuse.ATTR.pack(
    fuse.ROOT_ID, 0, 0, 0, 0, 0, 0, 0, 0, stat.S_IFDIR | 0o700, 2, 0, 0, 0, PAGE_SIZE, 0
)
_EMPTY: Final = b""

_S = TypeVar("_S", bound=ctypes.Structure)


class Request(NamedTuple):
    """One request: the fields of its header that are used, and the bytes after the header."""

    opcode: int
    unique: int
    nodeid: int
    uid: int
    gid: int
    #: The calling thread's id in the PID namespace of the process that mounted; 0 if it has none
    #: there.
    pid: int
    body: bytes


@final
@dataclass(slots=True)
class _Node:
    file: RestrictedFile
    open: bool = True


@final
class FileSystem:
    """The nodes of one mount and the handler of each request; requests may run concurrently."""

    def __init__(
        self,
        design: str,
        *,
        backing: str = "memfd",
        memory_max: int | None = None,
        max_files: int,
        prove: Callable[[bytes, int, RestrictedFile], None] | None = None,
        usage: Usage | None = None,
        account: Callable[[int], None] | None = None,
    ) -> None:
        """Make an empty file system.

        ``design`` and ``backing`` name those of each file (``mm.design``, ``mm.backing``).
        ``memory_max`` is the most bytes that a descriptor may hold. At most ``max_files``
        descriptors exist at once; creating one more is ENFILE.

        ``prove`` is called for each token that an ioctl presents, with the inode number and the
        file. It raises OSError for an unknown token. ``usage`` counts what owners do, if the counts
        are wanted; that takes a quarter of an allocation's time. ``account`` gets the changes of
        the bytes that files hold (``RestrictedFile``).

        Raises:
            OSError: EINVAL for an unknown backing.
        """
        make_backing(backing)
        #: Called before a request waits: with a consumer's number, or with None if it waits for
        #: much memory. A server with other requests lets another thread handle them now. The call
        #: returns False if the server has put the request off instead. Such a request has no reply
        #: yet and will be handled again.
        self.before_waiting: Callable[[int | None], bool] = _go_on
        #: Drops a range of bytes of a file from the page cache (``fs.invalidator``). None where no
        #: guest_memfd can be made.
        self.drop_pages: Callable[[int, int, int], None] | None = None
        #: Whether this thread is the only one that reads requests.
        self.is_alone: Callable[[], bool] = _never
        self._design = design
        self._backing = backing
        self.memory_max = memory_max
        self._usage = usage
        self._max_files = max_files
        self._prove = prove
        self._account = account
        self._nodes: dict[int, _Node] = {}
        self._next_node = fuse.ROOT_ID + 1
        self._mutex = sync.mutex()
        self._handlers: dict[int, Callable[[Request], bytes | None]] = {
            Opcode.INIT: self._init,
            Opcode.LOOKUP: self._lookup,
            Opcode.FORGET: self._forget,
            Opcode.BATCH_FORGET: self._batch_forget,
            Opcode.GETATTR: self._getattr,
            Opcode.SETATTR: self._setattr,
            Opcode.CREATE: self._create,
            Opcode.UNLINK: self._unlink,
            Opcode.OPEN: self._open,
            Opcode.OPENDIR: self._opendir,
            Opcode.RELEASE: self._release,
            Opcode.STATFS: self._statfs,
            Opcode.IOCTL: self._ioctl,
            Opcode.FALLOCATE: self._fallocate,
            Opcode.INTERRUPT: self._interrupt,
            Opcode.READ: self._read,
            Opcode.WRITE: self._write,
            Opcode.FSYNC: self._refuse,
        }

    def handle(self, request: Request) -> bytes | None:
        """Execute a request and return the reply's body, or ``None`` for no reply now.

        A request without a reply now has none at all (FORGET), or the server has put it off
        (``before_waiting``).

        Raises:
            OSError: the errno of the reply; EINVAL for a request too short for its opcode.
        """
        handler = self._handlers.get(request.opcode)
        if handler is None:
            raise OSError(ENOSYS, f"FUSE opcode {request.opcode}")
        try:
            return handler(request)
        except struct.error as error:
            raise OSError(EINVAL, f"FUSE opcode {request.opcode}: {error}") from None

    def knows(self, opcode: int) -> bool:
        """Say whether an operation exists; ``handle`` raises ENOSYS for all others."""
        return opcode in self._handlers

    def files(self) -> dict[int, RestrictedFile]:
        """Return a snapshot of the open files by inode number."""
        with self._mutex:
            return {number: node.file for number, node in self._nodes.items() if node.open}

    def _file(self, nodeid: int) -> RestrictedFile:
        node = self._nodes.get(nodeid)
        if node is None:
            raise OSError(ENOENT if nodeid != fuse.ROOT_ID else EPERM, f"node {nodeid}")
        return node.file

    # The mount and its directory.

    def _init(self, request: Request) -> bytes:
        # Before 7.36 the kernel sent only the first 16 bytes.
        body = request.body.ljust(ctypes.sizeof(fuse.fuse_init_in), b"\0")
        offered = fuse.fuse_init_in.from_buffer_copy(body)
        if offered.major != fuse.KERNEL_VERSION or offered.minor < fuse.OLDEST_MINOR_VERSION:
            raise OSError(EINVAL, f"FUSE protocol {offered.major}.{offered.minor} is not supported")
        no_cache = self.drop_pages is None
        reply = fuse.fuse_init_out(
            major=fuse.KERNEL_VERSION,
            minor=min(offered.minor, fuse.KERNEL_MINOR_VERSION),
            max_readahead=0 if no_cache else guest_memfd_requests.READ_AROUND,
            flags=offered.flags & InitFlag.PARALLEL_DIROPS,
            max_background=16,
            congestion_threshold=12,
            max_write=PAGE_SIZE if no_cache else guest_memfd_requests.WRITE_BACK,
            time_gran=1,
        )
        return bytes(reply)

    def _lookup(self, request: Request) -> bytes:
        # No name is ever found: the owner unlinks a file right after creating it, and the kernel
        # never caches the names.
        raise OSError(ENOENT, "lookup")

    def _create(self, request: Request) -> bytes:
        asked = _decode(fuse.fuse_create_in, request)
        name = request.body[ctypes.sizeof(asked) :].rstrip(b"\0")
        made = parse_name(name) if self.drop_pages is not None else None
        if request.nodeid != fuse.ROOT_ID or (name != NAME and made is None):
            raise OSError(EACCES, "create: not a name of this file system")
        if asked.flags & os.O_ACCMODE != os.O_RDWR:
            raise OSError(EINVAL, "create: a restricted file is opened for reading and writing")
        with self._mutex:
            if len(self._nodes) >= self._max_files:
                raise OSError(ENFILE, "create: the service has no descriptor left for another file")
            nodeid = self._next_node
            self._next_node += 1
            inode = Inode.make(request.uid, request.gid)
            file = (
                self._make_restricted(asked.mode, inode)
                if made is None
                else GuestMemfdFile(*made, inode, self._account, limit=self.memory_max)
            )
            self._nodes[nodeid] = _Node(file)
        if self._usage is not None:
            self._usage.create(file)
        entry = fuse.ENTRY_OUT.pack(nodeid, 0, 0, 0, 0, 0)
        flags = _OPEN_FLAGS if made is None else guest_memfd_requests.OPEN_FLAGS
        return entry + _attributes(nodeid, file) + fuse.OPEN_OUT.pack(0, flags, 0)

    def _make_restricted(self, mode: int, inode: Inode) -> RestrictedFile:
        # The bit is a hint. It has no effect where every page is a huge page already.
        kind = "thp" if mode & HUGEPAGE_MODE and self._backing == "memfd" else self._backing
        backing = make_backing(kind, limit=self.memory_max)
        return RestrictedFile(designs.make(self._design), backing, inode, self._account)

    def _unlink(self, request: Request) -> bytes:
        return _EMPTY

    def _opendir(self, request: Request) -> bytes:
        raise OSError(EACCES, "opendir: nothing to list")

    def _statfs(self, request: Request) -> bytes:
        return bytes(fuse.fuse_statfs_out(bsize=PAGE_SIZE, namelen=255, frsize=PAGE_SIZE))

    # One file.

    def _open(self, request: Request) -> bytes:
        # An anonymous inode has no_open_fops, so open("/proc/self/fd/N") is ENXIO.
        raise OSError(ENXIO, "open")

    def _getattr(self, request: Request) -> bytes:
        if request.nodeid == fuse.ROOT_ID:
            return _ATTR_OUT_UNCACHED + _ROOT_ATTR
        return _ATTR_OUT_UNCACHED + _attributes(request.nodeid, self._file(request.nodeid))

    def _setattr(self, request: Request) -> bytes:
        file = self._file(request.nodeid)
        asked = _decode(fuse.fuse_setattr_in, request)
        if isinstance(file, GuestMemfdFile):
            raise OSError(EINVAL, "setattr: a guest_memfd's attributes cannot be changed")
        if asked.valid & AttrValid.SIZE:
            file.ftruncate(asked.size)
            if self._usage is not None:
                self._usage.size(asked.size)
        if asked.valid & AttrValid.MODE:
            file.inode.chmod(asked.mode, request.uid)
        if asked.valid & (AttrValid.UID | AttrValid.GID):
            uid = asked.uid if asked.valid & AttrValid.UID else None
            gid = asked.gid if asked.valid & AttrValid.GID else None
            file.inode.chown(uid, gid, request.uid, request.gid)
        if asked.valid & (AttrValid.ATIME | AttrValid.MTIME) and not asked.valid & AttrValid.SIZE:
            atime = asked.atime * _NANO + asked.atimensec if asked.valid & AttrValid.ATIME else None
            mtime = asked.mtime * _NANO + asked.mtimensec if asked.valid & AttrValid.MTIME else None
            file.inode.utimens(atime, mtime, request.uid)
        return _ATTR_OUT_UNCACHED + _attributes(request.nodeid, file)

    def _fallocate(self, request: Request) -> bytes | None:
        # This does not use ``_decode``: with a ctypes struct, fallocate(2) takes 5 % longer here.
        _fh, offset, length, mode, _padding = fuse.FALLOCATE_IN.unpack_from(request.body)
        file = self._file(request.nodeid)
        if offset + length >= _FILE_END:
            raise OSError(EFBIG, "fallocate: beyond any file")
        heard = file.notifier_count > 0
        if (heard or length > _HUGE_REQUEST) and not self.before_waiting(
            file.holder if heard else None
        ):
            return None
        punches = bool(mode & FallocMode.PUNCH_HOLE)
        if self._usage is not None and punches:
            self._usage.before_punch(file)
        # A thread that waits for a reply cannot end, so its id is not reused meanwhile.
        abandoned = partial(process.is_dying, request.pid)
        if not file.fallocate_unheard(mode, offset, length, abandoned):
            # A consumer may have registered after the first check.
            if not heard and not self.before_waiting(file.holder):
                return None
            file.fallocate(mode, offset, length, abandoned)
        if self._usage is not None:
            if punches:
                self._usage.punch(file, length)
            else:
                self._usage.allocate(file)
        return _EMPTY

    def _ioctl(self, request: Request) -> bytes | None:
        asked = _decode(fuse.fuse_ioctl_in, request)
        if asked.cmd == KVM_SET_MEMORY_ATTRIBUTES2.request:
            return self._set_memory_attributes(request)
        if asked.cmd != PROVE or self._prove is None or asked.in_size != TOKEN_BYTES:
            raise OSError(ENOTTY, f"ioctl {asked.cmd:#x}")
        token = request.body[ctypes.sizeof(asked) :][:TOKEN_BYTES]
        self._prove(token, request.nodeid, self._file(request.nodeid))
        return fuse.IOCTL_OUT.pack(0, 0, 0, 0)

    # A guest_memfd.

    def _guest_memfd(self, request: Request, errno: int) -> GuestMemfdFile:
        file = self._file(request.nodeid)
        if not isinstance(file, GuestMemfdFile):
            raise OSError(errno, "the file has no such operation")
        return file

    def _read(self, request: Request) -> bytes:
        return guest_memfd_requests.read(self._guest_memfd(request, EINVAL), request.body)

    def _write(self, request: Request) -> bytes:
        return guest_memfd_requests.write(self._guest_memfd(request, EINVAL), request.body)

    def _set_memory_attributes(self, request: Request) -> bytes | None:
        file = self._guest_memfd(request, ENOTTY)
        asked = _decode(kvm_memory_attributes2, request, ctypes.sizeof(fuse.fuse_ioctl_in))
        wanted = guest_memfd_requests.AttributesRequest.of(asked, file.size)
        if not self.before_waiting(file.holder):
            return None
        if self.is_alone():
            raise OSError(ENOMEM, "no other thread would answer the kernel meanwhile")
        file.convert(
            wanted.span,
            private=wanted.private,
            zero=wanted.zero,
            drop=partial(self._drop_pages, request.nodeid),
        )
        return fuse.IOCTL_OUT.pack(0, 0, 0, 0) + bytes(asked)

    def _drop_pages(self, nodeid: int, span: PageRange) -> None:
        assert self.drop_pages is not None
        self.drop_pages(nodeid, span.start << PAGE_SHIFT, len(span) << PAGE_SHIFT)

    def _refuse(self, request: Request) -> bytes:
        raise OSError(EINVAL, "the file has no such operation")

    # Lifetimes. RELEASE comes at the last close, FORGET when the kernel drops the inode. FORGET,
    # BATCH_FORGET and INTERRUPT have no reply.

    def _release(self, request: Request) -> bytes | None:
        node = self._nodes.get(request.nodeid)
        if (
            node is not None
            and node.open
            and node.file.backing.resident() > _HUGE_REQUEST
            and not self.before_waiting(None)
        ):
            return None
        with self._mutex:
            if node is None or not node.open:
                raise OSError(ENOENT, f"release: node {request.nodeid}")
            node.open = False
        self._put(node.file)
        return _EMPTY

    def _forget(self, request: Request) -> None:
        self._drop(request.nodeid)

    def _batch_forget(self, request: Request) -> None:
        asked = _decode(fuse.fuse_batch_forget_in, request)
        pairs = request.body[ctypes.sizeof(asked) :][: asked.count * fuse.FORGET_ONE.size]
        for nodeid, _ in fuse.FORGET_ONE.iter_unpack(pairs):
            self._drop(nodeid)

    def _drop(self, nodeid: int) -> None:
        with self._mutex:
            node = self._nodes.pop(nodeid, None)
        # If a create is interrupted after our reply, FORGET comes without any open or release.
        if node is not None and node.open:
            node.open = False
            self._put(node.file)

    def _put(self, file: RestrictedFile) -> None:
        """Let go of a file that no owner has any more."""
        if self._usage is not None:
            self._usage.close(file)
        file.put()

    def _interrupt(self, request: Request) -> None:
        """Do nothing: a punch cannot stop half way, and an allocation needs no INTERRUPT.

        The kernel sends INTERRUPT for any signal. An allocation checks by itself whether its caller
        dies.
        """


def _decode(kind: type[_S], request: Request, start: int = 0) -> _S:
    """Return the struct at a byte of a request's body.

    Raises:
        OSError: EINVAL for a shorter body.
    """
    try:
        return kind.from_buffer_copy(request.body, start)
    except ValueError:
        raise OSError(EINVAL, f"FUSE opcode {request.opcode}: short request") from None


_ATTR_OUT_UNCACHED: Final = fuse.ATTR_OUT.pack(0, 0, 0)


def _go_on(_consumer: int | None) -> bool:
    """Let the request wait, because this process has no other requests."""
    return True


def _never() -> bool:
    """Say no: a server without threads serves no page cache either."""
    return False


def _attributes(nodeid: int, file: RestrictedFile) -> bytes:
    inode = file.inode
    atime, atimensec = divmod(inode.atime, _NANO)
    mtime, mtimensec = divmod(inode.mtime, _NANO)
    ctime, ctimensec = divmod(inode.ctime, _NANO)
    return fuse.ATTR.pack(
        nodeid,
        file.size,
        file.blocks,
        atime,
        mtime,
        ctime,
        atimensec,
        mtimensec,
        ctimensec,
        inode.mode,
        file.nlink,
        inode.uid,
        inode.gid,
        0,
        file.blksize,
        0,
    )
