"""After the launch, nothing but what the guest passes leaves the engine.

Pages become shared at the guest's word alone.
"""

import os
import struct

import pytest

from launching import (
    CALL,
    GPA,
    R10,
    RAX,
    RCX,
    RDI,
    RDX,
    RSI,
    RSP,
    code,
    engine,
    errno_of,
    explicit,
    fd,
    hypercall,
    mov,
    service,
    start,
    vm,
)
from restrictedmem.abi import kvm, memory
from restrictedmem.fd import OwnedFd
from restrictedmem.protocol import exits, guest_abi, vm_wire
from restrictedmem.service.client import Service
from restrictedmem.service.wire import Call, Channel
from restrictedmem.vmm.vm import Vm

__all__ = ["engine", "explicit", "fd", "service", "vm"]

MIB = 1 << 20
PAGE = 4096
EPERM, EIO = 1, 5


# Conversions at the guest's word.


SHARED_PAGE = GPA + 16 * PAGE


@pytest.mark.requires("fuse")
def test_pages_become_shared_only_when_the_guest_asks(service: Service, explicit: Vm) -> None:
    ask = hypercall(guest_abi.MAP_GPA_RANGE, SHARED_PAGE, 2, 0)
    take_back = hypercall(
        guest_abi.MAP_GPA_RANGE, SHARED_PAGE, 2, guest_abi.MAP_GPA_RANGE_ENCRYPTED
    )
    # mov %rax, %rdi: tells what it was told
    tell = "4889c7" + mov(RAX, guest_abi.EXIT) + CALL
    with start(
        explicit, code(hypercall(guest_abi.EXIT, 1), ask, take_back, tell, take_back, tell)
    ) as vcpu:
        vcpu.run()
        assert errno_of(explicit.convert, SHARED_PAGE, PAGE, private=False) == EPERM
        asked = exits.Hypercall(guest_abi.MAP_GPA_RANGE, (SHARED_PAGE, 2, 0, 0))
        assert vcpu.run() == asked
        assert errno_of(explicit.convert, SHARED_PAGE, 3 * PAGE, private=False) == EPERM
        assert errno_of(explicit.convert, SHARED_PAGE - PAGE, 2 * PAGE, private=False) == EPERM
        explicit.convert(SHARED_PAGE, 2 * PAGE, private=False)
        vcpu.run(0)
        explicit.convert(SHARED_PAGE, PAGE, private=True)
        assert errno_of(vcpu.run, 0) == EPERM, "one page is shared still"
        explicit.convert(SHARED_PAGE, 2 * PAGE, private=False)
        assert vcpu.run(0) == exits.Hypercall(guest_abi.EXIT, ((1 << 64) - EIO, 0, 0, 0)), (
            "both are shared still"
        )
        vcpu.run(0)
        explicit.convert(SHARED_PAGE, 2 * PAGE, private=True)
        assert vcpu.run(0) == exits.Hypercall(guest_abi.EXIT, (0, 0, 0, 0))


@pytest.mark.requires("fuse")
def test_slots_that_were_private_at_the_launch_stay(service: Service, explicit: Vm) -> None:
    with start(explicit, code(hypercall(guest_abi.EXIT, 1))) as vcpu:
        with OwnedFd(service.memfd_restricted()) as other:
            os.ftruncate(other.fileno(), PAGE)
            explicit.set_user_memory_region(
                slot=5, guest_phys_addr=GPA + MIB, memory_size=PAGE, restricted_fd=other.fileno()
            )
        explicit.set_user_memory_region(slot=5, guest_phys_addr=GPA + MIB, memory_size=0)
        explicit.launch_finish()
        with OwnedFd(service.memfd_restricted()) as other:
            os.ftruncate(other.fileno(), PAGE)
            again = {
                "guest_phys_addr": GPA + MIB,
                "memory_size": PAGE,
                "restricted_fd": other.fileno(),
            }
            assert errno_of(explicit.set_user_memory_region, slot=5, **again) == EPERM
        assert (
            errno_of(explicit.set_user_memory_region, slot=0, guest_phys_addr=GPA, memory_size=0)
            == EPERM
        )
        # Others come and go.
        with memory.memfd_create("window") as window:
            os.ftruncate(window.fileno(), PAGE)
            explicit.set_user_memory_region(
                slot=1, guest_phys_addr=0x1000_0000, memory_size=PAGE, shared_fd=window.fileno()
            )
            explicit.set_user_memory_region(slot=1, guest_phys_addr=0x1000_0000, memory_size=0)
        assert vcpu.run() == exits.Hypercall(guest_abi.EXIT, (1, 0, 0, 0))


