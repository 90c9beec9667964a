"""Features of the machine that tests may need, and fixtures that all tests share.

``@pytest.mark.requires("fuse", "root")`` skips a test if one of the features is missing, and says
why. ``RESTRICTEDMEM_REQUIRE=fuse,root`` turns such a skip into a failure, so that a run can promise
what it covered. ``@pytest.mark.alone("why")`` keeps all other tests of the machine away
(``turns``).
"""

import ctypes
import mmap
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Generator
from contextlib import closing
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Final

import pytest
from hypothesis import HealthCheck, settings

import browser
import emulation
import hugetlb
from restrictedmem.abi import memory, process, seccomp
from restrictedmem.devkvm import Kvm
from restrictedmem.emulated.emulated_machine import EmulationError, Kernel
from restrictedmem.kvm.kernel.kernel_vm import new_vm
from restrictedmem.service.cgroup import Cgroup
from turns import Turns

# The speed of examples depends on the machine's other work.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


def _fuse() -> str:
    return "" if os.access("/dev/fuse", os.R_OK | os.W_OK) else "/dev/fuse cannot be opened"


@cache
def _kvm() -> str:
    try:
        with Kvm.open() as kvm:
            new_vm(kvm, debug=False)[0].close()
    except OSError as error:
        return f"/dev/kvm has no VM for the kernel engine: {error.strerror}"
    return ""


def _processor() -> str:
    return _kvm() or (
        "QEMU's TCG is the processor, with mistakes of its own"
        if emulation.hypervisor() == emulation.TCG
        else ""
    )


def _amd() -> str:
    return _processor() or (
        ""
        if emulation.is_amd()
        else "lengths of what is invalid were compared with AMD's processors alone "
        "(docs/reference/engines.md)"
    )


def _debug_registers() -> str:
    return _kvm() or (
        "QEMU's TCG loads no breakpoints with a guest"
        if emulation.hypervisor() == emulation.TCG
        else ""
    )


def _cachestat() -> str:
    with memory.memfd_create("cachestat") as fd:
        try:
            memory.resident_pages(fd.fileno(), 0, mmap.PAGESIZE)
        except OSError as error:
            return f"cachestat came with Linux 6.5: {error.strerror}"
    return ""


def _inotify() -> str:
    watch = ctypes.CDLL(None, use_errno=True).inotify_init1(os.O_CLOEXEC)
    if watch < 0:
        return f"inotify_init1: {os.strerror(ctypes.get_errno())}"
    os.close(watch)
    return ""


def _guard() -> str:
    with (
        memory.memfd_create("guard") as fd,
        closing(memory.Mapping(fd.fileno(), 0, mmap.PAGESIZE, mmap.PAGESIZE)) as mapping,
    ):
        try:
            mapping.madvise(memory.MADV_GUARD_INSTALL, 0, mmap.PAGESIZE)
        except OSError:
            return "the kernel has no MADV_GUARD_INSTALL for files (Linux 6.15)"
    return ""


def _root() -> str:
    everything = process.effective_capabilities() >> 21 & 1
    return "" if os.geteuid() == 0 and everything else "not root with CAP_SYS_ADMIN"


def _memory_cgroup() -> str:
    own = Cgroup.own()
    if own is None or not os.access(own.directory, os.W_OK):
        return "no cgroup with the memory controller can be made here"
    enabled = (
        own.version == 1
        or "memory"
        in (own.directory / "cgroup.subtree_control").read_text(encoding="ascii").split()
    )
    return "" if enabled else f"{own.directory} has no memory controller for cgroups below it"


def _cc() -> str:
    return "" if shutil.which("cc") or shutil.which("gcc") else "no C compiler"


def _fusermount() -> str:
    return "" if shutil.which("fusermount3") else "fusermount3 is not installed (package fuse3)"


def _seccomp() -> str:
    return (
        ""
        if seccomp.flags_known(seccomp.FilterFlag.NEW_LISTENER)
        else "the kernel has no seccomp listeners (CONFIG_SECCOMP_FILTER)"
    )


def _go() -> str:
    return "" if shutil.which("go") else "go is not installed (package golang-go)"


def _orders() -> str:
    return (
        ""
        if os.geteuid() == 0
        else "without root a service cannot learn the order of a folio (docs/understand/folios.md)"
    )


@cache
def _rust() -> str:
    # The command rustc may be rustup's, which knows no compiler in another HOME.
    try:
        asked = subprocess.run(["rustc", "--version"], check=False, capture_output=True, text=True)
    except FileNotFoundError:
        return "rustc is not installed"
    return f"rustc does not run: {asked.stderr[:60]!r}" if asked.returncode else ""


