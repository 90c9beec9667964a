"""Attacks on things that an owner must not have.

These are a place among the trusted processes, another owner's file, and the guest's secret.
"""

import json
import mmap
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from errno import EACCES, EADDRINUSE, EEXIST, ENOENT, EPERM, EPROTO
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Final, cast

from field import Attack, Field, knock, started, with_private_memory
from outcomes import Errno, outcome
from restrictedmem.audit import on_namespaces
from restrictedmem.audit.attacker import Attacker, parent_of
from restrictedmem.audit.attempt import Outcome, attempt
from restrictedmem.audit.pattern import Pattern
from restrictedmem.fd import OwnedFd
from restrictedmem.protocol import exits, guest_abi
from restrictedmem.service import wire
from restrictedmem.service.exec_service import PACKAGE_ROOT
from restrictedmem.service.listener import listen
from restrictedmem.service.options import Options
from restrictedmem.service.wire import Channel
from restrictedmem.units import PAGE_SIZE as PAGE
from restrictedmem.vmm.vm import Vm
from waiting import wait_until

PUPPET: Final = Path(__file__).parent / "consumers" / "puppet.py"


def namespace_handles(field: Field) -> Iterator[None]:
    service, party = field.start()
    yield
    pid = service.info["pid"]
    victims = {"engine": party.vm.statistics()["pid"], "service": pid, "spawner": parent_of(pid)}
    owner = SimpleNamespace(processes=victims, pattern=Pattern(1, 0, PAGE), as_root=False)
    for route in on_namespaces.routes():
        came = attempt(route, cast(Attacker, owner))
        assert came.outcome is Outcome.REFUSED, came


