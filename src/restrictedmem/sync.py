"""The only source of locks, waits and unlocked shared reads for ``mm`` and the fault path.

A checker replaces the factories here to try every interleaving. Nothing in ``mm`` or in the guests'
fault path uses ``threading`` or shared memory by itself. Each name is the kernel's: ``mutex``,
``RwSem`` (``struct rw_semaphore``), and ``SharedWords`` for words that the kernel reads with
READ_ONCE and writes with WRITE_ONCE.
"""

import threading
import time
from typing import Final, TypeAlias, final

Mutex: TypeAlias = threading.Lock
#: Seconds of ``relax``.
_RELAX: Final = 0.0001


def mutex() -> Mutex:
    """Make a lock that is not recursive."""
    return threading.Lock()


def shared_bytes(size: int) -> bytearray:
    """Make ``size`` zero bytes that threads read without a lock; no access is torn."""
    return bytearray(size)


def relax() -> None:
    """Let others go on for a moment (``cpu_relax``).

    A thread calls this after it has read a shared word, and before it reads the word again.
    """
    time.sleep(_RELAX)


def condition(lock: Mutex) -> threading.Condition:
    """Make a condition to wait on while ``lock`` is held."""
    return threading.Condition(lock)


@final
class RwSem:
    """A readers-writer semaphore: many readers or one writer.

    A waiting writer goes before new readers. Neither mode is recursive, as in the kernel: a
    callback that runs under the read side must not take it again.
    """

    __slots__ = ("_changed", "_lock", "_readers", "_writers", "_writing")

    def __init__(self) -> None:
        self._lock = mutex()
        # Made at the first contention: each of thousands of files has a semaphore, and few ever
        # wait.
        self._changed: threading.Condition | None = None
        self._readers = 0
        # Waiting writers count too, so one look at the count keeps new readers out.
        self._writers = 0
        self._writing = False

    def _wait(self) -> None:
        if self._changed is None:
            self._changed = condition(self._lock)
        self._changed.wait()

    def _wake(self) -> None:
        if self._changed is not None:
            self._changed.notify_all()

    def down_read(self) -> None:
        """Take the read side."""
        with self._lock:
            while self._writers:
                self._wait()
            self._readers += 1

    def up_read(self) -> None:
        """Release the read side."""
        with self._lock:
            self._readers -= 1
            if self._writers and not self._readers:
                self._wake()

    def down_write(self) -> None:
        """Take the write side."""
        with self._lock:
            self._writers += 1
            while self._writing or self._readers:
                self._wait()
            self._writing = True

    def up_write(self) -> None:
        """Release the write side."""
        with self._lock:
            self._writers -= 1
            self._writing = False
            self._wake()


@final
class SharedWords:
    """64-bit words in memory that another process writes or reads at the same time.

    Each access is one aligned load or store, so a word is never torn. The order between words is
    that of the machine's memory model plus the interpreter's own barriers. On x86-64 loads stay in
    order and so do stores. The invalidation sequence needs no more.
    """

    __slots__ = ("_words",)

    def __init__(self, memory: memoryview) -> None:
        self._words = memory.cast("B").cast("Q")

    def read(self, index: int) -> int:
        """Read one word (READ_ONCE)."""
        return self._words[index]

    def write(self, index: int, value: int) -> None:
        """Write one word (WRITE_ONCE)."""
        self._words[index] = value

    def release(self) -> None:
        """Give the memory back, so that its mapping can be closed."""
        self._words.release()
