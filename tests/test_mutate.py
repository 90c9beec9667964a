"""The changes that ``scripts/mutate`` makes, the tests it runs, and its report on a small tree."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mutation
from waiting import wait_until

ROOT = Path(__file__).parent.parent


def texts(source: str) -> list[str]:
    return [mutant.text for mutant in mutation.mutants_of("file", source.encode())]


@pytest.mark.parametrize(
    ("source", "changes"),
    [
        ("a < b", ["(a <= b)"]),
        ("a == b > c", ["(a != b > c)", "(a == b >= c)"]),
        ("a is not b", ["(a is b)"]),
        ("a not in b", ["(a in b)"]),
        ("a + b", ["(a - b)"]),
        ("a << b & c", ["(a << b | c)", "(a >> b)"]),
        ("a * b // c", ["(a * b * c)", "(a + b)"]),
        ("a and b", ["(a or b)"]),
        ("not a", ["(a)"]),
        ("a += b", ["a -= b"]),
        ("min(a, b)", ["max(a, b)", "pass"]),
        ("x = min(a, b)", ["max(a, b)"]),
        ("x = 7", ["8"]),
        ("x = True", ["False"]),
        ("raise error", ["pass"]),
        ("raise OSError(EINVAL, 'x')", ["73", "pass"]),
        ("file.close()", ["pass"]),
    ],
)
def test_changes(source: str, changes: list[str]) -> None:
    assert sorted(texts(source)) == changes


@pytest.mark.parametrize(
    "source",
    [
        '"A text."',
        "x = 1.5",
        'f"{a + 1:>10}"',
        'a + "text"',
        "x: int | None = None",
        "def f(a: X | Y) -> A | B: ...",
        "@total(slots=True)\ndef f(): ...",
        "assert a < b",
        'log.error("a %d", 1)',
        "if TYPE_CHECKING:\n    x = 1",
        "class seccomp_data(ctypes.Structure):\n    arg0: u64 = 0",
    ],
)
def test_what_no_test_could_tell_apart_stays(source: str) -> None:
    assert texts(source) == []


def test_a_change_is_where_it_says() -> None:
    source = 'x = "€"; y = (a\n    + b) # z\n'.encode()
    (mutant,) = mutation.mutants_of("src/file.py", source)
    assert mutant.applied(source).decode() == 'x = "€"; y = ((a - b)) # z\n'
    assert str(mutant) == 'src/file.py:1 `x = "€"; y = (a + b) # z` -> `x = "€"; y = ((a - b)) # z`'


def test_changed_files_are_python() -> None:
    file = "src/restrictedmem/mm/pages.py"
    source = (ROOT / file).read_bytes()
    mutants = mutation.mutants_of(file, source)
    assert len(mutants) > 100
    for mutant in mutants:
        assert ast.dump(ast.parse(mutant.applied(source))) != ast.dump(ast.parse(source)), str(
            mutant
        )


def test_layers_take_turns_and_a_seed_says_which_lines() -> None:
    layers = ["consumer", "mm", "platform"]
    chosen = mutation.choose(ROOT, layers, 30, 5)
    assert [
        mutation.layer_of(Path(mutant.file).relative_to("src/restrictedmem")) for mutant in chosen
    ] == layers * 10
    assert len({(mutant.file, mutant.line) for mutant in chosen}) == 30
    assert mutation.choose(ROOT, layers, 30, 5) == chosen != mutation.choose(ROOT, layers, 30, 6)
    dropped = mutation.choose(ROOT, layers, 30, 5, texts={mutation.DROPPED})
    assert {mutant.text for mutant in dropped} == {"pass"}
    # The layer has fewer lines than were asked for.
    assert 0 < len(mutation.choose(ROOT, ["guests"], 1000, 5)) < 100


def tree(place: Path, **files: str) -> Path:
    """Make a repository of some files, whose names have __ for /."""
    for name, text in files.items():
        path = place / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return place


def test_the_nearest_tests_come_first(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        src__restrictedmem__mm__pages="locked_bytes = 0",
        src__restrictedmem__kvm__mmu="from restrictedmem.mm import pages",
        src__restrictedmem__vmm__vm="from restrictedmem.kvm.mmu import Mmu",
        src__restrictedmem__cli__run="import restrictedmem.vmm.vm",
        src__restrictedmem__cli__main="COMMANDS = ('run',)\n"
        "import_module(f'restrictedmem.cli.{name}')",
        src__restrictedmem____main__="from restrictedmem.cli.main import run",
        tests__helper="import restrictedmem.kvm.mmu",
        tests__test_a="command = ['-m', 'restrictedmem', 'run']",
        tests__test_b="from restrictedmem.vmm.vm import Vm",
        tests__test_c="import helper",
        tests__test_last="import helper\nlocked_bytes = 1",
        tests__test_d="code = 'restrictedmem.mm.pages'",
        tests__test_pages="import restrictedmem.vmm.vm",
        tests__test_other="import os",
        tests__test_all="for found in names: import_module(f'restrictedmem.kvm.{found}')",
    )
    (tmp_path / "src/restrictedmem/__main__.py").write_text(
        "from restrictedmem.cli.main import run"
    )
    found = mutation.tests_by_module(root)
    assert found["src/restrictedmem/mm/pages.py"] == [
        f"tests/test_{name}.py" for name in ("pages", "d", "all", "last", "b", "c", "a")
    ]
    assert found["src/restrictedmem/cli/run.py"] == ["tests/test_a.py"]


def run(root: Path, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, str(root / "scripts" / "mutate"), *arguments]
    # A person may have a tree of their own there.
    env = {**os.environ, "PYTHONPATH": str(root / "src")}
    done = subprocess.run(
        command, env=env, check=False, capture_output=True, text=True, timeout=100
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def mutate(root: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    status, said = run(root, "--json", "--layer", "mm", *arguments)
    return status, json.loads(said)


def a_tree_to_search(place: Path, limits: str, tests: str) -> Path:
    """Make a repository of one module and its tests, with the script."""
    for file in ("scripts/mutate", "tests/mutation.py", "tests/guarantees.py"):
        (place / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, place / file)
    root = tree(
        place,
        src__restrictedmem__abi__process="from ctypes import CDLL\nPR_SET_CHILD_SUBREAPER = 36\n"
        "prctl = CDLL(None).prctl\n",
        src__restrictedmem__mm__limits=limits,
        tests__test_limits=tests,
    )
    (root / "src/restrictedmem/__init__.py").touch()
    return root


def test_a_tree_is_searched_and_left_alone(tmp_path: Path) -> None:
    """One line is tested to its limit, another only half.

    One test fails anyway, and one leaves a process.
    """
    mark = tmp_path / "left"
    root = a_tree_to_search(
        tmp_path,
        "def inside(x): return x < y\ndef beyond(x): return x > y\ny = int('3')\n",
        f"""
