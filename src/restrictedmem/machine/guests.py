"""Probes for guests: Unicorn for one engine, /dev/kvm and guest_memfd for the other."""

import ctypes
import importlib.util
import mmap
import os
import re
from collections.abc import Iterator
from errno import EACCES, EFAULT, EIO, ENODEV, ENOENT, ENXIO
from pathlib import Path
from typing import Final

from restrictedmem.abi import kvm
from restrictedmem.fd import OwnedFd
from restrictedmem.machine.descriptor import device_mode
from restrictedmem.machine.finding import Finding, State, reason, setting
from restrictedmem.probe import in_child
from restrictedmem.units import PAGE_SIZE

_KVM: Final = "/dev/kvm"
_API_VERSION: Final = 12
_AFTER_KVM: Final = "it could not be tried without /dev/kvm"

_UC_ARCH_X86: Final = 4
_UC_MODE_64: Final = 1 << 3
#: The versions that pyproject.toml asks for. UC_HOOK_TLB_FILL and the flushes that the engine needs
#: were tried with these.
_UNICORN_FIRST: Final = (2, 1, 3)
_UNICORN_AFTER: Final = (2, 2, 0)

#: The capabilities that decide which guests can run here.
_CAPABILITIES: Final = (
    kvm.Cap.USER_MEMORY2,
    kvm.Cap.MEMORY_FAULT_INFO,
    kvm.Cap.MEMORY_ATTRIBUTES,
    kvm.Cap.GUEST_MEMFD,
    kvm.Cap.VM_TYPES,
    kvm.Cap.PRE_FAULT_MEMORY,
    kvm.Cap.GUEST_MEMFD_FLAGS,
)
#: Sets of flags of KVM_CREATE_GUEST_MEMFD; each set is tried by itself.
_FLAGS: Final = {
    "guest_memfd": 0,
    "guest_memfd, MMAP": kvm.GUEST_MEMFD_FLAG_MMAP,
    "guest_memfd, MMAP and INIT_SHARED": kvm.GUEST_MEMFD_FLAG_MMAP
    | kvm.GUEST_MEMFD_FLAG_INIT_SHARED,
}


def probe() -> Iterator[Finding]:
    """Yield the findings about guests."""
    yield unicorn()
    yield hardware()
    device = kvm_device()
    yield device
    if device.state is State.YES:
        try:
            capabilities = in_child(_capabilities)
        except OSError as error:
            missing = f"a VM could not be made: {reason(error)}"
        else:
            yield kvm_capabilities(capabilities)
            yield memory_attributes(capabilities)
            for name, flags in _FLAGS.items():
                yield guest_memfd(name, flags)
            return
    else:
        missing = _AFTER_KVM
    for name in ("KVM capabilities", "memory attributes", *_FLAGS):
        yield Finding(name, State.UNKNOWN, missing)


def unicorn() -> Finding:
    """Load Unicorn's library in a child, get its version, and open an x86-64 engine.

    The Python module is not imported.
    """
    name = "Unicorn"
    consequence = "no guest runs on the software engine"
    remedy = "python -m pip install 'unicorn>=2.1.3,<2.2'"
    spec = importlib.util.find_spec("unicorn")
    folders = spec.submodule_search_locations if spec else None
    libraries = [
        path for folder in folders or () for path in Path(folder, "lib").glob("libunicorn.so*")
    ]
    if not libraries:
        return Finding(
            name,
            State.NO,
            "not installed" if spec is None else "its library is missing",
            consequence,
            remedy,
        )
    try:
        version = in_child(lambda: _unicorn_version(str(libraries[0])))
    except OSError as error:
        return Finding(name, State.NO, reason(error), consequence, remedy)
    detail = "version " + ".".join(map(str, version))
    if not _UNICORN_FIRST <= version < _UNICORN_AFTER:
        return Finding(
            name,
            State.PARTLY,
            f"{detail}, with which restrictedmem was not tested",
            "guests may fail on the software engine",
            remedy,
        )
    return Finding(name, State.YES, f"{detail}, x86-64")


def _unicorn_version(path: str) -> tuple[int, int, int]:
    library = ctypes.CDLL(path)
    engine = ctypes.c_void_p()
    if library.uc_open(_UC_ARCH_X86, _UC_MODE_64, ctypes.byref(engine)):
        raise OSError(EIO, "uc_open: no x86-64 engine")
    packed: int = library.uc_version(None, None)
    return packed >> 24 & 0xFF, packed >> 16 & 0xFF, packed >> 8 & 0xFF


def hardware() -> Finding:
    """Report whether the processor has virtualisation; this is information only."""
    name = "hardware virtualisation"
    flags = re.search(r"^flags\s*:(.*)$", setting("/proc/cpuinfo") or "", re.MULTILINE)
    words = set(flags[1].split()) if flags else set[str]()
    where = "itself inside a virtual machine" if "hypervisor" in words else "on bare metal"
    for word, meaning in (("vmx", "Intel VMX"), ("svm", "AMD SVM")):
        if word in words:
            return Finding(name, State.YES, f"{meaning}, {where}")
    return Finding(
        name,
        State.NO,
        f"neither vmx nor svm in /proc/cpuinfo, {where}",
        "if KVM works nevertheless, it emulates a guest's kernel mode slowly",
    )


