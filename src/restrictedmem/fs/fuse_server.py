"""The loop between /dev/fuse and the file system.

One thread reads at a time, the leader. Before it does something that may wait (for a consumer, or
for gigabytes), it lets another thread read (the leader/followers pattern). So the common request
costs one read and one write with no hand-over, and a slow one delays no other request.

A request may have to wait for something that enough threads wait for already. The server puts it
off, without a thread, until one of those threads is done.
"""

import logging
import os
import threading
from collections import deque
from contextlib import suppress
from errno import EINTR, EIO, ENODEV, ENOENT, ENOMEM, ENOSYS, EOPNOTSUPP
from functools import partial
from typing import Final, final

from restrictedmem import threads
from restrictedmem.abi import fuse, process
from restrictedmem.failure import status_of
from restrictedmem.fd import OwnedFd
from restrictedmem.fs.filesystem import FileSystem, Request
from restrictedmem.fs.guest_memfd_requests import REQUEST_BUFFER
from restrictedmem.patience import patiently

log = logging.getLogger(__name__)

#: Threads that may wait for memory at the same time.
MAX_THREADS: Final = 8
#: Threads that stay when no request waits any more.
_SPARE: Final = 8
#: Nanoseconds. Requests are short, and their callers wait. With a short slice the server need not
#: also wait until a guest's slice ends.
_SLICE: Final = 100_000
#: Larger errnos are internal to the kernel.
_LAST_ERRNO: Final = 511

_IN_SIZE: Final = fuse.IN_HEADER.size
_OUT_SIZE: Final = fuse.OUT_HEADER.size
_NOTHING: Final = bytes(_IN_SIZE)


