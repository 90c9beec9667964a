"""Conversion in place while others act: a model, attacks on private pages, and deaths at any time.

docs/understand/conversion-in-place.md says which process enforces what.
"""

import ctypes
import fcntl
import mmap
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from in_place_calls import set_memory_attributes
from owned_service import in_fork
from processes import end_after
from restrictedmem.abi import memory
from restrictedmem.abi.kvm import (
    KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE,
    KVM_SET_MEMORY_ATTRIBUTES2_ZERO,
    Cap,
)
from restrictedmem.abi.process import PR_SET_CHILD_SUBREAPER, prctl
from restrictedmem.audit.syscalls import io_uring_read, process_vm_readv
from restrictedmem.conformance.in_place_machine import (
    PRIVATE,
    SHARED,
    InPlace,
    machine,
)
from restrictedmem.conformance.steps import Steps
from restrictedmem.fd import OwnedFd
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options

pytestmark = pytest.mark.requires("fuse")
P = 4096
NPAGES = 6


class Pages(RuleBasedStateMachine):
    """A file beside a list of pages, each private or shared, with one value."""

    service: Service

    def __init__(self) -> None:
        super().__init__()
        self.made = ExitStack()
        self.it: InPlace

    @initialize(flags=st.sampled_from((PRIVATE, SHARED)))
    def begin(self, flags: int) -> None:
        self.it = self.made.enter_context(machine(self.service, Steps(), NPAGES, flags))
        self.private = [flags == PRIVATE] * NPAGES
        self.value = [0] * NPAGES

    page = st.integers(0, NPAGES - 1)
    value_ = st.integers(1, 255)
    some = st.integers(1, NPAGES)

    def span(self, page: int, npages: int) -> range:
        return range(page, min(page + npages, NPAGES))

    @rule(page=page, value=value_)
    def store(self, page: int, value: int) -> None:
        if self.private[page]:
            assert self.it.touch(page, value) == "SIGBUS"
        else:
            self.it.store(page, value)
            self.value[page] = value

    @rule(page=page)
    def load(self, page: int) -> None:
        if not self.private[page]:
            assert self.it.load(page) == self.value[page]

    @rule(page=page, value=st.none() | value_)
    def touch_in_a_child(self, page: int, value: int | None) -> None:
        answer = self.it.touch(page, value)
        if self.private[page]:
            assert answer == "SIGBUS"
            return
        self.value[page] = self.value[page] if value is None else value
        assert answer == str(self.value[page])

    @rule(page=page, value=st.none() | value_)
    def guest(self, page: int, value: int | None) -> None:
        assert self.it.guest(page, value) == self.value[page]
        self.value[page] = self.value[page] if value is None else value

    @rule(
        page=page,
        npages=some,
        private=st.booleans(),
        flags=st.sampled_from(
            (0, KVM_SET_MEMORY_ATTRIBUTES2_ZERO, KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE)
        ),
    )
    def convert(self, page: int, npages: int, private: bool, flags: int) -> None:
        zero = flags == KVM_SET_MEMORY_ATTRIBUTES2_ZERO and not private
        span = self.span(page, npages)
        self.it.convert(page, len(span), private=private, flags=flags if zero else flags & 2)
        for each in span:
            if zero and self.private[each]:
                self.value[each] = 0
            self.private[each] = private

    @rule(page=page, npages=some)
    def punch(self, page: int, npages: int) -> None:
        self.it.punch(page, npages)
        for each in self.span(page, npages):
            self.value[each] = 0

    @rule(page=page, npages=some)
    def allocate(self, page: int, npages: int) -> None:
        self.it.allocate(page, len(self.span(page, npages)))

    @invariant()
    def the_engine_lives(self) -> None:
        if hasattr(self, "it"):
            self.it.machine.check_extension(Cap.MEMORY_ATTRIBUTES)

    def teardown(self) -> None:
        self.made.close()


