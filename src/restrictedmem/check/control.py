"""Control over ``sync``: the explorer decides at each synchronization which actor goes on.

Each lock operation, wait and unlocked shared access is a scheduling point, called a point here.
Each actor is a greenlet. It stops *before* each operation on an object made by ``sync``. The
operation and the plain code up to the next operation are one step.

Code outside the actors, which makes the program and checks it, has no points.
"""

from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, Final, ParamSpec, Protocol, TypeAlias, TypeVar, final

from greenlet import GreenletExit, getcurrent, greenlet

_P = ParamSpec("_P")
_T = TypeVar("_T", bound=Hashable)

#: A function of the states of all objects: whether an operation can be done now.
Gate: TypeAlias = Callable[[Sequence[Any]], bool]
#: An operation that an actor is about to do: a verb, the number of the object, and the part of it.
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

#: Operations that only a mutex's owner does; nobody else can do anything to the mutex meanwhile.
OWNERS: Final = frozenset({RELEASES, WAITS, NOTIFIES})
#: Operations that may change the data that a program's check looks at.
VISIBLE: Final = frozenset({WRITES, CHANGES})
#: Operations of which any two on one object commute. The readers of a semaphore come and go in any
#: order.
COMMUTE: Final = frozenset({LOOKS, TAKES_READ, RELEASES_READ, READS, TOUCHES})


class UnsoundError(Exception):
    """A program hides part of its state, or does not do the same in each execution.

    No result about such a program is valid.
    """


class Story(Protocol):
    """A listener to one execution, which is to be shown to a person."""

    def made(self, slot: int) -> None:
        """Hear that ``sync`` has just made an object; its maker is on the stack."""
        ...

    def arrives(self, actor: "Actor", operation: Operation | None) -> None:
        """Hear that an actor stopped before an operation, or ended (None).

        The result of its last operation is known now (``Actor.value``).
        """
        ...

    def performs(self, actor: "Actor") -> None:
        """Hear that an actor goes on."""
        ...


@final
class Actor:
    """An actor: a greenlet, its next operation, and all that it has done and read."""

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
        #: The number of the actor's past: everything that it did and read so far, and is about to
        #: do. Two numbers are equal exactly if the pasts are.
        self.history = 0
        #: The result of the operation under way.
        self.value: Hashable = None
        self.pending: Operation | None = None
        #: Whether the operation can be done now; None: always.
        self.gate: Gate | None = None
        #: Slots of the exclusive locks that it holds.
        self.held: frozenset[int] = frozenset()
        #: The operation and the gate of a wait until the shared word that it read last has changed.
        self.polled: tuple[Operation, Gate] | None = None
        self.done = False
        self.made = 0


class Names:
    """State that lasts from one execution to the next.

    It consists of the numbers of objects and of actors' pasts, and of the greenlets, which cost
    more to make than to keep.
    """

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
        #: Numbers of objects whose state the explorer sees, from 0 up. ``_places`` has the numbers
        #: of those whose state it does not see, from -1 down.
        self.slots: dict[Hashable, int] = {}
        self._places: dict[Hashable, int] = {}
        self._operations: dict[tuple[int, tuple[str, ...], Hashable], tuple[Operation, ...]] = {}
        self._gates: dict[tuple[Hashable, ...], Gate] = {}
        #: Mutexes that some actor looks at, or tries to take, without waiting.
        self.tried: set[int] = set()
        self._pasts: dict[tuple[int, Hashable, Operation | None], int] = {}
        self._watched: set[int] | None = None

    def watch(self, place: int) -> None:
        """Declare that the program's check looks at an object.

        If no object is declared, the check may look at any.
        """
        self._watched = {place} | (self._watched or set())

    def visible(self, operation: Operation | None) -> bool:
        """Return whether an operation may change data that the program's check looks at."""
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
        """Return the operations of an object, one for each verb."""
        key = slot, verbs, where
        found = self._operations.get(key)
        if found is None:
            found = self._operations[key] = tuple((verb, slot, where) for verb in verbs)
        return found

    def gate(self, says: Callable[..., bool], *about: Hashable) -> Gate:
        """Return a gate that calls ``says`` with ``about`` and the states of all objects."""
        found = self._gates.get((says, *about))
        if found is None:
            found = self._gates[says, *about] = partial(says, *about)
        return found

    def past(self, before: int, value: Hashable, operation: Operation | None) -> int:
        """Return the number of a past.

        A past is an earlier past, the result of its last operation, and the operation that comes
        now.
        """
        return self._pasts.setdefault((before, value, operation), len(self._pasts) + 1)


