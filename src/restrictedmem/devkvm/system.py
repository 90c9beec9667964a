"""/dev/kvm itself."""

import os
from typing import Final, Self, final

from restrictedmem.abi import kvm
from restrictedmem.abi.kvm_x86 import KVM_GET_SUPPORTED_CPUID, kvm_cpuid_entry2
from restrictedmem.devkvm._entries import CpuidEntries
from restrictedmem.devkvm.vm_fd import VmFd
from restrictedmem.fd import OwnedFd

DEVICE: Final = "/dev/kvm"


@final
class Kvm(OwnedFd):
    """The descriptor of /dev/kvm: what the kernel supports, and the creation of VMs."""

    __slots__ = ()

    @classmethod
    def open(cls) -> Self:
        """Open /dev/kvm, close-on-exec.

        Raises:
            OSError: ENOENT or ENODEV without KVM, EACCES without permission.
        """
        return cls(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))

    def get_api_version(self) -> int:
        """Return KVM_API_VERSION, which is always 12."""
        return kvm.KVM_GET_API_VERSION(self)

    def check_extension(self, capability: int) -> int:
        """Return the kernel's answer for a ``KVM_CAP_*``; 0 means no.

        For one VM, ``VmFd.check_extension`` is more exact.
        """
        return kvm.KVM_CHECK_EXTENSION(self, capability)

    def get_vcpu_mmap_size(self) -> int:
        """Return the bytes that a vCPU shares with its process."""
        return kvm.KVM_GET_VCPU_MMAP_SIZE(self)

    def get_supported_cpuid(self) -> list[kvm_cpuid_entry2]:
        """Return all that CPUID can answer in a guest, for ``VcpuFd.set_cpuid2``."""
        entries = CpuidEntries.room()
        KVM_GET_SUPPORTED_CPUID(self, entries)
        return entries.listed()

    def create_vm(self, kind: int = kvm.KVM_X86_DEFAULT_VM) -> VmFd:
        """Create a VM, close-on-exec; the caller owns it.

        ``kind`` is a ``KVM_X86_*_VM``. Only the process that created the VM can use it, because the
        VM uses this process's address space.

        Raises:
            OSError: EINVAL for a kind that ``KVM_CAP_VM_TYPES`` does not have.
        """
        mmap_size = self.get_vcpu_mmap_size()
        return VmFd(kvm.KVM_CREATE_VM(self, kind), mmap_size)
