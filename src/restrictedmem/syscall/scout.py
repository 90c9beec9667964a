"""Processes that look into programs, and write to them, and that can be spared.

A look at a program can take as long as somebody likes. Its memory may be backed by a file system
whose server was stopped. A thread that waits for such memory may hold the lock of its mappings, or
of the directory of its descriptors. And if the program closes a descriptor during a look, the scout
has the last hold on the file, and releases it in the program's place.

So the supervisor has a scout look, one for each call under way. It kills a scout that nobody waits
for any more. A killed scout that waits for a file system's server may live on. It then holds
nothing but its end of a socket, /proc, and the file in question.
"""

import marshal
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from errno import EIO
from functools import partial
from typing import BinaryIO, Final, final

from restrictedmem.abi.stat import device
from restrictedmem.child import fork
from restrictedmem.failure import failed
from restrictedmem.fd import OwnedFd
from restrictedmem.syscall.filter import MAP_ANONYMOUS, MAP_PRIVATE, MAP_TYPE

_MESSAGE: Final = 512
#: Part of the path of every restricted descriptor, whoever has mounted its file system, and where.
_NAME: Final = "/restrictedmem"
_RANGE_BYTES: Final = 16
_CACHESTAT_BYTES: Final = 40
#: Flags and descriptor in i386's ``struct mmap_arg_struct``, after address, length and protection,
#: before the offset.
_OLD_MMAP: Final = struct.Struct("=12xIi4x")

#: A question's name and its arguments: see ``_Looks``.
Question = tuple[str, tuple[int | bytes, ...]]


@final
class Scout:
    """The supervisor's hold on a scout: a question, its answer, the next question."""

    def __init__(self, proc: OwnedFd) -> None:
        """Fork a scout, which looks into programs by way of ``proc`` (``abi.process``).

        Raises:
            OSError: EAGAIN, ENOMEM, EMFILE.
        """
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                self.pid: Final = fork(
                    lambda: _serve(theirs, proc),
                    bound=True,
                    name="rmem-scout",
                    keep=[theirs.fileno(), proc.fileno()],
                )
        except BaseException:
            self._sock.close()
            raise

    def fileno(self) -> int:
        """Return a descriptor that is readable at an answer, or when the scout has ended."""
        return self._sock.fileno()

    def ask(self, question: Question) -> None:
        """Ask a question, after the one before was answered, so that this does not wait.

        Raises:
            BrokenPipeError: when the scout has ended.
        """
        self._sock.send(marshal.dumps(question), socket.MSG_NOSIGNAL)

    def answer(self) -> bool:
        """Return the answer to the last question.

        Raises:
            BlockingIOError: when there is none yet.
            OSError: the error of the question; EIO when the scout has ended.
        """
        message = self._sock.recv(_MESSAGE, socket.MSG_DONTWAIT)
        errno, found = marshal.loads(message) if message else (EIO, 0)
        if errno:
            raise failed("scout", errno)
        return bool(found)

    def kill(self) -> None:
        """Kill the scout, whatever it waits for; its ``pid`` is still to be reaped."""
        self._sock.close()
        os.kill(self.pid, signal.SIGKILL)


def _serve(sock: socket.socket, proc: OwnedFd) -> None:
    looks = _Looks(proc)
    while message := sock.recv(_MESSAGE):
        name, arguments = marshal.loads(message)
        look: Callable[..., bool] = getattr(looks, name)
        try:
            answer = 0, look(*arguments)
        except OSError as error:
            answer = error.errno or EIO, False
        sock.send(marshal.dumps(answer), socket.MSG_NOSIGNAL)


