"""Targets of files and texts: a guest's ELF, a report, a trace, a VM's options, gdb's packets."""

import io
import os
import sys
from collections import Counter
from collections.abc import Iterator
from errno import E2BIG, EBADMSG, EFAULT, EINVAL, ENOEXEC, EOPNOTSUPP
from itertools import pairwise
from typing import Any, Final, cast
from unittest import mock

from fuzz.source import Source, check_declared
from restrictedmem.abi.kvm import kvm_regs
from restrictedmem.abi.kvm_x86 import kvm_sregs
from restrictedmem.cli import trace as cli_trace
from restrictedmem.cli import verify
from restrictedmem.cli.errors import CommandError
from restrictedmem.fd import OwnedFd
from restrictedmem.platform import platform
from restrictedmem.protocol import exits, guest_abi
from restrictedmem.protocol.vm_wire import ENGINES, Creation
from restrictedmem.service import report as attestation
from restrictedmem.units import PAGE_MASK
from restrictedmem.vmm import elf as guest_elf
from restrictedmem.vmm import perfetto
from restrictedmem.vmm.boot import launch_pages
from restrictedmem.vmm.gdb import rsp as protocol
from restrictedmem.vmm.gdb.gates import Gates
from restrictedmem.vmm.gdb.stub import Stub, _Detached
from restrictedmem.vmm.vm import Vcpu

_PRIVATE_SIZE: Final = 1 << 20


def elf(data: bytes) -> None:
    """A guest: what is loaded is in the file, fits the guest, and is where the headers say."""
    try:
        image = guest_elf.parse(data)
        pages = list(launch_pages(image, ["argument"], private_size=_PRIVATE_SIZE, vcpus=1))
    except OSError as error:
        check_declared(error, ENOEXEC, E2BIG)
        return
    assert sum(len(segment.data) for segment in image.segments) <= len(data)
    limit = guest_abi.PRIVATE_BASE + _PRIVATE_SIZE - guest_abi.STACK_SIZE
    for gpa, content in pages:
        assert not (gpa | len(content)) & PAGE_MASK
        assert guest_abi.PRIVATE_BASE <= gpa < gpa + len(content) <= limit
    assert all(first + len(content) < second for (first, content), (second, _) in pairwise(pages))
    for segment in image.segments:
        assert 0 < len(segment.data) <= segment.size or not segment.data
        assert guest_abi.IMAGE_BASE <= segment.gpa <= segment.gpa + segment.size <= limit
        assert segment.data in data
        if len(image.segments) == 1 and segment.data:
            gpa, content = pages[-1]
            assert content[segment.gpa - gpa :][: len(segment.data)] == segment.data


def report(data: bytes) -> None:
    """Read a report, binary or in hexadecimal.

    The parser returns what was signed, and a report with a changed byte is not signed.
    """
    with mock.patch.object(sys, "stdin", mock.Mock(buffer=io.BytesIO(data))):
        try:
            found = verify._read("-")
        except CommandError:
            return
    assert found == data or found.hex().encode() == b"".join(data.split()).lower()
    try:
        read = attestation.Report.unpack(found)
    except OSError as error:
        check_declared(error, EBADMSG)
        return
    assert len(found) == attestation.REPORT_BYTES
    size = len(read.pack())
    assert read.pack() == found[:size]
    assert verify._fields(read)
    if attestation.signed_by_its_key(found):
        for index in (12, size - 1, size, len(found) - 1):
            changed = found[:index] + bytes([found[index] ^ 1]) + found[index + 1 :]
            assert not attestation.signed_by_its_key(changed), index


