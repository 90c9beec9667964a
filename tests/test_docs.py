"""The documents are true: examples run, the command reference is generated, each guarantee names tests, and there is a change for them."""

import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest

from guarantees import changes, named_tests

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.requires("fuse")
def test_the_descriptor_session_in_the_readme() -> None:
    (session,) = blocks("pycon")
    # Errors show there without their traceback header, as a person reads them.
    source = re.sub(
        r"^(\w*Error: )", r"Traceback (most recent call last):\n\1", session, flags=re.MULTILINE
    )
    test = doctest.DocTestParser().get_doctest(source, {}, "README", "README.md", 0)
    assert doctest.DocTestRunner().run(test).failed == 0
    assert len(test.examples) == 9


@pytest.mark.requires("fuse")
def test_the_vm_example_in_the_readme() -> None:
    (example,) = blocks("python")
    before = "import os\nfrom restrictedmem import memfd_restricted\nfd = memfd_restricted()\nos.ftruncate(fd, 1 << 20)\n"
    done = subprocess.run(
        [sys.executable, "-c", before + example],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout == "PortOut(port=66, size=1, data=0)\n"
    assert "# " + done.stdout.strip() in example


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 160


def test_the_command_reference_is_generated() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "cli-docs"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_every_guarantee_has_its_tests() -> None:
    guarantees = named_tests(ROOT)
    assert len(guarantees) > 100
    for number, tests in guarantees.items():
        assert tests, f"{number} names no test"
        for test in tests:
            file, name = test.split("::")
            source = (ROOT / file).read_text(encoding="utf-8")
            assert re.search(rf"^def {name}\(|^{name} = ", source, re.MULTILINE), (
                f"{number}: {test} does not exist"
            )


def test_every_guarantee_has_a_change_that_breaks_it() -> None:
    found = changes(ROOT)
    assert list(found) == list(named_tests(ROOT))
    for number, change in found.items():
        mutant = change.mutant(ROOT)
        changed = mutant.applied((ROOT / change.file).read_bytes())
        if change.file.endswith(".py"):
            compile(changed, f"{change.file} of {number}", "exec")
