"""Nothing is loaded once a service is ready, whatever happens then.

The files of a private service are its owner's, who may put others in their place.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

import pytest

from outcomes import in_child
from processes import family
from restrictedmem import guests
from restrictedmem.failure import FAULT
from restrictedmem.fd import close_all
from restrictedmem.service import sealing, wire
from restrictedmem.service.client import Service
from restrictedmem.service.exec_service import PACKAGE_ROOT
from restrictedmem.service.options import Options
from restrictedmem.vmm import elf, recording
from restrictedmem.vmm.vm import Vm
from restrictedmem.vmm.vmm import Vmm
from watching import opens

DMA = Path(__file__).parent.parent / "clients" / "dma" / "dma.py"
ENGINES = ["software", *(["kernel", "auto"] if os.access("/dev/kvm", os.R_OK | os.W_OK) else [])]

Scenario = Callable[[Service, str, Path], int]


def program(path: str) -> bool:
    """Say whether a file is one that an interpreter loads, or shows."""
    return path.endswith((".py", ".pyc")) or ".so" in os.path.basename(path)


def run_guest(vmm: Vmm, name: str, *arguments: str) -> int:
    """Run a guest of the package to its end; returns the engine's pid."""
    vmm.load(elf.parse(guests.path(name).read_bytes()), arguments)
    with TemporaryFile() as stdin, open(os.devnull, "wb") as sink:
        stdin.write(b"report a challenge\n")
        stdin.seek(0)
        vmm.run(stdin, sink, sink)
    return int(vmm.statistics()["pid"])


def a_report(service: Service, engine: str, _: Path) -> int:
    with Vmm(4 << 20, service, engine=engine) as vmm:
        return run_guest(vmm, "seal")


def a_platform(service: Service, _: str, __: Path) -> int:
    with Vmm(4 << 20, service, platform="snp") as vmm:
        pid = run_guest(vmm, "convert")
        vmm.destroy()
        return pid


def a_trace(service: Service, engine: str, place: Path) -> int:
    with Vmm(4 << 20, service, engine=engine) as vmm, recording.record(vmm, place / "trace"):
        return run_guest(vmm, "spin", "exit", "0")


def a_debugger(service: Service, engine: str, _: Path) -> int:
    with Vmm(4 << 20, service, engine=engine, debug=True) as vmm:
        vmm.load(elf.parse(guests.path("spin").read_bytes()), ["exit", "0"])
        with suppress(OSError):
            vmm.vcpus[0].set_guest_debug(step=True)
        vmm.vcpus[0].run()
        vmm.vcpus[0].get_regs()
        vmm.vm.read_memory(0x4000_0000, 64)
        return int(vmm.statistics()["pid"])


def mistakes_to_an_engine(service: Service, engine: str, _: Path) -> int:
    with Vm(service, engine=engine) as vm:
        pid = int(vm.statistics()["pid"])
        with vm.create_vcpu() as vcpu, suppress(OSError):
            vcpu._channel.call(wire.Call("MISTAKE", 77), b"\xff")
        for number in range(200):
            with suppress(OSError):
                vm._channel.call(wire.Call("MISTAKE", number << 8 | number), b"\xff" * number)
        return pid


def mistakes_to_a_service(service: Service, _: str, __: Path) -> int:
    for number in range(60):
        connection = service._connect()
        with suppress(OSError):
            close_all(connection.call(wire.Call("MISTAKE", number), b"\xff" * number)[1])
        connection.close()
    for arguments in ("{", '{"engine": "none"}', "[" * 50_000):
        with suppress(OSError), service.spawn("kvm", arguments) as sock:
            wire.Channel(sock, "engine").call(wire.Call("MISTAKE", 1))
    assert service.status()
    return int(service.info["pid"])


def a_third_partys_consumer(service: Service, _: str, __: Path) -> int:
    with service.spawn("dma") as sock:
        body, fds = wire.Channel(sock, "the device").call(wire.Call("STATUS", 6))
        assert json.loads(body)
        assert fds == []
        (report,) = [
            consumer["report"]
            for consumer in service.status()["consumers"]
            if consumer["name"] == "dma"
        ]
        return int(report["pid"])


