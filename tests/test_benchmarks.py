"""Every benchmark runs and compares; how fast anything is, is not asserted here."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
#: With a floor to compare with, so with a ratio.
COMPARED = (
    "get-page-range",
    "get-page-each",
    "get-page-warm",
    "descriptor-idle",
    "descriptor-busy",
    "first-touch",
    "first-touch-levels",
    "digest",
    "in-place",
    "punch-mapped",
    "exit",
    "start",
    "turns",
    "faults-punched",
    "punch-unheard",
    "punch-heard",
    "design-punch",
    "exec-create",
    "exec-others",
    "exec-programs",
    "slots",
)
#: Compared too, on /dev/kvm.
KVM = ("kvm-exit", "kvm-machine", "conversion", "seal", "kvm-faults-punched")
ABSOLUTE = ("memory", "interrupt", "notifier")


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment or None,
    )


def figures(name: str) -> list[dict[str, Any]]:
    done = bench("--quick", "--json", name)
    # 1 says that an aim was missed, which a quick run may well.
    assert done.returncode in (0, 1) and done.stdout, done.stderr  # noqa: PT018  whichever it is, that says why
    data: dict[str, Any] = json.loads(done.stdout)
    assert set(data["machine"]) == {"kernel", "cpu", "cores", "governor", "python", "unicorn"}
    found: list[dict[str, Any]] = data["figures"]
    assert found
    assert {figure["name"] for figure in found} == {name}
    # Without a floor it may be a difference.
    assert all(figure["ours"] >= 0 for figure in found if figure["floor"] is not None)
    return found


@pytest.mark.requires("fuse", "root", "cc")
@pytest.mark.parametrize(
    "name", [*COMPARED, *(pytest.param(name, marks=pytest.mark.requires("kvm")) for name in KVM)]
)
def test_a_comparison_runs_and_gives_a_ratio(name: str) -> None:
    assert any(
        figure["floor"] > 0 and figure["ratio"] > 0
        for figure in figures(name)
        if figure["floor"] is not None
    )


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("name", ABSOLUTE)
def test_an_absolute_figure_runs(name: str) -> None:
    assert all(figure["floor"] is None for figure in figures(name))


@pytest.mark.requires("cc")
def test_the_table_has_the_machine_a_head_and_a_row() -> None:
    machine, head, row = bench("--quick", "get-page-each").stdout.splitlines()
    assert machine.startswith("kernel ")
    assert head.split() == ["what", "floor", "ours", "unit", "ratio", "aim", "met"]
    assert row.startswith("get_page one at a time, cold ")
    assert row.endswith((" met", " MISSED"))


def test_without_a_compiler_there_is_one_line_and_a_hint() -> None:
    done = bench("--quick", "get-page-each", PATH="/nonexistent")
    assert done.returncode == 2
    why, hint = done.stderr.splitlines()
    assert why == "error: get-page-each: the floors are C programs and there is no C compiler"
    assert hint.startswith("hint: apt-get install ")


def test_an_unknown_name_is_refused_and_every_known_one_is_tested() -> None:
    done = bench("nonsense")
    assert done.returncode == 2
    offered = done.stderr.partition("no benchmark nonsense; choose from ")[2].strip().split(", ")
    assert sorted(offered) == sorted((*COMPARED, *KVM, *ABSOLUTE))