def test_pages_are_as_a_list_of_pages_says() -> None:
    with Service.start(Options(guest_memfd=True)) as service:
        Pages.service = service
        case = Pages.TestCase
        case.settings = settings(max_examples=12, stateful_step_count=25)
        case().runTest()


# Attacks.

SECRET, OPEN = 0xEE, 0x55


def address_of(mapping: mmap.mmap) -> int:
    # A mapping that is only read has no writable buffer.
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def routes(fd: int, mapping: mmap.mmap, path: Path) -> dict[str, Callable[[], bytes]]:
    """Return each way of a process to read the first byte of a file that it has mapped."""
    copy = mmap.mmap(fd, P, flags=mmap.MAP_PRIVATE)
    mem = os.open("/proc/self/mem", os.O_RDONLY)
    out, into = os.pipe()
    os.set_blocking(out, False)
    me, at, at_copy = os.getpid(), address_of(mapping), address_of(copy)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    aligned = mmap.mmap(-1, P)
    libc = ctypes.CDLL(None, use_errno=True)

    def through_pipe(put: Callable[[], object]) -> bytes:
        put()
        return os.read(out, P)[:1]

    def vmsplice() -> None:
        iovec = (ctypes.c_uint64 * 2)(at, 1)
        if libc.vmsplice(into, iovec, 1, 0) < 0:
            raise OSError(ctypes.get_errno(), "vmsplice")

    def direct() -> bytes:
        os.pwrite(file, memoryview(mapping)[:P], 0)
        os.preadv(file, [aligned], 0)
        return aligned[:1]

    return {
        "process_vm_readv": lambda: process_vm_readv(me, at, 1),
        "process_vm_readv of a private mapping": lambda: process_vm_readv(me, at_copy, 1),
        "/proc/self/mem": lambda: os.pread(mem, 1, at),
        "write from the mapping": lambda: through_pipe(
            lambda: os.write(into, memoryview(mapping)[:1])
        ),
        "vmsplice": lambda: through_pipe(vmsplice),
        "O_DIRECT write from the mapping": direct,
        "read": lambda: os.read(fd, 1),
        "pread": lambda: os.pread(fd, 1, 0),
        "splice": lambda: through_pipe(lambda: os.splice(fd, into, P)),
        "sendfile": lambda: through_pipe(lambda: os.sendfile(into, fd, None, P)),
        "io_uring": lambda: io_uring_read(fd, 1),
    }


