"""Which files processes open, as the kernel tells root (fanotify)."""

import ctypes
import os
import struct
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import final

import pytest

_FAN_CLOEXEC, _FAN_NONBLOCK, _FAN_UNLIMITED_QUEUE = 1, 2, 0x10
_FAN_MARK_ADD, _FAN_MARK_FILESYSTEM = 1, 0x100
_FAN_OPEN, _FAN_Q_OVERFLOW = 0x20, 0x4000
#: ``struct fanotify_event_metadata``: event_len, vers, reserved, metadata_len, mask, fd, pid.
_EVENT = struct.Struct("=IBBHQii")
_libc = ctypes.CDLL(None, use_errno=True)


@final
class Opens:
    """The files opened on some file systems since the last look."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def take(self) -> list[tuple[int, str]]:
        """Return pid and path of each."""
        found: list[tuple[int, str]] = []
        with suppress(BlockingIOError):
            # Each event comes with a descriptor: on a busy machine a large buffer takes more than
            # there may be.
            while data := os.read(self._fd, 1 << 12):
                at = 0
                while at < len(data):
                    size, _, _, _, mask, fd, pid = _EVENT.unpack_from(data, at)
                    assert not mask & _FAN_Q_OVERFLOW
                    with suppress(OSError):
                        found.append((pid, os.readlink(f"/proc/self/fd/{fd}")))
                    os.close(fd)
                    at += size
        return found


@contextmanager
def opens(*paths: str) -> Generator[Opens]:
    """Make a watch on the file systems of some paths."""
    fd = _libc.fanotify_init(
        _FAN_CLOEXEC | _FAN_NONBLOCK | _FAN_UNLIMITED_QUEUE, os.O_RDONLY | os.O_CLOEXEC
    )
    if fd < 0:
        pytest.skip(f"fanotify_init: {os.strerror(ctypes.get_errno())}")
    try:
        for path in paths:
            flags = _FAN_MARK_ADD | _FAN_MARK_FILESYSTEM
            if _libc.fanotify_mark(fd, flags, ctypes.c_uint64(_FAN_OPEN), -100, path.encode()):
                pytest.skip(f"fanotify_mark {path}: {os.strerror(ctypes.get_errno())}")
        yield Opens(fd)
    finally:
        os.close(fd)
