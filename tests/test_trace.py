"""Events of a run: what is in them, and where they go."""

import json
import os
import re
import resource
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from errno import ETOOMANYREFS
from pathlib import Path
from typing import Any

import pytest

from outcomes import Errno, outcome
from planting import always
from recorded_runs import engine, recorded, service
from restrictedmem.abi import kvm
from restrictedmem.fd import OwnedFd
from restrictedmem.protocol import exits, vm_wire
from restrictedmem.protocol.trace_events import VERSION, Trace, of_exit, pair
from restrictedmem.service.client import Service
from restrictedmem.service.wire import Message
from restrictedmem.units import PAGE_SIZE
from restrictedmem.vmm.recording import record
from restrictedmem.vmm.vm import Vm
from restrictedmem.vmm.vmm import Vmm
from users import ORDINARY, as_user

__all__ = ["engine", "recorded", "service"]

ROOT = Path(__file__).parent.parent
EINVAL = 22
MIB = 1 << 20
COMMON = {"ts", "pid", "tid", "event", "lost"}
KINDS: dict[str, type] = {
    "event": str,
    "private": bool,
    "side": str,
    "engine": str,
    "reason": str,
    "call": str,
    "fatal": str,
}

Event = dict[str, Any]


def documented() -> dict[str, set[str]]:
    """The table of docs/use/trace.md: event, and the fields it may have."""
    rows = re.findall(
        r"^\| (\w+) \| (?:both|engine|owner) \| (.*) \|$",
        (ROOT / "docs" / "use" / "trace.md").read_text(),
        re.MULTILINE,
    )
    return {event: set(fields.split(", ")) for event, fields in rows}


def check(events: list[Event]) -> None:
    """Check the schema: documented events and fields, kinds of values, rising time by thread."""
    known = documented()
    last: dict[int, int] = {}
    for event in events:
        assert event.keys() <= COMMON | known[event["event"]], event
        assert {"ts", "pid", "tid", "event"} <= event.keys()
        for name, value in event.items():
            kind = str if (event["event"], name) == ("fault", "result") else KINDS.get(name, int)
            assert type(value) is kind, event
        assert event["ts"] >= last.get(event["tid"], 0)
        last[event["tid"]] = event["ts"]
        assert 0 <= event.get("ns", 0) <= event["ts"]


def lines(path: Path) -> list[Event]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def drain(reader: OwnedFd | socket.socket) -> list[Event]:
    """Read to the end."""
    with open(reader.detach(), encoding="ascii") as stream:
        return [json.loads(line) for line in stream]


def read_all(reader: socket.socket) -> list[Event]:
    """Read what has come."""
    found = b""
    with suppress(BlockingIOError):
        while True:
            found += reader.recv(1 << 16, socket.MSG_DONTWAIT)
    return [json.loads(line) for line in found.splitlines()]


# A process's own part.


def test_exits_carry_what_they_are_and_nothing_of_the_guest() -> None:
    assert of_exit(exits.Hypercall(2, (0x1111, 0x2222, 0x3333, 0x4444))) == {
        "reason": "Hypercall",
        "number": 2,
    }
    assert of_exit(exits.PortOut(0x42, 4, 0xDEAD)) == {"reason": "PortOut", "port": 0x42, "size": 4}
    assert of_exit(exits.MmioWrite(0xD000_0000, 8, 0xDEAD)) == {
        "reason": "MmioWrite",
        "gpa": 0xD000_0000,
        "size": 8,
    }
    assert of_exit(exits.Debug(1, 0x4000_1234, 0)) == {"reason": "Debug"}
    fault = exits.MemoryFault(8, 0x4000_0000, 4096, 14)
    assert of_exit(fault) == {
        "reason": "MemoryFault",
        "flags": 8,
        "gpa": 0x4000_0000,
        "size": 4096,
        "errno": 14,
    }


def test_off_writes_nothing_and_says_so() -> None:
    trace = Trace()
    assert not trace.on
    trace.emit("enter", vcpu=0)


