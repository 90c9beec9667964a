"""The stub: a thread that talks to one gdb, and opens and closes the vCPUs' gates as gdb asks.

All vCPUs stop together, and those go on that gdb names (gdb's all-stop mode). When gdb disconnects,
the guest goes on by itself.
"""

import os
import socket
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from errno import EFAULT, EINVAL, EIO
from typing import Final, TextIO, final

from restrictedmem.fd import readable
from restrictedmem.protocol import exits
from restrictedmem.threads import begin
from restrictedmem.units import PAGE_SIZE
from restrictedmem.vmm.gdb import target
from restrictedmem.vmm.gdb.gates import Gate, Gates
from restrictedmem.vmm.gdb.rsp import PACKET_SIZE, RspConnection, Sign, escape, unescape
from restrictedmem.vmm.vmm import Ended, Vmm

# gdb's own numbers of signals (gdb/signals.def).
_SIGINT: Final = 2
_SIGILL: Final = 4
_SIGTRAP: Final = 5
_SIGFPE: Final = 8
_SIGBUS: Final = 10
_SIGSEGV: Final = 11
_SIGTERM: Final = 15
#: Signals by exception vector (Intel SDM 6.15), as on Linux. Every other vector is SIGSEGV.
_SIGNALS: Final = {
    0: _SIGFPE,
    1: _SIGTRAP,
    3: _SIGTRAP,
    6: _SIGILL,
    16: _SIGFPE,
    17: _SIGBUS,
    19: _SIGFPE,
}


class _Detached(Exception):  # noqa: N818 - not an error.
    """Raised when gdb detaches from the guest."""


@contextmanager
def serve(vmm: Vmm, port: int, program: str, talk: TextIO = sys.stderr) -> Generator[int]:
    """Let one gdb debug the guest on a TCP port of 127.0.0.1, and yield the port.

    Port 0 means a free one. Within the context, ``vmm.run`` waits until gdb lets the guest go. The
    command to type is printed to ``talk``. ``program`` is the path of the guest's ELF.

    Raises:
        OSError: EADDRINUSE, EACCES for a port that cannot be used; EPERM for a VM made without
            ``debug``.
    """
    with socket.create_server(("127.0.0.1", port)) as listener:
        # Only after the launch may gdb change registers.
        vmm.vm.launch_finish()
        vmm.vcpus[0].get_regs()
        port = listener.getsockname()[1]
        stub = Stub(vmm, listener)
        # gdb assumes that a remote stub has hardware watchpoints. With this setting it single-steps
        # instead.
        own = "set can-use-hw-watchpoints 0"
        print(
            f"gdb: type  gdb {program} -ex '{own}' -ex 'target remote 127.0.0.1:{port}'",
            file=talk,
            flush=True,
        )
        try:
            yield port
        finally:
            stub.close()


