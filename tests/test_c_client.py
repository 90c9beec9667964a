"""The C client: its header against this package, what it makes of refusals, and its VMM running the guests."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator
from errno import (
    EACCES,
    EAGAIN,
    EBADF,
    ECONNRESET,
    EEXIST,
    EFAULT,
    EINVAL,
    ENAMETOOLONG,
    ENOENT,
    ENOSYS,
    ENOTCONN,
    ENOTTY,
    EOPNOTSUPP,
    EPERM,
    EPROTO,
)
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import pytest

from restrictedmem import guests
from restrictedmem.abi import kvm
from restrictedmem.fs import filesystem
from restrictedmem.protocol import exits, guest_abi, measurement, vm_wire
from restrictedmem.service import starter
from restrictedmem.service import wire as service_wire
from restrictedmem.units import PAGE_SIZE
from restrictedmem.vmm import elf
from restrictedmem.vmm.vmm import Vmm
from strangers import listening
from users import ORDINARY

pytestmark = pytest.mark.requires("cc")

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "clients" / "c"
HEADER = SOURCE / "restrictedmem.h"
DOCUMENT = (ROOT / "docs" / "reference" / "wire-protocol.md").read_text(encoding="utf-8")
ENGINES = ["software", pytest.param("kernel", marks=pytest.mark.requires("kvm"))]
#: Seconds that a program may take.
PATIENCE = 60

#: Every number of the header, and where this package has it.
NUMBERS = {
    "CONNECT": service_wire.CONNECT.number,
    "TOKEN": service_wire.TOKEN.number,
    "SPAWN": service_wire.SPAWN.number,
    "SIGNING_KEY": service_wire.SIGNING_KEY.number,
    "READY": service_wire.READY.number,
    "SET_USER_MEMORY_REGION": vm_wire.SET_USER_MEMORY_REGION.number,
    "SET_MEMORY_ATTRIBUTES": vm_wire.SET_MEMORY_ATTRIBUTES.number,
    "MEMORY_ENCRYPT_REG_REGION": vm_wire.ENCRYPT_REG_REGION.number,
    "MEMORY_ENCRYPT_UNREG_REGION": vm_wire.ENCRYPT_UNREG_REGION.number,
    "CREATE_VCPU": vm_wire.CREATE_VCPU.number,
    "LAUNCH_UPDATE": vm_wire.LAUNCH_UPDATE.number,
    "CHECK_EXTENSION": vm_wire.CHECK_EXTENSION.number,
    "GET_SUPPORTED_MEMORY_ATTRIBUTES": vm_wire.GET_SUPPORTED_MEMORY_ATTRIBUTES.number,
    "PRE_FAULT_MEMORY": vm_wire.PRE_FAULT_MEMORY.number,
    "INTERRUPT": vm_wire.INTERRUPT.number,
    "LAUNCH_FINISH": vm_wire.LAUNCH_FINISH.number,
    "STATISTICS": vm_wire.STATISTICS.number,
    "SET_REGS": vm_wire.SET_REGS.number,
    "RUN": vm_wire.RUN.number,
    "PROVE": filesystem.PROVE,
    "MEM_READONLY": kvm.KVM_MEM_READONLY,
    "MEM_PRIVATE": kvm.KVM_MEM_PRIVATE,
    "MEMORY_ATTRIBUTE_PRIVATE": kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE,
    "MEMORY_EXIT_FLAG_PRIVATE": kvm.KVM_MEMORY_EXIT_FLAG_PRIVATE,
    "POLICY_DEBUG": vm_wire.POLICY_DEBUG,
    "POLICY_EXPLICIT": vm_wire.POLICY_EXPLICIT,
    "EXIT_UNKNOWN": kvm.ExitReason.UNKNOWN,
    "EXIT_IO": kvm.ExitReason.IO,
    "EXIT_HYPERCALL": kvm.ExitReason.HYPERCALL,
    "EXIT_MMIO": kvm.ExitReason.MMIO,
    "EXIT_SHUTDOWN": kvm.ExitReason.SHUTDOWN,
    "EXIT_INTR": kvm.ExitReason.INTR,
    "EXIT_MEMORY_FAULT": kvm.ExitReason.MEMORY_FAULT,
    "PAGE_SIZE": PAGE_SIZE,
    "TOKEN_SIZE": filesystem.TOKEN_BYTES,
    "MEASUREMENT_SIZE": measurement.MEASUREMENT_BYTES,
    "CONNECT_KEY_SIZE": service_wire.KEY_BYTES,
    "KEY_SIZE": 32,
    "MAX_MESSAGE": service_wire.MAX_MESSAGE,
    "START_SECONDS": int(starter.START_DEADLINE),
}
#: Every struct of the header that travels in a message.
STRUCTS: dict[str, type[ctypes.Structure]] = {
    "userspace_memory_region_ext": kvm.kvm_userspace_memory_region_ext,
    "memory_attributes": kvm.kvm_memory_attributes,
    "enc_region": kvm.kvm_enc_region,
    "pre_fault_range": kvm.kvm_pre_fault_memory,
    "regs": kvm.kvm_regs,
}


def compiler() -> str:
    return shutil.which("cc") or "gcc"


def compile_c(source: Path, program: Path, *options: str) -> subprocess.CompletedProcess[str]:
    include = (f"-I{SOURCE}", f"-I{ROOT / 'guests' / 'include'}")
    command = [
        compiler(),
        "-std=gnu11",
        "-g",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Wshadow",
        "-Werror",
        *options,
        *include,
    ]
    return subprocess.run(
        [*command, "-o", str(program), str(source), "-pthread"],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def sanitizers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the options for memory and undefined behaviour to be watched, where the compiler has the libraries."""
    directory = tmp_path_factory.mktemp("sanitizers")
    (directory / "empty.c").write_text("int main(void) { return 0; }\n")
    options = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    return (
        options
        if compile_c(directory / "empty.c", directory / "empty", *options).returncode == 0
        else []
    )


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory, sanitizers: list[str]) -> Path:
    """Build the client's programs and return where they are."""
    directory = tmp_path_factory.mktemp("clients")
    for name in ("vmm", "check"):
        built = compile_c(SOURCE / f"{name}.c", directory / name, *sanitizers)
        assert built.returncode == 0, built.stderr
    return directory


