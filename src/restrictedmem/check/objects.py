"""Replacements for the objects of ``sync`` while the explorer controls their steps."""

from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, SupportsIndex, cast, final

from restrictedmem import sync
from restrictedmem.check.control import (
    ASKS_WRITE,
    LOOKS,
    NOTIFIES,
    READS,
    RELEASES,
    RELEASES_READ,
    RELEASES_WRITE,
    TAKES,
    TAKES_READ,
    TAKES_WRITE,
    TRIES,
    WAITS,
    WAKES,
    WRITES,
    Actor,
    Operation,
    current,
    enter,
)

# Gates: whether an operation can be done, by the states of all objects.


def _is_free(mutex: int, values: Sequence[Any]) -> bool:
    return bool(values[mutex] == -1)


def _is_woken(mutex: int, condition: int, actor: int, values: Sequence[Any]) -> bool:
    return values[mutex] == -1 and actor not in values[condition]


def _has_no_writers(semaphore: int, values: Sequence[Any]) -> bool:
    return not values[semaphore][1]


def _is_unused(semaphore: int, values: Sequence[Any]) -> bool:
    readers, _, writing = values[semaphore]
    return not writing and not readers


def _is_another(word: int, value: int, values: Sequence[Any]) -> bool:
    # A word without a state was never written.
    return word < len(values) and values[word] not in (None, value)


_TO_A_MUTEX: Final = (TAKES, TRIES, RELEASES, LOOKS)
_ON_A_CONDITION: Final = (WAITS, WAKES, NOTIFIES)


@final
class Mutex:
    """``sync.mutex()``."""

    __slots__ = ("_execution", "_free", "_looks", "_releases", "_takes", "_tries", "owner", "slot")
    owner: Actor | None

    def __init__(self) -> None:
        self._execution = current()
        self.slot = slot = self._execution.new_slot()
        self.owner = None
        self._execution.values[slot] = -1
        self._takes, self._tries, self._releases, self._looks = self._execution.names.operations(
            slot, _TO_A_MUTEX
        )
        self._free = self._execution.names.gate(_is_free, slot)

    def give(self, owner: Actor | None) -> None:
        """Set the owner, or None for no owner; this is no point."""
        if owner is not None:
            owner.held |= {self.slot}
        elif self.owner is not None:
            self.owner.held -= {self.slot}
        self.owner = owner
        self._execution.values[self.slot] = -1 if owner is None else owner.index

    def acquire(self, blocking: bool = True) -> bool:
        """Take the mutex, and wait for it unless told not to."""
        actor = self._execution.running
        if actor is None:
            return True
        if blocking:
            self._execution.point(self._takes, self._free)
        else:
            self._execution.names.tried.add(self.slot)
            self._execution.point(self._tries)
            actor.value = self.owner is None
            if not actor.value:
                return False
        self.give(actor)
        return True

    def release(self) -> None:
        """Release the mutex."""
        if self._execution.running is None:
            return
        self._execution.point(self._releases)
        if self.owner is None:
            raise RuntimeError("release unlocked lock")
        self.give(None)

    def locked(self) -> bool:
        """Return whether some actor holds the mutex."""
        actor = self._execution.running
        if actor is not None:
            self._execution.names.tried.add(self.slot)
            self._execution.point(self._looks)
            actor.value = self.owner is not None
        return self.owner is not None

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