def test_without_room_events_are_lost_and_counted() -> None:
    writer, reader = pair()
    trace = Trace()
    trace.start(writer)
    for number in range(9000):
        trace.emit("enter", vcpu=number)
    got = read_all(reader)
    trace.emit("enter", vcpu=-1)
    (last,) = read_all(reader)
    assert [event["vcpu"] for event in got] == [*range(len(got))]
    assert last["lost"] == 9000 - len(got) > 0
    reader.close()
    # Nobody reads any more.
    trace.emit("enter", vcpu=0)
    assert not trace.on


def test_there_is_room_for_hundreds_of_events() -> None:
    writer, reader = pair()
    trace = Trace()
    trace.start(writer)
    for number in range(200):
        trace.emit("enter", vcpu=number)
    trace.end()
    assert [event.get("vcpu") for event in drain(reader)] == [*range(200), None]


def test_nobody_sends_anything_to_who_writes() -> None:
    writer, reader = pair()
    with writer, reader, pytest.raises(BrokenPipeError):
        reader.send(b"x")


def test_a_further_trace_ends_the_one_before() -> None:
    trace = Trace()
    readers: list[socket.socket] = []
    for number in range(2):
        writer, reader = pair()
        readers.append(reader)
        trace.start(writer)
        trace.emit("enter", vcpu=number)
    trace.end()
    assert [[event.get("vcpu") for event in drain(reader)] for reader in readers] == [
        [0],
        [1, None],
    ]


def test_a_further_trace_that_fails_ends_nothing() -> None:
    trace = Trace()
    (first, reader), (second, other) = pair(), pair()
    trace.start(first)

    def fail() -> None:
        with trace.starting(second) as write:
            write("enter", {"vcpu": 0})
            raise OSError(ETOOMANYREFS, "no room for the reader")

    assert outcome(fail) == Errno(ETOOMANYREFS)
    trace.emit("enter", vcpu=1)
    trace.end()
    assert [[event.get("vcpu") for event in drain(each)] for each in (reader, other)] == [
        [1, None],
        [0],
    ]


@pytest.mark.requires("fuse", "root")
def test_a_further_trace_that_cannot_be_sent_ends_nothing() -> None:
    """The kernel counts the descriptors that a uid's processes sent, until they are received."""

    def owner() -> tuple[object, set[str]]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))
        with Service.start() as service, Vm(service, engine="software") as vm, ExitStack() as stack:
            reader = stack.enter_context(vm.start_trace())
            sender, receiver = map(stack.enter_context, socket.socketpair())
            null = stack.enter_context(open(os.devnull, "rb")).fileno()
            with suppress(OSError):
                while True:
                    socket.send_fds(sender, [b"x"], [null] * 100)
            failed = outcome(vm.start_trace)
            receiver.close()
            vm.create_vcpu().close()
            vm.end_trace()
            return failed, {event["event"] for event in drain(reader)}

    assert as_user(owner, ORDINARY) == (Errno(ETOOMANYREFS), {"trace", "vcpu", "end"})


# A run.


@pytest.mark.requires("fuse")
def test_a_run_keeps_to_the_schema(recorded: Path, engine: str) -> None:
    events = lines(recorded)
    check(events)
    found = {event["event"] for event in events}
    elsewhere = {"vcpu", "report", "interrupt", "launch_finish"}
    assert found == documented().keys() - elsewhere - ({"fault"} if engine == "kernel" else set())
    theirs, owner = (
        next(event for event in events if event.get("side") == side) for side in ("engine", "owner")
    )
    assert (theirs["version"], theirs["engine"], theirs["policy"] & 1) == (VERSION, engine, 0)
    assert owner["version"] == VERSION
    assert owner["pid"] == os.getpid() != theirs["pid"]