@pytest.mark.requires("fuse", "root")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "scenario",
    [
        a_report,
        a_platform,
        a_trace,
        a_debugger,
        mistakes_to_an_engine,
        mistakes_to_a_service,
        a_third_partys_consumer,
    ],
    ids=lambda scenario: scenario.__name__,
)
def test_no_process_of_a_service_opens_a_program_after_ready(
    scenario: Scenario, engine: str, tmp_path: Path
) -> None:
    with Service.start(Options(consumers=(("dma", str(DMA)),))) as service:
        everywhere = {sys.base_prefix, sys.prefix, PACKAGE_ROOT, str(DMA), "/usr/lib"}
        with opens(*everywhere) as opened:
            pids = {found.pid for found in family(service)}
            pids.add(scenario(service, engine, tmp_path))
            # The watch works: this one opens plenty.
            control = subprocess.Popen([sys.executable, "-I", "-c", "import decimal"])
            control.wait()
            seen = opened.take()
    assert [path for pid, path in seen if pid == control.pid and program(path)]
    assert [path for pid, path in seen if pid in pids and program(path)] == []


# The effects of sealing.


@pytest.mark.requires("fuse")
def test_a_consumer_imports_nothing(tmp_path: Path) -> None:
    """It is forked by the spawner, which has loaded what it was to load."""
    program = tmp_path / "late.py"
    program.write_text(
        """
def serve(owner, service, notify, options, arguments):
    try:
        import decimal
    except ImportError as error:
        owner.send(type(error).__name__.encode())
""",
        encoding="ascii",
    )
    with (
        Service.start(Options(consumers=(("late", str(program)),))) as service,
        service.spawn("late") as sock,
    ):
        sock.settimeout(10)
        assert sock.recv(100) == b"ModuleNotFoundError"


def test_nothing_is_imported_after_sealing() -> None:
    def body() -> list[str]:
        # This runs only in the child: a module loaded twice would be two modules to the users of
        # the first.
        for name in ("decimal", "restrictedmem.cli.ps"):
            sys.modules.pop(name, None)
        sealing.seal()
        return [
            str(outcome(partial(__import__, name)))
            for name in ("decimal", "restrictedmem.cli.ps", "_lsprof")
        ]

    def outcome(call: Callable[[], object]) -> object:
        try:
            return call()
        except ImportError as error:
            return type(error).__name__

    assert in_child(body) == repr(["ModuleNotFoundError"] * 3)


def test_no_source_is_shown_after_sealing(tmp_path: Path) -> None:
    """A traceback would show lines of files that may have been replaced.

    It would decode them as the file itself asks.
    """
    done = subprocess.run(
        [sys.executable, "-I", "-c", _RAISES, PACKAGE_ROOT, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.count("RuntimeError: it happened") == 3, done.stderr
    assert "THE SOURCE" not in done.stderr


_RAISES = """
import sys, threading
sys.path.insert(0, sys.argv[1])
from restrictedmem.service import sealing
path = sys.argv[2] + "/module.py"
with open(path, "w") as file:
    file.write("def fail(): raise RuntimeError('it happened')  # THE SOURCE")
scope = {}
exec(compile(open(path).read(), path, "exec"), scope)
sealing.seal()
threading.Thread(target=scope["fail"]).start()
class Closing:
    def __del__(self): scope["fail"]()
closing = Closing()
del closing
scope["fail"]()
"""


@pytest.mark.parametrize("argument", ["c_void_p", "py_object"], ids=["raised", "not even called"])
def test_an_exception_that_nobody_gets_ends_the_process(argument: str) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-c", _LOSES, PACKAGE_ROOT, argument],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (FAULT, "")
    assert "Error" in done.stderr


_LOSES = """
import ctypes, sys
sys.path.insert(0, sys.argv[1])
from restrictedmem.service import sealing
sealing.seal()
sealing.end_when_lost()
def fail(_): raise RuntimeError
callback = ctypes.CFUNCTYPE(None, getattr(ctypes, sys.argv[2]))(fail)
ctypes.CFUNCTYPE(None, ctypes.c_void_p)(ctypes.cast(callback, ctypes.c_void_p).value)(None)
print("it went on")
"""


def test_signing_needs_nothing_more_after_preloading() -> None:
    pytest.importorskip("cryptography")

    done = subprocess.run(
        [sys.executable, "-I", "-c", _SIGNS, PACKAGE_ROOT],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "64 False\n"), done.stderr


_SIGNS = """
import sys
sys.path.insert(0, sys.argv[1])
from restrictedmem.service import sealing, signing
signing.preload()
sealing.seal()
signer = signing.Signer()
key = signer.make_key()
signature = signer.sign(b"data")
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.exceptions import InvalidSignature
try:
    Ed25519PublicKey.from_public_bytes(key).verify(signature, b"other data")
    fine = True
except InvalidSignature:
    fine = False
print(len(signature), fine)
"""
