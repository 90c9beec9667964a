"""``run --prove``: an owner without capabilities tries all routes; a table shows the outcomes.

Capabilities would open routes by themselves; only with ``as_root`` does the owner keep them.
"""

import json
import os
import secrets
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, zip_longest
from typing import Any, Final, final

from restrictedmem.abi import process
from restrictedmem.audit import (
    on_descriptor,
    on_host,
    on_namespaces,
    on_processes,
    on_sockets,
    on_vm,
)
from restrictedmem.audit.attacker import (
    Attacker,
    drop_capabilities,
    fork_twin,
    trusted_processes,
)
from restrictedmem.audit.attempt import Attempt, Outcome, Route, attempt
from restrictedmem.audit.held_guest import HeldGuest, held_guest
from restrictedmem.audit.pattern import Pattern, content
from restrictedmem.audit.reading import of_descriptors, of_process
from restrictedmem.child import end_child, fork
from restrictedmem.service.client import Service
from restrictedmem.text import Line

#: Bytes of the pattern that the control holds.
_CONTROL_SIZE: Final = 1 << 16
_NARROWEST: Final = 40

Progress = Callable[[Attempt], None]


def prove(
    service: Service, guest: HeldGuest, seed: int, *, engine: str, as_root: bool, progress: Progress
) -> list[Attempt]:
    """Try every route to the memory of a guest that holds the pattern of ``seed``.

    ``progress`` is called with each attempt after it. Preconditions: nobody else may talk to the
    guest meanwhile.

    Raises:
        OSError: EIO if the trying process died; ENOENT, ESRCH without this PID namespace's /proc
            (``abi.process``).
    """
    # Routes find processes by their pids. In another namespace's /proc, the pids would be those of
    # other processes, which allow or refuse for reasons of their own.
    process.proc().close()
    found: list[Attempt] = []
    # The owner's own memory comes last, in a new process that is forked after all other attempts.
    for routes in (_routes, _last_routes):
        for one in _as_owner(
            partial(_owner, service, guest, seed, engine, as_root), routes, as_root=as_root
        ):
            found.append(one)
            progress(one)
    found.append(_still_there(guest))
    progress(found[-1])
    return found


def _routes() -> Iterator[Route]:
    return chain(
        on_descriptor.ROUTES,
        on_processes.routes(),
        on_namespaces.routes(),
        on_sockets.routes(),
        on_host.routes(),
        on_vm.routes(),
    )


def _last_routes() -> Iterator[Route]:
    yield Route(
        "control",
        "a process that lets itself be read",
        lambda owner: of_process(owner.control),
        control=True,
    )
    yield Route("owner", "its files", lambda _: of_descriptors())
    yield Route("owner", "its memory", lambda owner: of_process(owner.twin))


def _still_there(guest: HeldGuest) -> Attempt:
    """Ask the guest whether it still holds the pattern outside the range that it converted."""
    answer = guest.check(guest.start + on_vm.CONVERTED, guest.end)
    outcome = Outcome.CONTROL if answer == "intact" else Outcome.FAILED
    return Attempt("control", "the guest still holds it", outcome, detail=answer)


@contextmanager
def _owner(
    service: Service, guest: HeldGuest, seed: int, engine: str, as_root: bool
) -> Generator[Attacker]:
    # Both are forked before the pattern's words are in this process.
    twin = fork_twin()
    control = fork_twin(lambda: content(seed, guest.start, _CONTROL_SIZE))

    try:
        pattern = Pattern(seed, guest.start, guest.end)
        yield Attacker(
            service,
            guest,
            seed,
            engine,
            pattern,
            trusted_processes(service, guest),
            twin,
            control,
            as_root,
        )
    finally:
        end_child(twin)
        end_child(control)


