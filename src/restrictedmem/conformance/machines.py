"""A VM under test: what its owner can ask of it, and what its guest can do.

A case uses a ``Machine``. Each operation makes one call, notes it, and returns its answer: a number
or a text, so that answers can be compared.
"""

import mmap
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import contextmanager
from errno import EFAULT, ETIMEDOUT
from typing import Any, Final, Self

from restrictedmem.abi import kvm, memory
from restrictedmem.abi.memory import PUNCH, FallocMode
from restrictedmem.conformance import guest
from restrictedmem.conformance.outcome import Errno, outcome
from restrictedmem.conformance.steps import Steps
from restrictedmem.failure import failed
from restrictedmem.patience import SLICE, Clock
from restrictedmem.protocol import exits
from restrictedmem.units import PAGE_SIZE, U64_MAX

#: Where a guest finds the slots of a case, and how many bytes it can reach there.
DATA: Final = 4 << 30
DATA_SIZE: Final = 16 << 20
#: The number of a case's slot, unless the case says another.
SLOT: Final = 10
#: The number of the slot that has the guest's code.
GUEST_SLOT: Final = 100
PRIVATE: Final = kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE
#: Seconds within which a guest that runs in a thread has to exit.
_DEADLINE: Final = 20.0
#: Offsets from the code page: what a guest keeps for its owner, and the end of its stack.
RESULT: Final = PAGE_SIZE
STACK: Final = 3 * PAGE_SIZE
#: Bytes of the guest's slot that begin with the code page.
GUEST_SIZE: Final = 3 * PAGE_SIZE

Answer = int | str


