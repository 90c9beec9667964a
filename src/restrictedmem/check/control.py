"""Taking control of ``sync``: every lock, wait and unlocked shared access becomes a point at which an explorer says who goes on.

Each actor is a greenlet. It stops *before* each operation on an object made by ``sync``; the
operation and the plain code up to the next one are a single step. What runs outside the actors
(making the program, its checks) passes through without points.
"""

from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, Final, ParamSpec, Protocol, TypeAlias, TypeVar, final

from greenlet import GreenletExit, getcurrent, greenlet

_P = ParamSpec("_P")
_T = TypeVar("_T", bound=Hashable)

#: Says by the state of all objects whether something can be done.
Gate: TypeAlias = Callable[[Sequence[Any]], bool]
#: What an actor is about to do: a verb, the number of the object, and where in it.
Operation: TypeAlias = tuple[str, int, Hashable]

TAKES: Final = "takes"
TRIES: Final = "tries to take"
RELEASES: Final = "releases"
LOOKS: Final = "looks whether somebody holds"
WAITS: Final = "waits on"
WAKES: Final = "goes on after waiting on"
NOTIFIES: Final = "notifies"
TAKES_READ: Final = "takes for reading"
RELEASES_READ: Final = "releases, having read"
ASKS_WRITE: Final = "asks to take for writing"
TAKES_WRITE: Final = "takes for writing"
RELEASES_WRITE: Final = "releases, having written"
READS: Final = "reads"
WRITES: Final = "writes"
TOUCHES: Final = "looks at"
CHANGES: Final = "changes"

#: What an owner alone does to its mutex, and nobody else can do anything meanwhile.
OWNERS: Final = frozenset({RELEASES, WAITS, NOTIFIES})
#: What may change what a program's check looks at.
VISIBLE: Final = frozenset({WRITES, CHANGES})
#: Two of these on one object commute; readers of a semaphore come and go in any order.
COMMUTE: Final = frozenset({LOOKS, TAKES_READ, RELEASES_READ, READS, TOUCHES})


class UnsoundError(Exception):
    """A program that hides something of its state, or does not do the same each time: nothing found about it counts."""


class Story(Protocol):
    """Who wants to hear what happens, in the one execution that is told to a person."""

    def made(self, slot: int) -> None:
        """Hear of an object just made by ``sync``; who made it is on the stack."""
        ...

    def arrives(self, actor: "Actor", operation: Operation | None) -> None:
        """Hear that an actor stopped before an operation, or ended; what its last one returned is known now."""
        ...

    def performs(self, actor: "Actor") -> None:
        """Hear that an actor goes on."""
        ...


@final
class Actor:
    """One of the parties: a greenlet, what it is about to do, and all it has done and read."""

    __slots__ = (
        "done",
        "gate",
        "held",
        "history",
        "index",
        "made",
        "name",
        "pending",
        "polled",
        "switch",
        "value",
    )

    def __init__(self, index: int, name: str, switch: Callable[..., object]) -> None:
        self.index = index
        self.name = name
        self.switch = switch
        #: The number of everything this actor did and read so far, and is about to do: equal
        #: exactly for equal pasts.
        self.history = 0
        #: What the operation under way returned.
        self.value: Hashable = None
        self.pending: Operation | None = None
        #: Says whether the operation can be done now; None: always.
        self.gate: Gate | None = None
        #: Slots of what it holds that only one can hold.
        self.held: frozenset[int] = frozenset()
        #: How to wait until the shared word that it read last is another.
        self.polled: tuple[Operation, Gate] | None = None
        self.done = False
        self.made = 0