@final
class Execution:
    """One execution: its actors, the objects they share, and the actor whose turn it is."""

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
        """Make an execution without actors.

        ``arrive`` chooses the actor that goes on once the schedule is used up; None stops the
        execution.
        """
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
        #: The actor whose turn it is; None while code outside the actors runs.
        self.running: Actor | None = None
        #: The number of steps that were done.
        self.step = 0
        #: By slot: the state of each object of ``sync``; None for an object that is not made yet.
        self.values: list[Hashable] = [None] * len(names.slots)
        #: An exception that an actor raised, and the actor.
        self.broken: tuple[Actor, Exception] | None = None

    # Executing.

    def run(self, acts: Sequence[tuple[str, Callable[[], None]]], schedule: Sequence[int]) -> None:
        """Run each actor to its first point, follow the schedule, then ask ``arrive``.

        At the end, unfinished actors are dropped where they stand.
        """
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
        """Run an actor until it ends or is dropped."""
        try:
            act()
        except GreenletExit:
            return
        except Exception as error:  # noqa: BLE001 any exception is the finding
            self.broken = actor, error
        actor.done = True
        if self._story is not None:
            self._story.arrives(actor, None)
        actor.history = self.names.past(actor.history, actor.value, None)
        actor.pending = actor.gate = None
        self.running = self._hub if self.broken else self._next()

    def enabled(self, actor: Actor) -> bool:
        """Return whether an actor can go on."""
        return not actor.done and (actor.gate is None or actor.gate(self.values))

    def _next(self) -> Actor:
        step = self.step + len(self.actors)
        if step < len(self._plan):
            following = self._plan[step]
            if following.done:
                raise UnsoundError(f"{following.name} had one step more in an earlier execution")
        else:
            self.running = None
            try:
                chosen = self._arrive(self)
            except BaseException as error:  # noqa: BLE001 it must not unwind an actor's code
                self._failure = error
                chosen = None
            if chosen is None:
                return self._hub
            following = chosen
        self.step += 1
        return following

    def point(self, operation: Operation, gate: Gate | None = None) -> None:
        """Stop the running actor before an operation until the explorer chooses it."""
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
        """Drop the actors; an operation in a ``finally`` clause ends its actor at once."""
        self._over = True
        for actor, worker in zip(self.actors, self.names.workers, strict=False):
            self.running = actor
            if not actor.done and worker:
                worker.throw()
            actor.gate = None
        self.running = None

    # Objects.

    def slot(self, name: Hashable) -> int:
        """Return the slot of the object with a name."""
        slot = self.names.slot(name)
        if slot >= len(self.values):
            self.values.extend([None] * (slot + 1 - len(self.values)))
        return slot

    def memory(self, memory: object) -> int:
        """Return the slot of a block of memory in which objects lie.

        The caller must keep the memory as long as the execution.
        """
        slot = self._memories.get(id(memory))
        if slot is None:
            slot = self._memories[id(memory)] = self.new_slot()
        return slot

    def new_slot(self) -> int:
        """Return the slot of an object that the running actor makes.

        The slot is the same in each execution, no matter what the other actors did before.
        """
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
    """Run one actor after the other, each of another execution."""
    hub = getcurrent().parent
    assert hub is not None
    while True:
        execution.live(actor, act)
        # The greenlet must keep nothing of an execution until the next one.
        del execution, actor, act
        execution, actor, act = hub.switch()


_execution: Execution | None = None


def current() -> Execution:
    """Return the execution under way; new objects belong to it."""
    assert _execution is not None, "only in an exploration"
    return _execution


def enter(execution: Execution | None) -> None:
    """Set the execution that new objects belong to."""
    global _execution
    _execution = execution


def touch(name: Hashable, *, write: bool) -> None:
    """Mark an access to a model's object: a point for an actor, else nothing.

    Call this right before the access. Call ``saw`` after it if the actor learned something.
    """
    execution = _execution
    if execution is not None and execution.running is not None:
        execution.point(
            (CHANGES if write else TOUCHES, execution.names.place(("model", name)), name)
        )


def saw(value: Hashable) -> None:
    """Record what the running actor learned from its last access to plain data.

    Equal values make equal states.
    """
    if _execution is not None and _execution.running is not None:
        _execution.running.value = value


def watch(name: Hashable) -> None:
    """Declare that the program's check looks at a model's object (``Names.watch``)."""
    if _execution is not None:
        _execution.names.watch(_execution.names.place(("model", name)))


def forget(where: Hashable) -> None:
    """Declare that the running actor's code keeps nothing of what it has read.

    Of its past, only ``where`` matters from now on: the place that it has reached. This joins
    states that differ only in how the actor came there.
    """
    if _execution is not None and (actor := _execution.running) is not None:
        actor.value = None
        actor.history = _execution.names.past(0, where, None)


#: A class and the name of one of its methods.
Method: TypeAlias = tuple[type, str]


@contextmanager
def summarized(methods: Iterable[Method]) -> Generator[None]:
    """Make actors forget what they read in these methods once the methods return.

    The caller keeps only what a method returns or raises. Nothing else joins so many states,
    because code consists of calls, and a call can come to the same end in different ways. It is
    sound for a method that keeps nothing in plain data, except data that the program's ``state``
    shows. Results must be hashable.
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
