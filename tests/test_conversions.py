"""The answers that a guest gets to its conversions (policy ``explicit``).

The service never says that memory is private which the owner can read.
"""

import mmap
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import pytest

from restrictedmem.abi import memory
from restrictedmem.fd import OwnedFd
from restrictedmem.protocol import exits, guest_abi
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.vmm.vm import Vcpu, Vm

pytestmark = pytest.mark.requires("fuse")

PAGE = 4096
EPERM, EIO, EINVAL = 1, 5, 22
#: Two slots side by side, each with both halves; a third, which is read-only; and one without a
#: private half.
GPA, PAGES = 0x4000_0000, 16
SECOND = GPA + PAGES * PAGE
READONLY = 0x5000_0000
WINDOW = 0x1000_0000
STACK = GPA + 8 * PAGE
SHARED_PAGE = GPA + 12 * PAGE
PRIVATE = guest_abi.MAP_GPA_RANGE_ENCRYPTED
SECRET = 0x2121_5445_5243_4553
FAILED = (1 << 64) - EIO


@pytest.fixture(scope="module", params=["v10", "v9"])
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    with Service.start(Options(api=request.param)) as found:
        yield found


@dataclass
class Guest:
    """A VM with the policy ``explicit``, what its owner sees of its shared memory, and its file."""

    vm: Vm
    shared: mmap.mmap
    shared_fd: int
    fd: int

    def slot(
        self, number: int, gpa: int, first: int, *, private: bool, readonly: bool = False
    ) -> None:
        self.vm.set_user_memory_region(
            slot=number,
            guest_phys_addr=gpa,
            memory_size=PAGES * PAGE,
            restricted_fd=self.fd if private else None,
            restricted_offset=first * PAGE if private else 0,
            shared_fd=self.shared_fd,
            shared_offset=first * PAGE,
            readonly=readonly,
        )

    def start(self, *code: str) -> Vcpu:
        self.vm.launch_update(GPA, bytes.fromhex("".join(code)).ljust(PAGE, b"\xf4"))
        vcpu = self.vm.create_vcpu()
        vcpu.set_regs(rip=GPA, rsp=STACK)
        return vcpu


@pytest.fixture(params=["software", pytest.param("kernel", marks=pytest.mark.requires("kvm"))])
def guest(request: pytest.FixtureRequest, service: Service) -> Iterator[Guest]:
    with ExitStack() as stack:
        fd = stack.enter_context(OwnedFd(service.memfd_restricted())).fileno()
        os.ftruncate(fd, 3 * PAGES * PAGE)
        shared_fd = stack.enter_context(
            OwnedFd(os.memfd_create("shared", os.MFD_ALLOW_SEALING))
        ).fileno()
        os.ftruncate(shared_fd, 4 * PAGES * PAGE)
        shared = stack.enter_context(mmap.mmap(shared_fd, 4 * PAGES * PAGE))
        vm = stack.enter_context(Vm(service, engine=request.param, explicit=True))
        found = Guest(vm, shared, shared_fd, fd)
        for number, (gpa, readonly) in enumerate(((GPA, False), (SECOND, False), (READONLY, True))):
            found.slot(number, gpa, number * PAGES, private=True, readonly=readonly)
        found.slot(3, WINDOW, 3 * PAGES, private=False)
        # One page is shared from the start.
        found.vm.convert(GPA, PAGES * PAGE, private=True)
        found.vm.convert(SECOND, PAGES * PAGE, private=True)
        found.vm.convert(SHARED_PAGE, PAGE, private=False)
        found.vm.convert(READONLY, PAGES * PAGE, private=False)
        yield found


# movabs $value, register; then mov $0x100000,%ecx; call *%rcx
_CALL = "b900001000 ffd1"
RAX, RDX, RSI, RDI = 0, 2, 6, 7


def mov(register: int, value: int) -> str:
    return (
        bytes([0x48, 0xB8 | register]).hex() + (value & (1 << 64) - 1).to_bytes(8, "little").hex()
    )


def hypercall(number: int, *arguments: int) -> str:
    return (
        "".join(
            mov(register, value)
            for register, value in zip((RAX, RDI, RSI, RDX), (number, *arguments), strict=False)
        )
        + _CALL
    )