class Names:
    """What stays from one execution to the next: numbers of objects and of actors' pasts, and the greenlets, which cost more to make."""

    __slots__ = (
        "_gates",
        "_operations",
        "_pasts",
        "_places",
        "_watched",
        "slots",
        "tried",
        "workers",
    )

    def __init__(self) -> None:
        self.workers: list[greenlet] = []
        #: Objects whose state the explorer sees, from 0 up; and those whose state it does not, from
        #: -1 down.
        self.slots: dict[Hashable, int] = {}
        self._places: dict[Hashable, int] = {}
        self._operations: dict[tuple[int, tuple[str, ...], Hashable], tuple[Operation, ...]] = {}
        self._gates: dict[tuple[Hashable, ...], Gate] = {}
        #: Mutexes that somebody looks at, or tries to take, without waiting.
        self.tried: set[int] = set()
        self._pasts: dict[tuple[int, Hashable, Operation | None], int] = {}
        self._watched: set[int] | None = None

    def watch(self, place: int) -> None:
        """Say that the program's check looks at an object; if this is never said, it may look at any."""
        self._watched = {place} | (self._watched or set())

    def visible(self, operation: Operation | None) -> bool:
        """Say whether an operation may change what the program's check looks at."""
        return (
            operation is not None
            and operation[0] in VISIBLE
            and (self._watched is None or operation[1] in self._watched)
        )

    def slot(self, name: Hashable) -> int:
        """Return the number of an object with a state."""
        return self.slots.setdefault(name, len(self.slots))

    def place(self, name: Hashable) -> int:
        """Return the number of an object without a state of its own."""
        return self._places.setdefault(name, ~len(self._places))

    def operations(
        self, slot: int, verbs: tuple[str, ...], where: Hashable = None
    ) -> tuple[Operation, ...]:
        """Return what is done to an object, ready to use."""
        key = slot, verbs, where
        found = self._operations.get(key)
        if found is None:
            found = self._operations[key] = tuple((verb, slot, where) for verb in verbs)
        return found

    def gate(self, says: Callable[..., bool], *about: Hashable) -> Gate:
        """Return ``says`` about something, to be asked with the state of all objects."""
        found = self._gates.get((says, *about))
        if found is None:
            found = self._gates[says, *about] = partial(says, *about)
        return found

    def past(self, before: int, value: Hashable, operation: Operation | None) -> int:
        """Return the number of a past: an earlier one, what its last operation returned, and what comes now."""
        return self._pasts.setdefault((before, value, operation), len(self._pasts) + 1)


@final
class Execution:
    """One execution: actors, the objects they share, and whose turn it is."""

    __slots__ = (
        "_arrive",
        "_failure",
        "_hub",
        "_made",
        "_memories",
        "_over",
        "_plan",
        "_story",
        "actors",
        "broken",
        "names",
        "running",
        "step",
        "values",
    )

    def __init__(
        self,
        names: Names,
        arrive: Callable[["Execution"], Actor | None],
        story: Story | None = None,
    ) -> None:
        """Make one without actors; ``arrive`` chooses who goes on once the plan is used up, None to stop."""
        self.names = names
        self._arrive = arrive
        self._story = story
        self._hub = Actor(-1, "", getcurrent().switch)
        self._plan: list[Actor] = []
        self._over = False
        self._failure: BaseException | None = None
        self._made = 0
        self._memories: dict[int, int] = {}
        self.actors: tuple[Actor, ...] = ()
        #: Whose turn it is; None while code outside the actors runs.
        self.running: Actor | None = None
        #: How many steps were done.
        self.step = 0
        #: The state of each object behind ``sync``, by slot; None for one that is not made yet.
        self.values: list[Hashable] = [None] * len(names.slots)
        #: What an actor raised.
        self.broken: tuple[Actor, Exception] | None = None

    # Executing.

    def run(self, acts: Sequence[tuple[str, Callable[[], None]]], schedule: Sequence[int]) -> None:
        """Bring each actor to its first point, follow the schedule, then ask; unfinished actors are dropped where they stand."""
        workers = self.names.workers
        workers.extend(greenlet(_work) for _ in range(len(acts) - len(workers)))
        self.actors = tuple(
            Actor(index, name, worker.switch)
            for index, ((name, _), worker) in enumerate(zip(acts, workers, strict=False))
        )
        self._plan = [self._hub] * len(acts) + [self.actors[index] for index in schedule]
        self.step = -len(acts)
        try:
            for actor, (_, act) in zip(self.actors, acts, strict=True):
                self.running = actor
                actor.switch(self, actor, act)
            self.running = self._hub if self.broken else self._next()
            while (running := self.running) is not self._hub:
                assert running is not None
                running.switch()
        finally:
            self._end()
        if self._failure is not None:
            raise self._failure

    def live(self, actor: Actor, act: Callable[[], None]) -> None:
        """Be an actor until it ends or is dropped."""
        try:
            act()
        except GreenletExit:
            return
        except Exception as error:  # noqa: BLE001 whatever it is, it is the finding
            self.broken = actor, error
        actor.done = True
        if self._story is not None:
            self._story.arrives(actor, None)
        actor.history = self.names.past(actor.history, actor.value, None)
        actor.pending = actor.gate = None
        self.running = self._hub if self.broken else self._next()

    def enabled(self, actor: Actor) -> bool:
        """Say whether an actor can go on."""
        return not actor.done and (actor.gate is None or actor.gate(self.values))

    def _next(self) -> Actor:
        step = self.step + len(self.actors)
        if step < len(self._plan):
            following = self._plan[step]
            if following.done:
                raise UnsoundError(f"{following.name} had a step more in an earlier execution")
        else:
            self.running = None
            try:
                chosen = self._arrive(self)
            except BaseException as error:  # noqa: BLE001 it must not run through an actor's code
                self._failure = error
                chosen = None
            if chosen is None:
                return self._hub
            following = chosen
        self.step += 1
        return following

    def point(self, operation: Operation, gate: Gate | None = None) -> None:
        """Stop the running actor before an operation until it is chosen to do it."""
        actor = self.running
        if self._over or actor is None:
            raise GreenletExit
        actor.history = self.names.past(actor.history, actor.value, operation)
        if self._story is not None:
            self._story.arrives(actor, operation)
        actor.value = None
        actor.pending = operation
        actor.gate = gate
        self.running = following = self._next()
        if following is not actor:
            following.switch()
        if gate is not None and not gate(self.values):
            raise UnsoundError(f"{actor.name} did not have to wait in an earlier execution")
        if self._story is not None:
            self._story.performs(actor)

    def _end(self) -> None:
        """Drop the actors: whatever operation their ``finally`` clauses come to ends them at once."""
        self._over = True
        for actor, worker in zip(self.actors, self.names.workers, strict=False):
            self.running = actor
            if not actor.done and worker:
                worker.throw()
            actor.gate = None
        self.running = None

    # Objects.

    def slot(self, name: Hashable) -> int:
        """Return the slot of an object by its name."""
        slot = self.names.slot(name)
        if slot >= len(self.values):
            self.values.extend([None] * (slot + 1 - len(self.values)))
        return slot

    def memory(self, memory: object) -> int:
        """Return the slot of some memory in which objects lie; it must be kept as long as the execution."""
        slot = self._memories.get(id(memory))
        if slot is None:
            slot = self._memories[id(memory)] = self.new_slot()
        return slot

    def new_slot(self) -> int:
        """Return the slot of an object being made: the same in each execution, whatever the others did before."""
        maker = self.running
        if maker is None:
            self._made += 1
            slot = self.slot((-1, self._made))
        else:
            maker.made += 1
            slot = self.slot((maker.index, maker.made))
        if self._story is not None:
            self._story.made(slot)
        return slot