class Machine(ABC):
    """A VM whose only slot is that of its guest, which appears when the guest first runs.

    ``memory`` is ordinary memory of the owner for the shared halves of slots, and ``flags`` are
    those of its private files.
    """

    #: Whether a call is a message to another process, so that a loop of thousands takes long.
    by_message = False

    def __init__(self, steps: Steps, shared: mmap.mmap, flags: int = 0) -> None:
        self.steps = steps
        self.memory = shared
        self.flags = flags
        self._files: dict[int, str] = {}
        #: How many steps the guest has begun, and whether it is there.
        self._begun = 0
        self._booted = False
        self._answer: Callable[[], Answer] = lambda: 0

    # What each kind of machine does in its own way.

    @abstractmethod
    def lacks(self, need: str) -> str:
        """Say what the machine lacks of a need of a case, "" if nothing."""

    @abstractmethod
    def another(self) -> "Machine":
        """Make another VM of the kind, which the caller closes."""

    @abstractmethod
    def close(self) -> None:
        """End the VM and close its files."""

    @abstractmethod
    def _create(self, size: int, flags: int) -> int:
        """Create a private file with these flags."""

    @abstractmethod
    def descriptor(self, kind: str) -> int:
        """Return a descriptor that is no private file: of the ``device``, or of the ``vm``."""

    @abstractmethod
    def set_region(
        self,
        slot: int = SLOT,
        gpa: int = DATA,
        size: int = 0,
        *,
        shared: int | None = None,
        private: int | None = None,
        offset: int = 0,
        flags: int | None = None,
        old: bool = False,
    ) -> None:
        """Make the call KVM_SET_USER_MEMORY_REGION, or its successor for private memory.

        ``shared`` is an offset in ``memory``, ``private`` a descriptor, and ``offset`` its offset.
        ``flags`` say that there is a private half if one is given, unless the case says other
        flags. ``old`` makes the first version of the call although there is a private half.
        """

    @abstractmethod
    def at(self, address: int) -> int:
        """Return an address of this process as a place in ``memory``, for ``set_region``."""

    @abstractmethod
    def _set_attributes(self, request: kvm.kvm_memory_attributes) -> None:
        """Call KVM_SET_MEMORY_ATTRIBUTES."""

    @abstractmethod
    def _check_extension(self, capability: int) -> int:
        """Call KVM_CHECK_EXTENSION."""

    @abstractmethod
    def _pre_fault(self, request: kvm.kvm_pre_fault_memory) -> int:
        """Call KVM_PRE_FAULT_MEMORY; return the bytes left."""

    @abstractmethod
    def _boot(self) -> None:
        """Make the guest's slot, and a vCPU at the first step of its code."""

    @abstractmethod
    def _enter(self, value: int) -> str:
        """Run the vCPU to its next exit, which is "" at the end of a step.

        ``value`` answers the last exit.
        """

    @property
    @abstractmethod
    def _code(self) -> memoryview:
        """Return the memory of the guest's code page and of those behind it."""

    @property
    @abstractmethod
    def _base(self) -> int:
        """Return the guest address of the code page."""

    @property
    @abstractmethod
    def _call(self) -> bytes:
        """Return the instructions of a hypercall."""

    # Files.

    def private_file(self, size: int, flags: int = 0) -> int:
        """Create a private file of some bytes; the machine owns the descriptor."""
        return self.exact_file(size, self.flags | flags)

    def exact_file(self, size: int, flags: int) -> int:
        """Create a private file with these flags, and none of the machine's own."""
        name = f"fd{len(self._files) or ''}"
        fd = self.steps.call(
            f"{name} = {self._creation(size, flags)}", lambda: self._create(size, flags)
        )
        self._files[fd] = name
        return fd

    @abstractmethod
    def _creation(self, size: int, flags: int) -> str:
        """Return the call that creates a private file, in C."""

    def close_file(self, fd: int) -> None:
        """Close a private file."""
        self.steps.call(f"close({self._files.pop(fd)})", lambda: os.close(fd))

    def punch(self, fd: int, offset: int, length: int) -> None:
        """Free the pages of a range of a private file."""
        self._fallocate(fd, PUNCH, offset, length)

    def allocate(self, fd: int, offset: int, length: int) -> None:
        """Allocate the pages of a range of a private file."""
        self._fallocate(fd, FallocMode.KEEP_SIZE, offset, length)

    def _fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        self.steps.call(
            f"fallocate({self._name(fd)}, {mode:#x}, {offset:#x}, {length:#x})",
            lambda: memory.fallocate(fd, mode, offset, length),
        )

    def _name(self, fd: int) -> str:
        return self._files.get(fd, str(fd))

    def _close_files(self) -> None:
        for fd in self._files:
            os.close(fd)
        self._files.clear()

    def convert(
        self, fd: int, offset: int, size: int, attributes: int = PRIVATE, **fields: Any
    ) -> kvm.kvm_memory_attributes2:
        """Convert a range of a private file in place; return the struct as the call left it."""
        wanted = kvm.kvm_memory_attributes2(
            offset=offset, size=size, attributes=attributes, **fields
        )
        more = "".join(f", {name}={value}" for name, value in fields.items())
        self.steps.call(
            f"ioctl({self._name(fd)}, KVM_SET_MEMORY_ATTRIBUTES2, {{{offset:#x}, {size:#x},"
            f" attributes={attributes:#x}{more}}})",
            lambda: kvm.KVM_SET_MEMORY_ATTRIBUTES2(fd, wanted),
        )
        return wanted

    def held(self, fd: int) -> int:
        """Return the number of pages that a private file has, by cachestat(2)."""
        return self.steps.call(
            f"pages of {self._name(fd)}, by cachestat",
            lambda: memory.resident_pages(fd, 0, os.fstat(fd).st_size),
        )

    # Slots and attributes.

    def set_attributes(
        self, gpa: int, size: int, attributes: int = PRIVATE, flags: int = 0
    ) -> None:
        """Make a range of guest memory private or shared."""
        request = kvm.kvm_memory_attributes(
            address=gpa, size=size, attributes=attributes, flags=flags
        )
        self.steps.call(
            f"ioctl(vm, KVM_SET_MEMORY_ATTRIBUTES, {{{gpa:#x}, {size:#x},"
            f" attributes={attributes:#x}, flags={flags:#x}}})",
            lambda: self._set_attributes(request),
        )

    def check_extension(self, capability: int) -> int:
        """Return the VM's answer for a ``KVM_CAP_*``."""
        return self.steps.call(
            f"ioctl(vm, KVM_CHECK_EXTENSION, {capability})",
            lambda: self._check_extension(capability),
        )

    def pre_fault(self, gpa: int, size: int, flags: int = 0) -> int:
        """Map guest memory before the guest touches it; return the bytes that are left."""
        self._boot_once()
        request = kvm.kvm_pre_fault_memory(gpa=gpa & U64_MAX, size=size, flags=flags)
        return self.steps.call(
            f"ioctl(vcpu, KVM_PRE_FAULT_MEMORY, {{{gpa:#x}, {size:#x}, flags={flags:#x}}})",
            lambda: self._pre_fault(request),
        )

    def delete(self, slot: int = SLOT) -> None:
        """Delete a slot."""
        self.set_region(slot, 0)

    def make_private(self, gpa: int, size: int) -> None:
        """Make a range private where the machine has attributes."""
        if not self.lacks("attributes"):
            self.set_attributes(gpa, size)

    def make_shared(self, gpa: int, size: int) -> None:
        """Make a range shared where the machine has attributes."""
        if not self.lacks("attributes"):
            self.set_attributes(gpa, size, 0)

    def delete_guest(self) -> None:
        """Delete the slot that has the guest's code."""
        self.delete(GUEST_SLOT)

    @abstractmethod
    def end(self) -> None:
        """End the VM; its files stay."""

    # The owner's side of private memory.

    def view(self, fd: int) -> mmap.mmap:
        """Map all of a private file; the mapping goes with its last reference.

        Raises:
            OSError: ENODEV for a restricted descriptor, which no posting maps.
        """
        size = os.fstat(fd).st_size
        return self.steps.call(
            f"mmap(NULL, {size:#x}, …, MAP_SHARED, {self._name(fd)}, 0)",
            lambda: mmap.mmap(fd, size),
        )

    def host_fill_file(self, fd: int, byte: int) -> None:
        """Set each byte of a private file by a mapping."""
        view = self.view(fd)
        self.steps.note(f"memset(view, {byte:#x}, {len(view):#x})")
        view[:] = bytes((byte,)) * len(view)

    def host_sees_file(self, fd: int) -> str:
        """Return the byte that is everywhere in a private file, by a mapping."""
        view = self.view(fd)
        return self.steps.call("bytes of the view", lambda: uniform(view[:]))

    def host_reads(self, fd: int, offset: int) -> str:
        """Read 8 bytes of a private file by a mapping, in a child; return them, or its signal."""
        view = self.view(fd)
        return self.steps.in_child(
            lambda: self.steps.call(
                f"*(u64 *)(view + {offset:#x})",
                lambda: hex(int.from_bytes(view[offset : offset + 8], "little")),
            )
        )

    # The owner's side of shared memory.

    def host_fill(self, offset: int, size: int, byte: int) -> None:
        """Set bytes of the owner's memory."""
        self.steps.note(f"memset(memory + {offset:#x}, {byte:#x}, {size:#x})")
        self.memory[offset : offset + size] = bytes((byte,)) * size

    def host_sees(self, offset: int, size: int) -> str:
        """Return the byte that is everywhere in a range of the owner's memory, or ``mixed``."""
        return self.steps.call(
            f"bytes of memory + {offset:#x}, {size:#x}",
            lambda: uniform(self.memory[offset : offset + size]),
        )

    # The guest's side.

    def load(self, address: int = DATA) -> Answer:
        """Let the guest read 8 bytes; return them, or the exit that came instead."""
        return self._step(
            f"*(u64 *){address:#x}", guest.load(address, self._base + RESULT), self._kept
        )

    def store(self, value: int, address: int = DATA) -> Answer:
        """Let the guest write 8 bytes; return 0, or the exit."""
        return self._step(f"*(u64 *){address:#x} = {value:#x}", guest.store(address, value))

    def fill(self, address: int, size: int, byte: int) -> Answer:
        """Let the guest set each byte of a range; return 0, or the exit."""
        return self._step(
            f"memset({address:#x}, {byte:#x}, {size:#x})", guest.fill(address, size, byte)
        )

    def sees(self, address: int, size: int, count: int = 1, stride: int = 0) -> Answer:
        """Return the byte that the guest finds everywhere in a range, ``mixed``, or the exit.

        There may be ``count`` ranges, ``stride`` bytes apart.
        """
        more = f", and of {count - 1} more, each {stride:#x} further" if count > 1 else ""
        return self._step(
            f"bytes of {address:#x}, {size:#x}{more}",
            guest.compare(address, size, self._base + RESULT, count, stride),
            lambda: "mixed" if self._kept(8) else uniform(bytes(self._code[RESULT : RESULT + 8])),
        )

    def touch(self, address: int, size: int) -> Answer:
        """Let the guest read a word of each page of a range; return 0, or the exit."""
        code = guest.touch(address, size // PAGE_SIZE, PAGE_SIZE, self._base + RESULT)
        return self._step(f"read each page of {address:#x}, {size:#x}", code)

    def map_gpa_range(self, gpa: int, pages: int, attributes: int) -> Answer:
        """Let the guest ask for a conversion; return the exit."""
        code = guest.map_gpa_range(gpa, pages, attributes, self._call, self._base + RESULT)
        return self._step(
            f"hypercall(KVM_HC_MAP_GPA_RANGE, {gpa:#x}, {pages}, {attributes:#x})",
            code,
            self._kept,
        )

    def go_on(self, value: int = 0) -> Answer:
        """Answer the last exit, and return what the interrupted step comes to."""
        return self.steps.call(f"answer {value:#x}, and go on", lambda: self._finish(value))

    @abstractmethod
    def _accept_kicks(self) -> None:
        """Let ``_kick`` reach this thread, which runs the vCPU."""

    @abstractmethod
    def _kick(self) -> None:
        """Take the vCPU out of a guest that may be unable to exit."""

    def run_bare(self) -> str:
        """Run a vCPU of a VM that has no slot at all; return the exit."""
        return self.steps.call("ioctl(vcpu, KVM_RUN)", self._run_bare)

    @abstractmethod
    def _run_bare(self) -> str: ...

    def trap(self) -> Answer:
        """Let the guest execute an undefined opcode, for which it has no handler."""
        return self._step("ud2", guest.trap())

    @contextmanager
    def waiting(
        self, value: int, address: int = DATA, answer: int | None = None
    ) -> Generator[Callable[[], Answer]]:
        """Let the guest read 8 bytes, in a thread, until they are no longer ``value``.

        Yield a function that returns what it then reads, or the exit. With ``answer``, a read that
        finds no slot is answered so, and is no end.
        """
        code = guest.wait_while(address, value, self._base + RESULT)
        text = f"while (*(u64 *){address:#x} == {value:#x});"
        with self._in_thread(text, code, answer) as end:
            yield end

    @contextmanager
    def spinning(self) -> Generator[Callable[[], Answer]]:
        """Let the guest loop for ever, in a thread; yield a function that returns the exit."""
        with self._in_thread("for (;;);", guest.spin()) as end:
            yield end

    @contextmanager
    def _in_thread(
        self, text: str, code: bytes, mmio: int | None = None
    ) -> Generator[Callable[[], Answer]]:
        self.steps.note(f"guest, in a thread: {text}")
        self._write(code, self._kept)
        found: list[object] = []

        def run() -> Answer:
            self._accept_kicks()
            answer = self._finish(0)
            while mmio is not None and str(answer).startswith("MMIO read"):
                answer = self._finish(mmio)
            return answer

        thread = threading.Thread(target=lambda: found.append(outcome(run)), daemon=True)
        thread.start()

        def end() -> Answer:
            clock = Clock()
            while thread.is_alive():
                if clock.look() > _DEADLINE:
                    raise failed("guest", ETIMEDOUT, "the guest did not exit")
                thread.join(SLICE)
                self._kick()
            (answer,) = found
            return self.steps.call("guest, in the thread:", lambda: _raised(answer))

        yield end

    def _step(self, text: str, code: bytes, answer: Callable[[], Answer] = lambda: 0) -> Answer:
        self._write(code, answer)
        return self.steps.call(f"guest: {text}", lambda: self._finish(0))

    def _write(self, code: bytes, answer: Callable[[], Answer]) -> None:
        self._boot_once()
        content = guest.page(code, self._begun)
        self._code[: len(content)] = content
        self._answer = answer
        self._begun += 1

    def _boot_once(self) -> None:
        if not self._booted:
            self._boot()
            self._booted = True

    def _finish(self, value: int) -> Answer:
        return self._enter(value) or self._answer()

    def _kept(self, at: int = 0) -> int:
        return int.from_bytes(self._code[RESULT + at : RESULT + at + 8], "little")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _raised(answer: object) -> Answer:
    """Return an answer, or raise what it stands for."""
    if isinstance(answer, Errno):
        raise OSError(answer.number, os.strerror(answer.number))
    assert isinstance(answer, int | str)
    return answer


def uniform(content: bytes) -> str:
    """Return the byte that some content consists of, or ``mixed``."""
    return f"{content[0]:#x}" if content.count(content[0]) == len(content) else "mixed"


def spell_exit(found: exits.Exit) -> str:
    """Return an exit as text, the same for each kind of machine; "" at the end of a step."""
    match found:
        case exits.PortOut(guest.DONE, _, _):
            return ""
        case exits.MemoryFault(flags, gpa, size, errno):
            # EFAULT is the usual errno.
            more = "" if errno == EFAULT else f" {Errno(errno)}"
            return f"MEMORY_FAULT flags={flags:#x} gpa={gpa:#x} size={size:#x}{more}"
        case exits.MmioRead(gpa, size):
            return f"MMIO read {size} at {gpa:#x}"
        case exits.MmioWrite(gpa, size, data):
            return f"MMIO write {size} at {gpa:#x}: {data:#x}"
        case exits.Hypercall(kvm.KVM_HC_MAP_GPA_RANGE, (gpa, pages, attributes, *_)):
            return f"HYPERCALL MAP_GPA_RANGE {gpa:#x} {pages} {attributes:#x}"
        case exits.Shutdown():
            return "SHUTDOWN"
        case exits.Unknown(reason):
            return f"exit {reason}"
        case _:
            return str(found)
