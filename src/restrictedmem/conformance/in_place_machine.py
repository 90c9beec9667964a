"""Conversion in place: the machine that has it here, and a guest_memfd whose pages are converted.

docs/understand/conversion-in-place.md has the design of the former.
"""

import os
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Final, final

from restrictedmem.abi import kvm
from restrictedmem.abi.kvm import GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP
from restrictedmem.child import fork
from restrictedmem.conformance import calls
from restrictedmem.conformance.engine_machine import EngineMachine
from restrictedmem.conformance.files import pipe
from restrictedmem.conformance.machines import DATA, Answer, Machine
from restrictedmem.conformance.outcome import Errno
from restrictedmem.conformance.steps import Steps
from restrictedmem.devkvm import address_of
from restrictedmem.service.client import Service
from restrictedmem.units import PAGE_SIZE

SHARED: Final = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED
PRIVATE: Final = GUEST_MEMFD_FLAG_MMAP
_WORD: Final = 8
#: Seconds after which a child that waits for its parent ends.
_DEADLINE: Final = 60


@final
class InPlaceMachine(EngineMachine):
    """A VM of the software engine whose private files are guest_memfds of this project."""

    _region_call = "KVM_SET_USER_MEMORY_REGION2"

    def __init__(self, steps: Steps, service: Service) -> None:
        super().__init__(steps, service, "software")
        self.flags = SHARED

    def lacks(self, need: str) -> str:
        """Say what the machine lacks of a need of a case."""
        if need in ("attributes", "halves"):
            return "the attributes are the file's, not the VM's"
        return "" if need in ("mapping", "in-place") else super().lacks(need)

    def another(self) -> "InPlaceMachine":
        """Make another VM of the kind."""
        return InPlaceMachine(self.steps, self._service)

    def _create(self, size: int, flags: int) -> int:
        return self._service.create_guest_memfd(size, flags)

    def _creation(self, size: int, flags: int) -> str:
        return creation_of(flags, size)

    def held(self, fd: int) -> int:
        """Return the number of pages of a guest_memfd, whose ``st_blocks`` is 0."""
        return Machine.held(self, fd)

    def _put_region(
        self,
        region: kvm.kvm_userspace_memory_region_ext,
        private: int | None,
        shared: int | None,
    ) -> None:
        # The file is both halves. A kernel, too, uses no ``userspace_addr`` for guest accesses.
        if private is not None and region.memory_size:
            region.userspace_addr, shared = region.restricted_offset, private
        super()._put_region(region, private, shared)


def creation_of(flags: int, size: int) -> str:
    """Return the call of this project that creates a guest_memfd."""
    return f"create_guest_memfd({size:#x}, {flags:#x})"


