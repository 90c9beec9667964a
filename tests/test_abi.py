"""Every struct and number of ``abi``, compared with the C headers installed here.

One generated C program prints sizes, offsets and values. If the compiler refuses a line, the
headers lack that name. ``RECORDED`` then must have it, with the kernel version whose headers have
it.
"""

import ctypes
import errno
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import cast

import pytest

from restrictedmem import abi
from restrictedmem.abi import seccomp
from restrictedmem.abi._ioctl import Ioctl, IoctlInt

_LINUX = (
    "audit capability falloc fcntl filter fs errno fuse io_uring kvm kvm_para memfd mman "
    "mount prctl sched seccomp userfaultfd"
)
HEADERS = [*(f"linux/{name}.h" for name in _LINUX.split()), "asm/unistd.h"]

#: The prefix of each enumeration's members in C.
PREFIXES = {
    "Opcode": "FUSE_",
    "InitFlag": "FUSE_",
    "OpenFlag": "FOPEN_",
    "AttrValid": "FATTR_",
    "FallocMode": "FALLOC_FL_",
    "Cap": "KVM_CAP_",
    "ExitReason": "KVM_EXIT_",
    "Category": "PAGE_IS_",
    "FilterFlag": "SECCOMP_FILTER_FLAG_",
}
#: Python's name to C's, where they differ.
C_NAMES = {
    "KERNEL_VERSION": "FUSE_KERNEL_VERSION",
    "ROOT_ID": "FUSE_ROOT_ID",
    "MIN_READ_BUFFER": "FUSE_MIN_READ_BUFFER",
    "AUDIT_ARCH": f"AUDIT_ARCH_{os.uname().machine.upper()}",
    "X32_BIT": "__X32_SYSCALL_BIT",
    "_word": "struct { __u64 value; }",
    "PUNCH": "(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)",
    "cap_data": "struct { struct __user_cap_data_struct low, high; }",
    "cap_header": "struct __user_cap_header_struct",
    "fuse_statfs_out": "struct fuse_kstatfs",
    "kvm_userspace_memory_region_ext": "struct kvm_userspace_memory_region",
    **{
        f"kvm_exit_{name}": f"__typeof__(((struct kvm_run *)0)->{member})"
        for name, member in {
            "unknown": "hw",
            "exception": "ex",
            **{
                name: name
                for name in (
                    "fail_entry",
                    "io",
                    "debug",
                    "mmio",
                    "hypercall",
                    "internal",
                    "system_event",
                    "msr",
                    "memory_fault",
                )
            },
        }.items()
    },
    **{
        f"kvm_vcpu_{name}": f"__typeof__(((struct kvm_vcpu_events *)0)->{name})"
        for name in ("exception", "interrupt", "nmi", "smi")
    },
}
#: Structs of which only the part before another struct is declared here, and one that is no
#: kernel's.
C_SIZES = {
    "fuse_attr_out": "__builtin_offsetof(struct fuse_attr_out, attr)",
    "fuse_entry_out": "__builtin_offsetof(struct fuse_entry_out, attr)",
    "kvm_userspace_memory_region_ext": "sizeof(struct kvm_userspace_memory_region_ext)",
}
C_FIELDS = {
    **{f"cap_data.{name}": f"low.{name}" for name in ("effective", "permitted", "inheritable")},
    **{
        f"cap_data.{name}_high": f"high.{name}"
        for name in ("effective", "permitted", "inheritable")
    },
    "kvm_guest_debug.debugreg": "arch.debugreg",
    "kvm_run.exit": "hw",
    "kvm_vcpu_events.triple_fault_pending": "triple_fault.pending",
    **{f"seccomp_data.arg{number}": f"args[{number}]" for number in range(6)},
    **{f"uffdio_register.{name}": f"range.{name}" for name in ("start", "len")},
}
#: This package's choices, which no header has.
OURS = {
    "KERNEL_MINOR_VERSION",
    "OLDEST_MINOR_VERSION",
    "PMD_ORDER",
    "PMD_SIZE",
    "PUD_ORDER",
    "ZERO",
}
#: Names newer than some headers that are about, with their values and the kernel that has them.
RECORDED = {
    "cachestat": (40, "6.5"),
    "cachestat.nr_cache": (0, "6.5"),
    "cachestat.nr_dirty": (8, "6.5"),
    "cachestat.nr_writeback": (16, "6.5"),
    "cachestat.nr_evicted": (24, "6.5"),
    "cachestat.nr_recently_evicted": (32, "6.5"),
    "cachestat_range": (16, "6.5"),
    "cachestat_range.off": (0, "6.5"),
    "cachestat_range.len": (8, "6.5"),
    "SYS_cachestat": (451, "6.5"),
    "SYS_memfd_restricted": (451, "none: v9 3/8, v10 1/9"),
    "MFD_NOEXEC_SEAL": (8, "6.3"),
    "SECCOMP_IOCTL_NOTIF_SET_FLAGS": (0x4008_2104, "6.6"),
    "SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP": (1, "6.6"),
    "IORING_MAX_REG_BUFFERS": (16384, "5.13, io_uring/rsrc.c"),
    "fuse_open_out.backing_id": (12, "6.9"),
    "fuse_init_out.max_stack_depth": (36, "6.9"),
    "PIDFD_GET_INFO": (0xC040_FF0B, "6.13"),
    "PIDFD_INFO_EXIT": (8, "6.15"),
    "pidfd_info": (64, "6.13"),
    **{f"pidfd_info.{name}": (at * 8, "6.13") for at, name in enumerate(("mask", "cgroupid"))},
    **{
        f"pidfd_info.{name}": (16 + at * 4, "6.13; exit_code 6.15")
        for at, name in enumerate(
            [
                "pid",
                "tgid",
                "ppid",
                "ruid",
                "rgid",
                "euid",
                "egid",
                "suid",
                "sgid",
                "fsuid",
                "fsgid",
                "exit_code",
            ]
        )
    },
    "PAGEMAP_SCAN": (0xC060_6610, "6.7"),
    "Category.FILE": (4, "6.7"),
    "Category.PRESENT": (8, "6.7"),
    "Category.SWAPPED": (16, "6.7"),
    "Category.HUGE": (64, "6.7"),
    "page_region": (24, "6.7"),
    **{
        f"page_region.{name}": (at * 8, "6.7")
        for at, name in enumerate(("start", "end", "categories"))
    },
    "pm_scan_arg": (96, "6.7"),
    **{
        f"pm_scan_arg.{name}": (at * 8, "6.7")
        for at, name in enumerate(
            (
                "size",
                "flags",
                "start",
                "end",
                "walk_end",
                "vec",
                "vec_len",
                "max_pages",
                "category_inverted",
                "category_mask",
                "category_anyof_mask",
                "return_mask",
            )
        )
    },
    "Cap.USER_MEMORY2": (231, "6.8"),
    "Cap.MEMORY_FAULT_INFO": (232, "6.8"),
    "Cap.MEMORY_ATTRIBUTES": (233, "6.8"),
    "Cap.GUEST_MEMFD": (234, "6.8"),
    "Cap.VM_TYPES": (235, "6.8"),
    "Cap.PRE_FAULT_MEMORY": (236, "6.11"),
    "Cap.GUEST_MEMFD_FLAGS": (244, "6.18"),
    "ExitReason.MEMORY_FAULT": (39, "6.8"),
    "KVM_CREATE_GUEST_MEMFD": (0xC040_AED4, "6.8"),
    "kvm_create_guest_memfd": (64, "6.8"),
    "kvm_create_guest_memfd.size": (0, "6.8"),
    "kvm_create_guest_memfd.flags": (8, "6.8"),
    "KVM_SET_MEMORY_ATTRIBUTES": (0x4020_AED2, "6.8"),
    "kvm_memory_attributes": (32, "6.8"),
    **{
        f"kvm_memory_attributes.{name}": (at * 8, "6.8")
        for at, name in enumerate(("address", "size", "attributes", "flags"))
    },
    "KVM_X86_QUIRK_SLOT_ZAP_ALL": (1 << 7, "6.12"),
    "KVM_MEM_GUEST_MEMFD": (4, "6.8"),
    "KVM_SET_USER_MEMORY_REGION2": (0x40A0_AE49, "6.8"),
    "kvm_userspace_memory_region2": (160, "6.8"),
    "kvm_userspace_memory_region2.slot": (0, "6.8"),
    "kvm_userspace_memory_region2.flags": (4, "6.8"),
    "kvm_userspace_memory_region2.guest_phys_addr": (8, "6.8"),
    "kvm_userspace_memory_region2.memory_size": (16, "6.8"),
    "kvm_userspace_memory_region2.userspace_addr": (24, "6.8"),
    "kvm_userspace_memory_region2.guest_memfd_offset": (32, "6.8"),
    "kvm_userspace_memory_region2.guest_memfd": (40, "6.8"),
    "KVM_X86_DEFAULT_VM": (0, "6.8"),
    "KVM_X86_SW_PROTECTED_VM": (1, "6.8"),
    "KVM_PRE_FAULT_MEMORY": (0xC040_AED5, "6.11"),
    "kvm_pre_fault_memory": (64, "6.11"),
    **{
        f"kvm_pre_fault_memory.{name}": (at * 8, "6.11")
        for at, name in enumerate(("gpa", "size", "flags"))
    },
    "kvm_exit_memory_fault": (24, "6.8"),
    **{
        f"kvm_exit_memory_fault.{name}": (at * 8, "6.8")
        for at, name in enumerate(("flags", "gpa", "size"))
    },
    "KVM_MEMORY_ATTRIBUTE_PRIVATE": (8, "6.8"),
    "KVM_MEMORY_EXIT_FLAG_PRIVATE": (8, "6.8"),
    "MADV_GUARD_INSTALL": (102, "6.13"),
    "MADV_GUARD_REMOVE": (103, "6.13"),
    "GUEST_MEMFD_FLAG_MMAP": (1, "6.18"),
    "GUEST_MEMFD_FLAG_INIT_SHARED": (2, "6.18"),
    # Names of the v9 and v10 postings, in no kernel.
    "KVM_MEM_PRIVATE": (4, "v10"),
    "KVM_CAP_PRIVATE_MEM": (224, "v9"),
    "KVM_GET_SUPPORTED_MEMORY_ATTRIBUTES_REQUEST": (0x8008_AED2, "v10"),
    "kvm_userspace_memory_region_ext": (160, "v10"),
    "kvm_userspace_memory_region_ext.restricted_offset": (32, "v10"),
    "kvm_userspace_memory_region_ext.restricted_fd": (40, "v10"),
    # Names of the series of conversion in place, in no kernel yet.
    "KVM_SET_MEMORY_ATTRIBUTES2": (0xC080_AED2, "v8"),
    "KVM_SET_MEMORY_ATTRIBUTES2_ZERO": (1, "v8"),
    "KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE": (2, "v8"),
    "kvm_memory_attributes2": (128, "v8"),
    **{
        f"kvm_memory_attributes2.{name}": (at * 8, "v8")
        for at, name in enumerate(("offset", "size", "attributes", "flags", "error_offset"))
    },
    # Names of a series on top of v10, 18 February 2023.
    "RMFD_HUGEPAGE": (2, "RFC"),
}
_FILLER = re.compile(r"(unused|reserved|spare|padding|pad|dummy|resv)\d*")


