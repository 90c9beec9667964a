"""A VM: its slots, its private memory, its vCPUs."""

import ctypes
import mmap
import os
from typing import final

from restrictedmem.abi import kvm
from restrictedmem.abi._ioctl import HasFileno
from restrictedmem.abi.kvm_x86 import KVM_SET_TSS_ADDR
from restrictedmem.devkvm.guest_memfd import GuestMemfd
from restrictedmem.devkvm.vcpu_fd import VcpuFd
from restrictedmem.fd import OwnedFd


def address_of(memory: mmap.mmap | bytearray) -> int:
    """Return the address of memory of this process, for ``userspace_addr``.

    The memory must stay in place as long as a slot uses it.
    """
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


@final
class VmFd(OwnedFd):
    """The descriptor of KVM_CREATE_VM, for the process that created it.

    Any other process gets EIO. Addresses and sizes are bytes.
    """

    __slots__ = ("_vcpu_mmap_size",)

    def __init__(self, fd: int, vcpu_mmap_size: int) -> None:
        super().__init__(fd)
        self._vcpu_mmap_size = vcpu_mmap_size

    def check_extension(self, capability: int) -> int:
        """Return the kernel's answer for a ``KVM_CAP_*`` of this VM; 0 means no."""
        return kvm.KVM_CHECK_EXTENSION(self, capability)

    def enable_cap(self, capability: int, *arguments: int) -> None:
        """Turn a capability on.

        Raises:
            OSError: EINVAL for a capability that cannot be turned on.
        """
        request = kvm.kvm_enable_cap(cap=capability)
        request.args[: len(arguments)] = list(arguments)
        kvm.KVM_ENABLE_CAP(self, request)

    def create_vcpu(self, number: int = 0) -> VcpuFd:
        """Create a vCPU, close-on-exec; the caller owns it.

        Raises:
            OSError: EEXIST when there is one of that number, EINVAL when the number is not below
                KVM_CAP_MAX_VCPU_ID.
        """
        return VcpuFd(kvm.KVM_CREATE_VCPU(self, number), self._vcpu_mmap_size)

    def create_guest_memfd(self, size: int, flags: int = 0) -> GuestMemfd:
        """Create a guest_memfd of ``size`` bytes for slots of this VM; the caller owns it.

        The descriptor is close-on-exec. The kernel creates it without close-on-exec, so a program
        that another thread starts at that moment may inherit it.

        Raises:
            OSError: EINVAL for size 0 or not of whole pages, or flags outside
                KVM_CAP_GUEST_MEMFD_FLAGS.
        """
        made = GuestMemfd(
            kvm.KVM_CREATE_GUEST_MEMFD(self, kvm.kvm_create_guest_memfd(size=size, flags=flags)),
            flags,
        )
        os.set_inheritable(made.fileno(), False)
        return made

    def set_user_memory_region(
        self, slot: int, guest_phys_addr: int, memory_size: int, userspace_addr: int, flags: int = 0
    ) -> None:
        """Create a slot on memory of this process, move it, change its flags, or delete it.

        Size 0 deletes it.

        Raises:
            OSError: EEXIST where another slot is; EINVAL unless aligned, or for a slot with a
                guest_memfd, which can only be deleted.
        """
        region = kvm.kvm_userspace_memory_region(
            slot=slot,
            flags=flags,
            guest_phys_addr=guest_phys_addr,
            memory_size=memory_size,
            userspace_addr=userspace_addr,
        )
        kvm.KVM_SET_USER_MEMORY_REGION(self, region)

    def set_user_memory_region2(
        self,
        slot: int,
        guest_phys_addr: int,
        memory_size: int,
        userspace_addr: int,
        guest_memfd: HasFileno | int,
        guest_memfd_offset: int = 0,
        flags: int = kvm.KVM_MEM_GUEST_MEMFD,
    ) -> None:
        """Create a slot with a range of a guest_memfd.

        The range is bound to the slot until the slot is deleted or the file is gone. On a default
        VM, a file with GUEST_MEMFD_FLAG_MMAP serves every access of the guest. A file without it
        serves none.

        Raises:
            OSError: EBADF for a bad ``guest_memfd``; EEXIST where another slot is; EINVAL unless
                aligned, for a file of another kind or VM, for a range past its end or (since Linux
                7.2 EEXIST) bound already, and for changing a slot.
        """
        fd = guest_memfd if isinstance(guest_memfd, int) else guest_memfd.fileno()
        region = kvm.kvm_userspace_memory_region2(
            slot=slot,
            flags=flags,
            guest_phys_addr=guest_phys_addr,
            memory_size=memory_size,
            userspace_addr=userspace_addr,
            guest_memfd_offset=guest_memfd_offset,
            guest_memfd=fd & 0xFFFF_FFFF,
        )
        kvm.KVM_SET_USER_MEMORY_REGION2(self, region)

    def delete_memory_region(self, slot: int) -> None:
        """Delete a slot of either kind.

        Raises:
            OSError: EINVAL when there is none.
        """
        self.set_user_memory_region(slot, 0, 0, 0)

    def set_memory_attributes(self, address: int, size: int, attributes: int) -> None:
        """Make a range private (``KVM_MEMORY_ATTRIBUTE_PRIVATE``) or shared (0).

        This does not move the content.

        Raises:
            OSError: ENOTTY when the device lacks KVM_CAP_MEMORY_ATTRIBUTES; EINVAL unless aligned,
                or for attributes that the VM's capability lacks, which may be all.
        """
        kvm.KVM_SET_MEMORY_ATTRIBUTES(
            self, kvm.kvm_memory_attributes(address=address, size=size, attributes=attributes)
        )

    def set_nr_mmu_pages(self, pages: int) -> None:
        """Limit the pages that shadow page tables take; at least 64.

        Raises:
            OSError: EINVAL below 64.
        """
        kvm.KVM_SET_NR_MMU_PAGES(self, pages)

    def set_tss_addr(self, address: int) -> None:
        """Give KVM three pages of guest physical memory below 4 GiB for real mode.

        Intel processors that cannot run real mode by themselves need them.

        Raises:
            OSError: EINVAL above 4 GiB, EEXIST where a slot is.
        """
        KVM_SET_TSS_ADDR(self, address)