def kvm_device() -> Finding:
    """Open /dev/kvm and ask for its API version."""
    consequence = "guests run on the software engine only"
    try:
        with OwnedFd(os.open(_KVM, os.O_RDWR | os.O_CLOEXEC)) as device:
            version = kvm.KVM_GET_API_VERSION(device)
    except OSError as error:
        match error.errno:
            case e if e in (ENOENT, ENODEV, ENXIO):
                remedy = (
                    "turn virtualisation on in the firmware, or nested virtualisation on the host;"
                    " sudo modprobe kvm_intel or kvm_amd"
                )
            case e if e == EACCES:
                remedy = _kvm_permission()
            case _:
                remedy = "allow the device to this container: --device /dev/kvm"
        return Finding(_KVM, State.NO, f"{reason(error)}; {device_mode(_KVM)}", consequence, remedy)
    detail = f"API version {version}; {device_mode(_KVM)}"
    if version != _API_VERSION:
        return Finding(
            _KVM, State.NO, detail, consequence, f"a kernel with API version {_API_VERSION}"
        )
    return Finding(_KVM, State.YES, detail)


def _kvm_permission() -> str:
    if os.stat(_KVM).st_mode & 0o060 == 0o060:
        return "sudo usermod -aG kvm $USER, then log in again"
    return (
        "sudo chmod 0666 /dev/kvm (until the next boot; for good: sudo apt install udev && sudo"
        " usermod -aG kvm $USER, then reboot)"
    )


def _new_vm(device: OwnedFd) -> OwnedFd:
    return OwnedFd(kvm.KVM_CREATE_VM(device))


def _capabilities() -> dict[str, int]:
    # A VM belongs to the address space that made it, so one process has to do all of this.
    with OwnedFd(os.open(_KVM, os.O_RDWR | os.O_CLOEXEC)) as device, _new_vm(device) as vm:
        return {cap.name: kvm.KVM_CHECK_EXTENSION(vm, cap) for cap in _CAPABILITIES}


def kvm_capabilities(found: dict[str, int]) -> Finding:
    """Judge the answers of KVM_CHECK_EXTENSION on a VM."""
    needed = {
        cap.name for cap in (kvm.Cap.USER_MEMORY2, kvm.Cap.MEMORY_FAULT_INFO, kvm.Cap.GUEST_MEMFD)
    }
    missing = sorted(name for name in needed if not found[name])
    detail = ", ".join(f"{name} {value}" for name, value in found.items())
    if missing:
        return Finding(
            "KVM capabilities",
            State.NO,
            detail,
            f"no kernel engine without {' and '.join(missing)}",
            "Linux 6.18, on which guests ran",
        )
    return Finding("KVM capabilities", State.YES, detail)


def memory_attributes(found: dict[str, int]) -> Finding:
    """Report whether KVM itself keeps pages private or shared.

    This takes a VM type that has private memory.
    """
    name = "memory attributes"
    detail = (
        f"KVM_CAP_MEMORY_ATTRIBUTES {found['MEMORY_ATTRIBUTES']:#x} on a default VM,"
        f" KVM_CAP_VM_TYPES {found['VM_TYPES']:#x}"
    )
    if not found["MEMORY_ATTRIBUTES"] and found["VM_TYPES"] <= 1:
        return Finding(
            name,
            State.NO,
            detail,
            "the kernel's own conversion between private and shared cannot be tried here;"
            " restrictedmem keeps its attributes itself",
            "a kernel with CONFIG_KVM_SW_PROTECTED_VM, SEV-SNP or TDX",
        )
    return Finding(name, State.YES, detail)


def guest_memfd(name: str, flags: int) -> Finding:
    """Create a guest_memfd of one page, map and touch it, and report how far this went."""
    try:
        went = in_child(lambda: _create_and_map(flags))
    except OSError as error:
        return Finding(
            name,
            State.NO,
            reason(error),
            _guest_memfd_consequence(flags),
            f"Linux {'6.18' if flags else '6.8'} or later",
        )
    return Finding(name, State.YES, f"created; {went}")


def _guest_memfd_consequence(flags: int) -> str:
    if flags & kvm.GUEST_MEMFD_FLAG_INIT_SHARED:
        return "no guest_memfd that its owner can fill before the guest runs"
    return "no private memory on a default VM" if flags else "no kernel engine"


def _create_and_map(flags: int) -> str:
    with OwnedFd(os.open(_KVM, os.O_RDWR | os.O_CLOEXEC)) as device, _new_vm(device) as vm:
        request = kvm.kvm_create_guest_memfd(size=PAGE_SIZE, flags=flags)
        with OwnedFd(kvm.KVM_CREATE_GUEST_MEMFD(vm, request)) as memfd:
            try:
                mapping = mmap.mmap(memfd.fileno(), PAGE_SIZE)
            except OSError as error:
                return f"mmap is refused ({reason(error)})"
            with mapping:
                return (
                    "mmap succeeds, a touch"
                    f" {'succeeds too' if _readable(mapping) else 'is SIGBUS'}"
                )


def _readable(mapping: mmap.mmap) -> bool:
    """Say whether a mapping can be touched, by letting write(2) read from it.

    An access that is SIGBUS to a program is EFAULT to write(2).
    """
    reader, writer = os.pipe()
    with OwnedFd(reader), OwnedFd(writer):
        try:
            os.write(writer, mapping)
        except OSError as error:
            if error.errno != EFAULT:
                raise
            return False
        return True
