"""The GDB remote stub: the real gdb in batch mode, and its protocol spoken by hand where gdb would never say it."""

import contextlib
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from restrictedmem.protocol import exits
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.vmm import elf
from restrictedmem.vmm.gdb import rsp, target
from restrictedmem.vmm.gdb.stub import serve
from restrictedmem.vmm.vmm import Ended, Vmm
from waiting import wait_until

ROOT = Path(__file__).parent.parent
DEADLINE = 20.0
EPERM = 1
PRIVATE_SIZE = 4 << 20

GUEST = """
#include <restrictedmem/guest.h>

static volatile u64 counter, seen;

static __attribute__((noinline)) u64 twice(u64 x)
{
	counter += x;
	return 2 * x;
}

static __attribute__((noinline)) void spin(void)
{
	for (;;)
		asm volatile("lock incq %0" : "+m"(counter) : : "cc");
}

int secondary(const struct boot_info *boot, u64 index)
{
	(void)boot;
	seen = index;
	spin();
	return 0;
}

int main(const struct boot_info *boot)
{
	static const char text[] = "hello\\n";
	const char *args = (const char *)boot->args;
	u64 sum = 0;

	/* The others have their say before this one ends the guest. */
	while (boot->vcpus > 1 && !seen)
		;

	if (boot->argc && args[0] == 's')
		spin();
	if (boot->argc && args[0] == 'd')
		asm volatile("divl %0" : : "r"(0) : "eax", "edx", "cc");
	for (u64 i = 1; i <= 3; i++)
		sum += twice(i);
	if (guest_write(boot, STREAM_OUT, text, sizeof text - 1))
		return 1;
	return (int)sum;
}
"""
#: What the stub tells to type first: `watch` fails without it.
OWN_WATCHPOINTS = "set can-use-hw-watchpoints 0"
#: What main returns.
STATUS = 12


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guest with symbols."""
    folder = tmp_path_factory.mktemp("guest")
    (folder / "guest.c").write_text(GUEST)
    flags = "-g -O1 -std=gnu11 -march=x86-64 -ffreestanding -fno-pie -mgeneral-regs-only -mno-red-zone -fcf-protection=none"
    flags += " -fno-stack-protector -nostdlib -static -no-pie -Wl,--build-id=none -Wl,-z,max-page-size=4096 -Wl,-z,noexecstack"
    sources = [str(ROOT / "guests" / "start.S"), str(folder / "guest.c")]
    script = ["-I", str(ROOT / "guests" / "include"), f"-Wl,-T,{ROOT / 'guests' / 'guest.ld'}"]
    compiler = shutil.which("gcc") or "cc"
    subprocess.run(
        [compiler, *flags.split(), *script, "-o", str(folder / "guest.elf"), *sources], check=True
    )
    return folder / "guest.elf"


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with Service.start(Options()) as found:
        yield found


@dataclass(frozen=True)
class Host:
    service: Service
    engine: str


@pytest.fixture(
    scope="module", params=["software", pytest.param("kernel", marks=pytest.mark.requires("kvm"))]
)
def host(request: pytest.FixtureRequest, service: Service) -> Host:
    return Host(service, request.param)


@dataclass
class Run:
    """A guest under the stub."""

    vmm: Vmm
    port: int
    out: Path
    outcome: list[Ended | BaseException] = field(default_factory=list["Ended | BaseException"])

    def ended(self) -> Ended | BaseException:
        wait_until(lambda: bool(self.outcome), "the guest to end", DEADLINE)
        return self.outcome[0]


@contextlib.contextmanager
def debugged(
    host: Host, image: Path, tmp_path: Path, *arguments: str, vcpus: int = 1
) -> Generator[Run]:
    talk = io.StringIO()
    out = tmp_path / "out"
    with Vmm(PRIVATE_SIZE, host.service, vcpus=vcpus, engine=host.engine, debug=True) as vmm:
        vmm.load(elf.parse(image.read_bytes()), arguments)
        with serve(vmm, 0, "guest.elf", talk) as port:
            before, after = f"-ex '{OWN_WATCHPOINTS}'", f"-ex 'target remote 127.0.0.1:{port}'"
            assert talk.getvalue() == f"gdb: type  gdb guest.elf {before} {after}\n"
            run = Run(vmm, port, out)

            def drive() -> None:
                try:
                    with open(os.devnull, "rb") as empty, out.open("wb") as file:
                        run.outcome.append(vmm.run(empty, file, file))
                except BaseException as error:
                    run.outcome.append(error)

            thread = threading.Thread(target=drive, daemon=True)
            thread.start()
            try:
                yield run
            finally:
                vmm.stop()
                thread.join(DEADLINE)
                assert not thread.is_alive(), "the guest did not end"


def symbol(image: Path, name: str) -> int:
    listed = subprocess.run(["nm", str(image)], capture_output=True, text=True, check=True).stdout
    return next(int(line.split()[0], 16) for line in listed.splitlines() if line.split()[2] == name)


def counted(run: Run, image: Path) -> int:
    return int.from_bytes(run.vmm.vm.read_memory(symbol(image, "counter"), 8), "little")


def wait_for_more(run: Run, image: Path) -> None:
    before = counted(run, image)
    wait_until(lambda: counted(run, image) != before, "the guest to count", DEADLINE)


# The real gdb.


def gdb_command(image: Path, port: int, *commands: str) -> list[str]:
    first = (
        "set debuginfod enabled off",
        "set confirm off",
        OWN_WATCHPOINTS,
        f"target remote 127.0.0.1:{port}",
    )
    words = [word for command in (*first, *commands) for word in ("-ex", command)]
    return ["gdb", "-q", "-nx", "-batch", *words, str(image)]


def gdb(image: Path, port: int, *commands: str) -> str:
    done = subprocess.run(
        gdb_command(image, port, *commands), capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout + done.stderr


needs_gdb = pytest.mark.requires("fuse", "cc", "gdb")


@needs_gdb
def test_a_session(host: Host, guest: Path, tmp_path: Path) -> None:
    with debugged(host, guest, tmp_path) as run:
        said = gdb(
            guest,
            run.port,
            "info symbol $pc",
            "break main",
            "continue",
            "print boot->version",
            "print/x $rdi",
            "break twice",
            "continue",
            "print x",
            "backtrace",
            "finish",
            "print counter",
            "stepi",
            "info registers rip eflags cs fs_base",
            "print $st0",
            "delete",
            "info threads",
            "set var counter = 40",
            "next",
            "print counter",
            "set $r15 = 100",
            "print $r15",
            "continue",
        )
        ended = run.ended()
    assert "_start in section .text" in said
    assert re.search(r"Breakpoint 1, main \(boot=0x40000000\)", said)
    assert "= 0x40000000" in said
    assert re.search(r"Breakpoint 2, twice \(x=.*1\)", said)
    assert re.search(r"#1 .* in main \(", said)
    assert "Value returned is" in said
    assert "<unavailable>" in said
    assert re.search(r"\* 1 +Thread 1 \(vCPU 0\)", said)
    assert "exited with code" in said
    assert isinstance(ended, Ended)
    assert ended.fatal is None
    # What it was set to, and what two more turns added.
    assert "= 45" in said
    assert "= 100" in said
    assert (tmp_path / "out").read_bytes() == b"hello\n"


@needs_gdb
def test_a_breakpoint_in_a_loop_stops_at_each_turn(host: Host, guest: Path, tmp_path: Path) -> None:
    with debugged(host, guest, tmp_path) as run:
        said = gdb(guest, run.port, "break twice", *["continue", "print x"] * 3, "continue")
        assert run.ended() == Ended(STATUS)
    assert re.findall(r"\$\d = (\d)", said) == ["1", "2", "3"]
    assert f"exited with code {STATUS:03o}" in said


@needs_gdb
def test_a_watchpoint_stops_where_memory_changes(host: Host, guest: Path, tmp_path: Path) -> None:
    with debugged(host, guest, tmp_path) as run:
        said = gdb(
            guest,
            run.port,
            "break main",
            "continue",
            "watch counter",
            "continue",
            "continue",
            "delete",
            "continue",
        )
        assert run.ended() == Ended(STATUS)
    assert re.findall(r"(?:Old|New) value = (\d+)", said) == ["0", "1", "1", "3"], said


@needs_gdb
def test_step_by_step_across_hypercalls_to_the_end(host: Host, guest: Path, tmp_path: Path) -> None:
    with debugged(host, guest, tmp_path) as run:
        said = gdb(guest, run.port, "break main", "continue", "stepi 500")
        assert run.ended() == Ended(STATUS)
    assert f"exited with code {STATUS:03o}" in said
    assert (tmp_path / "out").read_bytes() == b"hello\n"


@needs_gdb
def test_the_hypercall_page_can_be_looked_at_and_stopped_at(
    host: Host, guest: Path, tmp_path: Path
) -> None:
    with debugged(host, guest, tmp_path) as run:
        said = gdb(
            guest,
            run.port,
            "break *0x100000",
            "continue",
            "x/2i $pc",
            "print $rax",
            "stepi",
            "print $rax",
            "delete",
            "continue",
        )
        assert run.ended() == Ended(STATUS)
    assert re.search(r"=> 0x100000:\s+(ud2|out +%al,\$0xf4)", said)
    assert re.search(r"0x100002:\s+ret", said)
    assert re.findall(r"\$\d = (\d+)", said) == ["2", "6"]


@needs_gdb
def test_ctrl_c_stops_an_endless_loop(host: Host, guest: Path, tmp_path: Path) -> None:
    with debugged(host, guest, tmp_path, "s") as run:
        commands = gdb_command(
            guest, run.port, "continue", "print counter > 0", "info symbol $pc", "kill"
        )
        with subprocess.Popen(
            commands, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            wait_for_more(run, guest)
            process.send_signal(signal.SIGINT)
            said, _ = process.communicate(timeout=60)
        ended = run.ended()
    assert "SIGINT" in said
    assert re.search(r"spin (\+ \d+ )?in section .text", said)
    assert "$1 = 1" in said
    assert isinstance(ended, Ended)
    assert ended.interrupted


@needs_gdb
def test_an_exception_is_a_signal_and_then_the_end(host: Host, guest: Path, tmp_path: Path) -> None:
    with debugged(host, guest, tmp_path, "d") as run:
        said = gdb(guest, run.port, "continue", "info symbol $pc", "continue")
        assert run.ended() == Ended(1, exits.Shutdown(0))
    assert "received signal SIGFPE" in said
    assert "main" in said
    assert "terminated with signal SIGFPE" in said


@needs_gdb
def test_several_vcpus_are_threads(host: Host, guest: Path, tmp_path: Path) -> None:
    with debugged(host, guest, tmp_path, vcpus=3) as run:
        said = gdb(
            guest,
            run.port,
            "info threads",
            "break secondary",
            "continue",
            "info threads",
            "print index",
            "delete",
            "thread 1",
            "set scheduler-locking on",
            "stepi",
            "print $_thread",
            "set scheduler-locking off",
            "detach",
        )
        assert run.ended() == Ended(STATUS)
    assert len(re.findall(r"Thread [123] \(vCPU [012]\)", said.split("Breakpoint")[0])) == 3
    assert re.search(r"Thread [23] hit Breakpoint 1, secondary \(", said)
    assert re.search(r"\$\d = [12]\n", said)
    assert (tmp_path / "out").read_bytes() == b"hello\n"


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
    # What is well-formed and ends the session, or sends the guest somewhere else.
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
    # Whatever runs now is stopped; then it answers as ever.
    endless.sock.sendall(b"\x03")
    endless.send(b"qC")
    while (answer := endless.receive()) != b"QC1":
        assert answer is not None, "the stub hung up"
