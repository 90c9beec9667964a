"""Scenarios: actors that act at the same moment, designs to search, and known findings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol, final

from restrictedmem.check.explorer import Program, Result, effort, explore
from restrictedmem.check.invariants import Rule
from restrictedmem.check.summaries import calls
from restrictedmem.check.world import Parts, World
from restrictedmem.mm.design import TEARDOWN
from restrictedmem.mm.designs import NAMES
from restrictedmem.platform.snp import Snp


class Make(Protocol):
    """A maker of worlds of the searched design, with the searched slip."""

    def __call__(
        self, *, npages: int = 1, kind: str = "memfd", platform: Snp | None = None
    ) -> World:
        """Make a world without slots."""
        ...


@final
@dataclass(frozen=True, slots=True)
class KnownFault:
    """A fault that a design has by its nature: the rule that it breaks, and why."""

    rule: Rule
    reason: str


@final
@dataclass(frozen=True, slots=True)
class Scenario:
    """A small program to search."""

    name: str
    description: str
    #: Number of actors; the effort of a search depends on it (``explorer.effort``).
    actors: int
    build: Callable[[Make], World]
    #: Names, without ``TEARDOWN``, of the designs for which the scenario makes sense.
    designs: tuple[str, ...] = NAMES
    #: By the same names: the known fault of the design.
    findings: Mapping[str, KnownFault] = field(default_factory=dict[str, KnownFault])
    #: Whether the scenario belongs to the part that the test suite runs.
    quick: bool = False
    #: Whether a consumer leaves the file. If none does, invalidation at teardown changes nothing.
    leaves: bool = False

    def program(self, design: str, parts: Parts | None = None) -> Callable[[], Program]:
        """Return a maker of the world for a design, whose name may include ``TEARDOWN``."""
        exact = design.removesuffix(TEARDOWN) not in ("batched", "lazy")

        def make(*, npages: int = 1, kind: str = "memfd", platform: Snp | None = None) -> World:
            return World(
                design, npages=npages, kind=kind, platform=platform, parts=parts, exact=exact
            )

        return partial(self.build, make)

    def search(
        self,
        design: str,
        *,
        parts: Parts | None = None,
        exhaustive: bool = False,
        limit_seconds: float = 600,
    ) -> Result:
        """Search the scenario for a design, as far as ``effort`` says."""
        preemptions, reduce, _ = effort(self.actors, exhaustive=exhaustive)
        program = self.program(design, parts)
        return explore(
            program,
            preemptions=preemptions,
            reduce=reduce,
            calls=calls(),
            limit_seconds=limit_seconds,
        )

    def finding(self, design: str) -> KnownFault | None:
        """Return the known fault of a design; None where the design holds."""
        return self.findings.get(design.removesuffix(TEARDOWN))


SCENARIOS: Final[dict[str, Scenario]] = {}


def scenario(
    actors: int,
    *,
    designs: tuple[str, ...] = NAMES,
    findings: Mapping[str, KnownFault] | None = None,
    quick: bool = False,
    leaves: bool = False,
) -> Callable[[Callable[[Make], World]], Callable[[Make], World]]:
    """Return a decorator that adds a maker of a world to ``SCENARIOS``."""

    def add(build: Callable[[Make], World]) -> Callable[[Make], World]:
        name = build.__name__.replace("_", "-")
        assert build.__doc__
        SCENARIOS[name] = Scenario(
            name, build.__doc__, actors, build, designs, findings or {}, quick, leaves
        )
        return build

    return add