@pytest.mark.requires("fuse")
@pytest.mark.parametrize(
    "asked",
    [
        (SHARED_PAGE + 1, 1, 0),
        (SHARED_PAGE, 0, 0),
        (SHARED_PAGE, (1 << 64) - 1, 16),
        (0, (1 << 64) - 1, 16),
        ((1 << 64) - PAGE, 2, 0),
    ],
)
def test_words_of_a_guest_that_mean_nothing(
    service: Service, explicit: Vm, asked: tuple[int, int, int]
) -> None:
    with start(
        explicit, code(hypercall(guest_abi.MAP_GPA_RANGE, *asked), hypercall(guest_abi.EXIT, 1))
    ) as vcpu:
        assert vcpu.run() == exits.Hypercall(guest_abi.MAP_GPA_RANGE, (*asked, 0))
        assert errno_of(explicit.convert, SHARED_PAGE, PAGE, private=False) == EPERM
        assert vcpu.run(0) == exits.Hypercall(guest_abi.EXIT, (1, 0, 0, 0))


# Nothing else leaves the engine.


SECRET = int.from_bytes(b"\xf5secret\x9b", "little")
#: All but rsp, which a call needs.
_FULL = "".join(mov(register, SECRET) for register in range(16) if register != RSP)

OFFENCES = {
    "hlt": "f4",
    "ud2": "0f0b",
    "div by zero": mov(RCX, 0) + mov(RDX, 0) + "48f7f1",
    "int3": "cc",
    "syscall": "0f05",
    "load where nothing is": "48a1" + (0x9000_0000).to_bytes(8, "little").hex(),
    "load where nothing can be": "488b03",
    "call where nothing is": mov(RAX, 0x9000_0000) + "ffd0",
    "cpuid": "0fa2f4",
    "out": "e642",
    "in": "e442",
    "string out": mov(RSI, GPA) + mov(RDX, 0x42) + "6e",
    **{
        f"hypercall {number}": mov(RAX, number)
        + "".join(
            mov(register, 0)
            for register in (RDI, RSI, RDX, R10)[: guest_abi.ARGUMENTS.get(number, 4)]
        )
        + CALL
        for number in (*guest_abi.ARGUMENTS, 6, 1000)
        if number != guest_abi.REPORT
    },
}


def replies(sock: Channel, number: int, body: bytes) -> bytes:
    """Make a call, whatever the number, and return all that comes back."""
    try:
        data, _ = sock.call(Call("a call", number), body)
    except OSError as error:
        return str(error).encode()
    return data


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("offence", OFFENCES)
def test_no_exit_shows_a_register_that_the_guest_did_not_pass(vm: Vm, offence: str) -> None:
    secret = SECRET.to_bytes(8, "little")
    with start(vm, code(_FULL, OFFENCES[offence])) as vcpu:
        channel: Channel = vcpu._channel  # pyright: ignore[reportPrivateUsage]
        found = [replies(channel, vm_wire.RUN.number, vm_wire.COMPLETION.pack(0)) for _ in range(3)]
    for reply in found:
        # No piece of one is there either: ports are a byte wide, and nothing else is asked for.
        assert not any(secret[at : at + 2] in reply for at in range(7)), reply.hex()


@pytest.mark.requires("fuse")
def test_no_message_shows_a_register_or_private_memory(vm: Vm) -> None:
    secret = SECRET.to_bytes(8, "little")
    numbers = [call.number for call in vars(vm_wire).values() if isinstance(call, Call)] + [
        0,
        1,
        1 << 16,
        1 << 31,
        kvm.KVM_RUN.request + 2,
    ]
    bodies = [
        b"",
        struct.pack("<Q", GPA),
        struct.pack("<QQ", GPA, PAGE),
        struct.pack("<QQQQ", GPA, PAGE, 0, 0),
        bytes(144),
        bytes(160),
    ]
    with start(
        vm, code(_FULL, hypercall(guest_abi.EXIT, 1), "ebfe") + secret * (PAGE // 8)
    ) as vcpu:
        assert isinstance(vcpu.run(), exits.Hypercall)
        mine: Channel = vm._channel  # pyright: ignore[reportPrivateUsage]
        its: Channel = vcpu._channel  # pyright: ignore[reportPrivateUsage]
        for channel, runs in ((mine, False), (its, True)):
            for number in numbers:
                for body in bodies:
                    if not (
                        runs
                        and number == vm_wire.RUN.number
                        and len(body) == vm_wire.COMPLETION.size
                    ):
                        reply = replies(channel, number, body)
                        assert secret[:4] not in reply, (hex(number), reply)
                        assert secret[4:] not in reply, (hex(number), reply)


@pytest.mark.requires("fuse")
def test_a_port_shows_as_many_bytes_as_it_is_wide(vm: Vm, engine: str) -> None:
    if engine == "kernel":
        pytest.skip("ports in private memory: docs/reference/engines.md")
    with start(vm, code(_FULL, mov(RAX, SECRET), "e642", "66e742", "e742")) as vcpu:
        assert [vcpu.run() for _ in range(3)] == [
            exits.PortOut(0x42, size, SECRET & (1 << 8 * size) - 1) for size in (1, 2, 4)
        ]