def trace(data: bytes) -> None:
    """Convert a trace: it is converted whole, each slice has begin and end, no part of it grows."""
    lines = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors="replace")
    try:
        found = perfetto.read(cli_trace._lines(lines))
    except OSError as error:
        check_declared(error, EINVAL)
        return
    assert len(found.events) <= data.count(b"\n") + 1
    assert all(one["ts"] <= other["ts"] for one, other in pairwise(found.events))
    converted = perfetto.convert(found.events)
    assert len(converted) <= 100 * len(data) + 1000
    depth = Counter[int]()
    for number, packet in _fields(converted):
        assert number == 1
        event = dict(_fields(cast("bytes", dict(_fields(cast("bytes", packet))).get(11, b""))))
        depth[cast("int", event.get(11, 0))] += {1: 1, 2: -1}.get(cast("int", event.get(9, 0)), 0)
        assert min(depth.values()) >= 0, "a slice ends before it begins"
    assert not any(depth.values()), "a slice does not end"


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Decode one level of protobuf, whole."""
    at = 0

    def varint() -> int:
        nonlocal at
        found = shift = 0
        while True:
            found |= (data[at] & 0x7F) << shift
            shift, at = shift + 7, at + 1
            if not data[at - 1] & 0x80:
                assert found < 1 << 64
                return found

    while at < len(data):
        number, kind = divmod(varint(), 8)
        assert number
        assert kind in (0, 2)
        value = varint()
        if kind:
            assert at + value <= len(data)
            yield number, data[at : at + value]
            at += value
        else:
            yield number, value


def creation(data: bytes) -> None:
    """Read SPAWN's arguments of a VM.

    All accepted options are known, and writing them gives the same.
    """
    try:
        found = Creation.load(data.decode(errors="replace"))
    except OSError as error:
        check_declared(error, EINVAL, EOPNOTSUPP)
        return
    assert found.engine in ENGINES
    assert 0 <= found.policy < 4
    assert type(found.policy) is int
    assert found.platform in ("", *platform.NAMES)
    assert not (found.platform and found.engine == "kernel")
    assert Creation.load(found.dump()) == found


class _Vcpu:
    """A vCPU with the parts that the stub needs."""

    def __init__(self) -> None:
        self.regs = kvm_regs()
        self.breakpoints: frozenset[int] = frozenset()

    def get_regs(self) -> kvm_regs:
        return kvm_regs.from_buffer_copy(self.regs)

    def get_sregs(self) -> kvm_sregs:
        return kvm_sregs()

    def change_regs(self, regs: kvm_regs) -> None:
        self.regs = kvm_regs.from_buffer_copy(regs)

    def set_guest_debug(self, *, step: bool, breakpoints: frozenset[int]) -> None:
        assert all(0 <= address < 1 << 64 for address in breakpoints)
        self.breakpoints = breakpoints

    def interrupt(self) -> None:
        raise AssertionError("no vCPU is in the guest")


class _Guest:
    """A VMM and its VM as far as the stub needs them: two pages of memory, and two idle vCPUs."""

    START: Final = 0x1000

    def __init__(self) -> None:
        self.vm = self
        self.vcpus = (_Vcpu(), _Vcpu())
        self.outcome = None
        self.enter = _never
        self.memory = bytearray(0x2000)
        self.stopped = False

    def stop(self) -> None:
        self.stopped = True

    def _check(self, gpa: int, size: int) -> int:
        assert 0 <= gpa <= gpa + size <= 1 << 64
        start = gpa - self.START
        if not 0 <= start <= start + size <= len(self.memory):
            raise OSError(EFAULT, "DBG_READ: no slot")
        return start

    def read_memory(self, gpa: int, size: int) -> bytes:
        start = self._check(gpa, size)
        return bytes(self.memory[start : start + size])

    def write_memory(self, gpa: int, data: bytes) -> None:
        start = self._check(gpa, len(data))
        self.memory[start : start + len(data)] = data


def _never(vcpu: Vcpu, value: int) -> exits.Exit:
    raise AssertionError("no vCPU runs")


class _Gdb:
    """The stub's connection: what it answered."""

    acknowledge = True

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send(self, payload: bytes) -> None:
        self.sent.append(payload)


def rsp(data: bytes) -> None:
    """Read gdb's bytes.

    However they are split, the stub finds the same packets. It answers each by one packet, or lets
    the guest run.
    """
    source = Source(data)
    step, stream = source.number(1) + 1, source.rest()
    items = list(protocol.Parser().feed(stream))
    slow = protocol.Parser()
    pieces = [
        item for at in range(0, len(stream), step) for item in slow.feed(stream[at : at + step])
    ]
    assert items == pieces, "where the stream is cut makes a difference"
    assert protocol.unescape(protocol.escape(stream)) == stream
    assert [*protocol.Parser().feed(protocol.frame(protocol.escape(stream)))] == [
        protocol.escape(stream)
    ]
    with OwnedFd(os.eventfd(0, os.EFD_NONBLOCK)) as wake:
        _obey(items, wake.fileno())


def _obey(items: list[bytes | protocol.Sign], wake: int) -> None:
    guest = _Guest()
    # Without its thread, which waits for a connection.
    stub = cast("Any", Stub.__new__(Stub))
    stub._vmm, stub._stopped, stub._gates = guest, wake, Gates(cast("Any", guest), wake)
    stub._current, stub._breakpoints, stub._swbreak = (
        stub._gates.all[0],
        set[tuple[bytes, int]](),
        False,
    )
    stub._last_stop = stub._stop_reply(stub._current, 5)
    for packet in items:
        if isinstance(packet, protocol.Sign):
            continue
        gdb = _Gdb()
        try:
            runs = stub._obey(gdb, packet)
        except _Detached:
            assert packet[:1] in (b"D", b"k")
            return
        assert len(gdb.sent) == (not runs)
        if runs:
            stub._gates.shut()
        for payload in gdb.sent:
            assert len(payload) <= protocol.PACKET_SIZE
            assert [*protocol.Parser().feed(protocol.frame(payload))] == [payload]
            _check_effect(guest, packet, payload)


def _check_effect(guest: _Guest, packet: bytes, payload: bytes) -> None:
    """Check of a few packets in gdb's own form that what was done is what was asked for."""
    command, rest = packet[:1], packet[1:]
    if command == b"X" and payload == b"OK":
        where, _, content = rest.partition(b":")
        start = int(where.split(b",")[0], 16) - guest.START
        found = protocol.unescape(content)
        assert guest.memory[start : start + len(found)] == found
    if command == b"m" and payload[:1] != b"E":
        start, size = (int(word, 16) for word in rest.split(b","))
        asked = guest.memory[start - guest.START :][: min(size, protocol.PACKET_SIZE // 2)]
        assert bytes.fromhex(payload.decode()) == asked
    if packet == b"vKill;1":
        assert guest.stopped
