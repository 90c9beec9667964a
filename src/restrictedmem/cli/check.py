"""``restrictedmem check``: a search for races in production code, or in real processes.

``--random`` runs real processes instead of the search.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from errno import EINVAL
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from restrictedmem.abi.process import PR_SET_PDEATHSIG, prctl
from restrictedmem.cli import values
from restrictedmem.cli.errors import CommandError
from restrictedmem.failure import named
from restrictedmem.text import Line, duration

if TYPE_CHECKING:
    from concurrent.futures import Future

    from restrictedmem.check.explorer import Result
    from restrictedmem.check.scenario import Scenario

#: Seconds between two updates of the progress line.
_TICK: Final = 0.5


class Verdict(Enum):
    """The result of a search."""

    HOLDS = "holds"
    KNOWN = "known"
    """A counterexample that the scenario lists as a property of this design."""
    VIOLATED = "violated"
    MISSING = "holds, and should not"
    """No counterexample, although the scenario says that there is one."""
    UNFINISHED = "not finished"
    """No counterexample before the time limit."""


_GOOD: Final = (Verdict.HOLDS, Verdict.KNOWN)
#: The default limit of a search in seconds; no search needs as many.
_LIMIT: Final = 600.0


@dataclass(frozen=True, slots=True)
class Case:
    """The search of one scenario with one design or one known mistake (slip)."""

    scenario: str
    design: str
    #: Which interleavings were searched, in words.
    search: str
    #: The rule that the design is expected to break, and the reason; None if it should break no
    #: rule.
    expected: tuple[str, str] | None
    result: "Result"

    @property
    def verdict(self) -> Verdict:
        """Return the result of the search."""
        if self.result.counterexample is not None:
            known = self.expected is not None and self.result.counterexample.violation.startswith(
                self.expected[0]
            )
            return Verdict.KNOWN if known else Verdict.VIOLATED
        if not self.result.complete:
            return Verdict.UNFINISHED
        return Verdict.HOLDS if self.expected is None else Verdict.MISSING

    def as_data(self) -> dict[str, Any]:
        """Return the case as a dictionary for JSON."""
        found = asdict(self)
        return {**found, **found.pop("result"), "verdict": self.verdict.value}

    def line(self) -> str:
        """Return the case as one line of text."""
        result = self.result
        numbers = f"{result.states:>9} states {result.seconds:>7.1f} s"
        return f"{self.scenario:<28} {self.design:<20} {numbers}   {self.verdict.value}"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "check",
        help="search for races between punches, faults, conversions and others",
        description="Run the production code of fault path, notifiers, conversions and teardown in"
        " every order of\nits steps, for each design of the notifications. For each search, print"
        " whether the rules\nalways hold, or the shortest schedule that breaks one.\n\n"
        "Exit status 0 if every search was finished and found only the known faults of its design,"
        "\nelse 1. docs/understand/check.md explains how to read a schedule.",
        epilog="examples:\n"
        "  restrictedmem check                               search everything, in a few minutes\n"
        "  restrictedmem check --design v10                  search the default design\n"
        "  restrictedmem check --design folio-poc --scenario punch-fault\n"
        "                                                    one search, with its schedule\n"
        "  restrictedmem check --design v10 --exhaustive     two actors in all interleavings, four"
        "\n                                                    in all that may differ\n"
        "  restrictedmem check --list                        list scenarios and their designs\n"
        "  restrictedmem check --random 60                   use real processes and a real guest",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--design",
        metavar="NAME",
        help="search only this design, or only this known mistake of a posting (slip). With"
        " +teardown behind it, a consumer is told at unregister that all pages go",
    )
    parser.add_argument("--scenario", metavar="NAME", help="search only this scenario")
    parser.add_argument("--list", action="store_true", help="list the scenarios without searching")
    parser.add_argument("--json", action="store_true", help="print each search as JSON")
    parser.add_argument(
        "--jobs",
        type=values.count_of("jobs"),
        metavar="N",
        help="number of searches at the same time (default: one for each CPU)",
    )
    parser.add_argument(
        "--limit",
        type=values.seconds,
        metavar="SECONDS",
        help=f"time limit of each search (default: {_LIMIT:g})",
    )
    parser.add_argument(
        "--exhaustive",
        action="store_true",
        help="search two actors in all interleavings, not only in those that may differ, and four"
        " actors with any number of preemptions",
    )
    parser.add_argument(
        "--random",
        type=values.seconds,
        metavar="SECONDS",
        help="instead run a real service, engine and guest at random for this time",
    )
    parser.add_argument(
        "--seed", type=values.seed, metavar="N", help="with --random: repeat the run with this seed"
    )
    parser.set_defaults(main=main, error=parser.error)


def _check(args: argparse.Namespace) -> None:
    """End the program if an option would have no effect."""
    search = {
        "--jobs": args.jobs is not None,
        "--limit": args.limit is not None,
        "--exhaustive": args.exhaustive,
    }
    given = next((name for name, value in search.items() if value), None)
    if args.random is not None and args.list:
        args.error("--list does not go with --random")
    if args.random is None and args.seed is not None:
        args.error("--seed goes with --random")
    if given is not None and (args.random is not None or args.list):
        args.error(f"{given} is for searches, not for {'--list' if args.list else '--random'}")


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    _check(args)
    if args.random is not None:
        from restrictedmem.stress import run

        return run.main(args.random, args.design, args.scenario, args.seed, args.json)
    try:
        from restrictedmem.check.scenarios import SCENARIOS
    except ModuleNotFoundError as error:
        raise CommandError(
            f"the check needs {error.name}", "pip install 'restrictedmem[check]'"
        ) from None
    if args.scenario is not None and args.scenario not in SCENARIOS:
        raise CommandError(f"no scenario {args.scenario!r}", "restrictedmem check --list")
    chosen = [scenario for scenario in SCENARIOS.values() if args.scenario in (None, scenario.name)]
    cases = [
        (scenario, design) for scenario in chosen for design in _designs(scenario, args.design)
    ]
    if args.list:
        _list(cases, as_json=args.json)
        return 0
    if not cases:
        raise CommandError(
            f"scenario {args.scenario} does not fit design {args.design}",
            "restrictedmem check --list",
        )
    jobs = args.jobs or len(os.sched_getaffinity(0))
    found: list[Case] = []
    line, began = Line(sys.stderr), time.monotonic()
    search = partial(_search_one, limit=args.limit or _LIMIT, exhaustive=args.exhaustive)

    def tell(now: Sequence[str]) -> None:
        bad = sum(case.verdict not in _GOOD for case in found)
        line.update(
            lambda: (
                f"{len(found)} of {len(cases)} searched, {bad} bad,"
                f" {duration(time.monotonic() - began)}: {', '.join(now)}"
            )
        )

    try:
        for case in _search_all(cases, min(jobs, len(cases)), search, tell):
            found.append(case)
            line.clear()
            if not args.json:
                print("\n".join(_lines(case, in_full=len(cases) == 1)), flush=True)
    finally:
        line.clear()
    if args.json:
        json.dump([case.as_data() for case in found], sys.stdout, indent=2)
        print()
    elif len(found) > 1:
        print(_summary(found))
    return 0 if all(case.verdict in _GOOD for case in found) else 1


def _designs(scenario: "Scenario", wanted: str | None) -> list[str]:
    """Return the designs to search for a scenario, and the slips that it has to find.

    If ``wanted`` is given, return only that one.
    """
    from restrictedmem.check.slips import SLIPS
    from restrictedmem.mm.design import TEARDOWN
    from restrictedmem.mm.designs import make

    if wanted is not None and wanted not in SLIPS:
        try:
            wanted = str(make(wanted))
        except OSError as error:
            if error.errno == EINVAL:
                raise CommandError(error.strerror or str(error)) from None
            raise
    names = [
        name + ending
        for name in scenario.designs
        for ending in (("", TEARDOWN) if scenario.leaves else ("",))
    ]
    names += [slip.name for slip in SLIPS.values() if slip.scenario == scenario.name]
    return [name for name in names if wanted in (None, name)]


def _list(cases: Sequence[tuple["Scenario", str]], *, as_json: bool) -> None:
    """Print the scenarios, and the designs of each."""
    scenarios = {scenario.name: scenario for scenario, _ in cases}
    designs = {
        name: [design for scenario, design in cases if scenario.name == name] for name in scenarios
    }
    if as_json:
        json.dump(
            [
                {
                    "scenario": name,
                    "actors": each.actors,
                    "description": each.description,
                    "designs": designs[name],
                }
                for name, each in scenarios.items()
            ],
            sys.stdout,
            indent=2,
        )
        print()
        return
    for name, each in scenarios.items():
        print(
            f"{name} ({each.actors} actors)\n  {each.description}\n  for {', '.join(designs[name])}"
        )


def _search_one(name: str, design: str, *, limit: float, exhaustive: bool) -> Case:
    """Search one scenario; runs in a process of its own."""
    from restrictedmem.check.explorer import effort
    from restrictedmem.check.scenarios import SCENARIOS
    from restrictedmem.check.slips import SLIPS

    scenario = SCENARIOS[name]
    *_, words = effort(scenario.actors, exhaustive=exhaustive)
    expected: tuple[str, str] | None = None
    if (slip := SLIPS.get(design)) is not None:
        result, expected = (
            slip.search(exhaustive=exhaustive, limit_seconds=limit),
            (slip.rule.value, f"{slip.description} ({slip.source})"),
        )
    else:
        result = scenario.search(design, exhaustive=exhaustive, limit_seconds=limit)
        if (finding := scenario.finding(design)) is not None:
            expected = finding.rule.value, finding.reason
    return Case(name, design, words, expected, result)


def _begin() -> None:
    """Have this process end with its parent, and silently at Ctrl-C."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _search_all(
    cases: Sequence[tuple["Scenario", str]],
    jobs: int,
    search: Callable[[str, str], Case],
    tell: Callable[[Sequence[str]], None],
) -> Iterator[Case]:
    """Search all cases, and yield each result when it is ready.

    The searches with most actors start first, because they take longest. ``tell`` is called often
    with the searches under way.
    """
    # Imported late, because these imports take longer than most commands.
    import multiprocessing
    from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
    from concurrent.futures.process import BrokenProcessPool

    executor = ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("fork"), initializer=_begin
    )
    ordered = sorted(cases, key=lambda case: -case[0].actors)
    try:
        # The handlers that Python runs at a fork would swallow a KeyboardInterrupt.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            futures: dict[Future[Case], str] = {
                executor.submit(search, case[0].name, case[1]): f"{case[0].name} {case[1]}"
                for case in ordered
            }
        except OSError as error:
            raise named("fork", error) from None
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        while futures:
            # The first searches that are not done. The executor also calls searches running that
            # wait for a process.
            tell([name for name, _ in zip(futures.values(), range(jobs), strict=False)])
            for future in wait(futures, _TICK, FIRST_COMPLETED).done:
                del futures[future]
                yield future.result()
    except BrokenProcessPool:
        raise CommandError(
            "a process that searched was killed",
            "dmesg may say why; if memory ran out, use fewer --jobs",
        ) from None
    except BaseException:
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _lines(case: Case, *, in_full: bool) -> Iterator[str]:
    """Yield the lines of a case: its result, its schedule, why a fault was expected.

    The schedule is left out if the fault was expected, unless ``in_full``.
    """
    yield case.line()
    counterexample = case.result.counterexample
    if counterexample is not None and (in_full or case.verdict is Verdict.VIOLATED):
        yield from ("    " + line for line in counterexample.lines())
    if case.expected is not None and case.verdict is not Verdict.UNFINISHED:
        yield f"    expected of this design: {': '.join(case.expected)}"


def _summary(found: Sequence[Case]) -> str:
    """Return a line that counts the searches by result."""
    counts = [
        f"{number} {verdict.value}"
        for verdict in Verdict
        if (number := sum(case.verdict is verdict for case in found))
    ]
    return (
        f"{len(found)} searches, {sum(case.result.states for case in found)} states:"
        f" {'; '.join(counts)}"
    )