#: mov %rax, %rdi; exit: says what it was told.
TELL = "4889c7" + mov(RAX, guest_abi.EXIT) + _CALL


def told(vcpu: Vcpu, answer: int = 0) -> int:
    """Answer the guest's call, and return what it says that it was told."""
    exit_ = vcpu.run(answer)
    assert isinstance(exit_, exits.Hypercall)
    assert exit_.number == guest_abi.EXIT
    return exit_.arguments[0]


def errno_of(call: Callable[..., object], *args: object, **kwargs: object) -> int | None:
    with pytest.raises(OSError) as caught:
        call(*args, **kwargs)
    return caught.value.errno


@contextmanager
def asking(guest: Guest, *asked: tuple[int, int, int]) -> Generator[list[Vcpu]]:
    """Start a vCPU for each call of MAP_GPA_RANGE. All wait for the answer, and then report it."""
    code = [
        bytes.fromhex(hypercall(guest_abi.MAP_GPA_RANGE, *arguments) + TELL).ljust(PAGE, b"\xf4")
        for arguments in asked
    ]
    guest.vm.launch_update(GPA, b"".join(code))
    with ExitStack() as stack:
        vcpus = [stack.enter_context(guest.vm.create_vcpu()) for _ in asked]
        for number, vcpu in enumerate(vcpus):
            vcpu.set_regs(rip=GPA + number * PAGE, rsp=STACK - 256 * number)
        for vcpu, arguments in zip(vcpus, asked, strict=True):
            assert vcpu.run() == exits.Hypercall(guest_abi.MAP_GPA_RANGE, (*arguments, 0))
        yield vcpus


