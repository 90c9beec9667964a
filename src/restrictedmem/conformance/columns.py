"""The columns: each kind of memory that a machine may have, and how to make it."""

import os
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from errno import EFAULT, EINVAL, ENOSYS
from typing import Any, Final, Protocol, final

from restrictedmem.abi import kvm, memory
from restrictedmem.conformance import holder
from restrictedmem.conformance.case import Case, Family, UnsupportedError
from restrictedmem.conformance.engine_machine import EngineMachine
from restrictedmem.conformance.files import Creation, File
from restrictedmem.conformance.in_place_machine import SHARED, InPlaceMachine, creation_of
from restrictedmem.conformance.kernel_machine import KernelMachine
from restrictedmem.conformance.machines import Machine
from restrictedmem.conformance.steps import Steps
from restrictedmem.devkvm import Kvm, VmFd
from restrictedmem.fd import OwnedFd
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.service.wire import Channel
from restrictedmem.units import PAGE_SIZE
from restrictedmem.vmm.vm import Vm


class Ground(Protocol):
    """A column that is open: it makes a fresh object for each case."""

    def subject(self, case: Case, steps: Steps) -> AbstractContextManager[Any]:
        """Make the object that a case needs, and close it afterwards.

        Raises:
            UnsupportedError: where the machine lacks what the case needs.
        """
        ...


@dataclass(frozen=True, slots=True)
class Column:
    """One kind of memory."""

    name: str
    says: str
    #: Names by which cases state its answers, the nearest first.
    answers: tuple[str, ...]
    families: frozenset[Family]
    #: Opens it, in the process that runs the cases; raises UnsupportedError.
    open: Callable[[], AbstractContextManager[Ground]]
    #: Arguments of ``restrictedmem`` under which that process runs.
    under: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        """The part of the name that columns of one kind share."""
        return self.name.partition("/")[0]


@final
class _Ground:
    """A ground that makes descriptors as ``creation`` says, and VMs by ``machine``."""

    def __init__(
        self,
        creation: Creation | None = None,
        machine: Callable[[Steps], Machine] | None = None,
    ) -> None:
        self._creation, self._machine = creation, machine

    @contextmanager
    def subject(self, case: Case, steps: Steps) -> Generator[Any]:
        """Make a descriptor or a VM."""
        if case.family is Family.VM:
            assert self._machine is not None
            with self._machine(steps) as machine:
                yield having(case.needs, machine)
        else:
            assert self._creation is not None
            with closing(File(self._creation, steps)) as file:
                yield file


def having(needs: tuple[str, ...], machine: Machine) -> Machine:
    """Return a machine that has what a case needs.

    Raises:
        UnsupportedError: where it lacks something.
    """
    for why in filter(None, map(machine.lacks, needs)):
        raise UnsupportedError(why)
    return machine


def _files(
    make: Callable[[int], int],
    says: Callable[[int], str],
    backing: Callable[[int, int], AbstractContextManager[int]] | None = None,
) -> Ground:
    """Return a ground of descriptors that have no size at their creation."""
    return _Ground(
        Creation(lambda flags, _: make(flags), lambda flags, _: says(flags), backing=backing)
    )


_FILES: Final = frozenset({Family.FILE})


@contextmanager
def _service(api: str, *, pin: bool = False, guest_memfd: bool = False) -> Generator[Service]:
    options = Options(
        api=api, pin=pin, guest_memfd=guest_memfd, consumers=((holder.NAME, holder.__file__),)
    )
    try:
        service = Service.start(options)
    except OSError as error:
        raise UnsupportedError(f"no service can be started: {error.strerror}") from error
    with service:
        yield service