import subprocess
from restrictedmem.mm import limits
def test_that_fails(): assert False
def test_inside(): assert limits.inside(2) and not limits.inside(3)
def test_beyond(): assert limits.beyond(5)
def test_that_leaves_a_process():
    with open({str(mark)!r}, "w") as file:
        file.write(str(subprocess.Popen(["sleep", "1000"]).pid))
""",
    )
    before = {path: path.stat() for path in root.rglob("*") if path.is_file()}
    status, found = mutate(root)
    assert (status, found["mutants"], found["layers"]) == (
        1,
        2,
        {"mm": {"mutants": 2, "survivors": 1}},
    )
    assert [(row["line"], row["old"], row["new"]) for row in found["survivors"]] == [
        (2, "def beyond(x): return x > y", "def beyond(x): return (x >= y)"),
    ]
    sleeper = Path("/proc", mark.read_text())
    wait_until(lambda: not sleeper.exists(), "what a test has left to be gone")
    mark.unlink()
    after = {
        path: path.stat()
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {path: (found.st_mtime_ns, found.st_size) for path, found in after.items()} == {
        path: (found.st_mtime_ns, found.st_size) for path, found in before.items()
    }
    assert mutate(root, "--count", "1", "--share", "1")[0] == 0


def test_tests_that_hang_are_told_of(tmp_path: Path) -> None:
    limits = "def inside(x): return x < y\ny = int('3')\n"
    tests = (
        "from restrictedmem.mm import limits\ndef test_it():\n    while limits.inside(3): pass\n"
    )
    root = a_tree_to_search(tmp_path, limits, tests)
    status, found = mutate(root, "--count", "1", "--seconds", "5")
    assert (status, found["mutants"], len(found["survivors"]), found["late"]) == (1, 1, 1, 1)


def test_tests_that_end_their_process_have_noticed(tmp_path: Path) -> None:
    """With a status that says that all is well, as a child's is that goes on as its parent."""
    limits = "def inside(x): return x < y\ny = int('3')\n"
    tests = (
        "import os\nfrom restrictedmem.mm import limits\ndef test_it():\n"
        "    if limits.inside(3): os._exit(0)\n"
    )
    status, found = mutate(a_tree_to_search(tmp_path, limits, tests), "--count", "1")
    assert (status, found["mutants"], len(found["survivors"])) == (0, 1, 0)