def _as_owner(
    owner: Callable[[], AbstractContextManager[Attacker]],
    routes: Callable[[], Iterable[Route]],
    *,
    as_root: bool,
) -> Iterator[Attempt]:
    """Try routes in a child that has all that this process has, except its capabilities.

    With ``as_root`` the child has the capabilities, too.
    """
    reader, writer = os.pipe()

    def be_owner() -> None:
        os.close(reader)
        _try_all(owner, routes, writer, as_root=as_root)

    child = fork(be_owner)
    os.close(writer)
    try:
        with open(reader, encoding="utf-8") as answers:
            for line in answers:
                fields: dict[str, Any] = json.loads(line)
                yield Attempt(outcome=Outcome(fields.pop("outcome")), **fields)
    finally:
        _, status = os.waitpid(child, 0)
    if status:
        yield Attempt(
            "control",
            "the trying process",
            Outcome.FAILED,
            detail=f"ended with {os.waitstatus_to_exitcode(status)}",
        )


def _try_all(
    owner: Callable[[], AbstractContextManager[Attacker]],
    routes: Callable[[], Iterable[Route]],
    writer: int,
    *,
    as_root: bool,
) -> None:
    if not as_root:
        drop_capabilities()
    with owner() as found:
        for route in routes():
            line = json.dumps(_plain(attempt(route, found)))
            os.write(writer, line.encode() + b"\n")


def _plain(one: Attempt) -> dict[str, Any]:
    return {**asdict(one), "outcome": one.outcome.value}


@final
@dataclass(frozen=True, slots=True)
class Proof:
    """All attempts, and whether their outcomes prove that the guest's memory is private."""

    as_root: bool
    attempts: list[Attempt]

    @property
    def proved(self) -> bool:
        """Whether no attempt succeeded that must not, and all could be tried."""
        return not any(one.outcome.bad for one in self.attempts)

    def as_data(self) -> dict[str, Any]:
        """Return the proof as JSON shows it."""
        return {
            "as_root": self.as_root,
            "proved": self.proved,
            "attempts": [*map(_plain, self.attempts)],
        }


def prove_main(service: Service, *, memory: int, engine: str, as_root: bool, quiet: bool) -> Proof:
    """Try all routes with a guest of ``memory`` bytes; show progress unless ``quiet``.

    Progress is shown only on a terminal.

    Raises:
        OSError: the guest could not run.
    """
    seed = secrets.randbits(64)
    line = Line(sys.stderr, show=not quiet)
    try:
        with held_guest(service, memory, seed, engine) as guest:
            tell: Progress = lambda one: line.update(lambda: f"{one.target}: {one.name}")  # noqa: E731
            return Proof(
                as_root, prove(service, guest, seed, engine=engine, as_root=as_root, progress=tell)
            )
    finally:
        line.clear()


def show(found: list[Attempt]) -> None:
    """Print a table with a line for all routes to a target that had the same outcome.

    Targets with equal lines are in one line.
    """
    names: dict[tuple[str, str], list[str]] = {}
    for one in found:
        # The errno of a refusal says enough.
        came = f"{one.outcome.value} {one.errno or one.detail}".rstrip()
        names.setdefault((one.target, came), []).append(one.name)
    targets: dict[tuple[str, str], list[str]] = {}
    for (target, came), some in names.items():
        targets.setdefault((came, ", ".join(some)), []).append(target)
    rows = [
        ("target", "outcome", "tried"),
        *((", ".join(of), came, tried) for (came, tried), of in targets.items()),
    ]
    for line in _table(
        rows, max(shutil.get_terminal_size().columns, _NARROWEST) if sys.stdout.isatty() else None
    ):
        print(line)
    counts = Counter(one.outcome for one in found)
    print(", ".join(f"{counts[outcome]} {outcome.value}" for outcome in Outcome if counts[outcome]))


def _table(rows: Sequence[tuple[str, str, str]], columns: int | None) -> Iterator[str]:
    """Yield the lines of a table of ``columns`` columns, or of any width if None."""
    widths = [max(len(row[place]) for row in rows) for place in range(2)]
    if columns is not None:
        widths = [min(width, columns // 4) for width in widths]
    last = None if columns is None else max(columns - sum(widths) - 2 * len(widths), columns // 4)
    for row in rows:
        cells = [
            _wrapped(text, width if columns is not None else None)
            for text, width in zip(row, (*widths, last), strict=True)
        ]
        for first, second, third in zip_longest(*cells, fillvalue=""):
            yield f"{first:{widths[0]}}  {second:{widths[1]}}  {third}".rstrip()


def _wrapped(text: str, width: int | None) -> list[str]:
    return [text] if width is None else textwrap.wrap(text, width) or [""]
