"""A guest's memory and registers before it runs, and the measurement that they give."""

from collections.abc import Iterable, Iterator, Sequence
from errno import ENOEXEC
from typing import Final

from restrictedmem.abi.kvm import kvm_regs
from restrictedmem.failure import failed
from restrictedmem.protocol import guest_abi
from restrictedmem.protocol.measurement import measure
from restrictedmem.units import PAGE_MASK
from restrictedmem.vmm import elf

#: The size of the window that guest and VMM both see, in bytes.
SHARED_SIZE: Final = 1 << 20
#: The end of the physical addresses of x86-64: no processor has more.
_PHYSICAL_END: Final = 1 << 52


def launch_pages(
    image: elf.Image, arguments: Sequence[str], *, private_size: int, vcpus: int
) -> Iterator[tuple[int, bytes]]:
    """Return a guest's initial private memory: runs of whole pages with their guest addresses.

    The runs are in the order of addresses.

    Raises:
        OSError: ENOEXEC for an image that does not fit between the guest ABI's first address and
            the stacks; E2BIG for arguments that do not fit the boot pages.
    """
    limit = guest_abi.PRIVATE_BASE + private_size - vcpus * guest_abi.STACK_SIZE
    for segment in image.segments:
        if not guest_abi.IMAGE_BASE <= segment.gpa < _PHYSICAL_END:
            raise failed(
                "exec",
                ENOEXEC,
                f"linked at {segment.gpa:#x}, and guests are linked from"
                f" {guest_abi.IMAGE_BASE:#x} on",
            )
    if image.end > limit:
        raise failed(
            "exec",
            ENOEXEC,
            f"it ends at {image.end:#x}, and the stacks of {vcpus} vCPUs begin at {limit:#x}",
        )
    heap_base = (image.end + PAGE_MASK) & ~PAGE_MASK
    boot = guest_abi.boot_info(
        private_size=private_size,
        shared_size=SHARED_SIZE,
        heap_base=heap_base,
        vcpus=vcpus,
        arguments=arguments,
    )
    return _whole_pages(
        [
            (guest_abi.PRIVATE_BASE, boot),
            *((segment.gpa, segment.data) for segment in image.segments),
        ]
    )


def launch_regs(image: elf.Image, *, private_size: int, index: int) -> kvm_regs:
    """Return the initial registers of a vCPU."""
    stack = guest_abi.PRIVATE_BASE + private_size - index * guest_abi.STACK_SIZE
    return kvm_regs(rip=image.entry, rsp=stack, rdi=guest_abi.PRIVATE_BASE, rsi=index)


def expected_measurement(
    image: elf.Image, arguments: Sequence[str], *, private_size: int, vcpus: int, policy: int
) -> bytes:
    """Return the measurement of a guest that a ``Vmm`` has loaded, without loading it.

    Raises:
        OSError: as ``launch_pages``.
    """
    pages = launch_pages(image, arguments, private_size=private_size, vcpus=vcpus)
    registers = [
        launch_regs(image, private_size=private_size, index=index) for index in range(vcpus)
    ]
    return measure(policy, pages, registers, [(guest_abi.PRIVATE_BASE, private_size, 0, 0)])


def _whole_pages(pieces: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """Merge pieces of content at guest addresses into runs of whole pages, zero in gaps."""
    start, content = 0, bytearray()
    for gpa, data in sorted((gpa, data) for gpa, data in pieces if data):
        first, end = gpa & ~PAGE_MASK, (gpa + len(data) + PAGE_MASK) & ~PAGE_MASK
        if first > start + len(content):
            if content:
                yield start, bytes(content)
            start, content = first, bytearray()
        content.extend(bytes(max(0, end - start - len(content))))
        content[gpa - start : gpa - start + len(data)] = data
    if content:
        yield start, bytes(content)