LIES = {
    "a slot without a private half": (WINDOW, 1),
    "no slot": (0x9000_0000, 1),
    "from a slot into nothing": (SECOND + (PAGES - 1) * PAGE, 2),
    "from nothing into a slot": (GPA - PAGE, 2),
    "across a gap": (SECOND, (READONLY - SECOND) // PAGE + 1),
    "not aligned": (SHARED_PAGE + 8, 1),
    "not aligned, at a slot's end": (SECOND + (PAGES - 1) * PAGE + 8, 1),
    "no pages": (SHARED_PAGE, 0),
    "more pages than there are": (GPA, (1 << 64) - 1),
    "around the end of addresses": ((1 << 64) - PAGE, 2),
    "all addresses": (0, 1 << 52),
    "memory that cannot be written": (READONLY, 1),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_owner_that_answers_0_is_not_believed(guest: Guest, lie: str) -> None:
    gpa, npages = LIES[lie]
    with guest.start(hypercall(guest_abi.MAP_GPA_RANGE, gpa, npages, PRIVATE), TELL) as vcpu:
        assert vcpu.run() == exits.Hypercall(guest_abi.MAP_GPA_RANGE, (gpa, npages, PRIVATE, 0))
        # It does what it can of it.
        for page in range(min(npages, 2)):
            with suppress(OSError):
                guest.vm.convert(gpa + page * PAGE, PAGE, private=True)
        if gpa == READONLY:
            assert errno_of(vcpu.run, 0) == EPERM, (
                "the page is private, and not what the guest asked for"
            )
            guest.vm.convert(gpa, PAGE, private=False)
        assert told(vcpu) == FAILED


@pytest.mark.parametrize(
    ("gpa", "npages"),
    [
        (GPA + 4 * PAGE, 1),
        (SHARED_PAGE - PAGE, 3),
        (GPA + 4 * PAGE + 8, 1),
        (GPA + 4 * PAGE, 0),
        (SECOND - PAGE, 2),
    ],
)
def test_an_owner_that_answers_0_has_shared_all_pages(guest: Guest, gpa: int, npages: int) -> None:
    with guest.start(hypercall(guest_abi.MAP_GPA_RANGE, gpa, npages, 0), TELL) as vcpu:
        vcpu.run()
        assert told(vcpu) == FAILED
        # The owner cannot do it later either.
        assert errno_of(guest.vm.convert, GPA + 4 * PAGE, PAGE, private=False) == EPERM


@pytest.mark.parametrize("first", [True, False])
def test_an_owner_that_refused_does_not_convert(guest: Guest, *, first: bool) -> None:
    with guest.start(hypercall(guest_abi.MAP_GPA_RANGE, SHARED_PAGE, 1, PRIVATE), TELL) as vcpu:
        vcpu.run()
        if first:
            guest.vm.convert(SHARED_PAGE, PAGE, private=True)
        assert told(vcpu, -EIO) == (0 if first else FAILED)
        assert errno_of(guest.vm.convert, SHARED_PAGE, PAGE, private=not first) == EPERM


def test_what_was_refused_may_be_undone_first(guest: Guest) -> None:
    with guest.start(hypercall(guest_abi.MAP_GPA_RANGE, GPA + 4 * PAGE, 2, 0), TELL) as vcpu:
        vcpu.run()
        guest.vm.convert(GPA + 4 * PAGE, PAGE, private=False)
        assert errno_of(vcpu.run, -EIO) == EPERM
        guest.vm.convert(GPA + 4 * PAGE, PAGE, private=True)
        assert told(vcpu, -EIO) == FAILED


def test_pages_that_the_guest_does_not_want_changed_stay_meanwhile(guest: Guest) -> None:
    with guest.start(hypercall(guest_abi.MAP_GPA_RANGE, GPA, 2 * PAGES, PRIVATE), TELL) as vcpu:
        vcpu.run()
        for page in range(0, 2 * PAGES * PAGE, PAGE):
            if GPA + page != SHARED_PAGE:
                assert errno_of(guest.vm.convert, GPA + page, PAGE, private=False) == EPERM
        guest.vm.convert(SHARED_PAGE, PAGE, private=True)
        assert told(vcpu) == 0


TWO = GPA + 4 * PAGE


@pytest.mark.parametrize("finished", [True, False])
def test_an_answer_to_one_vcpu_leaves_the_owner_what_another_asked_for(
    guest: Guest, *, finished: bool
) -> None:
    with asking(guest, (TWO, 2, 0), (TWO, 2, PRIVATE)) as (first, second):
        guest.vm.convert(TWO, PAGE, private=False)
        assert told(second, -EIO) == FAILED
        assert errno_of(first.run, 0) == EPERM
        if finished:
            guest.vm.convert(TWO + PAGE, PAGE, private=False)
        else:
            guest.vm.convert(TWO, PAGE, private=True)
        assert told(first) == (0 if finished else FAILED)
        assert errno_of(guest.vm.convert, TWO, 2 * PAGE, private=finished) == EPERM


def test_what_one_vcpu_was_told_to_be_private_is_no_longer_shared_for_another(guest: Guest) -> None:
    with asking(guest, (TWO, 2, 0), (TWO + PAGE, 2, PRIVATE), (TWO, 1, 0)) as (
        first,
        second,
        third,
    ):
        guest.vm.convert(TWO, 2 * PAGE, private=False)
        guest.vm.convert(TWO + PAGE, PAGE, private=True)
        assert told(second) == 0
        assert errno_of(guest.vm.convert, TWO + PAGE, PAGE, private=False) == EPERM
        assert errno_of(first.run, 0) == EPERM
        guest.vm.convert(TWO, PAGE, private=True)
        assert told(first) == FAILED
        guest.vm.convert(TWO, PAGE, private=False)
        assert told(third) == 0


def test_a_secret_is_not_written_to_the_window(guest: Guest) -> None:
    ask = hypercall(guest_abi.MAP_GPA_RANGE, WINDOW, 1, PRIVATE)
    # test %rax, %rax; jnz over: mov %rax, (%rdi)
    write = mov(RDI, WINDOW) + "4885c0 750d" + mov(RAX, SECRET) + "488907"
    with guest.start(ask, write, TELL) as vcpu:
        vcpu.run()
        told(vcpu)
    assert SECRET.to_bytes(8, "little") not in guest.shared[:]


def test_a_page_that_another_slot_was_moved_over_is_not_private(guest: Guest) -> None:
    after = SECOND + PAGES * PAGE
    with guest.start(hypercall(guest_abi.MAP_GPA_RANGE, after - PAGE, 2, PRIVATE), TELL) as vcpu:
        vcpu.run()
        guest.slot(3, after, 3 * PAGES, private=False)
        with suppress(OSError):
            guest.vm.convert(after, PAGE, private=True)
        assert told(vcpu) == FAILED


@pytest.mark.parametrize(
    ("gpa", "npages"), [(SHARED_PAGE, 1), (GPA, PAGES), (GPA, 2 * PAGES), (SECOND - PAGE, 2)]
)
def test_private_pages_of_one_slot_or_two_are_told(guest: Guest, gpa: int, npages: int) -> None:
    with guest.start(hypercall(guest_abi.MAP_GPA_RANGE, gpa, npages, PRIVATE), TELL) as vcpu:
        vcpu.run()
        guest.vm.convert(gpa, npages * PAGE, private=True)
        if gpa == SHARED_PAGE:
            # The owner undoes the conversion before it answers. The guest does not take it for
            # done.
            guest.vm.convert(gpa, PAGE, private=False)
            assert told(vcpu) == FAILED
        else:
            assert told(vcpu) == 0
        assert errno_of(guest.vm.convert, gpa, PAGE, private=gpa == SHARED_PAGE) == EPERM


def test_what_the_owner_refuses_to_share_stays_private(guest: Guest) -> None:
    page = GPA + 4 * PAGE
    with guest.start(hypercall(guest_abi.MAP_GPA_RANGE, page, 1, 0), TELL) as vcpu:
        vcpu.run()
        assert told(vcpu, -EIO) == FAILED
        assert errno_of(guest.vm.convert, page, PAGE, private=False) == EPERM


def test_the_guest_hears_of_what_its_owner_shared_and_denies(guest: Guest) -> None:
    page = GPA + 4 * PAGE
    with guest.start(hypercall(guest_abi.MAP_GPA_RANGE, page, 2, 0), TELL) as vcpu:
        vcpu.run()
        guest.vm.convert(page, PAGE, private=False)
        for _ in range(2):
            assert errno_of(vcpu.run, -EIO) == EPERM, "one page of two is shared"
        guest.vm.convert(page + PAGE, PAGE, private=False)
        assert told(vcpu, -EIO) == 0


def test_a_refusal_of_pages_that_were_in_part_shared_before_is_believed(guest: Guest) -> None:
    with guest.start(hypercall(guest_abi.MAP_GPA_RANGE, SHARED_PAGE - PAGE, 3, 0), TELL) as vcpu:
        vcpu.run()
        assert told(vcpu, -EIO) == FAILED
        for page in (SHARED_PAGE - PAGE, SHARED_PAGE + PAGE):
            assert errno_of(guest.vm.convert, page, PAGE, private=False) == EPERM
        guest.vm.convert(SHARED_PAGE, PAGE, private=False)


def test_no_page_of_the_file_is_at_two_addresses(guest: Guest) -> None:
    if guest.vm.engine == "kernel":
        # KVM itself has it so.
        assert errno_of(guest.slot, 4, 0x6000_0000, PAGES // 2, private=True) == EINVAL
        return
    guest.slot(4, 0x6000_0000, PAGES // 2, private=True)
    with guest.start("f4") as vcpu:
        assert errno_of(vcpu.run) == EINVAL
        guest.vm.set_user_memory_region(slot=4, guest_phys_addr=0x6000_0000, memory_size=0)
        assert vcpu.run() == exits.Shutdown(13)


def test_without_the_policy_the_owner_answers_as_it_likes(service: Service) -> None:
    with (
        Vm(service) as vm,
        OwnedFd(service.memfd_restricted()) as fd,
        memory.memfd_create("shared", os.MFD_ALLOW_SEALING) as shared,
    ):
        os.ftruncate(fd.fileno(), PAGES * PAGE)
        guest = Guest(vm, mmap.mmap(-1, PAGE), shared.fileno(), fd.fileno())
        vm.set_user_memory_region(
            slot=0, guest_phys_addr=GPA, memory_size=PAGES * PAGE, restricted_fd=fd.fileno()
        )
        guest.vm.convert(GPA, PAGES * PAGE, private=True)
        with guest.start(hypercall(guest_abi.MAP_GPA_RANGE, WINDOW, 1, PRIVATE), TELL) as vcpu:
            vcpu.run()
            assert told(vcpu) == 0
