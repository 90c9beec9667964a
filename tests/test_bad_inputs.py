"""Bad inputs and odd starts, each as a process: the exit status, one line that says what is wrong, and no traceback."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

COMMAND = [sys.executable, "-m", "restrictedmem"]
#: Of a command that could be run for the cases at the same time.
_AT_ONCE = 3


@dataclass(frozen=True)
class Case:
    """A command line, in which IN is a directory of inputs, and what has to come of it."""

    words: str
    status: int
    #: What the line matches, behind ``error: ``; empty when nothing is said.
    line: str
    #: What a hint in a second line contains, if there is to be one.
    hint: str | None = None
    environment: dict[str, str] = field(default_factory=dict[str, str])

    def __str__(self) -> str:
        return self.words


USAGE = [
    Case("", 2, "the following arguments are required: COMMAND"),
    Case("nonesuch", 2, r"argument COMMAND: invalid choice: 'nonesuch' \(choose from .*\)"),
    Case("run", 2, "name a guest, or --prove"),
    Case("run --memory tiny sha256", 2, r"argument --memory: not a size: 'tiny' \(write .*\)"),
    Case("run --memory 1000 sha256", 2, "argument --memory: 1000 is not a whole number of pages"),
    Case(f"run --memory {1 << 63} sha256", 2, rf"argument --memory: {1 << 63}: larger than any file \(9223372036854771712\)"),
    Case(f"run --memory {10**30} sha256", 2, "argument --memory: not a size: '10{30}' .*"),
    Case("run --memory-max 3K sha256", 2, "argument --memory-max: 3K is not a whole number of pages"),
    Case("run --vcpus 0 sha256", 2, "argument --vcpus: 0 is not a number of vCPUs"),
    Case("run --gdb 65536 sha256", 2, "argument --gdb: 65536 is not a port"),
    Case("run --prove as-root sha256", 2, "--prove runs a guest of its own: leave out the guest, or --prove"),
    Case("run --prove --gdb 0", 2, "--gdb goes with a guest, not with --prove"),
    Case("run --prove --trace IN/new", 2, "--trace goes with a guest, not with --prove"),
    Case("run --prove --vcpus 2", 2, "--vcpus goes with a guest, not with --prove"),
    Case("run --prove --platform snp", 2, "--platform goes with a guest, not with --prove"),
    Case("run --engine kernel --pin sha256", 2, "--pin is for the software engine: .*"),
    *(
        Case(
            f"run {option} sha256", 2, f"{option.split()[0]} is for a service of one's own, .*", environment={"RESTRICTEDMEM_SERVER": "@x"}
        )
        for option in ("--api v9", "--memory-max 64M", "--design v9", "--backing memfd", "--pin")
    ),
    Case("exec --memory-max 3K true", 2, "argument --memory-max: 3K is not a whole number of pages"),
    Case("exec --syscall-number 0 true", 2, "argument --syscall-number: 0 may be another system call's: take one from 451 on"),
    Case("exec --api v9 true", 2, "--api is for a service of one's own, .*", environment={"RESTRICTEDMEM_SERVER": "@x"}),
    Case("serve --socket IN/socket --memory-max 1", 2, "argument --memory-max: 1 is not a whole number of pages"),
    Case("serve --socket IN/socket --max-vms 0", 2, "argument --max-vms: 0 is not a number of VMs"),
    Case("measure --vcpus 0 sha256", 2, "argument --vcpus: 0 is not a number of vCPUs"),
    Case("measure --vcpus -1 sha256", 2, "argument --vcpus: (-1 is not a number of vCPUs|expected one argument)"),
    Case("verify IN/empty --memory 1M", 2, "--memory and --vcpus are a guest's, and go with --guest"),
    Case("verify IN/empty --guest", 2, "--guest takes a guest, after it: .*"),
    Case("check --random 0", 2, "argument --random: 0 is not a number of seconds"),
    Case("check --random -1", 2, "argument --random: (-1 is not a number of seconds|expected one argument)"),
    Case("check --random nan", 2, "argument --random: nan is not a number of seconds"),
    Case("check --limit inf", 2, "argument --limit: inf is not a number of seconds"),
    Case("check --jobs 0", 2, "argument --jobs: 0 is not a number of jobs"),
    Case("check --seed 1", 2, "--seed goes with --random"),
    Case("check --random 1 --jobs 1", 2, "--jobs is for searches, not for --random"),
    Case("check --random 1 --list", 2, "--list goes without --random"),
    Case("check --list --exhaustive", 2, "--exhaustive is for searches, not for --list"),
]

CASES = USAGE


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of files that nothing can be made of."""
    place = tmp_path_factory.mktemp("inputs")
    (place / "empty").touch()
    return place


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, inputs: Path) -> Iterator[Callable[[Case], subprocess.CompletedProcess[str]]]:
    """Return what came of a case; those that were chosen run side by side."""
    specs: list[Any] = [getattr(item, "callspec", None) for item in request.session.items]
    chosen = [spec.params["case"] for spec in specs if spec is not None and isinstance(spec.params.get("case"), Case)]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        futures: dict[int, Future[subprocess.CompletedProcess[str]]] = {id(case): pool.submit(run, case, inputs) for case in chosen}
        yield lambda case: futures[id(case)].result()


def run(case: Case, inputs: Path) -> subprocess.CompletedProcess[str]:
    words = [word.replace("IN/", f"{inputs}/") for word in case.words.split()]
    environment = {name: value for name, value in os.environ.items() if name != "RESTRICTEDMEM_SERVER"}
    return subprocess.run(
        [*COMMAND, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**environment, **case.environment},
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_bad_input_is_one_line(case: Case, found: Callable[[Case], subprocess.CompletedProcess[str]]) -> None:
    done = found(case)
    line, *more = done.stderr.splitlines() or [""]
    assert re.fullmatch(f"error: {case.line}" if case.line else "", line), done.stderr
    assert done.returncode == case.status
    # A second line is a hint, and there is no third.
    assert [each.startswith("hint: ") for each in more] in ([], [True]), done.stderr
    if case.hint is not None:
        assert more
        assert case.hint in more[0]
