"""The explorer's locks, conditions and semaphores.

They allow and refuse what the real ones do. The programs are small enough to know the answer.
"""

import threading
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import pytest

from explored import WHOLE, Base
from restrictedmem import sync
from restrictedmem.check import model
from restrictedmem.check.control import touch
from restrictedmem.check.explorer import RuleBroken, explore
from restrictedmem.sync import RwSem as ProductionRwSem


class Semaphore(Base):
    """Readers and writers note when they are inside; with ``nested``, a reader locks twice."""

    def __init__(self, kind: Callable[[], Any], *, nested: bool, readers: int = 2) -> None:
        self.sem = kind()
        self.nested = nested
        self.reading = 0
        self.writing = 0
        self.bodies = (self.write, *([self.read] * readers))

    def read(self) -> None:
        self.sem.down_read()
        self.reading += 1
        touch("inside", write=True)
        if self.nested:
            self.sem.down_read()
            self.sem.up_read()
        self.reading -= 1
        self.sem.up_read()

    def write(self) -> None:
        self.sem.down_write()
        self.writing += 1
        touch("inside", write=True)
        self.writing -= 1
        self.sem.up_write()

    def state(self) -> Hashable:
        # The state that production's own lock guards.
        inside = [
            getattr(self.sem, name)
            for name in getattr(ProductionRwSem, "__slots__", ())
            if hasattr(self.sem, name)
        ]
        return (
            self.reading,
            self.writing,
            tuple(value for value in inside if isinstance(value, int)),
        )

    def check(self) -> None:
        if self.writing > 1 or (self.writing and self.reading):
            raise RuleBroken(f"{self.writing} writers and {self.reading} readers are inside")


def controlled_rwsem() -> Any:
    return sync.RwSem()


@pytest.mark.parametrize("kind", [controlled_rwsem, ProductionRwSem])
def test_a_semaphore_keeps_writers_alone_and_puts_them_before_new_readers(
    kind: Callable[[], Any],
) -> None:
    for how in WHOLE:
        assert explore(partial(Semaphore, kind, nested=False), **how).holds
        # A writer that waits keeps the second down_read out, while the first keeps the writer out.
        found = explore(partial(Semaphore, kind, nested=True, readers=1), **how).counterexample
        assert found is not None
        assert found.violation == "deadlock: a and b wait"


class Shared(Base):
    """A reader and a writer that do not release what they took."""

    def __init__(self) -> None:
        self.sem = sync.RwSem()
        self.bodies = (self.sem.down_read, self.sem.down_write)


def test_a_semaphore_that_stays_taken_is_a_deadlock() -> None:
    found = explore(Shared).counterexample
    assert found is not None
    assert found.stuck[0].does in ("takes Shared.sem for writing", "takes Shared.sem for reading")


class Misuse(Base):
    def __init__(self, act: Callable[[Any, Any], None]) -> None:
        lock = sync.mutex()
        self.bodies = (partial(act, lock, sync.condition(lock)),)


def release(lock: Any, condition: Any) -> None:
    lock.release()


def wait(lock: Any, condition: Any) -> None:
    condition.wait()


def notify(lock: Any, condition: Any) -> None:
    condition.notify()


@pytest.mark.parametrize("act", [release, wait, notify])
def test_what_the_real_objects_refuse_is_refused(act: Callable[[Any, Any], None]) -> None:
    lock = threading.Lock()
    with pytest.raises(RuntimeError) as refused:
        act(lock, threading.Condition(lock))
    found = explore(partial(Misuse, act)).counterexample
    assert found is not None
    assert found.violation == f"a raised {refused.value!r}"


class Spin(Base):
    def __init__(self) -> None:
        self.words = sync.SharedWords(memoryview(bytearray(8)))
        self.bodies = (self.spin,)

    def spin(self) -> None:
        while not self.words.read(0):
            pass


@pytest.mark.parametrize("how", WHOLE)
def test_an_execution_without_an_end_is_a_violation(
    how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "ENDLESS", 100)
    found = explore(Spin, **how).counterexample
    assert found is not None
    assert found.violation == "no end after 100 steps"


class Tries(Base):
    """Mutual exclusion by trying: who fails goes without."""

    def __init__(self, ends: set[tuple[bool, ...]]) -> None:
        self.ends = ends
        self.lock = sync.mutex()
        self.got: dict[str, bool] = {}
        self.bodies = (partial(self.hold, "a"), partial(self.hold, "b"), self.look)

    def hold(self, name: str) -> None:
        self.got[name] = self.lock.acquire(blocking=False)
        if self.got[name]:
            self.lock.release()

    def look(self) -> None:
        self.got["c"] = self.lock.locked()

    def state(self) -> Hashable:
        return tuple(sorted(self.got.items()))

    def finish(self) -> None:
        self.ends.add(tuple(value for _, value in sorted(self.got.items())))


def test_trying_and_looking_are_steps() -> None:
    found: list[set[tuple[bool, ...]]] = []
    for how in WHOLE:
        ends: set[tuple[bool, ...]] = set()
        assert explore(partial(Tries, ends), **how).holds
        found.append(ends)
    assert (
        found[0]
        == found[1]
        == {
            (x, y, z) for x in (True, False) for y in (True, False) for z in (True, False) if x or y
        }
    )
