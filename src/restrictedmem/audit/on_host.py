"""Routes by the machine: physical memory, the kernel's view of it, own code in the kernel."""

import os
import stat
from collections.abc import Iterator
from errno import ECHILD, EPERM
from functools import partial
from tempfile import TemporaryDirectory
from typing import Final

from restrictedmem.abi.process import CLONE_NEWNS
from restrictedmem.audit import syscalls
from restrictedmem.audit.attacker import Attacker
from restrictedmem.audit.attempt import Route
from restrictedmem.audit.pattern import Buffer
from restrictedmem.audit.reading import of_process
from restrictedmem.child import fork
from restrictedmem.fd import OwnedFd
from restrictedmem.fs.mounter import enter_user_namespace
from restrictedmem.service.client import Service

_MOST: Final = 1 << 20
_PHYSICAL: Final = (
    "/dev/mem",
    "/dev/kmem",
    "/dev/port",
    "/proc/kcore",
    "/proc/vmcore",
    "/proc/kpageflags",
)
_MEM_DEVICE: Final = os.makedev(1, 1)


def _file(path: str, _: Attacker) -> Iterator[Buffer]:
    with OwnedFd(os.open(path, os.O_RDONLY | os.O_NONBLOCK)) as fd:
        yield os.read(fd.fileno(), _MOST)


def _made_device(owner: Attacker) -> Iterator[Buffer]:
    with TemporaryDirectory() as place:
        path = os.path.join(place, "mem")
        os.mknod(path, stat.S_IFCHR | 0o600, _MEM_DEVICE)
        yield from _file(path, owner)


def _bpf(_: Attacker) -> Iterator[Buffer]:
    syscalls.bpf_prog_load().close()
    yield b""


def _perf(_: Attacker) -> Iterator[Buffer]:
    syscalls.perf_event_open(-1, cpu=0).close()
    yield b""


def _tracefs(_: Attacker) -> Iterator[Buffer]:
    yield "\0".join(os.listdir("/sys/kernel/tracing/events")).encode()


def _namespace_above(owner: Attacker) -> Iterator[Buffer]:
    """Start a service in the owner's user namespace; look into its engine from outside."""
    reader, writer = os.pipe()
    hold, release = os.pipe()

    def be_inside() -> None:
        os.close(release)
        _inside(owner, writer, hold)

    child = fork(be_inside)
    os.close(writer)
    os.close(hold)
    try:
        with open(reader, "rb") as pipe:
            answer = pipe.readline()
        number = int(answer or -ECHILD)
        if number < 0:
            raise OSError(-number, "a service cannot start in a user namespace")
        yield from of_process(number)
    finally:
        os.close(release)
        os.waitpid(child, 0)


def _inside(owner: Attacker, writer: int, hold: int) -> None:
    try:
        enter_user_namespace(CLONE_NEWNS)
        with Service.start() as service, owner.another(service) as guest:
            os.write(writer, b"%d\n" % guest.vmm.vm.statistics()["pid"])
            os.read(hold, 1)
    except OSError as error:
        os.write(writer, b"%d\n" % -(error.errno or EPERM))


def routes() -> Iterator[Route]:
    """Yield the routes by the machine."""
    for path in _PHYSICAL:
        yield Route("machine", path, partial(_file, path), root=True)
    yield Route("machine", "mknod mem", _made_device, root=True)
    yield Route("machine", "bpf, a kprobe's program", _bpf, power=True, root=True)
    yield Route("machine", "perf_event_open, a whole CPU", _perf, power=True, root=True)
    yield Route("machine", "tracefs", _tracefs, power=True, root=True)
    yield Route(
        "machine",
        "a service in a user namespace of the owner's",
        _namespace_above,
        open_by="Owners of a user namespace",
    )
