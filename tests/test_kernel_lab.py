"""What ``scripts/kernel-lab`` does with a tree, shown with one that takes no time to build."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

SCRIPT: Final = Path(__file__).parent.parent / "scripts" / "kernel-lab"
FRAGMENT: Final = (SCRIPT.parent / "kernel-lab.config").read_text(encoding="ascii")
#: A tree whose configuration loses one option, as that of a kernel which does not have it.
MAKEFILE: Final = """\
tinyconfig:
\techo "# CONFIG_64BIT is not set" >$(O)/.config
olddefconfig:
\tsed -i '/^CONFIG_CACHESTAT_SYSCALL=y/d' $(O)/.config
\techo configured >>$(O)/times
bzImage:
\t@echo "  CC      init/main.o"
\tmkdir -p $(O)/arch/x86/boot
\tcp answer $(O)/arch/x86/boot/bzImage
"""
PATCH: Final = """\
--- a/answer
+++ b/answer
@@ -1 +1 @@
-plain
+patched
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    directory = tmp_path / "linux tree"
    directory.mkdir()
    (directory / "Kconfig").touch()
    (directory / "Makefile").write_text(MAKEFILE)
    (directory / "answer").write_text("plain\n")
    return directory


def lab(tmp_path: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
    )


def image(done: subprocess.CompletedProcess[str]) -> Path:
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.removesuffix("\n"))


@pytest.mark.requires("kernel-build")
def test_a_tree_is_built_and_not_changed(tmp_path: Path, tree: Path) -> None:
    before = sorted(tree.iterdir())
    done = lab(tmp_path, "--tree", tree)
    built = image(done)
    assert built.read_text() == "plain\n"
    assert tmp_path / "cache" / "restrictedmem" / "kernels" in built.parents
    assert "this kernel has no CONFIG_CACHESTAT_SYSCALL\n" in done.stderr
    assert "compiled 1 files" in done.stderr
    config = (built.parent / "build" / ".config").read_text().splitlines()
    wanted = [line for line in FRAGMENT.splitlines() if line.startswith("CONFIG_")]
    assert set(wanted) - set(config) == {"CONFIG_CACHESTAT_SYSCALL=y"}
    assert sorted(tree.iterdir()) == before


@pytest.mark.requires("kernel-build")
def test_a_second_build_goes_on_from_the_first(tmp_path: Path, tree: Path) -> None:
    (tree / "answer").rename(tree / "later")
    done = lab(tmp_path, "--tree", tree)
    (log,) = (tmp_path / "cache").rglob("log")
    assert done.returncode == 1
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("kernel-lab: make failed: make: *** ")
    assert last.endswith(f"(the whole of it: {log})")
    assert "cannot stat 'answer'" in log.read_text()
    (tree / "later").rename(tree / "answer")
    built = image(lab(tmp_path, "--tree", tree))
    assert (built.parent / "build" / "times").read_text() == "configured\n"


@pytest.mark.requires("kernel-build")
def test_a_patch_is_applied_to_a_copy(tmp_path: Path, tree: Path) -> None:
    patch = tmp_path / "fix.patch"
    patch.write_text(PATCH)
    built = image(lab(tmp_path, "--tree", tree, "--patch", patch))
    assert built.read_text() == "patched\n"
    assert (tree / "answer").read_text() == "plain\n"
    # The tree without the patch is another kernel, with a cache of its own.
    assert image(lab(tmp_path, "--tree", tree)).read_text() == "plain\n"
    patch.write_text(PATCH.replace("-plain", "-other"))
    done = lab(tmp_path, "--tree", tree, "--patch", patch)
    assert done.returncode == 1
    assert "patch failed: Hunk #1 FAILED at 1. " in done.stderr.splitlines()[-1]


@pytest.mark.requires("kernel-build")
def test_two_builds_in_one_place_are_refused(tmp_path: Path, tree: Path) -> None:
    built = image(lab(tmp_path, "--tree", tree))
    lock = os.open(built.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = lab(tmp_path, "--tree", tree)
    finally:
        os.close(lock)
    assert done.returncode == 1
    assert done.stderr == f"kernel-lab: another kernel-lab builds in {built.parent}\n"


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    done = lab(tmp_path, "--tree", tmp_path)
    assert done.returncode == 2
    assert f"{tmp_path}: no tree of Linux (it has no Kconfig)" in done.stderr
    done = lab(tmp_path, "--patch", "/no/patch")
    assert done.returncode == 2
    assert "/no/patch: no such file" in done.stderr
    empty = tmp_path / "empty"
    empty.mkdir()
    done = subprocess.run(
        [sys.executable, SCRIPT],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": str(empty)},
    )
    assert done.returncode == 1
    assert "apt-get install make gcc flex bison bc patch xz-utils" in done.stderr


def test_each_group_of_options_says_why() -> None:
    groups = [group.splitlines() for group in FRAGMENT.strip().split("\n\n")]
    assert all(group[0].startswith("# ") for group in groups)
    names = [line for group in groups for line in group if not line.startswith("#")]
    assert all(line.startswith("CONFIG_") and line[-2:] in ("=y", "=n") for line in names)
    assert len(names) == len({line.partition("=")[0] for line in names}) > 80
