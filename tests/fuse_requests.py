"""A mount without a kernel: FUSE requests by hand, and their replies."""

import os
from collections.abc import Iterator
from typing import Final, Self, final

import pytest

from restrictedmem.abi import fuse
from restrictedmem.abi.fuse import Opcode
from restrictedmem.abi.memory import FallocMode
from restrictedmem.fs.filesystem import FileSystem, Request
from restrictedmem.fs.owner_abi import NAME, TOKEN_BYTES
from restrictedmem.mm.notifier import Api
from restrictedmem.mm.restrictedmem import RestrictedFile

KEEP: Final = int(FallocMode.KEEP_SIZE)
TOKEN: Final = bytes(range(TOKEN_BYTES))
MISSING: Final = 99


def ioctl_in(command: int, size: int) -> bytes:
    return bytes(fuse.fuse_ioctl_in(fh=0, flags=0, cmd=command, arg=0, in_size=size, out_size=0))


@final
class Mount:
    """A file system, and requests to it in words."""

    def __init__(
        self, api: Api = Api.V10, *, max_files: int = 10, memory_max: int | None = None
    ) -> None:
        self.api = api
        self.proved: list[tuple[bytes, int, RestrictedFile]] = []
        self.filesystem = FileSystem(
            api.value, max_files=max_files, memory_max=memory_max, prove=self._heard
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.batch_forget(*range(2, 1000))

    def _heard(self, token: bytes, ino: int, file: RestrictedFile) -> None:
        self.proved.append((token, ino, file))

    def ask(
        self,
        opcode: int,
        nodeid: int = fuse.ROOT_ID,
        body: bytes = b"",
        uid: int = 1000,
        gid: int = 1000,
    ) -> bytes | None:
        return self.filesystem.handle(Request(opcode, 1, nodeid, uid, gid, 0, body))

    def create(
        self, name: bytes = NAME, flags: int = os.O_RDWR | os.O_CREAT, nodeid: int = fuse.ROOT_ID
    ) -> int:
        """Create a file and return its node."""
        reply = self.ask(
            Opcode.CREATE,
            nodeid,
            bytes(fuse.fuse_create_in(flags=flags, mode=0o100600, umask=0, open_flags=0))
            + name
            + b"\0",
        )
        assert reply is not None
        number: int = fuse.ENTRY_OUT.unpack_from(reply)[0]
        return number

    def file(self, node: int) -> RestrictedFile:
        return self.filesystem.files()[node]

    def fallocate(self, node: int, mode: int, offset: int, length: int) -> bytes | None:
        return self.ask(Opcode.FALLOCATE, node, fuse.FALLOCATE_IN.pack(0, offset, length, mode, 0))

    def setattr(
        self, node: int, valid: int, uid_of_caller: int = 1000, **fields: int
    ) -> bytes | None:
        zero = {name: 0 for name, *_ in fuse.fuse_setattr_in._fields_}
        return self.ask(
            Opcode.SETATTR,
            node,
            bytes(fuse.fuse_setattr_in(**{**zero, **fields, "valid": valid})),
            uid_of_caller,
        )

    def getattr(self, node: int) -> dict[str, int]:
        reply = self.ask(Opcode.GETATTR, node, bytes(16))
        assert reply is not None
        return attributes(reply[fuse.ATTR_OUT.size :])

    def ioctl(
        self, node: int, command: int, data: bytes, in_size: int | None = None
    ) -> bytes | None:
        head = ioctl_in(command, len(data) if in_size is None else in_size)
        return self.ask(Opcode.IOCTL, node, head + data)

    def batch_forget(self, *nodes: int) -> bytes | None:
        pairs = b"".join(fuse.FORGET_ONE.pack(node, 1) for node in nodes)
        return self.ask(
            Opcode.BATCH_FORGET,
            0,
            bytes(fuse.fuse_batch_forget_in(count=len(nodes), dummy=0)) + pairs,
        )


def attributes(data: bytes) -> dict[str, int]:
    names = [field[0] for field in fuse.fuse_attr._fields_]
    return dict(zip(names, fuse.ATTR.unpack_from(data), strict=True))


@pytest.fixture
def mount() -> Iterator[Mount]:
    with Mount() as made:
        yield made