#: Options for a program of i386 that needs no library.
I386: Final = (
    "-m32",
    "-static",
    "-nostdlib",
    "-ffreestanding",
    "-fno-pie",
    "-no-pie",
    "-fno-stack-protector",
)


@cache
def _i386() -> str:
    with tempfile.TemporaryDirectory() as place:
        source = 'void _start(void) { asm volatile("int $0x80" : : "a"(1), "b"(7)); }'
        command = [shutil.which("cc") or "gcc", *I386, "-x", "c", "-o", f"{place}/program", "-"]
        try:
            subprocess.run(command, input=source, text=True, check=True, capture_output=True)
            ended = subprocess.run([f"{place}/program"], check=False).returncode
        except (OSError, subprocess.CalledProcessError) as error:
            return f"programs of i386 cannot be built or run: {error}"
    return "" if ended == 7 else "the kernel runs no programs of i386"


def _musl() -> str:
    return "" if shutil.which("musl-gcc") else "musl-gcc is not installed (package musl-tools)"


def _qemu() -> str:
    return (
        ""
        if shutil.which("qemu-system-x86_64")
        else "qemu-system-x86_64 is not installed (package qemu-system-x86)"
    )


def _busybox() -> str:
    return "" if shutil.which("busybox") else "busybox is not installed (package busybox-static)"


def _kernel_build() -> str:
    missing = [name for name in ("make", "flex", "bison", "bc", "patch") if not shutil.which(name)]
    if not Path("/usr/include/libelf.h").exists():
        missing.append("libelf.h (package libelf-dev)")
    return f"no kernel can be built here without {', '.join(missing)}" if missing else ""


def _emulated_kernel() -> str:
    image = os.environ.get("RESTRICTEDMEM_KERNEL")
    if image is None:
        return "RESTRICTEDMEM_KERNEL names no kernel image (scripts/kernel-lab builds one)"
    try:
        Kernel(Path(image)).check()
    except EmulationError as error:
        return f"{error}; {error.hint}"
    return ""


def _gdb() -> str:
    return "" if shutil.which("gdb") else "gdb is not installed (package gdb)"


def _atheris() -> str:
    return "" if find_spec("atheris") else "atheris is not installed (extra fuzz)"


FEATURES: dict[str, Callable[[], str]] = {
    "fuse": _fuse,
    "kvm": _kvm,
    "processor": _processor,
    "amd": _amd,
    "debug-registers": _debug_registers,
    "cachestat": _cachestat,
    "inotify": _inotify,
    "guard": _guard,
    "root": _root,
    "memory-cgroup": _memory_cgroup,
    "cc": _cc,
    "fusermount": _fusermount,
    "gdb": _gdb,
    "seccomp": _seccomp,
    "go": _go,
    "rust": _rust,
    "orders": _orders,
    "qemu": _qemu,
    "busybox": _busybox,
    "kernel-build": _kernel_build,
    "emulated-kernel": _emulated_kernel,
    "musl": _musl,
    "i386": _i386,
    "hugetlb": hugetlb.missing,
    "atheris": _atheris,
    "chromium": browser.missing,
}


_turns = Turns()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "requires(*features): needs " + ", ".join(FEATURES))
    config.addinivalue_line("markers", "alone(why): no other test may run on the machine meanwhile")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # A group of such tests runs together, so that other tests wait for them once.
    items.sort(key=_is_alone)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    # This wait is outside the time that a test may take.
    _turns.begin(alone=_is_alone(item))
    try:
        return (yield)
    finally:
        _turns.end(more=nextitem is not None and _is_alone(nextitem))


@pytest.fixture(scope="session", autouse=True)
def _programs_hear_all_signals() -> None:
    hear_all_signals()


def hear_all_signals() -> None:
    """Make programs that this process starts ignore no signal that this process ignores.

    Otherwise a program would inherit an ignored signal. The signal must not end this process
    either. Python ignores SIGPIPE and SIGXFSZ on its own, and subprocess undoes that.
    """
    for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:
        if signal.getsignal(number) is signal.SIG_IGN:
            # exec keeps ignored signals, but no handlers.
            signal.signal(number, _go_on)


def _go_on(number: int, frame: FrameType | None) -> None:
    del number, frame


def _is_alone(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None


def pytest_runtest_setup(item: pytest.Item) -> None:
    must = set(filter(None, os.environ.get("RESTRICTEDMEM_REQUIRE", "").split(",")))
    for marker in item.iter_markers("requires"):
        for feature in marker.args:
            missing = FEATURES[feature]()
            if missing and feature in must:
                pytest.fail(f"{feature} is required here: {missing}", pytrace=False)
            if missing:
                pytest.skip(missing)