def modules() -> list[ModuleType]:
    names = sorted(found.name for found in pkgutil.iter_modules(abi.__path__))
    return [
        importlib.import_module(f"restrictedmem.abi.{name}")
        for name in names
        if not name.startswith("_")
    ]


def structs() -> Iterator[type[ctypes.Structure]]:
    for module in modules():
        for found in vars(module).values():
            if (
                isinstance(found, type)
                and issubclass(found, ctypes.Structure)
                and found.__module__ == module.__name__
            ):
                yield found


def declared() -> dict[str, tuple[int, str]]:
    """Return name to (value, C expression) of every size, offset and number."""
    found: dict[str, tuple[int, str]] = {}
    for struct in structs():
        name = struct.__name__
        c_name = C_NAMES.get(name, f"struct {name}")
        found[name] = ctypes.sizeof(struct), C_SIZES.get(name, f"sizeof({c_name})")
        for field, *_ in cast("list[tuple[str, object]]", struct._fields_):
            if not _FILLER.fullmatch(field):
                key = f"{name}.{field}"
                found[key] = (
                    getattr(struct, field).offset,
                    f"__builtin_offsetof({c_name}, {C_FIELDS.get(key, field)})",
                )
    for module in modules():
        for name, value in vars(module).items():
            found |= _numbers(module, name, value)
    return found