def _descriptor(api: str, *, pin: bool = False) -> Column:
    @contextmanager
    def opened() -> Generator[Ground]:
        with _service(api, pin=pin) as service:
            yield _files(
                service.memfd_restricted,
                "memfd_restricted({:#x})".format,
                lambda fd, pages: _held(service, fd, pages),
            )

    return Column(
        f"descriptor{'-pinned' if pin else ''}/{api}",
        f"memfd_restricted of this project, as {api}" + (", with pins" if pin else ""),
        (*(["descriptor-pinned"] if pin else []), api, "descriptor", "proposal"),
        _FILES,
        opened,
    )


@contextmanager
def _held(service: Service, fd: int, pages: int) -> Generator[int]:
    """Let a consumer take pages of a descriptor; open the memfd that has them.

    Raises:
        UnsupportedError: where this process may not open a consumer's memfd.
    """
    with closing(Channel(service.spawn(holder.NAME), "consumer")) as channel:
        body = holder.TAKE_BODY.pack(service.token_for(fd), pages)
        reply, _ = channel.call(holder.TAKE, body)
        (pid,) = holder.TAKEN.unpack(reply)
        try:
            (name,) = (
                entry.path
                for entry in os.scandir(f"/proc/{pid}/fd")
                if os.readlink(entry.path).startswith("/memfd:")
                and os.stat(entry.path).st_size >= pages * PAGE_SIZE
            )
            memfd = OwnedFd(os.open(name, os.O_RDWR | os.O_CLOEXEC))
        except PermissionError as error:
            raise UnsupportedError("only root may open a consumer's memfd") from error
        with memfd:
            yield memfd.fileno()


@contextmanager
def _by_syscall() -> Generator[Ground]:
    def make(flags: int) -> int:
        return memory.memfd_restricted(flags).detach()

    _try(make, "syscall(451, 0) makes no descriptor")
    yield _files(make, "syscall(451, {:#x})".format)


def _try(make: Callable[[int], int], why: str) -> None:
    """Make a descriptor once.

    Raises:
        UnsupportedError: where the kernel has no such descriptor.
    """
    try:
        os.close(make(0))
    except OSError as error:
        if error.errno not in (EFAULT, EINVAL, ENOSYS):
            raise
        raise UnsupportedError(f"{why}: {error.strerror}") from error


@contextmanager
def _memfd() -> Generator[Ground]:
    yield _files(lambda flags: os.memfd_create("case", flags), 'memfd_create("case", {:#x})'.format)


@contextmanager
def _memfd_secret() -> Generator[Ground]:
    def make(flags: int) -> int:
        return memory.memfd_secret(flags).detach()

    _try(make, "memfd_secret is not enabled")
    yield _files(make, "memfd_secret({:#x})".format)


def _of_kernel(device: Kvm, kind: int, flags: int, vm: VmFd) -> Ground:
    """Return a ground of VMs of /dev/kvm of one type, and of ``vm``'s guest_memfds."""

    def make(flags: int, size: int) -> int:
        # ``devkvm`` would make the descriptor close-on-exec; a case asks what the kernel made it.
        return kvm.KVM_CREATE_GUEST_MEMFD(vm, kvm.kvm_create_guest_memfd(size=size, flags=flags))

    offered = vm.check_extension(kvm.Cap.GUEST_MEMFD_FLAGS)
    return _Ground(
        Creation(make, _says_guest_memfd, flags, offered, vm.fileno()),
        lambda steps: KernelMachine(steps, device, kind, flags),
    )


def _says_guest_memfd(flags: int, size: int) -> str:
    return f"ioctl(vm, KVM_CREATE_GUEST_MEMFD, {{.size = {size:#x}, .flags = {flags:#x}}})"


def _needs_flags(vm: VmFd, flags: int) -> None:
    if not vm.check_extension(kvm.Cap.GUEST_MEMFD):
        raise UnsupportedError("KVM_CAP_GUEST_MEMFD is 0")
    offered = vm.check_extension(kvm.Cap.GUEST_MEMFD_FLAGS)
    if flags & ~offered:
        raise UnsupportedError(f"KVM_CAP_GUEST_MEMFD_FLAGS is {offered:#x}")