class _Looks:
    """The questions that a scout can answer about a process or one of its threads.

    Each raises OSError for a process that may not be looked into.
    """

    def __init__(self, proc: OwnedFd) -> None:
        self._proc = proc.fileno()
        #: Memory and mappings of the same process, even if another has its number by now.
        self._memory: tuple[OwnedFd, BinaryIO] | None = None

    def is_restricted(self, pid: int, fd: int, wanted: int) -> bool:
        """Say whether a descriptor is a restricted one of the service with device ``wanted``.

        This sends no request to any file system. The name alone is not enough, because anybody may
        give it to a file. But it is the fastest to get, and most files do not have it.
        """
        path = f"{pid}/fd/{fd}"
        return _NAME in os.readlink(path, dir_fd=self._proc) and device(path, self._proc) == wanted

    def may_be_cachestat(self, pid: int, fd: int, span: int, result: int) -> bool:
        """Say whether the arguments may be cachestat's.

        These are an open descriptor, and two structs that are mapped whole.
        """
        try:
            os.lstat(f"{pid}/fd/{fd}", dir_fd=self._proc)
        except FileNotFoundError:
            return False
        with _mappings(self._proc, pid) as maps:
            spans = list(_spans(maps))
        return _covers(spans, span, _RANGE_BYTES) and _covers(spans, result, _CACHESTAT_BYTES)

    def is_mapped_privately(self, pid: int, arguments: int, wanted: int) -> bool:
        """Say whether i386's old mmap maps a restricted descriptor privately.

        Its arguments are a struct at the address ``arguments``.
        """
        with self._opened(pid, os.O_RDONLY) as memory, _mappings(self._proc, pid) as maps:
            # If the process itself may not read them, the kernel should refuse the call.
            if not _covers(list(_spans(maps, b"r")), arguments, _OLD_MMAP.size):
                return False
            content = os.pread(memory.fileno(), _OLD_MMAP.size, arguments)
        if len(content) < _OLD_MMAP.size:
            return False
        flags, fd = _OLD_MMAP.unpack(content)
        return flags & (MAP_TYPE | MAP_ANONYMOUS) == MAP_PRIVATE and self.is_restricted(
            pid, fd, wanted
        )

    def open_memory(self, pid: int, fd: int, wanted: int) -> bool:
        """Say as ``is_restricted`` whose a descriptor is.

        If it is the service's, open the process's memory for ``write``.
        """
        self._let_go()
        if not self.is_restricted(pid, fd, wanted):
            return False
        with ExitStack() as undo:
            memory = undo.enter_context(self._opened(pid, os.O_WRONLY))
            self._memory = memory, _mappings(self._proc, pid)
            undo.pop_all()
        return True

    def write(self, address: int, content: bytes) -> bool:
        """Write to the memory that was opened last.

        Returns false when not all of it is there, or when the process itself may not write to it.
        /proc/PID/mem ignores protection. process_vm_writev(2) does not, but takes a pid, which may
        be another process's by then.
        """
        assert self._memory is not None
        memory, maps = self._memory
        try:
            # Close the mappings before the write, which may take as long as somebody likes.
            with maps:
                writable = _covers(list(_spans(maps, b"w")), address, len(content))
            return writable and os.pwrite(memory.fileno(), content, address) == len(content)
        except (OSError, OverflowError):
            return False
        finally:
            self._let_go()

    def _opened(self, pid: int, flags: int) -> OwnedFd:
        return OwnedFd(os.open(f"{pid}/mem", flags | os.O_CLOEXEC, dir_fd=self._proc))

    def _let_go(self) -> None:
        opened, self._memory = self._memory, None
        for each in opened or ():
            each.close()


def _mappings(proc: int, pid: int) -> BinaryIO:
    # Read bytes: a line ends with "\n" alone, which is "\\012" in a file's name. A "\r" in a name
    # is left as it is.
    return open(f"{pid}/maps", "rb", opener=partial(os.open, dir_fd=proc))


def _spans(maps: BinaryIO, right: bytes = b"") -> Iterator[tuple[int, int]]:
    """Yield the ranges of addresses that are mapped with a right, in their order."""
    for line in maps:
        edges, rights, _ = line.split(b" ", 2)
        if right in rights:
            first, last = edges.split(b"-")
            yield int(first, 16), int(last, 16)


def _covers(spans: list[tuple[int, int]], start: int, size: int) -> bool:
    """Say whether ``size`` bytes at ``start`` lie in ``spans`` whole."""
    at = start
    for first, last in spans:
        if first <= at < last:
            at = last
    return at >= start + size
