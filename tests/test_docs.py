"""The documents are true: examples run, the command reference is generated, every guarantee names a test that exists."""

import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.requires("fuse")
def test_the_descriptor_session_in_the_readme() -> None:
    (session,) = blocks("pycon")
    # Errors show there without their traceback header, as a person reads them.
    source = re.sub(r"^(\w*Error: )", r"Traceback (most recent call last):\n\1", session, flags=re.MULTILINE)
    test = doctest.DocTestParser().get_doctest(source, {}, "README", "README.md", 0)
    assert doctest.DocTestRunner().run(test).failed == 0
    assert len(test.examples) == 9


@pytest.mark.requires("fuse")
def test_the_vm_example_in_the_readme() -> None:
    (example,) = blocks("python")
    before = "import os\nfrom restrictedmem import memfd_restricted\nfd = memfd_restricted()\nos.ftruncate(fd, 1 << 20)\n"
    done = subprocess.run([sys.executable, "-c", before + example], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "PortOut(port=66, size=1, data=0)\n"
    assert "# " + done.stdout.strip() in example


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 150


def test_the_command_reference_is_generated() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "cli-docs"), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_every_guarantee_has_its_test() -> None:
    text = (ROOT / "SPECIFICATION.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+\.\d+) \| .*? \| (.*?) \|$", text, re.MULTILINE)
    assert rows
    assert len({number for number, _ in rows}) == len(rows)
    for number, tests in rows:
        names = re.findall(r"`(test_\w+)::(test_\w+)`", tests)
        assert names, f"{number} names no test"
        for module, name in names:
            source = (ROOT / "tests" / f"{module}.py").read_text(encoding="utf-8")
            assert re.search(rf"^ *def {name}\(|^{name} = ", source, re.MULTILINE), f"{number}: {module}::{name} does not exist"
