"""The packaged guests, rebuilt and tested.

A rebuilt guest has the same bytes if the compiler is the recorded one. The tests are the same for
any compiler.
"""

import hashlib
import hmac
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from restrictedmem import guests
from restrictedmem.protocol import guest_abi
from restrictedmem.vmm import elf

ROOT = Path(__file__).parent.parent
GUESTS = ROOT / "guests"
NAMES = guests.names()


def built_with() -> tuple[str, str]:
    """First lines of the compiler's and the linker's --version, as the record has them."""
    compiler = shutil.which("gcc") or "cc"
    linker = subprocess.run(
        [compiler, "-print-prog-name=ld"], capture_output=True, text=True, check=True
    ).stdout.strip()
    lines = [
        subprocess.run(
            [tool, "--version"], capture_output=True, text=True, check=True
        ).stdout.splitlines()[0]
        for tool in (compiler, linker)
    ]
    return lines[0], lines[1]


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("guests")
    subprocess.run(
        ["make", "-s", "-C", str(ROOT / "guests"), f"OUT={out}"],
        check=True,
        capture_output=True,
        text=True,
    )
    return out


def test_the_record_matches_the_packaged_guests() -> None:
    record = guests.toolchain()["guests"]
    assert sorted(record) == NAMES
    for name in NAMES:
        data = guests.path(name).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (
            record[name]["sha256"],
            record[name]["size"],
        ), name


@pytest.mark.requires("cc")
@pytest.mark.parametrize("name", NAMES)
def test_a_rebuilt_guest_is_the_same(name: str, rebuilt: Path) -> None:
    data = (rebuilt / f"{name}.elf").read_bytes()
    recorded = guests.toolchain()
    if built_with() == (recorded["compiler"], recorded["linker"]):
        assert data == guests.path(name).read_bytes()
    else:
        # Another compiler, other bytes: what can be compared is what the loader sees. That it works
        # is test_run's to say.
        assert elf.parse(data).entry == elf.parse(guests.path(name).read_bytes()).entry


@pytest.mark.parametrize("name", NAMES)
def test_a_guest_keeps_to_the_layout(name: str) -> None:
    image = elf.parse(guests.path(name).read_bytes())
    assert image.entry >= guest_abi.IMAGE_BASE
    assert all(segment.gpa >= guest_abi.IMAGE_BASE for segment in image.segments)
    assert image.end < guest_abi.PRIVATE_BASE + guest_abi.PRIVATE_SIZE_MIN


def host_program(directory: Path, source: str) -> bytes:
    """Compile what guests are made of for this machine, run it, and return what it printed."""
    program, text = directory / "program", directory / "program.c"
    text.write_text(source)
    flags = [
        "-std=gnu11",
        "-O1",
        "-fno-pie",
        "-no-pie",
        "-I",
        str(GUESTS / "include"),
        "-I",
        str(GUESTS),
    ]
    subprocess.run(
        ["gcc", *flags, "-o", str(program), str(text)], check=True, capture_output=True, text=True
    )
    return subprocess.run([str(program)], check=True, capture_output=True, timeout=30).stdout


HYPERCALLS = ("EXIT", "READ", "WRITE", "REPORT", "PARK", "CHECK", "MAP_GPA_RANGE")


@pytest.mark.requires("cc")
def test_the_header_and_the_package_agree(tmp_path: Path) -> None:
    # How far addresses reach is the loader's business: a guest is told where its memory is.
    expected = {
        name: value
        for name, value in vars(guest_abi).items()
        if name.isupper() and isinstance(value, int) and name not in ("GPA_BITS", "E2BIG")
    }
    lines = "".join(
        f'printf("{name} %lu\\n", (unsigned long){"HYPERCALL_" * (name in HYPERCALLS)}{name});'
        for name in expected
    )
    head = (
        "#define __ASSEMBLER__\n#include <restrictedmem/guest.h>\n#undef __ASSEMBLER__\n"
        "#include <stdio.h>\n"
    )
    printed = host_program(tmp_path, head + f"int main(void) {{ {lines} return 0; }}\n").decode()
    assert printed.splitlines() == [f"{name} {value}" for name, value in expected.items()]