@final
class Condition:
    """``sync.condition(lock)``; a timeout never runs out.

    It wakes actors in the order of their waits, as ``threading.Condition`` does.
    """

    __slots__ = ("_execution", "_mutex", "_notifies", "_slot", "_waiters", "_waits", "_wakes")

    _waiters: tuple[Actor, ...]

    def __init__(self, lock: Mutex) -> None:
        self._execution = current()
        self._mutex = lock
        self._slot = self._execution.new_slot()
        self._set_waiters(())
        # Waiting and waking are also operations on the mutex.
        self._waits, self._wakes, self._notifies = self._execution.names.operations(
            lock.slot, _ON_A_CONDITION, self._slot
        )

    def _set_waiters(self, waiters: tuple[Actor, ...]) -> None:
        self._waiters = waiters
        self._execution.values[self._slot] = tuple(actor.index for actor in waiters)

    def __enter__(self) -> bool:
        return self._mutex.acquire()

    def __exit__(self, *_: object) -> None:
        self._mutex.release()

    def acquire(self) -> bool:
        """Take the lock."""
        return self._mutex.acquire()

    def release(self) -> None:
        """Release the lock."""
        self._mutex.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Release the lock, wait for a notification, and take the lock."""
        actor = self._execution.running
        if actor is None or self._mutex.owner is not actor:
            raise RuntimeError("cannot wait on un-acquired lock")
        self._execution.point(self._waits)
        self._mutex.give(None)
        self._set_waiters((*self._waiters, actor))
        self._execution.point(
            self._wakes,
            self._execution.names.gate(_is_woken, self._mutex.slot, self._slot, actor.index),
        )
        self._mutex.give(actor)
        return True

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait until a predicate is true."""
        while not predicate():
            self.wait(timeout)
        return True

    def notify(self, n: int = 1) -> None:
        """Wake the ``n`` actors that have waited longest."""
        execution = self._execution
        if execution.running is None:
            return
        if self._mutex.owner is not execution.running:
            raise RuntimeError("cannot notify on un-acquired lock")
        execution.point(self._notifies)
        self._set_waiters(self._waiters[n:])

    def notify_all(self) -> None:
        """Wake all actors that wait."""
        self.notify(len(self._execution.actors))


@final
class ControlledRwSem:
    """``sync.RwSem`` as one object.

    An actor takes or releases it in one step; a writer that has to wait takes it in two.
    """

    __slots__ = ("_execution", "_readers", "_slot", "_writers", "_writing")
    _readers: int
    _writers: int
    _writing: bool

    def __init__(self) -> None:
        self._execution = current()
        self._slot = self._execution.new_slot()
        self._set(0, 0, writing=False)

    def _point(self, verb: str, gate: Callable[..., bool] | None = None) -> None:
        self._execution.point(
            (verb, self._slot, None),
            None if gate is None else self._execution.names.gate(gate, self._slot),
        )

    def _set(self, readers: int, writers: int, *, writing: bool) -> None:
        self._readers, self._writers, self._writing = readers, writers, writing
        self._execution.values[self._slot] = (readers, writers, writing)

    def down_read(self) -> None:
        """Take the read side, after all writers that wait."""
        if self._execution.running is not None:
            self._point(TAKES_READ, _has_no_writers)
            self._set(self._readers + 1, self._writers, writing=False)

    def up_read(self) -> None:
        """Release the read side."""
        if self._execution.running is not None:
            self._point(RELEASES_READ)
            self._set(self._readers - 1, self._writers, writing=False)

    def down_write(self) -> None:
        """Take the write side."""
        actor = self._execution.running
        if actor is None:
            return
        self._point(ASKS_WRITE)
        if self._writing or self._readers:
            self._set(self._readers, self._writers + 1, writing=self._writing)
            self._point(TAKES_WRITE, _is_unused)
            self._writers -= 1
        actor.held |= {self._slot}
        self._set(0, self._writers + 1, writing=True)

    def up_write(self) -> None:
        """Release the write side."""
        actor = self._execution.running
        if actor is not None:
            self._point(RELEASES_WRITE)
            actor.held -= {self._slot}
            self._set(0, self._writers - 1, writing=False)


