"""The verdicts of ``run --prove``, and attempts that are no refusal."""

import os
import re
import signal
from collections.abc import Iterable, Iterator
from errno import EBADF, EPERM
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hidden_pattern import SEED, START, owner_of, pattern
from outcomes import Errno, in_child, outcome
from restrictedmem.audit import on_descriptor, on_host, on_processes, on_vm
from restrictedmem.audit.attacker import Attacker, drop_capabilities
from restrictedmem.audit.attempt import Attempt, MeasurementTellsError, Outcome, Route, attempt
from restrictedmem.audit.pattern import Pattern, content

__all__ = ["pattern"]

THREAT_MODEL = Path(__file__).parent.parent / "docs" / "understand" / "threat-model.md"


# Capabilities.


@pytest.mark.requires("root")
def test_no_capability_is_left() -> None:
    def body() -> dict[str, str]:
        drop_capabilities()
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return dict(re.findall(r"^(Cap\w+|NoNewPrivs):\s(\w+)$", status, re.MULTILINE))

    none = "0" * 16
    expected = {
        "CapInh": none,
        "CapPrm": none,
        "CapEff": none,
        "CapBnd": none,
        "CapAmb": none,
        "NoNewPrivs": "1",
    }
    assert in_child(body) == repr(expected)


# Verdicts.


def verdict(pattern: Pattern, chunks: Iterable[bytes] | Exception, **route: Any) -> Attempt:
    def run(_: Attacker) -> Iterator[bytes]:
        if isinstance(chunks, Exception):
            raise chunks
        yield from chunks

    as_root = route.pop("as_root", False)
    return attempt(
        Route("target", "name", run, **route),
        cast(Attacker, SimpleNamespace(pattern=pattern, as_root=as_root)),
    )


def test_verdicts(pattern: Pattern) -> None:
    secret, refused = [content(SEED, START, 4096)], OSError(EPERM, "no")
    assert verdict(pattern, refused) == Attempt("target", "name", Outcome.REFUSED, "EPERM", "no")
    assert verdict(pattern, [b"", bytes(64)]) == Attempt(
        "target", "name", Outcome.NOTHING, searched=64
    )
    assert verdict(pattern, secret).outcome is Outcome.FOUND
    assert verdict(pattern, MeasurementTellsError(), power=True) == Attempt(
        "target", "name", Outcome.MEASURED
    )
    assert verdict(pattern, [b""], power=True) == Attempt(
        "target", "name", Outcome.FOUND, detail="accepted"
    )
    assert verdict(pattern, secret, open_by="Swap").outcome is Outcome.OPEN
    assert verdict(pattern, secret, root=True).outcome is Outcome.FOUND
    assert verdict(pattern, secret, root=True, as_root=True).outcome is Outcome.OPEN
    assert verdict(pattern, secret, as_root=True).outcome is Outcome.FOUND
    assert verdict(pattern, secret, control=True).outcome is Outcome.CONTROL
    assert verdict(pattern, [b""], control=True).outcome is Outcome.FAILED
    assert verdict(pattern, refused, control=True).outcome is Outcome.FAILED
    assert [outcome for outcome in Outcome if outcome.bad] == [Outcome.FOUND, Outcome.FAILED]


def test_an_attempt_that_dies_or_breaks_is_no_refusal(
    pattern: Pattern, capfd: pytest.CaptureFixture[str]
) -> None:
    def dies(_: Attacker) -> Iterator[bytes]:
        os.kill(os.getpid(), signal.SIGKILL)
        yield b""

    def breaks(_: Attacker) -> Iterator[bytes]:
        raise AssertionError("broken")

    for run in (dies, breaks):
        assert attempt(Route("target", "name", run), owner_of(pattern)).outcome is Outcome.FAILED
    capfd.readouterr()


def test_what_is_open_by_design_is_in_the_threat_model() -> None:
    items = set(
        re.findall(r"^- \*\*(.+?)\.\*\*", THREAT_MODEL.read_text(encoding="utf-8"), re.MULTILINE)
    )
    named = {
        route.open_by
        for route in (
            *on_host.routes(),
            *on_vm.routes(),
            *on_processes.routes(),
            *on_descriptor.ROUTES,
        )
    } - {""}
    assert {*named, "Root"} <= items


def test_what_every_try_is_refused_is_refused() -> None:
    def refused(errno: int) -> Iterator[bytes]:
        raise OSError(errno, "pidfd_getfd")

    def tried(*errnos: int) -> object:
        return outcome(
            lambda: [
                *on_processes._each(
                    partial(refused, errno) if errno else lambda: iter([b"found"])
                    for errno in errnos
                )
            ]
        )

    # A missing route says nothing, unless there is no other.
    assert tried(EPERM, EBADF) == tried(EBADF, EPERM) == Errno(EPERM)
    assert tried(EBADF, EBADF) == Errno(EBADF)
    assert tried(EPERM, 0) == [b"found"]
