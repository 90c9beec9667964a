"""The packaged guests: rebuilt where the compiler is the recorded one, and the same tests for whatever was built."""

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from restrictedmem import guests
from restrictedmem.kvm import elf, guest_abi

ROOT = Path(__file__).parent.parent
NAMES = guests.names()


def built_with() -> tuple[str, str]:
    """First lines of the compiler's and the linker's --version, as the record has them."""
    compiler = shutil.which("gcc") or "cc"
    linker = subprocess.run([compiler, "-print-prog-name=ld"], capture_output=True, text=True, check=True).stdout.strip()
    lines = [
        subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
        for tool in (compiler, linker)
    ]
    return lines[0], lines[1]


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("guests")
    subprocess.run(["make", "-s", "-C", str(ROOT / "guests"), f"OUT={out}"], check=True, capture_output=True, text=True)
    return out


def test_the_record_matches_the_packaged_guests() -> None:
    record = guests.toolchain()["guests"]
    assert sorted(record) == NAMES
    for name in NAMES:
        data = guests.path(name).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (record[name]["sha256"], record[name]["size"]), name


@pytest.mark.requires("cc")
@pytest.mark.parametrize("name", NAMES)
def test_a_rebuilt_guest_is_the_same(name: str, rebuilt: Path) -> None:
    data = (rebuilt / f"{name}.elf").read_bytes()
    recorded = guests.toolchain()
    if built_with() == (recorded["compiler"], recorded["linker"]):
        assert data == guests.path(name).read_bytes()
    else:
        # Another compiler, other bytes: what can be compared is what the loader sees. That it works is test_run's to say.
        assert elf.parse(data).entry == elf.parse(guests.path(name).read_bytes()).entry


@pytest.mark.parametrize("name", NAMES)
def test_a_guest_keeps_to_the_layout(name: str) -> None:
    image = elf.parse(guests.path(name).read_bytes())
    assert image.entry >= guest_abi.IMAGE_BASE
    assert all(segment.gpa >= guest_abi.IMAGE_BASE for segment in image.segments)
    assert image.end < guest_abi.PRIVATE_BASE + guest_abi.PRIVATE_SIZE_MIN


@pytest.mark.requires("cc")
def test_the_header_and_the_package_agree(tmp_path: Path) -> None:
    # How far addresses reach is the loader's business: a guest is told where its memory is.
    names = [name for name in dir(guest_abi) if name.isupper() and name != "GPA_BITS"]
    source = tmp_path / "abi.c"
    aliases = {"EXIT": "HYPERCALL_EXIT", "READ": "HYPERCALL_READ", "WRITE": "HYPERCALL_WRITE"}
    lines = "".join(f'printf("{name} %lu\\n", (unsigned long){aliases.get(name, name)});' for name in names)
    header = ROOT / "guests" / "include"
    head = "#define __ASSEMBLER__\n#include <restrictedmem/guest.h>\n#undef __ASSEMBLER__\n#include <stdio.h>\n"
    source.write_text(head + f"int main(void) {{ {lines} return 0; }}\n")
    subprocess.run(["gcc", "-I", str(header), "-o", str(tmp_path / "abi"), str(source)], check=True, capture_output=True, text=True)
    printed = subprocess.run([str(tmp_path / "abi")], check=True, capture_output=True, text=True).stdout
    assert printed.split("\n")[:-1] == [f"{name} {getattr(guest_abi, name)}" for name in names]


def test_an_unknown_guest_is_enoent() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        guests.path("../secret")
    assert caught.value.filename == "../secret"


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"#!/bin/sh\n", bytes(64), b"\x7fELF\x02\x01\x01" + bytes(57)])
def test_what_is_no_elf_is_enoexec(data: bytes) -> None:
    with pytest.raises(OSError, match="ELF") as caught:
        elf.parse(data)
    assert caught.value.errno == 8
