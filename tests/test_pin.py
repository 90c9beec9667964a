"""Pinned pages stay where they are until they are punched, as the kernel's page tables show."""

import ctypes
import mmap
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from errno import EAGAIN, EBUSY, ENOBUFS, ENOMEM, ENOSPC
from typing import Final

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from outcomes import Errno, outcome
from restrictedmem.abi import io_uring, memory, process
from restrictedmem.mm import pin
from restrictedmem.mm.backing import MemfdBacking
from restrictedmem.mm.pin import BLOCK, PinnedBacking
from restrictedmem.mm.sequence import InvalidationSequence
from restrictedmem.units import PAGE_SHIFT, PAGE_SIZE, PageRange, pgoff_t
from waiting import wait_until

BLOCK_BYTES: Final = BLOCK * PAGE_SIZE
_PFN: Final = (1 << 55) - 1
_CONTROLS: Final = 8


@dataclass
class Rig:
    """A memfd of some blocks, mapped as a consumer maps it (2 MiB-congruent), with pinned pages."""

    memfd: MemfdBacking
    mapping: mmap.mmap
    start: int
    pinned: PinnedBacking
    window: PageRange

    def allocate(self, first: int, count: int = 1) -> None:
        self.pinned.allocate(first << PAGE_SHIFT, count << PAGE_SHIFT)

    def punch(self, first: int, count: int = 1) -> None:
        self.pinned.release(first << PAGE_SHIFT, count << PAGE_SHIFT)
        self.memfd.punch(first << PAGE_SHIFT, count << PAGE_SHIFT)

    def frames(self, first: int, count: int) -> list[int]:
        return frames(self.start + (first << PAGE_SHIFT), count)

    def resident(self) -> int:
        return self.memfd.resident() >> PAGE_SHIFT


def frames(address: int, count: int) -> list[int]:
    """Return the page frames behind some pages of this process. Without CAP_SYS_ADMIN all are 0."""
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        entries = os.pread(pagemap.fileno(), count * 8, (address >> PAGE_SHIFT) * 8)
    return [entry & _PFN for (entry,) in struct.iter_unpack("=Q", entries)]


@contextmanager
def rig(
    blocks: int = 2, limit: int | None = None, sequence: InvalidationSequence | None = None
) -> Generator[Rig]:
    memfd = MemfdBacking(limit=limit)
    size = blocks * BLOCK_BYTES
    # The mapping is large enough to find 2 MiB-congruent addresses in it.
    mapping = mmap.mmap(memfd.fileno(), size + BLOCK_BYTES, mmap.MAP_SHARED)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    shift = -address % BLOCK_BYTES
    memory.map_over(address + shift, size, memfd.fileno())
    window = PageRange(pgoff_t(0), pgoff_t(blocks * BLOCK))

    class Mapped:
        """MADV_POPULATE_WRITE on the inner mapping."""

        def allocate(self, offset: int, length: int) -> None:
            memfd.charge(offset, length)
            mapping.madvise(memory.MADV_POPULATE_WRITE, shift + offset, length)

        def order_of(self, pgoff: pgoff_t) -> int:
            return memfd.order_of(pgoff)

        def release(self, offset: int, length: int) -> None:
            memfd.release(offset, length)

        def close(self) -> None:
            memfd.close()

    made = PinnedBacking(Mapped(), address + shift, window, sequence)
    try:
        yield Rig(memfd, mapping, address + shift, made, window)
    finally:
        made.close()


def compact() -> None:
    with open("/proc/sys/vm/compact_memory", "w", encoding="ascii") as setting:
        setting.write("1")


def collapse(found: Rig, block: int) -> object:
    """Try to move a block's pages into one huge page, as anybody may."""
    offset = (
        found.start
        - ctypes.addressof(ctypes.c_char.from_buffer(found.mapping))
        + block * BLOCK_BYTES
    )
    return outcome(lambda: found.mapping.madvise(memory.MADV_COLLAPSE, offset, BLOCK_BYTES))


