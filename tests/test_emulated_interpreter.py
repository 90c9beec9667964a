"""The Python that a suite under another kernel brings along."""

import importlib.util
import marshal
import os
import shutil
import subprocess
import sys
from collections import Counter
from importlib.machinery import SourcelessFileLoader
from pathlib import Path
from types import CodeType

import pytest

from restrictedmem.emulated import interpreter


@pytest.mark.parametrize("kept", [False, True])
def test_bytecode_is_loaded_without_its_source(tmp_path: Path, kept: bool) -> None:
    source = tmp_path / "answer.py"
    source.write_text("assert __debug__, 'what?'\nanswer = 42\n")
    if kept:
        subprocess.run([sys.executable, "-m", "compileall", "-q", source], check=True)
    (tmp_path / "there.pyc").write_bytes(interpreter._bytecode(source))
    loader = SourcelessFileLoader("there", str(tmp_path / "there.pyc"))
    spec = importlib.util.spec_from_loader("there", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    assert vars(module)["answer"] == 42


@pytest.mark.parametrize("change", ["time", "size"])
def test_bytecode_of_an_older_source_is_not_taken(tmp_path: Path, change: str) -> None:
    source = tmp_path / "answer.py"
    source.write_text("answer = 41\n")
    subprocess.run([sys.executable, "-m", "compileall", "-q", source], check=True)
    before = source.stat()
    source.write_text("answer = 42\n" if change == "time" else "answer = 42.0\n")
    later = before.st_mtime + 10 * (change == "time")
    os.utime(source, (later, later))
    code = marshal.loads(interpreter._bytecode(source)[16:])
    assert isinstance(code, CodeType)
    assert {42} & set(code.co_consts)


def test_tests_and_caches_stay_here(tmp_path: Path) -> None:
    for name in ("a.py", "b.so", "c.txt", "test/d.py", "sub/e.json", "sub/__pycache__/f.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [str(each.relative_to(tmp_path)) for each in interpreter._files_of(tmp_path)]
    assert found == ["a.py", "b.so", "sub/e.json"]


def test_each_file_is_there_once_and_libraries_are() -> None:
    names = Counter(name for name, _ in interpreter.files())
    assert set(names.values()) == {1}
    assert f"{interpreter.THERE}/restrictedmem/__init__.pyc" in names
    assert f"{interpreter.THERE}/unicorn/__init__.pyc" in names
    assert interpreter.path() in names
    libc = [name for name in names if Path(name).name.startswith("libc.so")]
    assert len(libc) == 1 or shutil.which("ldd") is None
