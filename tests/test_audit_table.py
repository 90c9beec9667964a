"""The flow of ``run --prove`` with doubles, and the table of its outcomes."""

import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, Final

import pytest

from hidden_pattern import SEED, START, owner_of, pattern
from outcomes import Errno, outcome
from planting import always, stub
from restrictedmem.abi import process
from restrictedmem.audit import on_descriptor, prove
from restrictedmem.audit.attacker import Attacker
from restrictedmem.audit.attempt import Attempt, Outcome, Route
from restrictedmem.audit.pattern import Pattern, content
from restrictedmem.audit.prove import Proof
from restrictedmem.audit.reading import of_process
from restrictedmem.fd import OwnedFd

__all__ = ["pattern"]

SIZE: Final = 1 << 20


def held() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


def children() -> bool:
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return False
    return True


def one(name: str, outcome: Outcome = Outcome.REFUSED, **parts: Any) -> Attempt:
    return Attempt(parts.pop("target", "target"), name, outcome, **parts)


# The flow.


@pytest.mark.parametrize("answer", ["intact", "broken at 7"])
def test_all_routes_come_before_the_owners_own_memory(
    answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, asked = list[Attempt](), list[object]()

    def as_owner(owner: Any, routes: Callable[[], object], *, as_root: bool) -> Iterator[Attempt]:
        asked.append((owner.args, as_root))
        yield one("first" if routes is prove._routes else "last")

    def check(*where: int) -> str:
        asked.append(where)
        return answer

    guest: Any = stub(start=START, end=START + 4 * SIZE, check=check)
    service: Any = "service"
    monkeypatch.setattr(prove, "_as_owner", as_owner)
    found = prove.prove(service, guest, 5, engine="kernel", as_root=True, progress=told.append)
    assert [(each.name, each.outcome, each.detail) for each in found] == [
        ("first", Outcome.REFUSED, ""),
        ("last", Outcome.REFUSED, ""),
        (
            "the guest still holds it",
            Outcome.CONTROL if answer == "intact" else Outcome.FAILED,
            answer,
        ),
    ]
    assert told == found
    # The guest converted the first MiB of its heap.
    owner = ((service, guest, 5, "kernel", True), True)
    assert asked == [owner, owner, (START + SIZE, START + 4 * SIZE)]


def test_without_proc_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> OwnedFd:
        raise OSError(3, "no /proc")

    nothing: Any = None
    monkeypatch.setattr(process, "proc", refuse)
    assert outcome(
        lambda: prove.prove(nothing, nothing, 0, engine="software", as_root=False, progress=nothing)
    ) == Errno(3)


def test_routes_that_cost_the_guest_its_memory_come_last() -> None:
    routes = list(prove._routes())
    assert routes[: len(on_descriptor.ROUTES)] == list(on_descriptor.ROUTES)
    assert routes[-1].name == "shared half after a conversion back"
    assert [(route.target, route.control) for route in prove._last_routes()] == [
        ("control", True),
        ("owner", False),
        ("owner", False),
    ]


def test_an_owner_has_a_twin_without_the_pattern_and_a_control_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prove, "trusted_processes", always({"engine": 7}))
    seed = secrets.randbits(64)
    guest: Any = stub(start=START, end=START + SIZE)
    service: Any = stub()
    before = held()
    with prove._owner(service, guest, seed, "kernel", as_root=True) as owner:
        kept = b"".join(map(bytes, of_process(owner.control)))
        assert content(seed, START, 4096) in kept
        assert content(seed, START + (1 << 16) - 4096, 4096) in kept
        assert content(seed, START + (1 << 16), 64) not in kept
        for chunk in of_process(owner.twin):
            assert owner.pattern.find(chunk) is None
        assert (owner.service, owner.guest, owner.seed) == (service, guest, seed)
        assert (owner.engine, owner.processes, owner.as_root) == ("kernel", {"engine": 7}, True)
    assert not children()
    assert held() == before


