"""The header of the C client against this package."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from c_programs import ROOT, SOURCE, compile_c, compiler, run
from restrictedmem.abi import kvm
from restrictedmem.fs import owner_abi
from restrictedmem.protocol import exits, measurement, vm_wire
from restrictedmem.service import exec_service
from restrictedmem.service import wire as service_wire
from restrictedmem.units import PAGE_SIZE

pytestmark = pytest.mark.requires("cc")

HEADER = SOURCE / "restrictedmem.h"
DOCUMENT = (ROOT / "docs" / "reference" / "wire-protocol.md").read_text(encoding="utf-8")

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
    "PROVE": owner_abi.PROVE,
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
    "TOKEN_SIZE": owner_abi.TOKEN_BYTES,
    "MEASUREMENT_SIZE": measurement.MEASUREMENT_BYTES,
    "CONNECT_KEY_SIZE": service_wire.KEY_BYTES,
    "KEY_SIZE": 32,
    "MAX_MESSAGE": service_wire.MAX_MESSAGE,
    "START_SECONDS": int(exec_service.START_DEADLINE),
}
#: Every struct of the header that travels in a message.
STRUCTS: dict[str, type[ctypes.Structure]] = {
    "userspace_memory_region_ext": kvm.kvm_userspace_memory_region_ext,
    "memory_attributes": kvm.kvm_memory_attributes,
    "enc_region": kvm.kvm_enc_region,
    "pre_fault_range": kvm.kvm_pre_fault_memory,
    "regs": kvm.kvm_regs,
}


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
            "e.exit_reason == RMEM_EXIT_MMIO && !e.flags"
            " && e.mmio.gpa == 0x1000 && e.mmio.size == 8",
        ),
        (
            exits.MmioWrite(0x1000, 1, 9),
            "e.exit_reason == RMEM_EXIT_MMIO && e.flags == 1"
            " && e.mmio.size == 1 && e.mmio.data == 9",
        ),
        (
            exits.Hypercall(12, (1, 2, 3, 4)),
            "e.exit_reason == RMEM_EXIT_HYPERCALL && e.hypercall.nr == 12"
            " && e.hypercall.args[0] == 1 && e.hypercall.args[3] == 4",
        ),
        (
            exits.MemoryFault(kvm.KVM_MEMORY_EXIT_FLAG_PRIVATE, 0x2000, 0x1000, 28),
            "e.exit_reason == RMEM_EXIT_MEMORY_FAULT"
            " && e.memory_fault.flags == RMEM_MEMORY_EXIT_FLAG_PRIVATE"
            " && e.memory_fault.gpa == 0x2000 && e.memory_fault.size == 0x1000"
            " && e.memory_fault.error == 28",
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
    # The comparison can fail, too.
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
    variables += "struct rmem_userspace_memory_region_ext region;"
    variables += "struct rmem_memory_attributes range; uint64_t gpa; off_t size;"
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