@pytest.mark.requires("fuse")
def test_a_run_says_what_happened(recorded: Path, engine: str) -> None:
    events = lines(recorded)

    def of(name: str) -> list[Event]:
        return [event for event in events if event["event"] == name]

    assert [(event["slot"], event["npages"]) for event in of("slot")] == [(0, 2048), (1, 256)]
    assert len(of("enter")) == len(of("exit"))
    assert len(of("answer")) + len(of("conversion")) == len(of("exit")) - 1
    # Each conversion changes attributes, and one to shared punches; beside those, slots began
    # private.
    done = [event for event in of("conversion") if event["result"] == 0]
    assert len(done) == sum(event["errno"] == 0 for event in of("attributes") if "ns" in event)
    assert (
        len(of("invalidate_start"))
        == len(of("invalidate_end"))
        == sum(not event["private"] for event in done)
    )
    if engine == "software":
        assert {event["result"] for event in of("fault")} <= {"mapped", "retry"}
        assert {event["private"] for event in of("fault")} == {True, False}
    assert [event.get("status") for event in of("end")] == [None, 0]


@pytest.mark.requires("fuse")
def test_requests_show_with_their_errno(service: Service) -> None:
    with Vm(service, engine="software") as vm:
        reader = vm.start_trace()
        with pytest.raises(OSError):
            vm.set_user_memory_region(slot=7, guest_phys_addr=0, memory_size=1)
        vm.set_memory_attributes(0x4000_0000, 8192, private=True)
        with vm.create_vcpu() as vcpu:
            vm.launch_finish()
            vcpu.interrupt()
        vm.end_trace()
        vm.set_memory_attributes(0x4000_0000, 8192, private=False)
    events = drain(reader)
    check(events)
    assert [event["event"] for event in events] == [
        "trace",
        "slot",
        "attributes",
        "vcpu",
        "launch_finish",
        "interrupt",
        "end",
    ]
    assert events[5]["vcpu"] == 0
    assert (events[1]["slot"], events[1]["errno"]) == (7, EINVAL)
    assert (events[2]["gfn"], events[2]["npages"], events[2]["private"], events[2]["errno"]) == (
        0x40000,
        2,
        True,
        0,
    )


@pytest.mark.requires("fuse")
def test_a_report_and_the_exits_around_it(service: Service, engine: str) -> None:
    code = bytes.fromhex(
        "b900001000"  # mov    ecx, HYPERCALL_PAGE
        "b803000000"  # mov    eax, 3    (report)
        "ffd1"  # call   rcx
        "31c0"  # xor    eax, eax    (exit)
        "ffd1"  # call   rcx
    )
    fd = service.memfd_restricted()
    os.ftruncate(fd, 8192)
    with Vm(service, engine=engine) as vm:
        vm.set_user_memory_region(
            slot=0, guest_phys_addr=0x4000_0000, memory_size=8192, restricted_fd=fd
        )
        os.close(fd)
        vm.set_memory_attributes(0x4000_0000, 8192, private=True)
        vm.launch_update(0x4000_0000, code.ljust(4096, b"\0"))
        with vm.create_vcpu() as vcpu:
            vcpu.set_regs(rip=0x4000_0000, rsp=0x4000_2000)
            reader = vm.start_trace()
            assert vcpu.run() == exits.Hypercall(0, (0, 0, 0, 0))
            vm.end_trace()
    events = [event for event in drain(reader) if "vcpu" in event]
    check(events)
    assert [event["event"] for event in events] == ["enter", "report", "exit"]


