"""The protocol of the GDB remote stub, spoken by hand, as gdb speaks it and as gdb never would."""

import contextlib
import io
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gdb_guest import (
    DEADLINE,
    PRIVATE_SIZE,
    STATUS,
    Host,
    counted,
    debugged,
    guest,
    host,
    service,
    symbol,
    wait_for_more,
)
from restrictedmem.service.client import Service
from restrictedmem.vmm import elf
from restrictedmem.vmm.gdb import rsp, target
from restrictedmem.vmm.gdb.stub import serve
from restrictedmem.vmm.vmm import Ended, Vmm
from waiting import wait_until

__all__ = ["guest", "host", "service"]

EPERM = 1


# By hand.


class Gdb:
    """gdb's end, without acknowledgements."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE)
        self._parser = rsp.Parser()
        self._waiting: list[bytes] = []
        assert self.ask(b"QStartNoAckMode") == b"OK"
        self.sock.sendall(b"+")

    def send(self, payload: bytes) -> None:
        self.sock.sendall(rsp.frame(payload))

    def receive(self) -> bytes | None:
        """Return the next reply; None when the stub has hung up."""
        while not self._waiting:
            data = self.sock.recv(65536)
            if not data:
                return None
            self._waiting += [item for item in self._parser.feed(data) if isinstance(item, bytes)]
        return self._waiting.pop(0)

    def ask(self, payload: bytes) -> bytes:
        self.send(payload)
        answer = self.receive()
        assert answer is not None, "the stub hung up"
        return answer

    def __enter__(self) -> "Gdb":
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


@pytest.mark.requires("fuse", "cc")
def test_what_gdb_asks_for(host: Host, guest: Path, tmp_path: Path) -> None:
    with debugged(host, guest, tmp_path) as run, Gdb(run.port) as client:
        assert client.ask(b"?") == b"T05thread:1;"
        assert b"swbreak+" in client.ask(b"qSupported:multiprocess+;swbreak+")
        assert client.ask(b"qC") == b"QC1"
        assert client.ask(b"qfThreadInfo") == b"m1"
        assert client.ask(b"qsThreadInfo") == b"l"
        assert client.ask(b"vCont?") == b"vCont;c;C;s;S"
        assert client.ask(b"Hg0") == client.ask(b"Hc-1") == client.ask(b"T1") == b"OK"
        assert client.ask(b"T2") == b"E16"
        whole = client.ask(b"qXfer:features:read:target.xml:0,1fff")
        assert whole == b"l" + rsp.escape(target.description())
        assert (
            client.ask(b"qXfer:features:read:target.xml:0,10") == b"m" + target.description()[:16]
        )
        registers = client.ask(b"g")
        assert len(registers) == 2 * sum(register.size for register in target.REGISTERS)
        entry = elf.parse(guest.read_bytes()).entry
        assert (
            client.ask(b"p10")
            == registers[16 * 16 : 17 * 16]
            == entry.to_bytes(8, "little").hex().encode()
        )
        assert client.ask(b"G" + registers) == b"OK"
        assert client.ask(b"P0=2a00000000000000") == b"OK"
        assert client.ask(b"p0") == b"2a00000000000000"
        assert (
            client.ask(b"P12=00000000")
            == client.ask(b"P0=00")
            == client.ask(b"p99")
            == client.ask(b"G00")
            == b"E16"
        )
        # Memory ends in the middle.
        end = 0x4000_0000 + PRIVATE_SIZE
        assert client.ask(b"m%x,10" % (end - 4)) == b"00" * 4
        assert client.ask(b"m%x,10" % end) == b"E0e"
        assert client.ask(b"m%x,0" % entry) == b""
        assert client.ask(b"M%x,2:1122" % (end - 8)) == b"OK"
        assert client.ask(b"X%x,3:" % (end - 6) + rsp.escape(b"}#$")) == b"OK"
        assert client.ask(b"m%x,5" % (end - 8)) == b"11227d2324"
        assert (
            client.ask(b"M%x,2:11" % (end - 8))
            == client.ask(b"m1")
            == client.ask(b"m-1,4")
            == b"E16"
        )
        assert (
            client.ask(b"Z2,%x,4" % entry)
            == client.ask(b"qUnheardOf")
            == client.ask(b"!")
            == client.ask(b"vMustReplyEmpty")
            == b""
        )
        assert client.ask(b"vCont;t") == b"E16"
        client.send(b"vCont;s:1;c")
        assert client.receive() == b"T05thread:1;"
        address = symbol(guest, "twice")
        assert client.ask(b"Z0,%x,1" % address) == b"OK"
        assert client.ask(b"c") == b"T05thread:1;swbreak:;"
        assert client.ask(b"?") == b"T05thread:1;swbreak:;"
        assert client.ask(b"z0,%x,1" % address) == b"OK"
        assert client.ask(b"c") == b"W%02x" % STATUS
        assert client.receive() is None


@pytest.mark.requires("fuse", "cc")
@pytest.mark.parametrize("how", ["detach", "die while stopped", "die while running"])
def test_without_gdb_the_guest_goes_on(how: str, host: Host, guest: Path, tmp_path: Path) -> None:
    with debugged(host, guest, tmp_path) as run:
        with Gdb(run.port) as client:
            address = symbol(guest, "twice")
            assert client.ask(b"Z0,%x,1" % address) == b"OK"
            assert client.ask(b"c") == b"T05thread:1;"
            if how == "detach":
                assert client.ask(b"D") == b"OK"
                assert client.receive() is None
            elif how == "die while running":
                client.send(b"c")
        assert run.ended() == Ended(STATUS)
    assert (tmp_path / "out").read_bytes() == b"hello\n"


@pytest.mark.requires("fuse", "cc")
def test_all_vcpus_stop_together_and_go_on(host: Host, guest: Path, tmp_path: Path) -> None:
    start, size = symbol(guest, "spin"), 64
    with debugged(host, guest, tmp_path, "s", vcpus=3) as run, Gdb(run.port) as client:
        for number in range(15):
            client.send(b"c")
            wait_for_more(run, guest)
            client.sock.sendall(b"\x03")
            assert re.fullmatch(rb"T02thread:[123];", client.receive() or b"")
            stopped = counted(run, guest)
            for thread in (1, 2, 3):
                assert client.ask(b"Hg%x" % thread) == b"OK"
                rip = int.from_bytes(bytes.fromhex(client.ask(b"p10").decode()), "little")
                # At first it may still wait for the others, one of which has counted.
                assert start <= rip < start + size or thread > 1 or not number
                assert client.ask(b"vCont;s:%x" % thread) == b"T05thread:%x;" % thread
            assert counted(run, guest) - stopped in range(4)


@pytest.mark.requires("fuse", "cc")
def test_kill_ends_the_guest(host: Host, guest: Path, tmp_path: Path) -> None:
    with debugged(host, guest, tmp_path, "s") as run, Gdb(run.port) as client:
        client.send(b"k")
        ended = run.ended()
    assert isinstance(ended, Ended)
    assert ended.interrupted


@pytest.mark.requires("fuse", "cc")
def test_the_guest_may_be_stopped_before_gdb_comes_and_while_it_looks(
    host: Host, guest: Path, tmp_path: Path
) -> None:
    for connected in (False, True):
        with debugged(host, guest, tmp_path) as run, contextlib.ExitStack() as stack:
            if connected:
                client = stack.enter_context(Gdb(run.port))
                assert client.ask(b"?") == b"T05thread:1;"
            run.vmm.stop()
            ended = run.ended()
        assert isinstance(ended, Ended)
        assert ended.interrupted


@pytest.mark.requires("fuse", "cc")
@pytest.mark.parametrize("first", [b"?", b"c"], ids=["stopped", "running"])
def test_a_gdb_that_does_not_read_keeps_no_guest(
    first: bytes, host: Host, guest: Path, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as stack:
        with debugged(host, guest, tmp_path, "s", vcpus=2) as run:
            client = stack.enter_context(Gdb(run.port))
            client.send(first)
            client.sock.setblocking(False)
            # Each asks for the last reply once more.
            wait_until(
                lambda: not _sends(client.sock, b"-" * 4096) and _writes("gdb"),
                "the stub to wait for a reader",
                DEADLINE,
            )
            run.vmm.stop()
            ended = run.ended()
        # The stub has ended too.
        assert not _writes("gdb")
    assert isinstance(ended, Ended)
    assert ended.interrupted


def _sends(sock: socket.socket, data: bytes) -> bool:
    try:
        return sock.send(data) > 0
    except BlockingIOError:
        return False


def _writes(name: str) -> bool:
    """Say whether a thread is inside ``Connection._write``."""
    frames = sys._current_frames()  # pyright: ignore[reportPrivateUsage]
    return any(
        thread.name == name and frames[thread.ident or 0].f_code.co_name == "_write"
        for thread in threading.enumerate()
    )


@pytest.mark.requires("fuse", "cc")
def test_a_vm_that_is_not_for_debugging_has_no_stub(service: Service, guest: Path) -> None:
    with Vmm(PRIVATE_SIZE, service, engine="software") as vmm:
        vmm.load(elf.parse(guest.read_bytes()))
        with pytest.raises(OSError) as caught, serve(vmm, 0, "guest.elf", io.StringIO()):
            pytest.fail("it was served")
    assert caught.value.errno == EPERM


@pytest.mark.requires("fuse", "cc")
def test_the_engine_dies_while_gdb_looks(host: Host, guest: Path, tmp_path: Path) -> None:
    with debugged(host, guest, tmp_path) as run, Gdb(run.port) as client:
        os.kill(run.vmm.statistics()["pid"], signal.SIGKILL)
        wait_until(lambda: client.ask(b"g") == b"E6b", "the engine to be gone", DEADLINE)
        client.sock.close()
        ended = run.ended()
    assert isinstance(ended, OSError)


# Packets that gdb would never send.


@given(st.binary(max_size=200))
def test_escaping_is_undone(data: bytes) -> None:
    escaped = rsp.escape(data)
    assert not set(escaped) & set(b"#$*")
    assert rsp.unescape(escaped) == data


@given(st.lists(st.binary(max_size=60).map(rsp.escape), max_size=5), st.data())
def test_packets_survive_any_cut(payloads: list[bytes], data: st.DataObject) -> None:
    stream = b"+".join(rsp.frame(payload) for payload in payloads)
    parser = rsp.Parser()
    found: list[bytes | rsp.Sign] = []
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        found += parser.feed(stream[:cut])
        stream = stream[cut:]
    assert found == payloads


@given(st.binary(max_size=400))
def test_the_parser_takes_anything(data: bytes) -> None:
    parser = rsp.Parser()
    list(parser.feed(data))
    # An unfinished packet swallows what comes, to its longest length or the next '#': after that,
    # it is as new.
    list(parser.feed(b"#00" + b"x" * (rsp.PACKET_SIZE + 8)))
    assert [*parser.feed(rsp.frame(b"?"))][-1:] == [b"?"]


def test_a_packet_without_an_end_is_dropped_once() -> None:
    parser = rsp.Parser()
    assert list(parser.feed(b"$" + b"a" * (rsp.PACKET_SIZE + 2))) == []
    assert list(islice(parser.feed(b"a"), 2)) == [rsp.Sign.BROKEN]
    assert list(parser.feed(rsp.frame(b"?"))) == [b"?"]


COMMANDS = st.sampled_from(
    [*b"gGpPmMXHTqQvcsCSR!?", *(b"Z0,", b"z1,", b"vCont", b"qXfer:", b"QStart")]
)
NUMBERS = st.sampled_from(
    [
        b"",
        b"-1",
        b"0",
        b"1",
        b"2",
        b"4000f000",
        b"f" * 16,
        b"1" + b"0" * 16,
        b"zz",
        b",",
        b":",
        b";",
        b"=",
    ]
)


@st.composite
def packets(draw: st.DrawFn) -> bytes:
    command = draw(COMMANDS)
    head = bytes([command]) if isinstance(command, int) else command
    packet = head + b"".join(draw(st.lists(NUMBERS, max_size=5))) + draw(st.binary(max_size=8))
    # These packets are well-formed, and end the session or send the guest somewhere else.
    assume(not packet.startswith((b"vKill", b"P10=")))
    return packet


@pytest.fixture(scope="module")
def endless(host: Host, guest: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gdb]:
    with (
        debugged(host, guest, tmp_path_factory.mktemp("endless"), "s") as run,
        Gdb(run.port) as client,
    ):
        yield client


@pytest.mark.requires("fuse", "cc")
@settings(max_examples=300, deadline=None)
@given(said=st.lists(packets(), max_size=8), noise=st.binary(max_size=8))
def test_the_stub_takes_anything(endless: Gdb, said: list[bytes], noise: bytes) -> None:
    for packet in said:
        endless.send(rsp.escape(packet))
    endless.sock.sendall(noise.replace(b"$", b""))
    # Stop the vCPU that runs now; then the stub answers as before.
    endless.sock.sendall(b"\x03")
    endless.send(b"qC")
    while (answer := endless.receive()) != b"QC1":
        assert answer is not None, "the stub hung up"