@pytest.mark.requires("cc")
def test_boot_info_is_laid_out_as_the_header_says(tmp_path: Path) -> None:
    fields = {
        "magic": guest_abi.BOOT_MAGIC,
        "version": guest_abi.BOOT_VERSION,
        "argc": 2,
        "private_base": guest_abi.PRIVATE_BASE,
        "private_size": 0x0123_4000,
        "shared_base": guest_abi.SHARED_BASE,
        "shared_size": 0x5000,
        "hypercall_page": guest_abi.HYPERCALL_PAGE,
        "heap_base": 0x4100_0000,
        "args": guest_abi.PRIVATE_BASE + 88,
        "report_page": guest_abi.REPORT_PAGE,
        "vcpus": 3,
    }
    boot = guest_abi.boot_info(
        private_size=0x0123_4000,
        shared_size=0x5000,
        heap_base=0x4100_0000,
        vcpus=3,
        arguments=["é", ""],
    )
    lines = "".join(f'printf("{name} %lu\\n", (unsigned long)boot->{name});' for name in fields)
    content = ",".join(map(str, boot))
    source = f"""
    #include <restrictedmem/guest.h>
    int printf(const char *, ...);
    int main(const struct boot_info *unused)
    {{
        static const u8 bytes[] __attribute__((aligned(8))) = {{ {content} }};
        const struct boot_info *boot = (const void *)bytes;

        (void)unused;
        {lines}
        return 0;
    }}
    """
    assert host_program(tmp_path, source).decode().splitlines() == [
        f"{name} {value}" for name, value in fields.items()
    ]
    assert boot[guest_abi.BOOT_INFO.size :] == b"\xc3\xa9\0\0"


@pytest.mark.requires("cc")
def test_seal_signs_with_hmac_sha256(tmp_path: Path) -> None:
    # Its key never leaves it, so it is its code that is looked at, with a key of ours.
    source = """
    #define main guest_main
    #include "seal.c"
    #undef main
    long write(int, const void *, unsigned long);
    int main(void)
    {
        static u8 data[300];
        u64 secret[8];
        struct key key;
        char tag[SHA256_HEX];

        for (u64 i = 0; i < sizeof(secret); i++)
            ((u8 *)secret)[i] = (u8)(i * 7 + 3);
        for (u64 i = 0; i < sizeof(data); i++)
            data[i] = (u8)(i * 5 + 1);
        pad_key(&key.inner, secret, 0x3636363636363636);
        pad_key(&key.outer, secret, 0x5c5c5c5c5c5c5c5c);
        for (u64 n = 0; n <= sizeof(data); n++) {
            sign(&key, data, n, tag);
            if (write(1, tag, sizeof(tag)) != sizeof(tag))
                return 1;
        }
        return 0;
    }
    """
    secret = bytes((i * 7 + 3) & 255 for i in range(64))
    data = bytes((i * 5 + 1) & 255 for i in range(300))
    expected = "".join(hmac.new(secret, data[:n], "sha256").hexdigest() for n in range(301))
    assert host_program(tmp_path, source).decode() == expected


@pytest.mark.requires("cc")
def test_hold_holds_splitmix64(tmp_path: Path) -> None:
    source = """
    #include "hold.h"
    int printf(const char *, ...);
    int main(const struct boot_info *unused)
    {
        (void)unused;
        /* With seed 1234567, numbers 1 to 3; and one far away. */
        for (u64 i = 1; i <= 3; i++)
            printf("%lu\\n", hold_word(1234567, (const u64 *)(8 * i)));
        printf("%lu\\n", hold_word(0xfedcba9876543210, (const u64 *)0x40123458));
        return 0;
    }
    """
    printed = [int(line) for line in host_program(tmp_path, source).split()]
    assert printed[:3] == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert printed[3] == hold_word(0xFEDC_BA98_7654_3210, 0x4012_3458)


def hold_word(seed: int, address: int) -> int:
    mask = (1 << 64) - 1
    z = seed + address // 8 * 0x9E37_79B9_7F4A_7C15 & mask
    z = (z ^ z >> 30) * 0xBF58_476D_1CE4_E5B9 & mask
    z = (z ^ z >> 27) * 0x94D0_49BB_1331_11EB & mask
    return z ^ z >> 31


@pytest.mark.requires("cc", "fuse")
def test_the_example_of_the_docs_runs(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "use" / "guests.md").read_text()
    (source,) = re.findall(r"```c\n(.*?)```", text, re.DOTALL)
    for name in ("Makefile", "guest.ld", "record.py", "start.S"):
        shutil.copy(GUESTS / name, tmp_path)
    shutil.copytree(GUESTS / "include", tmp_path / "include")
    (tmp_path / "hello.c").write_text(source)
    command = re.search(r"cd guests && (make .*?) OUT=/tmp", text)
    assert command is not None
    subprocess.run(
        [*command[1].split(), f"OUT={tmp_path}"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    run = [sys.executable, "-m", "restrictedmem", "run", "--quiet", str(tmp_path / "hello.elf")]
    done = subprocess.run(
        run, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=True
    )
    assert done.stdout == b"hello from private memory\n"


def test_an_unknown_guest_is_enoent() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        guests.path("../secret")
    assert caught.value.filename == "../secret"


@pytest.mark.parametrize(
    "data", [b"", b"\x7fELF", b"#!/bin/sh\n", bytes(64), b"\x7fELF\x02\x01\x01" + bytes(57)]
)
def test_what_is_no_elf_is_enoexec(data: bytes) -> None:
    with pytest.raises(OSError, match="ELF") as caught:
        elf.parse(data)
    assert caught.value.errno == 8