def test_cases_of_the_suite_are_tests_of_a_vm_and_may_be_the_only_ones(tmp_path: Path) -> None:
    """They reach the code through other processes; here by a name that is put together."""
    root = a_tree_to_search(
        tmp_path,
        "from errno import EINVAL, ENOENT\n"
        "def fail(x):\n    if x: raise OSError(EINVAL, '')\n    raise OSError(ENOENT, '')\n",
        """
from restrictedmem.mm.limits import fail
def test_it():
    try: fail(0)
    except OSError as error: assert error.errno == 2
    else: assert False
""",
    )
    (root / "tests/test_conformance_vm.py").write_text("""
from importlib import import_module
limits = import_module(".".join(("restrictedmem", "mm", "limits")))
def test_no_case_fails():
    try: limits.fail(1)
    except OSError as error: assert error.errno == 22
    else: assert False
""")
    status, found = mutate(root)
    assert (status, found["mutants"], found["survivors"]) == (0, 2, [])
    status, found = mutate(root, "--suite")
    assert (status, [row["line"] for row in found["survivors"]]) == (1, [4])
    assert {row["new"] for row in found["survivors"]} <= {"pass", "raise OSError(73, '')"}


#: Guarantees, and the test that each names.
ROWS = (("1.1", "low"), ("1.1a", "high"))


def test_a_guarantee_is_broken_for_its_own_tests_alone(tmp_path: Path) -> None:
    root = a_tree_to_search(
        tmp_path,
        "def inside(x):\n    return 1 < x < 5\n",
        """
from restrictedmem.mm.limits import inside
def test_low(): assert inside(2) and not inside(1)
def test_high(): assert inside(4)
""",
    )
    rows = [
        "| no. | guarantee | enforced by |",
        "|---|---|---|",
        *(f"| {number} | … | `test_limits::test_{name}` |" for number, name in ROWS),
    ]
    (root / "SPECIFICATION.md").write_text("\n".join(rows) + "\n", encoding="utf-8")
    changes = (
        f"{number} src/restrictedmem/mm/limits.py\n-    return 1 < x < 5\n+    return x < 5\n"
        for number, _ in ROWS
    )
    (root / "tests" / "guarantees.txt").write_text(
        "# Changes.\n\n" + "\n".join(changes), encoding="utf-8"
    )
    survivor = "1.1a src/restrictedmem/mm/limits.py:2 `return 1 < x < 5` -> `return x < 5`\n"
    assert run(root, "--guarantees") == (1, f"{survivor}1 of 2 survived\n")
    assert run(root, "--guarantees", "1.1") == (0, "0 of 1 survived\n")