@pytest.mark.parametrize("as_root", [False, True])
def test_attempts_are_made_without_capabilities(
    as_root: bool, pattern: Pattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped = list[int]()
    monkeypatch.setattr(prove, "drop_capabilities", lambda: dropped.append(1))

    def look(_: Attacker) -> Iterator[bytes]:
        yield bytes(8 * (1 + len(dropped)))

    def broken(_: Attacker) -> Iterator[bytes]:
        yield content(SEED, START, 4096)

    routes = [Route("target", "looks", look), Route("target", "finds", broken, open_by="Swap")]
    before = held()
    found = list(
        prove._as_owner(lambda: nullcontext(owner_of(pattern)), lambda: routes, as_root=as_root)
    )
    assert found == [
        one("looks", Outcome.NOTHING, searched=8 if as_root else 16),
        one("finds", Outcome.OPEN, detail=f"the guest's {START:#x} (Swap)", searched=4096),
    ]
    assert not dropped
    assert not children()
    assert held() == before


def test_an_owner_that_dies_proves_nothing() -> None:
    def dies() -> nullcontext[Attacker]:
        raise OSError(7, "no owner")

    (found,) = prove._as_owner(dies, list, as_root=True)
    assert (found.target, found.outcome, found.detail) == (
        "control",
        Outcome.FAILED,
        "ended with 7",
    )
    assert not children()


def test_a_proof_needs_every_attempt() -> None:
    for verdict in Outcome:
        proof = Proof(as_root=True, attempts=[one("a"), one("b", verdict)])
        assert proof.proved is (verdict not in (Outcome.FOUND, Outcome.FAILED))
        assert proof.as_data() == {
            "as_root": True,
            "proved": proof.proved,
            "attempts": [
                {
                    "target": "target",
                    "name": name,
                    "outcome": each,
                    "errno": "",
                    "detail": "",
                    "searched": 0,
                }
                for name, each in (("a", "refused"), ("b", verdict.value))
            ],
        }
        assert json.loads(json.dumps(proof.as_data())) == proof.as_data()


@pytest.mark.parametrize("quiet", [False, True])
def test_a_proof_has_a_seed_of_its_own(quiet: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[object]()

    def randbits(bits: int) -> int:
        asked.append(bits)
        return 5

    def line(file: object, *, show: bool) -> object:
        asked.append((file is sys.stderr, show))
        return stub(clear=lambda: asked.append("cleared"))

    def held_guest(*arguments: object) -> nullcontext[str]:
        asked.append(arguments)
        return nullcontext("guest")

    def prove_(*arguments: object, progress: object, **named: object) -> list[Attempt]:
        asked.append((*arguments, named))
        return [one("a")]

    monkeypatch.setattr(secrets, "randbits", randbits)
    monkeypatch.setattr(prove, "Line", line)
    monkeypatch.setattr(prove, "held_guest", held_guest)
    monkeypatch.setattr(prove, "prove", prove_)
    service: Any = "service"
    assert prove.prove_main(
        service, memory=SIZE, engine="kernel", as_root=True, quiet=quiet
    ) == Proof(as_root=True, attempts=[one("a")])
    assert asked == [
        64,
        (True, not quiet),
        ("service", SIZE, 5, "kernel"),
        ("service", "guest", 5, {"engine": "kernel", "as_root": True}),
        "cleared",
    ]


# The table.

FOUND: Final = [
    one("read", errno="EINVAL", detail="said twice"),
    one("pread", errno="EINVAL"),
    one("mem", Outcome.NOTHING, searched=7),
    one("read", target="other", errno="EINVAL"),
    one("pread", target="other", errno="EINVAL"),
    one("swap", Outcome.OPEN, target="machine", detail="the guest's 0x1 (Swap)"),
    one("mem", Outcome.NOTHING, target="machine"),
]


def test_equal_outcomes_share_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    prove.show(FOUND)
    assert capsys.readouterr().out.splitlines() == [
        "target           outcome                                tried",
        "target, other    refused EINVAL                         read, pread",
        "target, machine  nothing found                          mem",
        "machine          open by design the guest's 0x1 (Swap)  swap",
        "4 refused, 2 nothing found, 1 open by design",
    ]


@pytest.mark.parametrize(("columns", "width"), [(100, 100), (40, 40), (10, 40)])
def test_a_terminals_width_is_kept(
    columns: int, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = list[int | None]()

    def table(rows: list[Any], given: int | None) -> list[str]:
        asked.append(given)
        return []

    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(prove, "_table", table)
    prove.show(FOUND)
    with monkeypatch.context() as patch:
        patch.setattr(sys.stdout, "isatty", lambda: True)
        prove.show(FOUND)
    assert asked == [None, width]
    capsys.readouterr()


ROWS: Final = [("a", "one two three", "x" * 16), ("first second", "", "one two three four five")]


@pytest.mark.parametrize(
    ("columns", "lines"),
    [
        (
            None,
            [
                "a             one two three  xxxxxxxxxxxxxxxx",
                "first second                 one two three four five",
            ],
        ),
        (
            40,
            [
                "a           one two     xxxxxxxxxxxxxxxx",
                "            three",
                "first                   one two three",
                "second                  four five",
            ],
        ),
        (
            100,
            [
                "a             one two three  xxxxxxxxxxxxxxxx",
                "first second                 one two three four five",
            ],
        ),
    ],
)
def test_cells_are_wrapped_into_a_terminal(columns: int | None, lines: list[str]) -> None:
    assert list(prove._table(ROWS, columns)) == lines


def test_the_last_column_has_at_least_a_quarter() -> None:
    wide = [("a" * 20, "b" * 20, "c" * 9)]
    assert list(prove._table(wide, 12)) == [
        f"{'a' * 3}  {'b' * 3}  {'c' * 3}",
        f"{'a' * 3}  {'b' * 3}  {'c' * 3}",
        f"{'a' * 3}  {'b' * 3}  {'c' * 3}",
        *[f"{'a' * 3}  {'b' * 3}"] * 3,
        f"{'a' * 2}   {'b' * 2}",
    ]
