"""Taking control of ``sync``: every lock, wait and unlocked shared access becomes a point at which an explorer says who goes on.

Each actor is a greenlet. It stops *before* each operation on an object made by ``sync``; the operation and the plain code up to the next
one are a single step. What runs outside the actors (making the program, its checks) passes through without points.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Final, Protocol, TypeAlias, final

from greenlet import GreenletExit, getcurrent, greenlet

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

    __slots__ = ("done", "gate", "held", "history", "index", "made", "name", "pending", "polled", "switch", "value")

    def __init__(self, index: int, name: str, switch: Callable[..., object]) -> None:
        self.index = index
        self.name = name
        self.switch = switch
        #: The number of everything this actor did and read so far, and is about to do: equal exactly for equal pasts.
        self.history = 0
        #: What the operation under way returned.
        self.value: Hashable = None
        self.pending: Operation | None = None
        #: Says whether the operation can be done now; None: always.
        self.gate: Callable[[], bool] | None = None
        #: Slots of what it holds that only one can hold.
        self.held: frozenset[int] = frozenset()
        #: The read of a shared word that it did last, and whether the word is another now.
        self.polled: tuple[Operation, Callable[[], bool]] | None = None
        self.done = False
        self.made = 0

    @property
    def enabled(self) -> bool:
        """Whether this actor can go on."""
        return not self.done and (self.gate is None or self.gate())


class Names:
    """What stays from one execution to the next: numbers of objects and of actors' pasts, and the greenlets, which cost more to make."""

    __slots__ = ("_operations", "_pasts", "_places", "slots", "tried", "workers")

    def __init__(self) -> None:
        self.workers: list[greenlet] = []
        #: Objects whose state the explorer sees, from 0 up; and those whose state it does not, from -1 down.
        self.slots: dict[Hashable, int] = {}
        self._places: dict[Hashable, int] = {}
        self._operations: dict[tuple[int, tuple[str, ...], Hashable], tuple[Operation, ...]] = {}
        #: Mutexes that somebody looks at, or tries to take, without waiting.
        self.tried: set[int] = set()
        self._pasts: dict[tuple[int, Hashable, Operation | None], int] = {}

    def slot(self, name: Hashable) -> int:
        """Return the number of an object with a state."""
        return self.slots.setdefault(name, len(self.slots))

    def place(self, name: Hashable) -> int:
        """Return the number of an object without a state of its own."""
        return self._places.setdefault(name, ~len(self._places))

    def operations(self, slot: int, verbs: tuple[str, ...], where: Hashable = None) -> tuple[Operation, ...]:
        """Return what is done to an object, ready to use."""
        key = slot, verbs, where
        found = self._operations.get(key)
        if found is None:
            found = self._operations[key] = tuple((verb, slot, where) for verb in verbs)
        return found

    def past(self, before: int, value: Hashable, operation: Operation | None) -> int:
        """Return the number of a past: an earlier one, what its last operation returned, and what comes now."""
        return self._pasts.setdefault((before, value, operation), len(self._pasts) + 1)


@final
class World:
    """One execution: actors, the objects they share, and whose turn it is."""

    __slots__ = (
        "_arrive",
        "_failure",
        "_hub",
        "_made",
        "_over",
        "_plan",
        "_story",
        "actors",
        "broken",
        "names",
        "running",
        "step",
        "values",
        "versions",
    )

    def __init__(self, names: Names, arrive: Callable[["World"], Actor | None], story: Story | None = None) -> None:
        """Make a world without actors; ``arrive`` chooses who goes on once the plan is used up, None to stop."""
        self.names = names
        self._arrive = arrive
        self._story = story
        self._hub = Actor(-1, "", getcurrent().switch)
        self._plan: list[Actor] = []
        self._over = False
        self._failure: BaseException | None = None
        self._made = 0
        self.actors: tuple[Actor, ...] = ()
        #: Whose turn it is; None while code outside the actors runs.
        self.running: Actor | None = None
        #: How many steps were done.
        self.step = 0
        #: The state of each object behind ``sync``, by slot; None for one that is not made yet.
        self.values: list[Hashable] = [None] * len(names.slots)
        #: Who changed a model's object last, by its number, as the past of the actor that did.
        self.versions: dict[int, int] = {}
        #: What an actor raised.
        self.broken: tuple[Actor, Exception] | None = None

    # Executing.

    def run(self, acts: Sequence[tuple[str, Callable[[], None]]], schedule: Sequence[int]) -> None:
        """Bring each actor to its first point, follow the schedule, then ask; unfinished actors are dropped where they stand."""
        workers = self.names.workers
        workers.extend(greenlet(_work) for _ in range(len(acts) - len(workers)))
        self.actors = tuple(Actor(index, name, worker.switch) for index, ((name, _), worker) in enumerate(zip(acts, workers, strict=False)))
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

    def point(self, operation: Operation, gate: Callable[[], bool] | None = None) -> None:
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
        if gate is not None and not gate():
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


def _work(world: World, actor: Actor, act: Callable[[], None]) -> None:
    """Be one actor after the other, of one execution each."""
    hub = getcurrent().parent
    assert hub is not None
    while True:
        world.live(actor, act)
        # Nothing of an execution may be kept until the next.
        del world, actor, act
        world, actor, act = hub.switch()


_world: World | None = None


def current() -> World:
    """Return the world in which objects are being made."""
    assert _world is not None, "only in an exploration"
    return _world


def enter(world: World | None) -> None:
    """Make it the world in which objects are made."""
    global _world
    _world = world


def touch(name: Hashable, *, write: bool) -> None:
    """Mark an access to an object of a model: a point for each actor, and nothing outside an exploration.

    Call it right before the access. What an actor learns from it counts as everything that was ever done to the object, until ``saw``.
    """
    world = _world
    if world is None or (actor := world.running) is None:
        return
    place = world.names.place(("model", name))
    world.point((CHANGES if write else TOUCHES, place, name))
    actor.value = world.versions.get(place)
    if write:
        world.versions[place] = actor.history


def saw(value: Hashable) -> None:
    """Say what exactly the access after ``touch`` learned, so that equal findings are equal states."""
    if _world is not None and _world.running is not None:
        _world.running.value = value


def forget(where: Hashable) -> None:
    """Say that the running actor's code keeps nothing of what it has read: of its past only matters that it is at ``where``.

    Joins states that differ in the way only. What the actor changes from here on, others learn by ``saw`` alone.
    """
    if _world is not None and (actor := _world.running) is not None:
        actor.value = None
        actor.history = _world.names.past(0, where, None)