def late_imports(field: Field) -> Iterator[None]:
    copy = field.place / "installation"
    shutil.copytree(
        Path(PACKAGE_ROOT) / "restrictedmem",
        copy / "restrictedmem",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    tests = str(Path(__file__).parent)
    command = [
        sys.executable,
        "-I",
        "-c",
        _WITH_OTHER_FILES,
        str(copy),
        tests,
        str(field.place / "marker"),
    ]
    # It has to start a service before it gives its capabilities up.
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    yield
    # The files do what they are for: the owner itself has loaded some.
    names = set((field.place / "marker").read_text(encoding="utf-8").split())
    assert names == {"attacker"}, names


#: Argument 1 is a copied installation, 2 the tests, 3 the file in which a process that executes
#: another party's code leaves its name.
_WITH_OTHER_FILES: Final = """
import sys
copy, tests, marker = sys.argv[1:]
sys.path[:0] = [copy, tests]
import os, pathlib
import restrictedmem
assert restrictedmem.__file__.startswith(copy)
from restrictedmem.abi.process import set_name
from restrictedmem.audit.attacker import drop_capabilities
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
import test_sealing
set_name("attacker")
place = pathlib.Path(marker).parent
with Service.start(Options(consumers=(("dma", str(test_sealing.DMA)),))) as service:
    drop_capabilities()
    evil = "import os; open(%r, 'a').write(open('/proc/self/comm').read())\\n" % marker
    evil += "raise ImportError('another file')\\n"
    for path in pathlib.Path(copy).rglob("*.py"):
        path.write_text(evil)
    for path in pathlib.Path(copy).rglob("*.pyc"):
        path.unlink()
    engine = "software"
    test_sealing.a_report(service, engine, place)
    test_sealing.a_platform(service, engine, place)
    test_sealing.a_trace(service, engine, place)
    test_sealing.a_debugger(service, engine, place)
    test_sealing.mistakes_to_an_engine(service, engine, place)
    test_sealing.mistakes_to_a_service(service, engine, place)
    test_sealing.a_third_partys_consumer(service, engine, place)
    assert service.status()["last_error"] == "", service.status()["last_error"]
    assert not os.path.exists(marker), open(marker).read()
    try:
        import restrictedmem.cli.doctor
    except ImportError:
        pass
"""

#: Where the owner sees what the guest writes.
_WINDOW: Final = 0x1000_0000
_SECRET: Final = b"A SECRET"
_RAX, _RDX, _RSI, _RDI = 0, 2, 6, 7


def _mov(register: int, value: int) -> bytes:
    """Return movabs of a value into a register."""
    return bytes([0x48, 0xB8 | register]) + value.to_bytes(8, "little")


def _call(number: int, *arguments: int) -> bytes:
    """Return code that makes a hypercall: mov $HYPERCALL_PAGE, %ecx; call *%rcx."""
    loads = (
        _mov(register, value)
        for register, value in zip((_RAX, _RDI, _RSI, _RDX), (number, *arguments), strict=False)
    )
    return b"".join(loads) + b"\xb9" + guest_abi.HYPERCALL_PAGE.to_bytes(4, "little") + b"\xff\xd1"


def explicit_lie(field: Field) -> Iterator[None]:
    service, _ = field.start()
    yield
    ask = _call(guest_abi.MAP_GPA_RANGE, _WINDOW, 1, guest_abi.MAP_GPA_RANGE_ENCRYPTED)
    # mov %rax, (%rdi), where %rax was 0: test %rax, %rax; jnz over it.
    store = _mov(_RAX, int.from_bytes(_SECRET, "little")) + b"\x48\x89\x07"
    code = (
        ask
        + _mov(_RDI, _WINDOW)
        + b"\x48\x85\xc0\x75"
        + bytes([len(store)])
        + store
        + _call(guest_abi.EXIT, 0)
    )
    with ExitStack() as stack:
        window = stack.enter_context(OwnedFd(os.memfd_create("window", os.MFD_ALLOW_SEALING)))
        os.ftruncate(window.fileno(), PAGE)
        seen = stack.enter_context(mmap.mmap(window.fileno(), PAGE))
        vm = stack.enter_context(Vm(service, explicit=True))
        os.close(with_private_memory(service, vm))
        vm.set_user_memory_region(
            slot=1, guest_phys_addr=_WINDOW, memory_size=PAGE, shared_fd=window.fileno()
        )
        vcpu = stack.enter_context(started(vm, code))
        asked = vcpu.run()
        assert isinstance(asked, exits.Hypercall), asked
        assert asked.number == guest_abi.MAP_GPA_RANGE
        with suppress(OSError):
            vm.set_memory_attributes(_WINDOW, PAGE, private=True)
        # The lie.
        left = vcpu.run(0)
        assert isinstance(left, exits.Hypercall), left
        assert left.number == guest_abi.EXIT
        assert _SECRET not in seen[:]


def measurement_of_no_vm(field: Field) -> Iterator[None]:
    service, _ = field.start(Options(consumers=(("puppet", str(PUPPET)),)))
    yield
    launch = wire.LAUNCH.pack(2, b"kernel", bytes(48))
    asked = ((wire.LAUNCHED, launch), (wire.SIGN, bytes(64)))
    with closing(Channel(service.spawn("puppet"), "the puppet")) as puppet:
        for call, body in asked:
            words = json.dumps(["request", call.number, body.hex()]).encode()
            assert outcome(partial(puppet.call, call, words)) == Errno(EPERM)
    ways: tuple[tuple[Callable[[], Channel], int], ...] = (
        (lambda: knock(service), EACCES),
        (service._connect, EPROTO),
    )
    for connect, errno in ways:
        for call, body in asked:
            with closing(connect()) as channel:
                assert outcome(partial(channel.call, call, body)) == Errno(errno)


def replaced_socket(field: Field) -> Iterator[None]:
    yield
    socket = field.place / "room" / "socket"
    socket.parent.mkdir()
    for _ in field.until_over():
        with suppress(FileNotFoundError):
            if stat.S_ISSOCK(socket.lstat().st_mode):
                socket.unlink()
                socket.symlink_to(field.place / "victim")


def _listen_there(place: Path) -> None:
    victim, socket = place / "victim", place / "room" / "socket"
    victim.write_text("root's", encoding="ascii")
    victim.chmod(0o600)
    for _ in range(30):
        came = outcome(lambda: _listen_until_replaced(socket))
        # ENOENT: it was taken away before its maker looked at it.
        assert came in (None, Errno(EEXIST), Errno(EADDRINUSE), Errno(ENOENT)), came
        assert stat.S_IMODE(victim.stat().st_mode) == 0o600
        assert victim.read_text(encoding="ascii") == "root's"
        wait_until(socket.is_symlink, "the socket to be replaced")
        socket.unlink()


def _listen_until_replaced(path: Path) -> None:
    with listen(str(path), 0o666):
        wait_until(path.is_symlink, "the socket to be replaced")


ATTACKS: Final = {
    "namespace handles": Attack(
        "no namespace that leads into the service can be opened by handle",
        namespace_handles,
        alone="enters every namespace of its user's on the machine",
    ),
    "late imports": Attack(
        "service and engine execute no file that was put there after READY",
        late_imports,
        seconds=100,
    ),
    "an explicit lie": Attack(
        "the guest is told that the page did not become private, and keeps its secret", explicit_lie
    ),
    "a measurement of no VM": Attack(
        "no measurement is taken or signed but for a VM's engine", measurement_of_no_vm
    ),
    "the socket of serve replaced": Attack(
        "a file that a link leads to keeps mode and content", replaced_socket, _listen_there
    ),
}