def _kernel(kind: int, kind_name: str, flags: int) -> Column:
    @contextmanager
    def opened() -> Generator[Ground]:
        try:
            device = Kvm.open()
        except OSError as error:
            raise UnsupportedError(f"/dev/kvm: {error.strerror}") from error
        with device:
            try:
                vm = device.create_vm(kind)
            except OSError as error:
                raise UnsupportedError(f"no VM of type {kind}: {error.strerror}") from error
            with vm:
                _needs_flags(vm, flags)
                yield _of_kernel(device, kind, flags, vm)

    mapped = bool(flags & kvm.GUEST_MEMFD_FLAG_MMAP)
    shared = mapped and bool(flags & kvm.GUEST_MEMFD_FLAG_INIT_SHARED)
    answers = [
        *(["gmem-attributes-mapped"] if kind and mapped else []),
        *(["gmem-attributes"] if kind else []),
        *(["gmem-shared" if shared else "gmem-private", "gmem-mapped"] if mapped else []),
        *([] if mapped else ["gmem-unmapped"]),
        "gmem",
    ]
    return Column(
        f"kernel{kind_name}/flags={flags}",
        f"guest_memfd of this kernel, VM type {kind}, flags {flags:#x}",
        tuple(answers),
        frozenset(Family),
        opened,
    )


def _engine(name: str, engine: str, api: str) -> Column:
    @contextmanager
    def opened() -> Generator[Ground]:
        with _service(api) as service:
            try:
                Vm(service, engine=engine).close()
            except OSError as error:
                raise UnsupportedError(f"the engine does not start: {error.strerror}") from error
            yield _Ground(machine=lambda steps: EngineMachine(steps, service, engine))

    return Column(
        f"{name}/{api}",
        f"a VM of this project on the {engine} engine, as {api}",
        (f"{name}/{api}", name, api, "proposal"),
        frozenset({Family.VM}),
        opened,
    )


@contextmanager
def _in_place() -> Generator[Ground]:
    with _service("v10", guest_memfd=True) as service:
        creation = Creation(
            lambda flags, size: service.create_guest_memfd(size, flags),
            creation_of,
            SHARED,
            SHARED,
        )
        yield _Ground(creation, lambda steps: InPlaceMachine(steps, service))


_TYPES: Final = {"": kvm.KVM_X86_DEFAULT_VM, "-sw-protected": kvm.KVM_X86_SW_PROTECTED_VM}
COLUMNS: Final = (
    *(_kernel(kind, name, flags) for name, kind in _TYPES.items() for flags in range(4)),
    _descriptor("v9"),
    _descriptor("v10"),
    _descriptor("v10", pin=True),
    *(
        _engine(name, engine, api)
        for name, engine in (("software", "software"), ("kernel-engine", "kernel"))
        for api in ("v9", "v10")
    ),
    Column(
        "software/in-place",
        "guest_memfd of this project, flags 0x3, whose pages are converted in place",
        ("in-place", "gmem-shared", "gmem-mapped", "gmem"),
        frozenset(Family),
        _in_place,
    ),
    Column("memfd", "memfd of this kernel", ("memfd",), _FILES, _memfd),
    Column("memfd_secret", "memfd_secret of this kernel", ("secret",), _FILES, _memfd_secret),
    *(
        Column(
            f"syscall/{api}",
            f"the system call under restrictedmem exec, as {api}",
            ("syscall", api, "descriptor", "proposal"),
            _FILES,
            _by_syscall,
            ("exec", "--api", api, "--"),
        )
        for api in ("v9", "v10")
    ),
    Column(
        "posting",
        "a kernel that has memfd_restricted(2) itself",
        ("posting", "proposal"),
        _FILES,
        _by_syscall,
    ),
)


def column_of(name: str) -> Column:
    """Return the column of a name.

    Raises:
        KeyError: for any other name.
    """
    return {column.name: column for column in COLUMNS}[name]