def _numbers(module: ModuleType, name: str, value: object) -> dict[str, tuple[int, str]]:
    c_name = C_NAMES.get(name, re.sub("^SYS_", "__NR_", name))
    if name.startswith("_") or name in OURS or hasattr(errno, name):
        return {}
    if isinstance(value, type) and issubclass(value, int) and value.__module__ == module.__name__:
        members = cast("type[IntEnum]", value)
        return {
            f"{name}.{key}": (int(value), PREFIXES[name] + key)
            for key, value in members.__members__.items()
        }
    if isinstance(value, (Ioctl, IoctlInt)):
        return {name: (value.request, c_name)}
    if isinstance(value, dict) and os.uname().machine in value:
        return {name: (cast("dict[str, int]", value)[os.uname().machine], c_name)}
    if isinstance(value, int) and name.isupper() | name.startswith("SYS_"):
        return {name: (value, c_name)}
    return {}


def ask_headers(expressions: dict[str, str], folder: Path, *others: str) -> dict[str, int]:
    """Return the value of every expression that compiles, with ``HEADERS`` or with others."""
    compiler = shutil.which("cc") or shutil.which("gcc") or ""
    print_it = '#define P(name, value) printf("%s %llu\\n", name, (unsigned long long)(value))'
    head: list[str] = []
    for header in others or HEADERS:
        head += [f"#if __has_include(<{header}>)", f"#include <{header}>", "#endif"]
    source, program = folder / "abi.c", folder / "abi"
    wanted = dict(expressions)
    said = ""
    for _ in range(5):
        body = [f'P("{name}", {expression});' for name, expression in wanted.items()]
        lines = ["#include <stdio.h>", *head, print_it, "int main(void) {", *body, "}"]
        source.write_text("\n".join(lines) + "\n", encoding="ascii")
        compiled = subprocess.run(
            [compiler, "-w", "-o", program, source], capture_output=True, text=True, check=False
        )
        if compiled.returncode == 0:
            printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
            return {
                name: int(value) for name, value in (line.split() for line in printed.splitlines())
            }
        bad = {int(number) for number in re.findall(r"abi\.c:(\d+):\d+: error", compiled.stderr)}
        refused = [name for at, name in enumerate(wanted) if at + len(lines) - len(body) in bad]
        said = compiled.stderr
        assert refused, said
        for name in refused:
            del wanted[name]
    pytest.fail(f"does not compile: {said}")