def run(
    program: Path, *arguments: str | Path, data: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [program, *arguments], input=data, capture_output=True, timeout=PATIENCE, check=False
    )


def answers(program: Path, *arguments: str) -> dict[str, tuple[int, str]]:
    """Run a program that prints attempts and return, of each, the errno (0 for success) and the words."""
    done = run(program, *arguments)
    assert (done.returncode, done.stderr) == (0, b"")
    rows = [line.split("|") for line in done.stdout.decode().splitlines()]
    assert len({what for what, _, _ in rows}) == len(rows)
    return {what: (-int(result), words) for what, result, words in rows}


# The header.


def test_the_makefile_builds_it(tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "-s", "-C", SOURCE, f"OUT={tmp_path}"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {"vmm", "check"}


def test_its_numbers_are_this_packages(tmp_path: Path) -> None:
    names = re.findall(r"^#define RMEM_(\w+)\s", HEADER.read_text(encoding="ascii"), re.MULTILINE)
    lines = "".join(f'printf("{name} %llu\\n", (unsigned long long)RMEM_{name});' for name in names)
    (tmp_path / "numbers.c").write_text(
        f'#include "restrictedmem.h"\nint main(void) {{ {lines} return 0; }}\n'
    )
    built = compile_c(tmp_path / "numbers.c", tmp_path / "numbers")
    assert built.returncode == 0, built.stderr
    printed = dict(line.split() for line in run(tmp_path / "numbers").stdout.decode().splitlines())
    assert {name: int(value) for name, value in printed.items()} == NUMBERS


def test_its_structs_are_this_packages(tmp_path: Path) -> None:
    text = HEADER.read_text(encoding="ascii")
    asserted = dict(
        re.findall(r"^static_assert\(sizeof\(struct rmem_(\w+)\) == (\d+)", text, re.MULTILINE)
    )
    sizes = {name: ctypes.sizeof(struct) for name, struct in STRUCTS.items()} | {
        "exit": exits.LAYOUT.size
    }
    # The compiler holds the header to these.
    assert {name: int(size) for name, size in asserted.items()} == sizes
    fields = {
        f"{name}, {field[0]}": getattr(struct, field[0]).offset
        for name, struct in STRUCTS.items()
        for field in struct._fields_
    }
    lines = "".join(
        f'printf("%zu\\n", __builtin_offsetof(struct rmem_{field}));' for field in fields
    )
    (tmp_path / "fields.c").write_text(
        f'#include "restrictedmem.h"\nint main(void) {{ {lines} return 0; }}\n'
    )
    built = compile_c(tmp_path / "fields.c", tmp_path / "fields")
    assert built.returncode == 0, built.stderr
    printed = run(tmp_path / "fields").stdout.split()
    assert dict(zip(fields, map(int, printed), strict=True)) == fields


@pytest.mark.parametrize(
    ("exit_", "expression"),
    [
        (
            exits.PortIn(0x42, 2),
            "e.exit_reason == RMEM_EXIT_IO && !e.flags && e.io.port == 0x42 && e.io.size == 2",
        ),
        (
            exits.PortOut(0x42, 4, 7),
            "e.exit_reason == RMEM_EXIT_IO && e.flags == 1 && e.io.size == 4 && e.io.data == 7",
        ),
        (
            exits.MmioRead(0x1000, 8),
            "e.exit_reason == RMEM_EXIT_MMIO && !e.flags && e.mmio.gpa == 0x1000 && e.mmio.size == 8",
        ),
        (
            exits.MmioWrite(0x1000, 1, 9),
            "e.exit_reason == RMEM_EXIT_MMIO && e.flags == 1 && e.mmio.size == 1 && e.mmio.data == 9",
        ),
        (
            exits.Hypercall(12, (1, 2, 3, 4)),
            "e.exit_reason == RMEM_EXIT_HYPERCALL && e.hypercall.nr == 12 && e.hypercall.args[0] == 1 && e.hypercall.args[3] == 4",
        ),
        (
            exits.MemoryFault(kvm.KVM_MEMORY_EXIT_FLAG_PRIVATE, 0x2000, 0x1000, 28),
            "e.exit_reason == RMEM_EXIT_MEMORY_FAULT && e.memory_fault.flags == RMEM_MEMORY_EXIT_FLAG_PRIVATE"
            " && e.memory_fault.gpa == 0x2000 && e.memory_fault.size == 0x1000 && e.memory_fault.error == 28",
        ),
        (exits.Shutdown(14), "e.exit_reason == RMEM_EXIT_SHUTDOWN && e.vector == 14"),
        (exits.Interrupted(), "e.exit_reason == RMEM_EXIT_INTR"),
        (exits.Unknown(99), "e.exit_reason == RMEM_EXIT_UNKNOWN && e.reason == 99"),
    ],
)
def test_an_exit_reads_as_it_was_written(
    tmp_path: Path, exit_: exits.Exit, expression: str
) -> None:
    main = f"struct rmem_exit e; return !(read(0, &e, sizeof(e)) == sizeof(e) && {expression});"
    (tmp_path / "exit.c").write_text(f'#include "restrictedmem.h"\nint main(void) {{ {main} }}\n')
    built = compile_c(tmp_path / "exit.c", tmp_path / "exit")
    assert built.returncode == 0, built.stderr
    assert run(tmp_path / "exit", data=exits.pack(exit_)).returncode == 0
    # And it can fail.
    assert run(tmp_path / "exit", data=bytes(exits.LAYOUT.size - 1) + b"\1").returncode == 1


@pytest.mark.parametrize("standard", ["c11", "gnu17", "c++11", "c++20"])
def test_it_compiles_without_a_warning(tmp_path: Path, standard: str) -> None:
    cpp = standard.startswith("c++")
    tool = shutil.which("c++") if cpp else compiler()
    if tool is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / ("empty.cc" if cpp else "empty.c")
    source.write_text('#include "restrictedmem.h"\n')
    options = [
        f"-std={standard}",
        "-D_GNU_SOURCE",
        "-Wall",
        "-Wextra",
        "-Wpedantic",
        "-Wshadow",
        "-Wconversion",
        "-Werror",
    ]
    done = subprocess.run(
        [tool, *options, "-fsyntax-only", f"-I{SOURCE}", source],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


CALLS = [
    call
    for module in (service_wire, vm_wire)
    for call in vars(module).values()
    if isinstance(call, service_wire.Call)
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_every_call_is_documented_with_its_number(call: service_wire.Call) -> None:
    rows = [
        re.split(r" *\| *", line)[1:-1] for line in DOCUMENT.splitlines() if line.startswith("| ")
    ]
    (row,) = [row for row in rows if row[0].split(" (")[0] == call.name]
    number = row[2] if re.match("service|spawner|engine|consumer", row[1]) else row[1]
    assert int(number, 0) == call.number


def test_the_documented_calls_compile(tmp_path: Path) -> None:
    include, calls = next(
        block for block in re.findall(r"```c\n(.*?)```", DOCUMENT, re.DOTALL) if "rmem_run" in block
    ).split("\n", 1)
    names = ("service", "vm", "vcpu", "exit", "regs")
    variables = "".join(f"struct rmem_{name} {name};" for name in names)
    variables += "struct rmem_userspace_memory_region_ext region; struct rmem_memory_attributes range; uint64_t gpa; off_t size;"
    variables += (
        "unsigned char token[RMEM_TOKEN_SIZE], measurement[RMEM_MEASUREMENT_SIZE], content[4096];"
    )
    variables += "size_t length; int fd, shared_fd;"
    (tmp_path / "example.c").write_text(
        f"{include}\nvoid example(void);\nvoid example(void) {{ {variables}\n{calls} }}\n"
    )
    built = compile_c(
        tmp_path / "example.c",
        tmp_path / "example.o",
        "-c",
        "-Wno-uninitialized",
        "-Wno-unused-result",
    )
    assert built.returncode == 0, built.stderr


# What it makes of refusals and of nonsense.


def test_peers_that_answer_nonsense(programs: Path) -> None:
    assert answers(programs / "check", "peer") == {
        "a reply": (0, ""),
        "a descriptor nobody asked for": (0, ""),
        "a short reply": (EPROTO, "TOKEN: reply is too short"),
        "a long reply": (EPROTO, "TOKEN: reply is too long"),
        "a reply cut off": (EPROTO, "TOKEN: message of another length"),
        "an error": (EPERM, "TOKEN: some words"),
        "an error of many words": (EPERM, "TOKEN: some words"),
        "an error that is none": (EPROTO, "TOKEN: some words"),
        "a late reply": (EAGAIN, "STATISTICS: recvmsg"),
        "a call after it": (EBADF, "STATISTICS: sendmsg"),
        "less than a message": (EPROTO, "STATISTICS: message of another length"),
        "no room for a string": (EPROTO, "STATISTICS: reply is too long"),
        "a descriptor missing": (EPROTO, "KVM_CREATE_VCPU: reply without its descriptor"),
        "a peer that is gone": (ENOTCONN, "STATISTICS: the other end is gone"),
        "a closed handle": (EBADF, "STATISTICS: sendmsg"),
        "not ready": (EACCES, "start: /dev/fuse"),
        "ready without its mount": (EPROTO, 'start: {"api": "v10"}'),
        "ready without its key": (EPROTO, "start: no key"),
        "ready without its witness": (EPROTO, 'start: {"api": "v9"}'),
        "ready, and gone": (ENOTCONN, "CONNECT: the service is gone"),
        "ready, and a stranger has its name": (ENOTCONN, "CONNECT: the service is gone"),
        "what the stranger got": (0, ""),
        "descriptors left": (0, ""),
    }


#: What a service and a VM refuse: the errno, and the call that the words name.
REFUSED = {
    "no socket": (ENOENT, "connect"),
    "a long name": (ENAMETOOLONG, "connect"),
    "no python": (ECONNRESET, "start"),
    "token of nothing": (EBADF, "TOKEN"),
    "token of another file": (ENOTTY, "TOKEN"),
    "token of another service": (EACCES, "TOKEN"),
    "its first call": (EINVAL, "KVM_SET_USER_MEMORY_REGION"),
    "a token of no descriptor": (EINVAL, "KVM_SET_USER_MEMORY_REGION"),
    "a shared half that is no memfd": (EINVAL, "KVM_SET_USER_MEMORY_REGION"),
    "a shared half too short": (EINVAL, "KVM_SET_USER_MEMORY_REGION"),
    "unaligned": (EINVAL, "KVM_SET_USER_MEMORY_REGION"),
    "a token used twice": (EINVAL, "KVM_SET_USER_MEMORY_REGION"),
    "a slot over it": (EEXIST, "KVM_SET_USER_MEMORY_REGION"),
    "no slot to delete": (EINVAL, "KVM_SET_USER_MEMORY_REGION"),
    "an unknown attribute": (EINVAL, "KVM_SET_MEMORY_ATTRIBUTES"),
    "v9's call to make private": (EOPNOTSUPP, "KVM_MEMORY_ENCRYPT_REG_REGION"),
    "v9's call to make shared": (EOPNOTSUPP, "KVM_MEMORY_ENCRYPT_UNREG_REGION"),
    "no such call": (EPROTO, "NONE"),
    "another register": (EINVAL, "KVM_SET_REGS"),
    "content for nowhere": (EFAULT, "LAUNCH_UPDATE"),
    "content too long for the slot": (EFAULT, "LAUNCH_UPDATE"),
    "content of half a page": (EINVAL, "LAUNCH_UPDATE"),
    "late registers": (EPERM, "KVM_SET_REGS"),
    "late content": (EPERM, "LAUNCH_UPDATE"),
    "a late vCPU": (EPERM, "KVM_CREATE_VCPU"),
    "what the guest did not ask for": (EPERM, "KVM_SET_MEMORY_ATTRIBUTES"),
    "no vCPU to stop": (EINVAL, "INTERRUPT"),
    "a range of one byte": (EINVAL, "KVM_PRE_FAULT_MEMORY"),
    "a run without an engine": (ENOTCONN, "KVM_RUN"),
    "a VM without an engine": (ENOTCONN, "STATISTICS"),
}


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_service_and_a_vm(programs: Path, engine: str) -> None:
    found = answers(programs / "check", sys.executable, engine)
    number, _ = found.pop("a signing key")
    assert number == (0 if find_spec("cryptography") else ENOSYS)
    # An engine says what it cannot do.
    can_prefault = found.pop("KVM_CAP_PRE_FAULT_MEMORY")[1] == "1"
    expected = (
        REFUSED if can_prefault else REFUSED | {"a range": (EOPNOTSUPP, "KVM_PRE_FAULT_MEMORY")}
    )
    refused = {
        what: (number, words.partition(": ")) for what, (number, words) in found.items() if number
    }
    assert {what: (number, words[0]) for what, (number, words) in refused.items()} == expected
    assert all(words[2] for _, words in refused.values()), "each says why"
    granted = {what: words for what, (number, words) in found.items() if not number and words}
    assert granted == {
        "its api": "v9",
        "what is left": "0x40010000 0",
        "its exit": "3 0: 1(5, 6)",
        "its reason": str(kvm.ExitReason.INTR.value),
        "KVM_CAP_MEMORY_ATTRIBUTES": str(kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE),
        "KVM_MEMORY_ATTRIBUTE_PRIVATE": str(kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE),
        "what is left of it": "0x40010000 0" if can_prefault else "0x40000000 65536",
    }


# The VMM.


@pytest.fixture
def server() -> Generator[str, None, None]:
    """Run ``serve`` and return its socket."""
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/socket"
        command = [
            sys.executable,
            "-m",
            "restrictedmem",
            "serve",
            "--socket",
            path,
            "--user",
            "nobody",
        ]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            assert process.stderr.readline() == f"listening on {path}\n"
            yield path
            process.terminate()


@pytest.fixture(params=["private", pytest.param("served", marks=pytest.mark.requires("root"))])
def way(request: pytest.FixtureRequest) -> list[str]:
    """Return the VMM's options for each of the two ways to get a service."""
    return (
        ["-p", sys.executable]
        if request.param == "private"
        else ["-s", request.getfixturevalue("server")]
    )


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("engine", ENGINES)
def test_guests_run(programs: Path, way: list[str], engine: str) -> None:
    vmm, options = programs / "vmm", (*way, "-e", engine)
    data = os.urandom(3 << 20)
    done = run(vmm, *options, "-m", "2", guests.path("sha256"), data=data)
    assert (done.returncode, done.stdout) == (0, f"{sha256(data).hexdigest()}  -\n".encode()), (
        done.stderr
    )
    done = run(vmm, *options, guests.path("spin"), "exit", "nonsense")
    assert (done.returncode, done.stdout) == (2, b"")
    assert re.fullmatch(rb"measurement [0-9a-f]{96}\nusage: .*\n", done.stderr), done.stderr


@pytest.mark.requires("fuse")
def test_it_launches_what_the_vmm_in_python_launches(programs: Path) -> None:
    guest = guests.path("spin")
    with Vmm(guest_abi.PRIVATE_SIZE_DEFAULT, engine="software") as vmm:
        vmm.load(elf.parse(guest.read_bytes()), ["exit", "7"])
        measurement = vmm.vm.launch_finish().hex()
    for argument, same in (("7", True), ("8", False)):
        done = run(
            programs / "vmm", "-p", sys.executable, "-e", "software", guest, "exit", argument
        )
        assert done.returncode == int(argument)
        assert (done.stderr.decode() == f"measurement {measurement}\n") is same


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("engine", ENGINES)
def test_convert_finds_what_both_sides_must_see(programs: Path, engine: str) -> None:
    done = run(
        programs / "vmm", "-p", sys.executable, "-e", engine, "-m", "8", guests.path("convert")
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    lines = done.stdout.decode().splitlines()
    assert len(lines) >= 7
    assert all(line.endswith("ok") for line in lines), lines


@pytest.mark.requires("fuse")
def test_what_is_no_guest_is_said(programs: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"#!/bin/sh\n" * 100)
    for path, words in (
        (tmp_path / "text", b"not a static x86-64 ELF"),
        (tmp_path / "none", b"No such file or directory"),
    ):
        done = run(programs / "vmm", "-p", sys.executable, path)
        assert (done.returncode, done.stdout) == (1, b"")
        assert words in done.stderr


@pytest.mark.requires("root")
def test_another_users_name_is_not_taken_for_execs(programs: Path) -> None:
    name = f"restrictedmem-test/{os.getpid()}/{os.urandom(4).hex()}"
    with listening(name, ORDINARY) as heard:
        done = run(programs / "vmm", "-s", "@" + name, guests.path("sha256"))
    assert (done.returncode, heard) == (1, [b""])
    assert b"connect: another user's name" in done.stderr


# Another language, from the document alone.


@pytest.mark.requires("fuse", "root", "rust")
def test_a_client_in_rust(tmp_path: Path, server: str) -> None:
    program = tmp_path / "first_exit"
    source = ROOT / "clients" / "rust" / "first_exit.rs"
    built = subprocess.run(
        ["rustc", "--edition", "2021", "-D", "warnings", "-o", program, source],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    done = run(program, server)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"0x42 1 42\n", b"")
