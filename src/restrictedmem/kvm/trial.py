"""A trial guest of a few instructions, which shows that guests run on the kernel engine.

A kernel may have all required capabilities and still not run a guest, or run it wrongly. The guest
reads and writes a page that was launched, converted to the shared half and back, and freed. Each
time it says what it found. A child tries the guest (``in_child``). VM and memory go away with the
child, and so does anything that hangs.
"""

import os
from collections.abc import Callable
from contextlib import closing
from errno import EIO
from typing import Final, TypeVar, final

from restrictedmem.abi import memory
from restrictedmem.abi.kvm import kvm_regs
from restrictedmem.consumer import Bound
from restrictedmem.devkvm import Kvm
from restrictedmem.kvm.attributes import Attributes
from restrictedmem.kvm.engine import Engine
from restrictedmem.kvm.engine_vcpu import EngineVcpu, EngineVcpus
from restrictedmem.kvm.half import SharedFiles, SharedHalf, forbid_shrinking
from restrictedmem.kvm.kernel.kernel_vm import KernelVm
from restrictedmem.kvm.memslot import Memslot
from restrictedmem.mm.memfd import make_memfd
from restrictedmem.mm.notifier import Api
from restrictedmem.protocol import exits
from restrictedmem.protocol.guest_abi import EXIT, PRIVATE_BASE
from restrictedmem.units import PAGE_SHIFT, PAGE_SIZE, PageRange, gfn_t, pgoff_t

_T = TypeVar("_T")
_W: Final = 8

# Pages of the guest: its code, the page that it looks at, and its stack.
_CODE, _DATA, _STACK, _PAGES = range(4)
_GFN: Final = gfn_t(PRIVATE_BASE >> PAGE_SHIFT)

#: A hypercall that is not in the guest ABI, so that all of its arguments are passed on.
_FOUND: Final = 0x100
_GUEST: Final = bytes.fromhex(
    "488b37"  # again: mov (%rdi), %rsi
    "48ff07"  # incq (%rdi)
    "b800010000"  # mov $_FOUND, %eax
    "b900001000"  # mov $HYPERCALL_PAGE, %ecx
    "ffd1"  # call *%rcx
    "4885c0"  # test %rax, %rax
    "74e9"  # jz again
    "31c0"  # xor %eax, %eax: EXIT
    "ffd1"  # call *%rcx
    "f4"  # hlt
)


def run_guest(kvm: Kvm, *, debug: bool) -> None:
    """Run the guest on a VM of its own; the caller keeps ``kvm``. It hangs if the kernel does.

    Raises:
        OSError: the errno with which the kernel refused; EIO when the guest found a wrong value, or
            ended otherwise.
    """
    vcpus = EngineVcpus()
    with (
        closing(KernelVm(_NoService(), vcpus, Attributes(Api.V10), kvm, debug=debug)) as engine,
        memory.memfd_create("trial-shared") as fd,
    ):
        memory.fallocate(fd.fileno(), 0, 0, _PAGES * PAGE_SIZE)
        shared = SharedHalf(
            SharedFiles(forbid_shrinking).of_fd(fd.fileno(), _PAGES * PAGE_SIZE),
            0,
            _PAGES * PAGE_SIZE,
        )
        private = engine.bind(b"", PageRange(pgoff_t(0), pgoff_t(_PAGES)))
        with closing(Memslot(0, _GFN, _PAGES, private=private, shared=shared)) as slot:
            slot.attributes[:] = b"\1" * _PAGES
            engine.add_slot(slot)
            vcpu = EngineVcpu(engine.create_vcpu(0))
            vcpus.all = (vcpu,)
            try:
                _run(engine, slot, fd.fileno(), vcpu)
            except RuntimeError as error:
                # The VM ends here all the same. The caller asks for the kernel's errno.
                if isinstance(error.__cause__, OSError):
                    raise error.__cause__ from None
                raise


def _run(engine: Engine, slot: Memslot, shared: int, vcpu: EngineVcpu) -> None:
    start = PRIVATE_BASE + _DATA * PAGE_SIZE
    span, first, last = (
        PageRange(pgoff_t(_DATA), pgoff_t(_DATA + 1)),
        gfn_t(_GFN + _DATA),
        gfn_t(_GFN + _DATA + 1),
    )
    content = _GUEST.ljust(PAGE_SIZE, b"\0") + _word(5).ljust(PAGE_SIZE, b"\0")
    engine.launch_update(slot, PRIVATE_BASE, content)
    vcpu.engine.set_regs(
        kvm_regs(rip=PRIVATE_BASE, rsp=PRIVATE_BASE + _PAGES * PAGE_SIZE, rdi=start)
    )
    _expect("launched", 5, vcpu)
    # By the descriptor, as an owner would: this process may be kept from its own mapping.
    os.pwrite(shared, _word(50), _DATA * PAGE_SIZE)
    engine.set_attributes(slot, first, last, private=False)
    _expect("shared", 50, vcpu)
    _check(
        "the guest stored", 51, int.from_bytes(os.pread(shared, _W, _DATA * PAGE_SIZE), "little")
    )
    engine.set_attributes(slot, first, last, private=True)
    _expect("private again", 6, vcpu)
    assert slot.private is not None
    engine.invalidate_start(slot.private.binding, span, None)
    engine.invalidate_end(slot.private.binding, span, None)
    _expect("freed", 0, vcpu)
    # The statistics that `run` shows at the end need the kernel, too.
    engine.statistics()
    vcpu.complete(1)
    if (ended := vcpu.run()) != exits.Hypercall(EXIT, (start, 0, 0, 0)):
        raise OSError(EIO, f"a trial guest ended with {ended}")


def _expect(what: str, value: int, vcpu: EngineVcpu) -> None:
    """Let the guest look at its page once, and check what it found."""
    vcpu.complete(0)
    match vcpu.run():
        case exits.Hypercall(number, (_, found, _, _)) if number == _FOUND:
            _check(f"on a {what} page the guest found", value, found)
        case other:
            raise OSError(EIO, f"on a {what} page a trial guest ended with {other}")


def _check(what: str, expected: int, found: int) -> None:
    if found != expected:
        raise OSError(EIO, f"{what} {found:#x} instead of {expected:#x}")


def _word(value: int) -> bytes:
    return value.to_bytes(_W, "little")


@final
class _NoService:
    """A stand-in for the service, which this VM does not need (``Binder``).

    The engine keeps the VM's pages in a guest_memfd.
    """

    def bind(self, token: bytes, window: PageRange, take: Callable[[Bound], _T]) -> _T:
        """Bind to an empty file."""
        memfd, sequence = make_memfd(PAGE_SIZE), memory.memfd_create("trial-sequence")
        return take(Bound(1, 1, None, memfd, sequence, flags=0, order=0))

    def bind_again(self, binding: int, window: PageRange, take: Callable[[int], _T]) -> _T:
        """Show more of the file."""
        return take(binding + 1)

    def unbind(self, number: int) -> None:
        """Do nothing: there are no invalidations."""