def attack(it: InPlace, path: Path, stop: int) -> dict[str, list[int]]:
    """Read by every route until ``stop`` has a byte; return the bytes that each has seen."""
    os.set_blocking(stop, False)
    # Without O_DIRECT the kernel answers read(2) from its page cache.
    flags = fcntl.fcntl(it.fd, fcntl.F_GETFL)
    fcntl.fcntl(it.fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    seen: dict[str, set[int]] = {}
    ways = routes(it.fd, it.mapping, path)
    while True:
        for name, read in ways.items():
            with suppress(OSError):
                seen.setdefault(name, set()).update(read()[:1])
        with suppress(BlockingIOError):
            if os.read(stop, 1):
                return {name: sorted(found) for name, found in seen.items()}


def test_no_route_reads_a_private_page_at_any_moment(tmp_path: Path) -> None:
    """The guest has a secret in the page only while it is private."""
    with (
        Service.start(Options(guest_memfd=True)) as service,
        machine(service, Steps()) as it,
    ):
        it.store(0, OPEN)
        ends = os.pipe(), os.pipe()
        attackers = [in_fork(partial(attack, it, tmp_path / str(stop), stop)) for stop, _ in ends]
        for _ in range(150):
            it.convert(0, private=True)
            assert it.guest(0, SECRET) == OPEN
            assert it.guest(0, OPEN) == SECRET
            it.convert(0, private=False)
            assert it.load(0) == OPEN
        for _, stop in ends:
            os.write(stop, b"x")
        for join in attackers:
            answer = join()
            assert isinstance(answer, dict), answer
            seen = cast("dict[str, list[int]]", answer)
            assert all(set(found) <= {OPEN} for found in seen.values()), seen
            # The routes work: those that the kernel allows have seen the shared page.
            reached = {name for name, found in seen.items() if found}
            assert reached >= {"process_vm_readv", "/proc/self/mem", "vmsplice", "read"}


def test_a_page_that_is_held_shows_nothing_of_the_guest() -> None:
    """The holder keeps the old page. The series would refuse the conversion with EAGAIN."""
    with (
        Service.start(Options(guest_memfd=True)) as service,
        machine(service, Steps()) as it,
    ):
        it.store(0, OPEN)
        out, into = os.pipe()
        iovec = (ctypes.c_uint64 * 2)(address_of(it.mapping), P)
        assert ctypes.CDLL(None).vmsplice(into, iovec, 1, 0) == P
        it.convert(0, private=True)
        assert it.guest(0, SECRET) == OPEN
        assert set(os.read(out, P)) <= {OPEN, 0}
        os.close(out)
        os.close(into)
        it.convert(0, private=False)
        assert it.load(0) == SECRET


# Deaths.


def convert_for_ever(service: Service, told: int) -> None:
    """Change pages and convert them; say so before each conversion."""
    size = 64 * P
    with OwnedFd(service.create_guest_memfd(size, SHARED)) as fd:
        mapping = mmap.mmap(fd.fileno(), size)
        while True:
            for at in range(0, size, P):
                mapping[at] = OPEN
            os.write(told, b"x")
            set_memory_attributes(fd.fileno(), 0, size, private=True)
            set_memory_attributes(fd.fileno(), 0, size, private=False)


def children() -> Iterator[tuple[int, str]]:
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii")
    for pid in map(int, text.split()):
        with suppress(FileNotFoundError):
            yield pid, Path(f"/proc/{pid}/comm").read_text(encoding="ascii").strip()


def die(victim: str, rounds: int) -> str:
    """Kill a party in the middle of a conversion, and wait until all of them have ended."""
    # Everything that loses its parent becomes this process's child.
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    end_after(30)
    service = Service.start(Options(guest_memfd=True))
    told, tell = os.pipe()
    owner = os.fork()
    if not owner:
        try:
            signal.signal(signal.SIGBUS, signal.SIG_DFL)
            convert_for_ever(service, tell)
        finally:
            os._exit(0)
    found = {name: pid for pid, name in children()}
    pids = {"service": service.info["pid"], "owner": owner} | found
    service.close()
    os.close(tell)
    for _ in range(rounds):
        if not os.read(told, 1):
            return "the owner could not convert"
    os.kill(pids[victim], signal.SIGKILL)
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    return "all have ended"


@pytest.mark.parametrize("rounds", range(1, 4))
@pytest.mark.parametrize("victim", ["service", "owner", "rmem-invalidate", "rmem-spawner"])
def test_nothing_is_left_when_a_party_dies(victim: str, rounds: int) -> None:
    assert in_fork(lambda: die(victim, rounds))() == "all have ended"


def test_an_engine_that_dies_leaves_the_file_to_its_owner() -> None:
    with (
        Service.start(Options(guest_memfd=True)) as service,
        machine(service, Steps(), 2) as it,
    ):
        it.store(0, OPEN)
        it.convert(0, private=True)
        assert it.guest(0, SECRET) == OPEN
        (engine,) = [each["report"]["pid"] for each in service.status()["consumers"]]
        os.kill(engine, signal.SIGKILL)
        it.convert(0, private=False)
        assert it.load(0) == SECRET
        memory.fallocate(it.fd, memory.PUNCH, 0, P)
        assert it.load(0) == 0


def test_the_program_of_the_page_runs() -> None:
    page = Path(__file__).parent.parent / "docs" / "understand" / "conversion-in-place.md"
    program, printed = re.findall(
        r"```python\n(.*?)```\n\n```text\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL
    )[0]
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout == printed
