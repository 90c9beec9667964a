"""The processor's vendor and the hypervisor.

If an emulated processor lacks something, the machine is the cause, not the kernel.
"""

import ctypes
import mmap
from functools import cache
from typing import Final

#: QEMU without KVM.
TCG: Final = b"TCGTCGTCGTCG"

#: push rbx; mov eax, 0x40000000; cpuid; mov [rdi], ebx; mov [rdi + 4], ecx; mov [rdi + 8], edx; pop
#: rbx; ret
_CPUID: Final = bytes.fromhex("53 b800000040 0fa2 891f 894f04 895708 5b c3")


@cache
def hypervisor() -> bytes:
    """Return the hypervisor's signature; on bare metal, something else. It works only on x86-64."""
    with mmap.mmap(
        -1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    ) as page:
        page[: len(_CPUID)] = _CPUID
        anchor, signature = ctypes.c_char.from_buffer(page), ctypes.create_string_buffer(12)
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(ctypes.addressof(anchor))(
            ctypes.addressof(signature)
        )
        del anchor
        return signature.raw


@cache
def is_amd() -> bool:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        return "AuthenticAMD" in lines.read()


@cache
def has(feature: str) -> bool:
    """Say whether the processor has a feature, by its name in /proc/cpuinfo."""
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        return any(feature in line.split() for line in lines if line.startswith("flags"))
