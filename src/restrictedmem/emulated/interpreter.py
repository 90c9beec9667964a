"""The files that this package needs under another kernel: itself, and its interpreter.

They go into the initramfs, because imports over 9p take twice as long. All of Python is bytecode
there, so that the emulated processor compiles nothing and looks for no source.
"""

import marshal
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.util import MAGIC_NUMBER, cache_from_source, find_spec
from pathlib import Path
from typing import Final

from restrictedmem.service.exec_service import PACKAGE_ROOT

#: The directory that the interpreter there must have on its path to find this package.
THERE: Final = "/package"
#: Directories and modules of the standard library that nothing here imports.
_LEFT_OUT: Final = (
    "__pycache__|config-.*|dist-packages|ensurepip|idlelib|lib2to3|pydoc_data|site-packages"
    "|test|tests|tkinter|turtledemo|_test.*|_tkinter.*|_curses.*|xx.*"
)
#: Header of bytecode without a source: flags, time and size.
_NO_SOURCE: Final = bytes(12)


def path() -> str:
    """Return the interpreter's path there, from which it finds its standard library."""
    return f"{sys.base_exec_prefix}/bin/python3"


def files() -> Iterator[tuple[str, bytes]]:
    """Yield path and content of each file that a Python with this package needs.

    Raises:
        OSError: as open(2).
    """
    program = Path(sys.executable).resolve()
    linked = [program]
    yield path(), program.read_bytes()
    library = sysconfig.get_path("stdlib")
    trees = {library: Path(library)}
    trees |= {f"{THERE}/{name}": _place(name) for name in ("restrictedmem", "unicorn")}
    for there, tree in trees.items():
        for file in _files_of(tree):
            name = f"{there}/{file.relative_to(tree)}"
            if file.suffix == ".py":
                yield f"{name}c", _bytecode(file)
            else:
                yield name, file.read_bytes()
            if ".so" in file.suffixes:
                linked.append(file)
    for name in _needed(linked):
        yield name, Path(name).read_bytes()


def _place(package: str) -> Path:
    if package == "restrictedmem":
        return Path(PACKAGE_ROOT, package)
    spec = find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def _files_of(tree: Path) -> Iterator[Path]:
    for each in sorted(tree.iterdir()):
        if re.fullmatch(_LEFT_OUT, each.name):
            continue
        if each.is_dir():
            yield from _files_of(each)
        elif each.suffix not in (".a", ".txt", ".rst"):
            yield each


def _bytecode(source: Path) -> bytes:
    """Return the bytecode of a source: what Python has kept of it, if that is of this source."""
    status = source.stat()
    kept = Path(cache_from_source(str(source), optimization=""))
    made_of = (0, int(status.st_mtime) & 0xFFFFFFFF, status.st_size & 0xFFFFFFFF)
    header = MAGIC_NUMBER + b"".join(number.to_bytes(4, "little") for number in made_of)
    if kept.is_file() and (found := kept.read_bytes()).startswith(header):
        return found
    code = compile(source.read_bytes(), str(source), "exec", dont_inherit=True, optimize=0)
    return MAGIC_NUMBER + _NO_SOURCE + marshal.dumps(code)


def _needed(files: list[Path]) -> list[str]:
    """Return the shared libraries that these files need, as the dynamic linker names them."""
    ldd = shutil.which("ldd") or "/usr/bin/ldd"
    said = subprocess.run([ldd, *files], check=False, capture_output=True, text=True).stdout
    return sorted(set(re.findall(r"^\s.*?(/\S+) \(0x", said, re.MULTILINE)))