@final
class Stub:
    """One gdb, and the thread that talks to it."""

    def __init__(self, vmm: Vmm, listener: socket.socket) -> None:
        """Close the gates of all vCPUs, and wait for gdb on ``listener``.

        The caller keeps ``listener``.
        """
        self._vmm = vmm
        self._listener = listener
        self._stopped = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._gates = Gates(vmm, self._stopped)
        #: The vCPU that gdb's commands are for.
        self._current = self._gates.all[0]
        #: Breakpoints of packets Z0 and Z1: type and address.
        self._breakpoints: set[tuple[bytes, int]] = set()
        self._swbreak = False
        self._last_stop = self._stop_reply(self._current, _SIGTRAP)
        self._thread = threading.Thread(target=self._speak, name="gdb", daemon=True)
        begin(self._thread)

    def close(self) -> None:
        """Stop the guest if it still runs, tell gdb how it ended, and end the thread."""
        self._vmm.stop()
        self._thread.join()
        os.close(self._stopped)

    def _speak(self) -> None:
        try:
            if self._listener in self._ready(self._listener):
                with (
                    RspConnection(self._listener.accept()[0], self._vmm.fileno()) as gdb,
                    suppress(OSError, _Detached),
                ):
                    self._session(gdb)
        finally:
            self._gates.remove()

    def _ready(
        self, *waited: socket.socket | RspConnection | int
    ) -> list[socket.socket | RspConnection | int | Vmm]:
        found = readable([*waited, self._vmm])
        if self._vmm in found:
            self._gates.end()
        return found

    def _session(self, gdb: RspConnection) -> None:
        running = False
        while True:
            found = self._ready(gdb, *([self._stopped] if running else []))
            if gdb in found:
                for item in gdb.receive():
                    if item is Sign.INTERRUPT and running:
                        self._say_stop(gdb, interrupted=True)
                        running = False
                    elif isinstance(item, bytes) and not running:
                        running = self._obey(gdb, item)
            if self._vmm in found:
                if running:
                    gdb.send(_ending(self._vmm.outcome))
                return
            if running and self._stopped in found:
                self._say_stop(gdb, interrupted=False)
                running = False

    def _say_stop(self, gdb: RspConnection, *, interrupted: bool) -> None:
        """Stop all vCPUs, and tell gdb of the first that stopped by itself, if any has."""
        self._gates.shut()
        with suppress(BlockingIOError):
            os.eventfd_read(self._stopped)
        stop = self._gates.take_stop()
        if stop is not None:
            self._current = stop.gate
            pc = (
                stop.why.pc
                if isinstance(stop.why, exits.Debug) and stop.why.exception == exits.BREAKPOINT
                else None
            )
            self._last_stop = self._stop_reply(stop.gate, _signal_of(stop.why), pc)
        elif interrupted:
            self._last_stop = self._stop_reply(self._current, _SIGINT)
        gdb.send(self._last_stop)

    def _stop_reply(self, gate: Gate, signal: int, breakpoint_: int | None = None) -> bytes:
        reason = b"swbreak:;" if self._swbreak and (b"0", breakpoint_) in self._breakpoints else b""
        return b"T%02xthread:%x;%b" % (signal, _number(gate), reason)

    def _resume(self, gates: Sequence[Gate], step: Sequence[Gate] = ()) -> None:
        self._gates.open(
            gates, step=step, breakpoints=frozenset(address for _, address in self._breakpoints)
        )

    # Commands.

    def _obey(self, gdb: RspConnection, packet: bytes) -> bool:
        """Execute a packet's command and answer it; return whether the guest runs now."""
        try:
            answer = self._answer(gdb, packet)
        except (ValueError, LookupError):
            answer = b"E%02x" % EINVAL
        except OSError as error:
            answer = b"E%02x" % ((error.errno or EIO) & 0xFF)
        if answer is None:
            return True
        gdb.send(answer)
        if packet == b"QStartNoAckMode":
            gdb.acknowledge = False
        if packet[:1] == b"D":
            raise _Detached
        return False

    def _answer(self, gdb: RspConnection, packet: bytes) -> bytes | None:
        """Return the reply to a packet; it is empty for an unknown command.

        None means that the reply follows at the next stop.
        """
        command, rest = packet[:1], packet[1:]
        match command:
            case b"?":
                return self._last_stop
            case b"g" | b"G" | b"p" | b"P":
                return self._registers(command, rest)
            case b"m" | b"M" | b"X":
                return self._memory(command, rest)
            case b"Z" | b"z":
                return self._breakpoint(command, rest)
            case b"H":
                self._current = self._gate(rest[1:])
                return b"OK"
            case b"T":
                self._gate(rest)
                return b"OK"
            case b"c" | b"C" | b"s" | b"S":
                # gdb sends no address and no signal with these packets when the stub has vCont.
                self._resume(self._gates.all, (self._current,) if command in (b"s", b"S") else ())
                return None
            case b"D":
                return b"OK"
            case b"k":
                self._vmm.stop()
                raise _Detached
            case b"q" | b"Q":
                return self._query(packet)
            case b"v":
                return self._verbose(packet)
            case _:
                return b""

    def _gate(self, text: bytes) -> Gate:
        """Return the gate of the thread that gdb names; 0 and -1 name any thread."""
        number = int(text, 16)
        if number < -1:
            raise ValueError("no such thread")
        return self._gates.all[number - 1] if number > 0 else self._current

    def _query(self, packet: bytes) -> bytes:
        name, _, rest = packet.partition(b":")
        match name:
            case b"qSupported":
                self._swbreak = b"swbreak+" in rest.split(b";")
                return (
                    b"PacketSize=%x;QStartNoAckMode+;qXfer:features:read+;vContSupported+;swbreak+"
                    % PACKET_SIZE
                )
            case b"QStartNoAckMode":
                return b"OK"
            case b"qXfer":
                return _read_description(rest)
            case b"qAttached":
                return b"1"
            case b"qC":
                return b"QC%x" % _number(self._current)
            case b"qfThreadInfo":
                return b"m" + b",".join(b"%x" % _number(gate) for gate in self._gates.all)
            case b"qsThreadInfo":
                return b"l"
            case _ if packet.startswith(b"qThreadExtraInfo,"):
                return f"vCPU {self._gate(packet.partition(b',')[2]).index}".encode().hex().encode()
            case _:
                return b""

    def _verbose(self, packet: bytes) -> bytes | None:
        name, *actions = packet.split(b";")
        match name:
            case b"vCont?":
                return b"vCont;c;C;s;S"
            case b"vCont":
                self._continue(actions)
                return None
            case b"vKill":
                self._vmm.stop()
                return b"OK"
            case _:
                return b""

    def _continue(self, actions: Sequence[bytes]) -> None:
        """Do the first action for each thread; a thread without an action stays stopped."""
        steps: dict[Gate, bool] = {}
        for action in actions:
            what, _, whom = action.partition(b":")
            if what[:1] not in (b"c", b"C", b"s", b"S"):
                raise ValueError("unknown action")
            for gate in self._gates.all if whom in (b"", b"-1") else (self._gate(whom),):
                steps.setdefault(gate, what[:1] in (b"s", b"S"))
        self._resume((*steps,), [gate for gate, step in steps.items() if step])

    def _registers(self, command: bytes, rest: bytes) -> bytes:
        vcpu = self._current.vcpu
        regs = vcpu.get_regs()
        number, _, value = rest.partition(b"=")
        match command:
            case b"g":
                return target.read_all(regs, vcpu.get_sregs())
            case b"p":
                return target.register(rest).read(regs, vcpu.get_sregs())
            case b"G":
                target.write_all(regs, rest)
            case _:
                target.write(regs, target.register(number), value)
        vcpu.change_regs(regs)
        return b"OK"

    def _memory(self, command: bytes, rest: bytes) -> bytes:
        where, _, data = rest.partition(b":")
        address, size = (int(word, 16) for word in where.split(b","))
        if address < 0 or size < 0 or address + size > 1 << 64:
            raise ValueError("no such address")
        if command == b"m":
            return self._read(address, min(size, PACKET_SIZE // 2)).hex().encode()
        content = unescape(data) if command == b"X" else bytes.fromhex(data.decode())
        if len(content) != size:
            raise ValueError("the content has another size than announced")
        self._vmm.vm.write_memory(address, content)
        return b"OK"

    def _read(self, address: int, size: int) -> bytes:
        """Return the memory from ``address`` on, up to the first page that does not exist."""
        try:
            return self._vmm.vm.read_memory(address, size)
        except OSError as error:
            inside = -address % PAGE_SIZE
            if error.errno != EFAULT or not 0 < inside < size:
                raise
        found = self._vmm.vm.read_memory(address, inside)
        with suppress(OSError):
            while len(found) < size:
                found += self._vmm.vm.read_memory(
                    address + len(found), min(PAGE_SIZE, size - len(found))
                )
        return found

    def _breakpoint(self, command: bytes, rest: bytes) -> bytes:
        kind, address, _ = rest.split(b";")[0].split(b",")
        if kind not in (b"0", b"1"):
            return b""
        entry = kind, int(address, 16)
        if not 0 <= entry[1] < 1 << 64:
            raise ValueError("no such address")
        if command == b"Z":
            self._breakpoints.add(entry)
        else:
            self._breakpoints.discard(entry)
        return b"OK"


def _number(gate: Gate) -> int:
    """Return gdb's number of the vCPU's thread, from 1, because 0 means any thread."""
    return gate.index + 1


def _signal_of(exit_: exits.Exit) -> int:
    match exit_:
        case exits.Debug():
            return _SIGTRAP
        case exits.Shutdown(vector):
            return _SIGNALS.get(vector, _SIGSEGV)
        case _:
            # The guest accessed memory that could not be taken, or a device that this VMM does not
            # have.
            return _SIGBUS


def _ending(outcome: Ended | BaseException | None) -> bytes:
    match outcome:
        case Ended(status, None):
            return b"W%02x" % status
        case Ended(_, exits.Shutdown() as fatal):
            return b"X%02x" % _signal_of(fatal)
        case _:
            return b"X%02x" % _SIGTERM


def _read_description(rest: bytes) -> bytes:
    """Answer qXfer:features:read:target.xml:OFFSET,LENGTH."""
    kind, action, annex, window = rest.split(b":")
    if (kind, action, annex) != (b"features", b"read", b"target.xml"):
        return b"E00"
    offset, length = (int(word, 16) for word in window.split(b","))
    if offset < 0 or length < 0:
        raise ValueError("no such range of the description")
    whole = target.description()
    # An escaped byte takes two bytes, and the reply has to fit into a packet.
    piece = whole[offset : offset + min(length, PACKET_SIZE // 2)]
    return (b"m" if offset + len(piece) < len(whole) else b"l") + escape(piece)
