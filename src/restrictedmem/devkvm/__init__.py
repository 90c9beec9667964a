"""/dev/kvm as typed, owned handles.

There is one class for each kind of descriptor, and one method for each ioctl. Each error names its
ioctl.
"""

from restrictedmem.devkvm.guest_memfd import GuestMemfd
from restrictedmem.devkvm.system import Kvm
from restrictedmem.devkvm.vcpu_fd import VcpuFd
from restrictedmem.devkvm.vm_fd import VmFd, address_of

__all__ = ["GuestMemfd", "Kvm", "VcpuFd", "VmFd", "address_of"]
