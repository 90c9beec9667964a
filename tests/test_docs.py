"""The documents are true.

Examples run, the command reference is generated, and each guarantee names tests and has a change.
"""

import doctest
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from guarantees import changes, named_tests

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
#: A page's code blocks. One below ``<!-- extract -->`` is neither run nor compared.
BLOCK = re.compile(
    r"^(?P<extract><!-- extract -->\n)?^```(?P<language>\w+)\n(?P<content>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def blocks(page: str) -> list[tuple[str, str]]:
    """Return language and content of each block of a page that is no extract, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [(b["language"], b["content"]) for b in BLOCK.finditer(text) if not b["extract"]]


@pytest.mark.requires("fuse")
def test_the_descriptor_session_in_the_quick_start() -> None:
    (session,) = (
        text for language, text in blocks("docs/use/quickstart.md") if language == "pycon"
    )
    # Errors show there without their traceback header, as a person reads them.
    source = re.sub(
        r"^(\w*Error: )", r"Traceback (most recent call last):\n\1", session, flags=re.MULTILINE
    )
    test = doctest.DocTestParser().get_doctest(source, {}, "quickstart", "quickstart.md", 0)
    assert doctest.DocTestRunner().run(test).failed == 0
    assert len(test.examples) == 9


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a reader who has activated .venv; ``tmp_path`` is the checkout."""
    shutil.copy(ROOT / "README.md", tmp_path)
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, words in {"restrictedmem": ["-m", "restrictedmem"], "python": []}.items():
        script = commands / name
        script.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, *words])} "$@"\n')
        script.chmod(0o755)
    return {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}"}


@pytest.mark.requires("fuse", "seccomp")
@pytest.mark.parametrize(
    ("page", "count"),
    [("README.md", 4), ("docs/use/quickstart.md", 6), ("docs/use/conformance.md", 2)],
)
def test_each_block_prints_what_the_page_says(
    page: str, count: int, tmp_path: Path, environment: dict[str, str]
) -> None:
    run, printed = 0, ""
    for language, content in blocks(page):
        if language == "text":
            assert printed == content
        elif language != "pycon":
            command = ["bash", "-e"] if language == "sh" else [sys.executable]
            done = subprocess.run(
                [*command, "-c", content],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=100,
                check=False,
            )
            assert done.returncode == 0, (content, done.stdout, done.stderr)
            run, printed = run + 1, done.stdout
            said = re.findall(r"^ *print\(.*\)  # (.*)", content, re.MULTILINE)
            assert not said or printed.splitlines() == said
            if "sha256sum" in content:
                guests, ours = printed.splitlines()
                assert guests == ours
    assert run == count


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 160


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


#: The pages whose unmarked blocks tests run, or which are generated.
_RUN = {
    "README.md",
    "docs/reference/cli.md",
    "docs/reference/wire-protocol.md",
    "docs/understand/conversion-in-place.md",
    "docs/use/conformance.md",
    "docs/use/consumers.md",
    "docs/use/devkvm.md",
    "docs/use/guests.md",
    "docs/use/quickstart.md",
    "docs/use/vm.md",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_block_that_no_test_runs_is_marked(page: Path) -> None:
    lines = ["", *page.read_text(encoding="utf-8").splitlines()]
    fences = [number for number, line in enumerate(lines) if line.startswith("```")]
    unmarked = [number for number in fences[::2] if "<!-- extract -->" not in lines[number - 1]]
    assert len(fences) % 2 == 0
    assert not unmarked or str(page.relative_to(ROOT)) in _RUN
