"""The files that ``scripts/under-kernel`` gives to a kernel.

Booting is tried by hand (docs/reference/kernels.md).
"""

import importlib.util
import lzma
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Final

import pytest

SCRIPT: Final = Path(__file__).parent.parent / "scripts" / "under-kernel"
_NAME_AT: Final = 110


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = SourceFileLoader("under_kernel", str(SCRIPT))
    spec = importlib.util.spec_from_loader("under_kernel", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_a_module_comes_behind_what_it_depends_on(script: ModuleType, tmp_path: Path) -> None:
    depends = {"kvm-amd": "kvm,ccp", "kvm": "irqbypass", "ccp": "", "irqbypass": "", "other": "kvm"}
    for name, others in depends.items():
        content = f"\x7fELF\0license=GPL\0depends={others}\0name={name}\0".encode()
        directory = tmp_path / name
        directory.mkdir()
        if name == "kvm":
            (directory / "kvm.ko.xz").write_bytes(lzma.compress(content))
        else:
            (directory / f"{name}.ko").write_bytes(content)
    found = [*script.needed_modules(tmp_path, ("fuse", "kvm-amd", "kvm"))]
    assert [name for name, _ in found] == ["irqbypass.ko", "kvm.ko", "ccp.ko", "kvm_amd.ko"]
    assert all(content.startswith(b"\x7fELF") for _, content in found)


def entries(archive: bytes) -> Iterator[tuple[str, int, bytes]]:
    """Yield name, mode and content of each entry, in the kernel's documented initramfs format."""
    at = 0
    while at < len(archive):
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, length = fields[1], fields[6], fields[11]
        name = archive[at + _NAME_AT : at + _NAME_AT + length - 1].decode()
        data = at + (_NAME_AT + length + 3) // 4 * 4
        yield name, mode, archive[data : data + size]
        at = data + (size + 3) // 4 * 4


def test_the_archive_holds_the_files(script: ModuleType) -> None:
    found = [*entries(b"".join(script.archive([("init", b"12345"), ("bin/busybox", b"")])))]
    assert found[-1] == ("TRAILER!!!", 0, b"")
    assert ("init", 0o100755, b"12345") in found
    assert [name for name, mode, _ in found if mode >> 12 == 4] == ["bin", "dev"]
    assert found.index(("bin", 0o40755, b"")) < found.index(("bin/busybox", 0o100755, b""))


def test_what_is_missing_is_said() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "/no/kernel", "--", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "/no/kernel: no such file" in done.stderr or "is not installed" in done.stderr