def pinned_by_rings() -> int:
    """Return the bytes that the kernel counts as pinned by this process (VmPin, for io_uring)."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmPin:"))


def test_a_page_brings_its_block_and_pins_it() -> None:
    with rig() as found:
        found.allocate(5)
        assert (found.pinned.pinned, found.resident()) == (BLOCK_BYTES, BLOCK)
        found.allocate(7, 16)
        assert found.resident() == BLOCK
        found.allocate(BLOCK - 1, 2)
        assert (found.pinned.pinned, found.resident()) == (2 * BLOCK_BYTES, 2 * BLOCK)


def every_other(found: Rig) -> list[int]:
    return found.frames(0, len(found.window))[1::2]


@pytest.mark.requires("root")
def test_frames_stay_across_compaction() -> None:
    """Every other page of much memory is freed. So compaction has cause and room to move pages.

    Their place in the zone is what decides which pages move. So the test makes controls, each
    somewhere else, until one of them was moved.
    """
    with rig(blocks=64) as pinned, ExitStack() as controls:
        pinned.allocate(0, len(pinned.window))
        for page in range(0, len(pinned.window), 2):
            pinned.punch(page)
        assert (pinned.pinned.unpinned, pinned.pinned.pinned) == (
            0,
            pinned.resident() << PAGE_SHIFT,
        )
        before = every_other(pinned)
        assert all(before)
        for _ in range(_CONTROLS):
            control = controls.enter_context(rig(blocks=64))
            control.allocate(0, len(control.window))
            # The control's pages are mapped, present and not pinned.
            control.pinned.release(0, len(control.window) << PAGE_SHIFT)
            for page in range(0, len(control.window), 2):
                control.punch(page)
            free_to_move = every_other(control)
            compact()
            # Migration that fails has entries of its own in the page table meanwhile.
            wait_until(lambda: every_other(pinned) == before, "what is pinned to be where it was")
            if every_other(control) != free_to_move:
                return
        pytest.fail(f"compaction moved nothing of {_CONTROLS} controls, so nothing was shown")


def test_what_is_pinned_cannot_be_collapsed() -> None:
    """This needs no privilege: MADV_COLLAPSE must move pages, and cannot while others hold them."""
    with rig() as found:
        found.allocate(0)
        assert collapse(found, 0) in (Errno(EAGAIN), Errno(EBUSY))
        found.pinned.release(0, BLOCK_BYTES)
        assert collapse(found, 0) is None


def test_a_punch_frees_and_the_rest_stays_pinned() -> None:
    with rig() as found:
        found.allocate(0)
        found.punch(100, 3)
        assert (found.pinned.pinned >> PAGE_SHIFT, found.resident()) == (BLOCK - 3, BLOCK - 3)
        found.allocate(101)
        assert (found.pinned.pinned >> PAGE_SHIFT, found.resident()) == (BLOCK - 2, BLOCK - 2)
        found.punch(0, BLOCK)
        assert (found.pinned.pinned, found.resident()) == (0, 0)


@pytest.mark.requires("root")
def test_a_partial_punch_moves_no_neighbour() -> None:
    with rig() as found:
        found.allocate(0)
        before = found.frames(0, BLOCK)
        found.punch(7)
        compact()
        after = found.frames(0, BLOCK)
        assert (after[:7], after[8:]) == (before[:7], before[8:])
        assert after[7] == 0


def test_close_lets_go() -> None:
    """The ring ends too: it holds no page any more after the file, and the memory can be moved."""
    with rig() as found:
        found.allocate(0)
        before = pinned_by_rings()
        fd = os.dup(found.memfd.fileno())
    try:
        wait_until(lambda: pinned_by_rings() <= before - BLOCK_BYTES, "the ring to let go")
        memory.fallocate(fd, memory.PUNCH, 0, BLOCK_BYTES)
        assert os.fstat(fd).st_blocks == 0
    finally:
        os.close(fd)


def test_under_a_limit_the_page_alone() -> None:
    with rig(limit=4 * PAGE_SIZE) as found:
        found.allocate(9, 2)
        assert (found.pinned.pinned, found.resident()) == (2 * PAGE_SIZE, 2)
        found.allocate(8, 4)
        assert (found.pinned.pinned, found.resident()) == (4 * PAGE_SIZE, 4)
        assert outcome(lambda: found.allocate(20)) == Errno(ENOSPC)
        assert found.pinned.pinned == 4 * PAGE_SIZE


def test_beside_an_invalidation_the_page_alone() -> None:
    """A page being punched was released before, and nobody would release it again."""
    with (
        closing(InvalidationSequence.create()) as sequence,
        rig(blocks=2, sequence=sequence) as found,
    ):
        sequence.begin(pgoff_t(0), pgoff_t(496))
        found.allocate(500)
        found.allocate(BLOCK)
        assert (found.resident(), found.pinned.pinned) == (1 + BLOCK, (1 + BLOCK) * PAGE_SIZE)
        sequence.end()
        found.allocate(7)
        assert found.resident() == 2 + BLOCK


def test_no_buffer_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io_uring, "IORING_MAX_REG_BUFFERS", 2)
    with rig(blocks=3) as found:
        found.allocate(0)
        found.allocate(BLOCK)
        assert outcome(lambda: found.allocate(2 * BLOCK)) == Errno(ENOBUFS)
        # Cut in two: one half finds the buffer of the whole, the other none.
        found.punch(10)
        assert (found.pinned.unpinned, found.pinned.pinned >> PAGE_SHIFT) == (
            BLOCK - 11,
            BLOCK + 10,
        )
        found.punch(0, 2 * BLOCK)
        assert found.pinned.pinned == 0
        found.allocate(2 * BLOCK)


def test_the_limit_on_locked_memory() -> None:
    """Without CAP_IPC_LOCK a user pins no more than RLIMIT_MEMLOCK, with all rings together."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if os.geteuid() == 0:
                # The kernel counts a user's pinned pages, whichever process has pinned them.
                nobody_else = 1_000_000 + os.getpid()
                os.setresuid(nobody_else, nobody_else, nobody_else)
            process.set_capabilities(0)
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (3 << 20, 3 << 20))
            with rig() as found:
                found.allocate(0)
                try:
                    found.allocate(BLOCK)
                except OSError as error:
                    status = (
                        0
                        if error.errno == ENOMEM
                        and "RLIMIT_MEMLOCK" in str(error)
                        and found.pinned.pinned == BLOCK_BYTES
                        else 2
                    )
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.requires("fuse", "root")
@pytest.mark.parametrize(
    ("kilobytes", "what"),
    [
        (0, ""),
        (64, "LAUNCH_UPDATE: Cannot allocate memory"),
        (4096, "the guest stopped: MemoryFault"),
    ],
)
def test_run_names_the_limit_on_pinned_memory(kilobytes: int, what: str) -> None:
    command = [
        sys.executable,
        "-m",
        "restrictedmem",
        "run",
        "--quiet",
        "--pin",
        "--engine",
        "software",
        "--memory",
        "4M",
        "sha256",
    ]
    no_cap = [
        "setpriv",
        "--bounding-set",
        "-ipc_lock,-sys_resource",
        "--inh-caps",
        "-ipc_lock,-sys_resource",
    ]
    limit = ["sh", "-c", f'ulimit -l {kilobytes} && exec "$@"', "sh"]
    done = subprocess.run(
        [*limit, *no_cap, *command],
        input="",
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    error, hint = done.stderr.splitlines()
    assert error.startswith(f"error: {what}")
    assert "RLIMIT_MEMLOCK" in error
    assert hint.startswith("hint: ")
    assert "ulimit -l" in hint


class PinMachine(RuleBasedStateMachine):
    """Random takes and punches, compared with the set of pages that must be pinned.

    The memfd says which of them exist.
    """

    @initialize()
    def create(self) -> None:
        self.context = rig(blocks=2)
        self.found = self.context.__enter__()
        self.model: set[int] = set()

    def teardown(self) -> None:
        if hasattr(self, "context"):
            self.context.__exit__(None, None, None)

    @rule(first=st.integers(0, 2 * BLOCK - 1), count=st.integers(1, 700))
    def take(self, first: int, count: int) -> None:
        count = min(count, 2 * BLOCK - first)
        self.found.allocate(first, count)
        for block in range(first // BLOCK, (first + count - 1) // BLOCK + 1):
            pages = set(range(block * BLOCK, (block + 1) * BLOCK))
            self.model |= pages & set(range(first, first + count)) if self.model & pages else pages

    @rule(first=st.integers(0, 2 * BLOCK - 1), count=st.integers(1, 700))
    def punch(self, first: int, count: int) -> None:
        count = min(count, 2 * BLOCK - first)
        self.found.punch(first, count)
        self.model -= set(range(first, first + count))

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "found"):
            assert (
                self.found.pinned.pinned >> PAGE_SHIFT == self.found.resident() == len(self.model)
            )
            assert self.found.pinned.unpinned == 0


TestPinMachine = PinMachine.TestCase
TestPinMachine.settings = settings(
    max_examples=30,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_blocks_are_two_mebibytes() -> None:
    assert pin.BLOCK << PAGE_SHIFT == 2 << 20
    assert io_uring.IORING_MAX_REG_BUFFERS * (pin.BLOCK << PAGE_SHIFT) == 32 << 30