@final
class InPlace:
    """A guest_memfd in a machine's slot, and its owner's mapping of it. Pages are numbers.

    An access of either side is to the first word of a page. Each method makes one step, notes it,
    and returns its answer.
    """

    def __init__(self, machine: Machine, npages: int = 1, flags: int = SHARED) -> None:
        size = npages * PAGE_SIZE
        self.machine = machine
        self.steps = machine.steps
        self.fd = machine.exact_file(size, flags)
        self.mapping = machine.view(self.fd)
        machine.set_region(size=size, private=self.fd)

    def convert(self, page: int, npages: int = 1, *, private: bool, flags: int = 0) -> None:
        """Make pages private or shared."""
        attributes = kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
        more = {"flags": flags} if flags else {}
        self.machine.convert(self.fd, page * PAGE_SIZE, npages * PAGE_SIZE, attributes, **more)

    def punch(self, page: int, npages: int = 1) -> None:
        """Free pages."""
        self.machine.punch(self.fd, page * PAGE_SIZE, npages * PAGE_SIZE)

    def allocate(self, page: int, npages: int = 1) -> None:
        """Allocate pages."""
        self.machine.allocate(self.fd, page * PAGE_SIZE, npages * PAGE_SIZE)

    def load(self, page: int) -> int:
        """Load in the owner's process, which a private page kills."""
        return self.steps.call(f"view[{page}*P]", lambda: self._word(page))

    def store(self, page: int, value: int) -> None:
        """Store in the owner's process, as ``load``."""
        self.steps.call(f"view[{page}*P] = {value:#x}", lambda: self._set_word(page, value))

    def _word(self, page: int) -> int:
        at = page * PAGE_SIZE
        return int.from_bytes(self.mapping[at : at + _WORD], "little")

    def _set_word(self, page: int, value: int) -> None:
        at = page * PAGE_SIZE
        self.mapping[at : at + _WORD] = value.to_bytes(_WORD, "little")

    def touch(self, page: int, value: int | None = None) -> str:
        """Load or store in a child that inherits the mapping; return ``SIGBUS`` if that kills it.

        Else the answer is the value that was there or is there now, as text.
        """
        return self.steps.in_child(partial(self._touch, page, value))

    def _touch(self, page: int, value: int | None) -> int:
        # No handler of the parent's, such as faulthandler's.
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        if value is None:
            return self.load(page)
        self.store(page, value)
        return value

    def guest(self, page: int, value: int | None = None) -> Answer:
        """Have the guest load a word, and store ``value`` there; return the old one, or an exit.

        The machine's ``go_on`` makes an access again that ended in an exit.
        """
        at = DATA + page * PAGE_SIZE
        found = self.machine.load(at)
        if value is None or isinstance(found, str):
            return found
        return self.machine.store(value, at) or found

    def refused(self, page: int, npages: int) -> tuple[object, int]:
        """Make pages private, which fails; return the errno, and ``error_offset`` in pages."""
        wanted = kvm.kvm_memory_attributes2(
            offset=page * PAGE_SIZE,
            size=npages * PAGE_SIZE,
            attributes=kvm.KVM_MEMORY_ATTRIBUTE_PRIVATE,
        )

        def ask() -> tuple[object, int]:
            answer: object = None
            try:
                kvm.KVM_SET_MEMORY_ATTRIBUTES2(self.fd, wanted)
            except OSError as error:
                answer = Errno(error.errno or 0)
            return answer, wanted.error_offset // PAGE_SIZE

        return self.steps.call(
            f"ioctl(gmem, KVM_SET_MEMORY_ATTRIBUTES2, {{{page}*P, {npages}*P, attributes=0x8}}),"
            " error_offset in pages",
            ask,
        )

    @contextmanager
    def held(self, page: int) -> Generator[None]:
        """Hold a page by a pipe."""
        with pipe() as (_, into):
            at = address_of(self.mapping) + page * PAGE_SIZE
            self.steps.call(
                f"vmsplice(pipe, {{view + {page}*P, P}}, 1, 0)",
                lambda: calls.vmsplice(into, at, PAGE_SIZE),
            )
            yield
            self.steps.note("close(pipe)")

    def beside(self, page: int, value: int, act: Callable[[], object]) -> tuple[object, str, str]:
        """Fork a child that stores a value, and go on when ``act`` has converted the page.

        Return what the child had found, how a store ends that a child of the child tries then, and
        how a load of the child's own ends.
        """
        said, say = os.pipe()
        go, let = os.pipe()
        # One process at a time writes the steps.
        self.steps.note(f"fork(); child: found = view[{page}*P], view[{page}*P] = {value:#x}")

        def body() -> None:
            signal.alarm(_DEADLINE)
            os.close(let)
            signal.signal(signal.SIGBUS, signal.SIG_DFL)
            found = self._word(page)
            self._set_word(page, value)
            os.write(say, f"{found} ".encode())
            os.read(go, 1)
            stored = Steps().in_child(lambda: self._set_word(page, value))
            os.write(say, stored.encode())
            self._word(page)

        child = fork(body, bound=True)
        os.close(say)
        os.close(go)
        try:
            found = os.read(said, 64).decode().strip()
            act()
            os.write(let, b"x")
            stored = os.read(said, 64).decode()
        finally:
            os.close(let)
            os.close(said)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        ended = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        self.steps.note(f"child: view[{page}*P] = {value:#x}, in a child of its own: {stored}")
        self.steps.note(f"child: view[{page}*P]: {ended}")
        return found, stored, ended


@contextmanager
def machine(
    service: Service, steps: Steps, npages: int = 1, flags: int = SHARED
) -> Generator[InPlace]:
    """Make a machine of a service, with a guest_memfd of some pages in a slot.

    The service makes guest_memfds (``Options.guest_memfd``).
    """
    with InPlaceMachine(steps, service) as made:
        yield InPlace(made, npages, flags)
