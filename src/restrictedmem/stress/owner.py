"""The owner of a VM: it drives the vCPUs, and does to the guest's memory what an owner may do.

A seed decides which operations the owner does, in which order and to which pages. The machine's
scheduling decides what the guest does meanwhile.
"""

import os
import random
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from errno import EIO
from typing import final

from restrictedmem.abi import memory
from restrictedmem.abi.kvm import EHWPOISON
from restrictedmem.protocol import exits, guest_abi
from restrictedmem.service.client import Service
from restrictedmem.stress.board import EXTRA_BASE, EXTRA_PAGES
from restrictedmem.stress.finding import PATIENCE, Finding, wait_for
from restrictedmem.stress.ground import CHURN, Ground, sized_memfd
from restrictedmem.stress.party import reporting, told_to_stop
from restrictedmem.stress.plan import Plan
from restrictedmem.stress.progress import Progress
from restrictedmem.stress.puncher import MOST_PAGES, Puncher
from restrictedmem.units import PAGE_SHIFT
from restrictedmem.vmm.boot import SHARED_SIZE, launch_pages, launch_regs
from restrictedmem.vmm.vm import Vcpu, Vm

_PRIVATE_SLOT, _WINDOW_SLOT, _EXTRA_SLOT = range(3)


@final
class Owner:
    """A VM with a guest that watches its pages, and its owner's operations on it."""

    def __init__(
        self, service: Service, ground: Ground, plan: Plan, puncher: Puncher, stack: ExitStack
    ) -> None:
        """Make the VM and load the guest; ``stack`` closes the VM.

        Raises:
            OSError: the engine could not start.
        """
        self._service = service
        self._ground = ground
        self._plan = plan
        self._puncher = puncher
        self._board = ground.board
        # A conversion and its punch belong together. Those of the guest must not come between those
        # of the owner, nor the other way round.
        self._converting = threading.Lock()
        self._extra_fd: int | None = None
        self._extra_half = sized_memfd(stack, "extra", EXTRA_PAGES << PAGE_SHIFT)
        self._epoch = 0
        #: The guest's output (``said``), and why a vCPU stopped that should not have (``failure``).
        self.said = ""
        self.failure = ""
        self.vm = stack.enter_context(Vm(service, engine=plan.engine, platform=plan.platform))
        self.vm.set_user_memory_region(
            slot=_PRIVATE_SLOT,
            guest_phys_addr=guest_abi.PRIVATE_BASE,
            memory_size=ground.private_size,
            restricted_fd=ground.fd,
            shared_fd=ground.half_fd,
        )
        self.vm.set_user_memory_region(
            slot=_WINDOW_SLOT,
            guest_phys_addr=guest_abi.SHARED_BASE,
            memory_size=SHARED_SIZE,
            shared_fd=ground.window_fd,
        )
        self.vm.set_memory_attributes(guest_abi.PRIVATE_BASE, ground.private_size, private=True)
        self._vcpus = tuple(stack.enter_context(self.vm.create_vcpu()) for _ in range(plan.vcpus))
        self._load()
        self._threads = tuple(
            threading.Thread(target=self._drive, args=[vcpu], daemon=True) for vcpu in self._vcpus
        )

    def _load(self) -> None:
        plan, size = self._plan, self._ground.private_size
        arguments = [
            str(random.Random(plan.seed).randrange(1 << 31)),
            str(plan.pages),
            "0",
            str(plan.converting),
        ]
        for gpa, content in launch_pages(CHURN, arguments, private_size=size, vcpus=plan.vcpus):
            self.vm.launch_update(gpa, content)
        for index, vcpu in enumerate(self._vcpus):
            regs = launch_regs(CHURN, private_size=size, index=index)
            vcpu.set_regs(rip=regs.rip, rsp=regs.rsp, rdi=regs.rdi, rsi=regs.rsi)

    @property
    def methods(self) -> dict[str, Callable[[], None]]:
        """The owner's operations that the plan has, by name."""
        puncher = self._puncher
        found: dict[str, Callable[[], None]] = {
            "punch": puncher.punch,
            "punch-block": puncher.punch_block,
            "allocate": puncher.allocate,
            "convert": self._convert,
            "slot": self._change_slot,
            "interrupt": self._interrupt,
            "error": self._lose_page,
        }
        return {name: found[name] for name in self._plan.operations}

    # The guest.

    def start(self) -> None:
        """Let every vCPU run."""
        for thread in self._threads:
            thread.start()

    def _drive(self, vcpu: Vcpu) -> None:
        try:
            value: int | None = 0
            while value is not None:
                value = self._answer(vcpu.run(value))
        except OSError as error:
            self.failure = self.failure or f"vCPU {vcpu.number}: {error.strerror}"

    def _answer(self, exit_: exits.Exit) -> int | None:
        """Return the answer to an exit; None when the vCPU has ended."""
        match exit_:
            case exits.Interrupted():
                return 0
            case exits.MemoryFault(_, gpa, _, errno) if errno == EHWPOISON:
                page = (gpa - guest_abi.PRIVATE_BASE - self._ground.offset) >> PAGE_SHIFT
                self._puncher.take(range(page, page + 1))
                return 0
            case exits.Hypercall(guest_abi.MAP_GPA_RANGE, (gpa, npages, attributes, _)):
                return self._map_gpa_range(
                    gpa,
                    npages << PAGE_SHIFT,
                    private=bool(attributes & guest_abi.MAP_GPA_RANGE_ENCRYPTED),
                )
            case exits.Hypercall(guest_abi.WRITE, (_, offset, length, _)):
                self.said += bytes(self._ground.window[offset : offset + length]).decode()
                return length
            case exits.Hypercall(guest_abi.EXIT, (status, _, _, _)):
                if status:
                    self.failure = (
                        self.failure or f"the guest ended with {status}: {self.said.strip()}"
                    )
                return None
            case exits.Hypercall(guest_abi.PARK):
                return None
            case other:
                self.failure = self.failure or f"a vCPU stopped: {other}"
                return None

    def _map_gpa_range(self, gpa: int, size: int, *, private: bool) -> int:
        half = self._ground.half_fd if private else self._ground.fd
        try:
            with self._converting:
                self.vm.set_memory_attributes(gpa, size, private=private)
                memory.fallocate(half, memory.PUNCH, gpa - guest_abi.PRIVATE_BASE, size)
        except OSError as error:
            return -(error.errno or EIO)
        return 0

    def join(self) -> None:
        """Wait for every vCPU to end.

        Raises:
            Finding: a vCPU does not end.
        """
        for thread in self._threads:
            thread.join(PATIENCE)
            if thread.is_alive():
                raise Finding(self.failure or f"hang: waited {PATIENCE:g} s for every vCPU to end")

    # The owner's operations.

    def _convert(self) -> None:
        """Make pages shared and then private again, without a request of the guest."""
        pages = self._puncher.some()
        start, size = self._ground.offset + (pages.start << PAGE_SHIFT), len(pages) << PAGE_SHIFT
        with self._converting, self._puncher.lane.taking(pages), self._board.exposing(pages):
            self.vm.set_memory_attributes(guest_abi.PRIVATE_BASE + start, size, private=False)
            memory.fallocate(self._ground.fd, memory.PUNCH, start, size)
            self.vm.set_memory_attributes(guest_abi.PRIVATE_BASE + start, size, private=True)
            memory.fallocate(self._ground.half_fd, memory.PUNCH, start, size)

    def _change_slot(self) -> None:
        """Add a slot with a new file at ``EXTRA_BASE``; or punch or delete the slot there.

        Now and then, the guest accesses this slot and is counted meanwhile (``extra_users``).
        """
        if self._extra_fd is not None and self._puncher.random.randrange(2):
            start = self._puncher.random.randrange(EXTRA_PAGES)
            memory.fallocate(
                self._extra_fd,
                memory.PUNCH,
                start << PAGE_SHIFT,
                (EXTRA_PAGES - start) << PAGE_SHIFT,
            )
            return
        if self._extra_fd is not None:
            self._remove_extra()
            return
        size = EXTRA_PAGES << PAGE_SHIFT
        self._extra_fd = self._service.memfd_restricted()
        os.ftruncate(self._extra_fd, size)
        self.vm.set_user_memory_region(
            slot=_EXTRA_SLOT,
            guest_phys_addr=EXTRA_BASE,
            memory_size=size,
            restricted_fd=self._extra_fd,
            shared_fd=self._extra_half,
        )
        self.vm.set_memory_attributes(EXTRA_BASE, size, private=True)
        self._epoch += 1
        self._board.extra = self._epoch

    def _remove_extra(self) -> None:
        if self._extra_fd is None:
            return
        self._board.extra = 0
        # A system call is a barrier. From here on, a vCPU that has read the old word is counted in
        # extra_users.
        os.sched_yield()
        wait_for(
            "the guest to leave the slot that is to be deleted",
            lambda: not self._board.extra_users or bool(self.failure),
        )
        self.vm.set_user_memory_region(slot=_EXTRA_SLOT, guest_phys_addr=EXTRA_BASE, memory_size=0)
        os.close(self._extra_fd)
        self._extra_fd = None

    def _interrupt(self) -> None:
        """Interrupt a vCPU; its thread runs it again at once."""
        self._puncher.random.choice(self._vcpus).interrupt()

    def _lose_page(self) -> None:
        """Make the machine lose a page; the owner punches it when the guest finds out."""
        page = self._puncher.random.randrange(self._ground.pages)
        self.vm.inject_failure(guest_abi.PRIVATE_BASE + self._ground.offset + (page << PAGE_SHIFT))

    # The end.

    def end(self) -> None:
        """End the guest; check the balance of callbacks and pages when nothing is under way.

        Raises:
            Finding: the guest failed or does not end, or something is out of balance.
        """
        with self._puncher.progress.doing("slot"):
            if not self.failure:
                self._remove_extra()
        self._board.stop()
        with self._puncher.progress.doing("wait"):
            self.join()
        if self.failure:
            raise Finding(self.failure)
        with self._puncher.progress.doing("account"):
            if self.vm.engine == "software":
                self._account()
            in_progress = sum(
                consumer["in_progress"] for consumer in self._service.status()["consumers"]
            )
            if in_progress:
                raise Finding(
                    f"accounting: {in_progress} callbacks are without their end, although no "
                    "operation is under way"
                )

    def destroy(self) -> None:
        """End the VM, and check the report of its platform.

        Raises:
            Finding: a rule of the platform was violated.
        """
        with self._puncher.progress.doing("destroy"):
            found = self.vm.destroy()
        if found.get("violated_pages"):
            raise Finding(
                f"{self._plan.platform}: {found['violated_pages']} pages violate a rule; the "
                f"first violation: {found['violations'][0]}"
            )

    def _account(self) -> None:
        """Map every page, punch some, and check that the engine gave back as many pages.

        No invalidation can hinder the mapping now.
        """
        ground, vcpu = self._ground, self._vcpus[0]
        # Pages that the machine has lost cannot be mapped before they are punched.
        self._puncher.take(range(ground.pages))
        gpa, left = guest_abi.PRIVATE_BASE + ground.offset, ground.pages << PAGE_SHIFT
        while left:
            done = vcpu.pre_fault_memory(gpa, left)
            gpa, left = gpa + done, left - done
        before = self.vm.statistics()["pages_freed"]
        some = self._puncher.random.sample(range(ground.pages), min(ground.pages, MOST_PAGES))
        for page in some:
            self._puncher.take(range(page, page + 1))
        freed = self.vm.statistics()["pages_freed"] - before
        if freed != len(some):
            raise Finding(
                f"accounting: {len(some)} pages were punched, and the engine gave up {freed} of "
                "them"
            )


def be_owner(
    service: Service, ground: Ground, plan: Plan, progress: Progress, parent: socket.socket
) -> None:
    """Drive a VM until the parent says stop, and send a report."""
    with reporting(parent) as report, ExitStack() as stack:
        puncher = Puncher(ground, ground.board.lane(0), progress, plan.seed + " owner")
        owner = Owner(service, ground, plan, puncher, stack)
        owner.start()
        try:
            puncher.go_on(owner.methods, lambda: bool(owner.failure) or told_to_stop(parent))
        except OSError as error:
            raise Finding(owner.failure or f"{error.strerror}") from error
        owner.end()
        report["statistics"] = owner.vm.statistics()
        owner.destroy()