@final
class ControlledSharedWords:
    """``sync.SharedWords``: each load and each store is a step of its own.

    Two of these over the same memory have the same words. To the explorer, all words of the same
    index are one object.
    """

    __slots__ = ("_execution", "_number", "_words")

    def __init__(self, memory: memoryview) -> None:
        self._execution = current()
        self._number = self._execution.memory(memory.obj)
        self._words = memory.cast("B").cast("Q")

    def _operation(self, verb: str, index: int) -> Operation:
        return verb, self._execution.names.place(("word", index)), (self._number, index)

    def read(self, index: int) -> int:
        """Read one word."""
        actor = self._execution.running
        if actor is None:
            return self._words[index]
        operation = verb, place, where = self._operation(READS, index)
        self._execution.point(operation)
        actor.value = value = self._words[index]
        actor.polled = (
            (verb, place, (where, value)),
            self._execution.names.gate(_is_another, self._execution.slot(where), value),
        )
        return value

    def write(self, index: int, value: int) -> None:
        """Write one word."""
        execution = self._execution
        if execution.running is not None:
            execution.point(self._operation(WRITES, index))
            execution.running.value = value
        self._words[index] = value
        execution.values[execution.slot((self._number, index))] = value

    def release(self) -> None:
        """Release the memory."""
        self._words.release()


@final
class SharedBytes(bytearray):
    """``sync.shared_bytes``.

    Each index, slice, count, search, iteration and assignment is a step of its own.
    """

    __slots__ = ("_execution", "slot")

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._execution = current()
        self.slot = self._execution.new_slot()
        self._execution.values[self.slot] = bytes(size)

    def watch(self) -> None:
        """Declare that the program's check looks at these bytes (``Names.watch``)."""
        self._execution.names.watch(self.slot)

    def _reads(self, where: Hashable) -> None:
        if self._execution.running is not None:
            self._execution.point((READS, self.slot, where))

    def _found(self, value: int) -> int:
        if self._execution.running is not None:
            self._execution.running.value = value
        return value

    def __getitem__(self, where: Any) -> Any:
        self._reads(_place(where))
        value = cast("int | bytearray", super().__getitem__(where))
        if self._execution.running is not None:
            self._execution.running.value = bytes(value) if isinstance(value, bytearray) else value
        return value

    def __setitem__(self, where: Any, value: Any) -> None:
        execution = self._execution
        if execution.running is not None:
            execution.point((WRITES, self.slot, _place(where)))
            execution.running.value = value if isinstance(value, int) else bytes(value)
        super().__setitem__(where, value)
        # bytes(self) would be one more step.
        execution.values[self.slot] = bytes(memoryview(self))

    def __iter__(self) -> Iterator[int]:
        return iter(self[:])

    def __contains__(self, key: object) -> bool:
        return key in self[:]

    def __bytes__(self) -> bytes:
        return bytes(self[:])

    def count(self, *args: Any) -> int:
        """Count occurrences, in one step."""
        self._reads(("count", *args))
        return self._found(super().count(*args))

    def find(self, *args: Any) -> int:
        """Find an occurrence, in one step."""
        self._reads(("find", *args))
        return self._found(super().find(*args))

    def index(self, *args: Any) -> int:
        """Find an occurrence in one step, or raise ValueError."""
        if (found := self.find(*args)) < 0:
            raise ValueError("subsection not found")
        return found


def relax() -> None:
    """Wait until the shared word that the actor read last has changed.

    So the search skips the polls that find nothing new.
    """
    execution = current()
    actor = execution.running
    if actor is not None and actor.polled is not None:
        execution.point(*actor.polled)
        actor.value = True


def _place(where: SupportsIndex | slice) -> Hashable:
    return (
        ("slice", where.start, where.stop, where.step)
        if isinstance(where, slice)
        else where.__index__()
    )


_FACTORIES: Final[dict[str, Callable[..., object]]] = {
    "mutex": Mutex,
    "condition": Condition,
    "RwSem": ControlledRwSem,
    "SharedWords": ControlledSharedWords,
    "shared_bytes": SharedBytes,
    "relax": relax,
}


@contextmanager
def controlled() -> Generator[None]:
    """Replace the objects of ``sync`` by those of this module; restore them in any case."""
    replaced = {name: getattr(sync, name) for name in _FACTORIES}
    assert Mutex not in replaced.values(), "explorations do not nest"
    try:
        for name, factory in _FACTORIES.items():
            setattr(sync, name, factory)
        yield
    finally:
        for name, original in replaced.items():
            setattr(sync, name, original)
        enter(None)