@pytest.mark.requires("cc")
def test_structs_and_numbers_are_the_headers(tmp_path: Path) -> None:
    ours = declared()
    assert len(ours) > 550
    theirs = ask_headers({name: expression for name, (_, expression) in ours.items()}, tmp_path)
    wrong = {
        name: (value, theirs[name])
        for name, (value, _) in ours.items()
        if name in theirs and theirs[name] != value
    }
    assert wrong == {}, "name: (here, header)"
    absent = sorted(set(ours) - set(theirs) - set(RECORDED))
    assert absent == [], "in no header here: record value and kernel version"
    print(
        f"{len(theirs)} of {len(ours)} compared with the headers, "
        f"{len(ours) - len(theirs)} with recorded values"
    )


@pytest.mark.requires("cc")
def test_other_machines_numbers_are_the_headers(tmp_path: Path) -> None:
    """aarch64 numbers its calls as asm-generic/unistd.h does."""
    ours = {f"AUDIT_ARCH_{machine.upper()}": value for machine, value in seccomp.AUDIT_ARCH.items()}
    for module in modules():
        for name, value in vars(module).items():
            if name.startswith("SYS_") and isinstance(value, dict):
                ours[name.replace("SYS_", "__NR_")] = cast("dict[str, int]", value)["aarch64"]
    assert len(ours) >= 9
    names = {name: name for name in ours}
    assert ask_headers(names, tmp_path, "asm-generic/unistd.h", "linux/audit.h") == ours


@pytest.mark.requires("cc")
def test_the_comparison_can_fail(tmp_path: Path) -> None:
    found = ask_headers(
        {
            "right": "FUSE_OPEN",
            "absent": "NO_SUCH_NAME",
            "offset": "__builtin_offsetof(struct fuse_attr, nofield)",
        },
        tmp_path,
    )
    assert found == {"right": 14}


def test_recorded_values_are_those_declared() -> None:
    ours = declared()
    assert {name: ours[name][0] for name in RECORDED} == {
        name: value for name, (value, _) in RECORDED.items()
    }