@pytest.mark.requires("fuse")
def test_a_trace_that_begins_late_says_what_there_is(service: Service) -> None:
    with Vmm(4 * MIB, service, engine="software") as vmm:
        vmm.vm.set_memory_attributes(0x4000_0000 + MIB, MIB, private=False)
        reader = vmm.vm.start_trace()
        vmm.vm.end_trace()
    events = drain(reader)
    check(events)
    slots = [
        (event["slot"], event["gfn"], event["npages"])
        for event in events
        if event["event"] == "slot"
    ]
    assert slots == [(0, 0x40000, 1024), (1, 0x10000, 256)]
    private = [
        (event["gfn"], event["npages"]) for event in events if event["event"] == "attributes"
    ]
    assert private == [(0x40000, 256), (0x40200, 512)]


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("platform", ["", "snp"])
def test_a_trace_that_cannot_be_written_fails_the_command(platform: str) -> None:
    command = [
        sys.executable,
        "-m",
        "restrictedmem",
        "run",
        "--memory",
        "4M",
        "--trace",
        "/dev/full",
        "sha256",
    ]
    command[4:4] = ["--platform", platform] if platform else []
    done = subprocess.run(
        command, input="", capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert done.stdout.startswith("e3b0c442"), "the guest runs all the same"
    assert [line for line in done.stderr.splitlines() if "/dev/full" in line] == [
        "error: /dev/full: write: No space left on device"
    ]


@pytest.mark.requires("fuse")
def test_a_child_that_has_the_socket_too_does_not_keep_a_trace_from_ending(
    service: Service, tmp_path: Path
) -> None:
    held = os.pipe()
    with Vmm(8 * MIB, service, engine="software") as vmm, record(vmm, tmp_path / "run.jsonl"):
        child = os.fork()
        if child == 0:
            os.close(held[1])
            os.read(held[0], 1)
            os._exit(0)
    os.close(held[1])
    os.waitpid(child, 0)
    os.close(held[0])
    assert lines(tmp_path / "run.jsonl")[-1]["event"] == "end"


@pytest.mark.parametrize(
    ("message", "event"),
    [
        (
            Message(
                vm_wire.SET_USER_MEMORY_REGION.number,
                bytes(
                    kvm.kvm_userspace_memory_region_ext(
                        slot=3,
                        flags=4,
                        guest_phys_addr=2 * PAGE_SIZE,
                        memory_size=5 * PAGE_SIZE,
                        userspace_addr=0,
                    )
                ),
                [],
            ),
            {"event": "slot", "slot": 3, "flags": 4, "gfn": 2, "npages": 5},
        ),
        (
            Message(
                vm_wire.SET_MEMORY_ATTRIBUTES.number,
                bytes(
                    kvm.kvm_memory_attributes(address=PAGE_SIZE, size=2 * PAGE_SIZE, attributes=8)
                ),
                [],
            ),
            {"event": "attributes", "gfn": 1, "npages": 2, "private": True},
        ),
        (
            Message(
                vm_wire.ENCRYPT_UNREG_REGION.number,
                bytes(kvm.kvm_enc_region(addr=PAGE_SIZE, size=2 * PAGE_SIZE)),
                [],
            ),
            {"event": "attributes", "gfn": 1, "npages": 2, "private": False},
        ),
        (
            Message(
                vm_wire.LAUNCH_UPDATE.number,
                vm_wire.LAUNCH.pack(7 * PAGE_SIZE) + bytes(3 * PAGE_SIZE),
                [],
            ),
            {"event": "launch_update", "gfn": 7, "npages": 3},
        ),
        (
            Message(vm_wire.INTERRUPT.number, vm_wire.VCPU.pack(6), []),
            {"event": "interrupt", "vcpu": 6},
        ),
    ],
    ids=["slot", "v10", "v9", "launch_update", "interrupt"],
)
def test_a_request_is_an_event(message: Message, event: Event) -> None:
    writer, reader = pair()
    trace = Trace()
    trace.start(writer)
    trace.requests(always(None))(message)
    with pytest.raises(OSError, match="refused"):
        trace.requests(refuse)(message)
    done, refused = read_all(reader)
    reader.close()
    trace.end()
    assert {name: done[name] for name in (*event, "errno")} == {**event, "errno": 0}
    assert {name: refused[name] for name in (*event, "errno")} == {**event, "errno": EINVAL}


def refuse(_: Message) -> None:
    raise OSError(EINVAL, "refused")
