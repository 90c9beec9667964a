"""The loop between /dev/fuse and the file system.

One thread reads at a time. Before it does something that may wait (for a consumer, or for gigabytes), it lets another thread read: so the
common request costs one read and one write with no hand-over, and a slow one delays nobody else (leader and followers).
"""

import logging
import os
import threading
from contextlib import suppress
from errno import EINTR, EIO, ENODEV, ENOENT, ENOSYS, EOPNOTSUPP
from typing import Final, final

from restrictedmem.abi import fuse, process
from restrictedmem.fd import OwnedFd
from restrictedmem.fs.filesystem import FileSystem, Request

log = logging.getLogger(__name__)

#: Requests that may wait at the same time; further ones queue in the kernel.
MAX_THREADS: Final = 8
#: Nanoseconds. Requests are short, and their callers wait: they should not also wait for a guest's slice to end.
_SLICE: Final = 100_000

#: Larger ones are between parts of the kernel.
_LAST_ERRNO: Final = 511

_IN_SIZE: Final = fuse.IN_HEADER.size
_OUT_SIZE: Final = fuse.OUT_HEADER.size
_BUFFER: Final = max(fuse.MIN_READ_BUFFER, 2 * os.sysconf("SC_PAGE_SIZE"))


@final
class Server:
    """Serves one mount until its last descriptor is gone."""

    def __init__(self, device: OwnedFd, filesystem: FileSystem) -> None:
        """Serve requests of ``device`` (an open /dev/fuse, which the caller keeps until ``run`` has returned)."""
        self._device = device.fileno()
        self._filesystem = filesystem
        filesystem.before_waiting = self._step_aside
        self._leading = threading.Lock()
        #: The thread that holds ``_leading``; 0 when it has stepped aside.
        self._leader = 0
        #: Whether the mount is gone; who waits to lead, or to answer, may not touch the device from then on.
        self._gone = False
        self._counts = threading.Lock()
        self._threads = 1
        self._idle = 1

    def run(self) -> None:
        """Serve until the mount is gone."""
        me = threading.get_ident()
        with suppress(OSError):
            # A matter of speed alone, where it is allowed.
            process.set_slice(_SLICE)
        try:
            while self._lead(me):
                with self._counts:
                    self._idle += 1
        finally:
            if self._leader == me:
                self._leader = 0
                self._leading.release()

    def _lead(self, me: int) -> bool:
        """Read and answer requests until one had to wait; false when the mount is gone."""
        self._leading.acquire()
        with self._counts:
            self._idle -= 1
        self._leader = me
        while self._leader == me:
            request = None if self._gone else self._read()
            if request is None:
                self._gone = True
                return False
            self._answer(request)
        return True

    def _step_aside(self) -> None:
        """Let another thread read while this one waits, unless all of them wait already."""
        if self._leader == threading.get_ident() and self._successor():
            self._leader = 0
            self._leading.release()

    def _successor(self) -> bool:
        """Make sure that another thread waits to lead; false when all of them are busy."""
        with self._counts:
            if self._idle:
                return True
            if self._threads == MAX_THREADS:
                return False
            try:
                threading.Thread(target=self.run, name=f"fuse-{self._threads}", daemon=True).start()
            except RuntimeError:
                # RLIMIT_NPROC, say: then the leader does it itself, and others wait meanwhile.
                return False
            self._threads += 1
            self._idle += 1
        return True

    def _read(self) -> Request | None:
        while True:
            try:
                data = os.read(self._device, _BUFFER)
            except OSError as error:
                # ENOENT: the request was interrupted before it was read. ENODEV: the mount is gone.
                if error.errno in (ENOENT, EINTR):
                    continue
                if error.errno == ENODEV:
                    return None
                raise
            _, opcode, unique, nodeid, uid, gid, _, _, _ = fuse.IN_HEADER.unpack_from(data)
            return Request(opcode, unique, nodeid, uid, gid, data[_IN_SIZE:])

    def _answer(self, request: Request) -> None:
        error = 0
        body: bytes | None = b""
        try:
            body = self._filesystem.handle(request)
        except OSError as failure:
            error = self._number(request, failure)
        except Exception:
            # A bug must not hang the caller: it gets EIO, and the log has the rest.
            log.exception("FUSE opcode %d on node %d", request.opcode, request.nodeid)
            error = EIO
        if body is None or self._gone:
            return
        reply = fuse.OUT_HEADER.pack(_OUT_SIZE + len(body), -error, request.unique) + body
        try:
            os.write(self._device, reply)
        except OSError as failure:
            # ENOENT: the caller was killed meanwhile; ENODEV: the mount is gone, which the next read says too.
            if failure.errno not in (ENOENT, ENODEV):
                raise

    def _number(self, request: Request, failure: OSError) -> int:
        """Return the errno that the kernel is told.

        It takes ENOSYS for "never ask again", for all of the mount: what exists must not fail with it, whatever it failed of. Of a
        number that is none of its own it refuses the whole reply, and the caller would wait for ever.
        """
        number = failure.errno or EIO
        if number == ENOSYS and self._filesystem.knows(request.opcode):
            return EOPNOTSUPP
        return number if 0 < number <= _LAST_ERRNO else EIO