@final
class FuseServer:
    """Serves one mount until its last descriptor is gone."""

    def __init__(self, device: OwnedFd, filesystem: FileSystem) -> None:
        """Serve requests of ``device``, an open /dev/fuse.

        The caller owns ``device`` and keeps it open until ``run`` has returned.
        """
        self._device = device.fileno()
        #: Only the leader uses it.
        self._buffer = bytearray(REQUEST_BUFFER)
        self._filesystem = filesystem
        filesystem.before_waiting = self._step_aside
        filesystem.is_alone = self._is_leader
        self._leading = threading.Lock()
        #: The thread that holds ``_leading``, 0 when it has stepped aside; and the request that it
        #: handles.
        self._leader = 0
        self._request: Request | None = None
        #: Whether the mount is gone. After that, threads that wait to lead or to reply may not use
        #: the device.
        self._gone = False
        self._counts = threading.Lock()
        # The rest is used under _counts.
        #: How many threads wait to lead.
        self._idle = 1
        #: How many threads wait for each consumer, and for memory (None).
        self._waiters: dict[int | None, int] = {}
        #: What each thread waits for, by the thread's identifier.
        self._waits_for: dict[int, int | None] = {}
        #: Requests that have to wait for something that enough threads wait for.
        self._put_off: deque[tuple[int | None, Request]] = deque()

    def run(self) -> None:
        """Serve until the mount is gone; a thread that fails in another way ends the process."""
        self._serve(may_end=False)

    def _serve(self, *, may_end: bool) -> None:
        me = threading.get_ident()
        with suppress(OSError):
            # The slice is only for speed. The kernel may not allow it.
            process.set_slice(_SLICE)
        try:
            while self._lead(me) and self._work_off(me, may_end=may_end):
                pass
        except BaseException as error:
            with suppress(BaseException):
                log.exception("a FUSE thread cannot go on")
            # Without this, the device would stay open with no thread to read it, and callers on the
            # mount would wait for ever. When the process ends, they get ENOTCONN.
            os._exit(status_of(error))
        if self._leader == me:
            self._leader = 0
            self._leading.release()

    def _lead(self, me: int) -> bool:
        """Read and answer requests until one had to wait; return False when the mount is gone."""
        self._leading.acquire()
        with self._counts:
            self._idle -= 1
            if not (self._idle or self._gone):
                # Start the next thread before it is needed. By then a limit, such as RLIMIT_NPROC,
                # may forbid it.
                self._start_thread()
        self._leader = me
        while self._leader == me:
            request = self._request = None if self._gone else self._read()
            if request is None:
                self._gone = True
                return False
            self._answer(request)
        return True

    def _step_aside(self, what: int | None) -> bool:
        """Let another thread read while this one waits; return False if it must not wait now.

        The thread waits for a consumer, or for memory (None). At most one thread waits for each
        consumer, because round trips to a consumer run one at a time anyway. So a consumer that
        does not answer delays only the owner of its own files, and takes only one thread.
        """
        me = threading.get_ident()
        if self._leader != me:
            # The thread has stepped aside before, or handles a request that was put off.
            return True
        with self._counts:
            if self._waiters.get(what, 0) >= _most_waiters(what) or not (
                self._idle or self._start_thread()
            ):
                if not self._waiters:
                    # This is the only thread, so no thread would come back to a request that was
                    # put off.
                    return True
                assert self._request is not None
                self._put_off.append((what, self._request))
                return False
            self._begin_wait(me, what)
        self._leader = 0
        self._leading.release()
        return True

    def _is_leader(self) -> bool:
        """Say whether no other thread reads requests until this one is done."""
        return self._leader == threading.get_ident()

    def _work_off(self, me: int, *, may_end: bool) -> bool:
        """Answer requests that were put off while this thread waited.

        Return False if this thread has to end, because there are enough others.
        """
        while True:
            with self._counts:
                self._end_wait(me)
                index = next(
                    (
                        i
                        for i, (what, _) in enumerate(self._put_off)
                        if self._waiters.get(what, 0) < _most_waiters(what)
                    ),
                    None,
                )
                if index is None:
                    if may_end and self._idle >= _SPARE:
                        return False
                    self._idle += 1
                    return True
                what, request = self._put_off[index]
                del self._put_off[index]
                self._begin_wait(me, what)
            self._answer(request)

    # Preconditions of these: _counts held.

    def _begin_wait(self, me: int, what: int | None) -> None:
        # Count last: if memory runs out in the line before, the count has not changed.
        self._waits_for[me] = what
        self._waiters[what] = self._waiters.get(what, 0) + 1

    def _end_wait(self, me: int) -> None:
        what = self._waits_for.pop(me)
        self._waiters[what] -= 1
        if not self._waiters[what]:
            del self._waiters[what]

    def _start_thread(self) -> bool:
        """Start one more thread; return False if that fails."""
        try:
            threads.start(partial(self._serve, may_end=True))
        except OSError:
            return False
        self._idle += 1
        return True

    def _read(self) -> Request | None:
        self._buffer[:_IN_SIZE] = _NOTHING
        while True:
            try:
                return patiently(self._read_one)
            except OSError as error:
                # ENOENT: the request was interrupted before it was read. ENODEV: the mount is gone.
                if error.errno in (ENOENT, EINTR):
                    continue
                if error.errno == ENODEV:
                    return None
                raise

    def _read_one(self) -> Request:
        # If memory ran out after the read, the request is still in the buffer.
        if not fuse.IN_HEADER.unpack_from(self._buffer)[0]:
            os.readv(self._device, (self._buffer,))
        size, opcode, unique, nodeid, uid, gid, pid, _, _ = fuse.IN_HEADER.unpack_from(self._buffer)
        return Request(opcode, unique, nodeid, uid, gid, pid, bytes(self._buffer[_IN_SIZE:size]))

    def _answer(self, request: Request) -> None:
        error = 0
        body: bytes | None = b""
        try:
            body = self._filesystem.handle(request)
        except OSError as failure:
            error = self._errno_of(request, failure)
        except MemoryError:
            error = ENOMEM
        except Exception:  # noqa: BLE001  logged in a function of its own
            # A bug must not hang the caller. The caller gets EIO, and the log has the rest.
            _log_failure("FUSE opcode %d on node %d", request)
            error = EIO
        if body is None or self._gone:
            return
        patiently(lambda: self._reply(request, error, body))

    def _reply(self, request: Request, error: int, body: bytes) -> None:
        reply = fuse.OUT_HEADER.pack(_OUT_SIZE + len(body), -error, request.unique) + body
        try:
            os.write(self._device, reply)
        except OSError as failure:
            # ENOENT: the caller was killed meanwhile. ENODEV: the mount is gone; the next read gets
            # ENODEV, too.
            if failure.errno not in (ENOENT, ENODEV):
                _log_failure("the reply to FUSE opcode %d on node %d", request)

    def _errno_of(self, request: Request, failure: OSError) -> int:
        """Return the errno for the kernel.

        The kernel takes ENOSYS for "never ask again", for the whole mount. So a known operation
        must not fail with ENOSYS, whatever the cause. If the errno is not one of the kernel's, the
        kernel refuses the whole reply, and the caller would wait for ever.
        """
        number = failure.errno or EIO
        if number == ENOSYS and self._filesystem.knows(request.opcode):
            return EOPNOTSUPP
        return number if 0 < number <= _LAST_ERRNO else EIO


def _most_waiters(what: int | None) -> int:
    """Return how many threads may wait for a consumer, or for memory."""
    return MAX_THREADS if what is None else 1


def _log_failure(words: str, request: Request) -> None:
    # The caller must get its reply even if logging fails.
    with suppress(Exception):
        log.exception(words, request.opcode, request.nodeid)
