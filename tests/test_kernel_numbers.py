"""The kernel's numbers outside ``abi``, compared with the C headers installed here."""

import ast
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

import restrictedmem
from restrictedmem import fd
from restrictedmem.audit import attacker, held_guest, syscalls
from restrictedmem.conformance import calls
from restrictedmem.kvm import half
from restrictedmem.kvm.software import unicorn
from restrictedmem.mm import sequence
from restrictedmem.protocol import guest_abi
from restrictedmem.syscall import filter as seccomp_filter
from restrictedmem.syscall import scout
from restrictedmem.units import U64_MAX
from test_abi import ask_headers

SOURCE = Path(restrictedmem.__file__).parent
MODULES: tuple[ModuleType, ...] = (
    *(attacker, calls, fd, guest_abi, half, held_guest, scout, seccomp_filter, sequence, syscalls),
    unicorn,
)
HEADERS = (
    *("asm/unistd.h", "linux/fcntl.h", "linux/mman.h", "linux/prctl.h", "linux/bpf.h"),
    *("linux/perf_event.h", "linux/kcmp.h", "linux/kvm_para.h", "asm/socket.h", "linux/io_uring.h"),
)
#: Newer than some headers that are about, with their values and the kernel that has them.
RECORDED = {"_SO_PEERPIDFD": (77, "6.5"), "_SO_PASSRIGHTS": (83, "6.16")}
_OURS = re.compile(r"_?(?:SYS|MAP|PR|F|AT|SO|MADV|BPF|PERF|KCMP|IORING|PIDFD)_[A-Z0-9_]+")
#: These are this package's own names, in spite of their prefix.
_NOT_THE_KERNELS = {"_AT_ONCE", "_AT_A_TURN", "_MAP_FAILED"}


def c_name(name: str) -> str:
    """Return the header's name of a constant."""
    bare = name.removeprefix("_")
    if bare.startswith("MAP_GPA_RANGE"):
        return f"KVM_{bare}" if bare.endswith("ENCRYPTED") else f"KVM_HC_{bare}"
    return re.sub("^SYS_(.*)", lambda found: f"__NR_{found[1].lower()}", bare)


def numbers(module: ModuleType) -> dict[str, int]:
    """Return the constants of a module whose names begin as the kernel's do."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, int) and _OURS.fullmatch(name) and name not in _NOT_THE_KERNELS
    }


def written() -> set[str]:
    """Return the names of such constants that modules outside ``abi`` define."""
    return {
        node.target.id
        for path in SOURCE.rglob("*.py")
        if path.parent.name != "abi"
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(node.value, ast.Constant | ast.UnaryOp | ast.BinOp)
        and _OURS.fullmatch(node.target.id)
        and node.target.id not in _NOT_THE_KERNELS
    }


@pytest.mark.requires("cc")
def test_numbers_are_the_headers(tmp_path: Path) -> None:
    ours = {name: value for module in MODULES for name, value in numbers(module).items()}
    theirs = ask_headers({name: c_name(name) for name in ours}, tmp_path, *HEADERS)
    theirs |= {name: value for name, (value, _) in RECORDED.items()}
    assert theirs == {name: value & U64_MAX for name, value in ours.items()}


@pytest.mark.requires("cc")
def test_numbers_of_a_filter_are_the_headers(tmp_path: Path) -> None:
    for headers, table in {
        "asm/unistd_64.h": seccomp_filter.TABLES["x86_64"][0],
        "asm/unistd_32.h": seccomp_filter.TABLES["x86_64"][1],
        "asm-generic/unistd.h": seccomp_filter.TABLES["aarch64"][0],
    }.items():
        named = {"mmap": table.mmap, "fstatfs": table.fstatfs}
        if table.old_mmap is not None and table.fstatfs64 is not None:
            named = {
                "mmap2": table.mmap,
                "fstatfs": table.fstatfs,
                "fstatfs64": table.fstatfs64,
                "mmap": table.old_mmap,
            }
        asked = {name: f"__NR_{name}" for name in named}
        assert ask_headers(asked, tmp_path, headers) == named


def test_each_module_with_such_numbers_is_compared() -> None:
    assert written() == {
        name
        for module in MODULES
        for name in numbers(module)
        if re.search(rf"^{name}: Final", inspect.getsource(module), re.MULTILINE)
    }