def _work(execution: Execution, actor: Actor, act: Callable[[], None]) -> None:
    """Be one actor after the other, of one execution each."""
    hub = getcurrent().parent
    assert hub is not None
    while True:
        execution.live(actor, act)
        # Nothing of an execution may be kept until the next.
        del execution, actor, act
        execution, actor, act = hub.switch()


_execution: Execution | None = None


def current() -> Execution:
    """Return the execution that is under way, in which objects are made."""
    assert _execution is not None, "only in an exploration"
    return _execution


def enter(execution: Execution | None) -> None:
    """Make an execution the one in which objects are made."""
    global _execution
    _execution = execution


def touch(name: Hashable, *, write: bool) -> None:
    """Mark an access to an object of a model: a point for each actor, and nothing outside an exploration.

    Call it right before the access, and ``saw`` after it if the actor learned something.
    """
    execution = _execution
    if execution is not None and execution.running is not None:
        execution.point(
            (CHANGES if write else TOUCHES, execution.names.place(("model", name)), name)
        )


def saw(value: Hashable) -> None:
    """Say what the running actor's last access to plain data told it; equal findings are equal states."""
    if _execution is not None and _execution.running is not None:
        _execution.running.value = value


def watch(name: Hashable) -> None:
    """Say that the program's check looks at a model's object (``Names.watch``)."""
    if _execution is not None:
        _execution.names.watch(_execution.names.place(("model", name)))


def forget(where: Hashable) -> None:
    """Say that the running actor's code keeps nothing of what it has read: of its past only matters that it is at ``where``.

    Joins states that differ in the way only.
    """
    if _execution is not None and (actor := _execution.running) is not None:
        actor.value = None
        actor.history = _execution.names.past(0, where, None)


#: A class and the name of one of its methods.
Method: TypeAlias = tuple[type, str]


@contextmanager
def summarized(methods: Iterable[Method]) -> Generator[None]:
    """Have actors forget what they read in these methods once they return: what stays with the caller is what they return or raise.

    Joins most of all states, for code is made of calls that have come by different ways to the same
    end. It is sound for a method that keeps nothing in plain data that the program's ``state`` does
    not show; results have to be hashable.
    """
    replaced = [(kind, name, vars(kind)[name]) for kind, name in methods]
    try:
        for kind, name, method in replaced:
            setattr(kind, name, _summary(method))
        yield
    finally:
        for kind, name, method in reversed(replaced):
            setattr(kind, name, method)


def _summary(method: Callable[_P, _T]) -> Callable[_P, _T]:
    name = method.__qualname__

    @wraps(method)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        execution = _execution
        if execution is None or (actor := execution.running) is None:
            return method(*args, **kwargs)
        before, value = actor.history, actor.value

        def sum_up(learned: Hashable) -> None:
            actor.history = execution.names.past(before, value, (name, 0, learned))
            actor.value = None

        try:
            result = method(*args, **kwargs)
        except OSError as error:
            sum_up((OSError, error.errno))
            raise
        sum_up(result)
        return result

    return call
