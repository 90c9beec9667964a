"""Conversion in place: its cost beside that of two halves and a copy, and the memory that it holds.

A VM with two halves loses the content of a page that it converts. A VMM that keeps the content
copies it. Here that is one copy of the step between the shared half and memory of this process.
"""

import mmap
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from typing import Final, NamedTuple, final

from benchmarks.common import Figure, Lab, Pairs, one_core, service, within
from benchmarks.conversion import GUEST, MEMORY, OWN, PAGES, STEP, show_halves, touch
from restrictedmem.abi import memory
from restrictedmem.abi.kvm import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_SET_MEMORY_ATTRIBUTES2,
    kvm_memory_attributes2,
)
from restrictedmem.protocol import guest_abi
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.units import PAGE_SIZE
from restrictedmem.vmm.vm import Vm

_FLAGS: Final = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED


class _Machine(ABC):
    """A VM whose memory behind ``OWN`` bytes of its own is converted, and its owner's mapping."""

    def __init__(self, vm: Vm, shared_fd: int, size: int) -> None:
        self.vm = vm
        self.size = size
        self.shared_fd = shared_fd
        self._mapping = mmap.mmap(shared_fd, OWN + size)
        self._mapping[: len(GUEST)] = GUEST
        self.view = memoryview(self._mapping)[OWN:]
        self._vcpu = vm.create_vcpu()
        self._vcpu.set_regs(rip=guest_abi.PRIVATE_BASE, rsp=guest_abi.PRIVATE_BASE + OWN)
        self._vcpu.run()

    @abstractmethod
    def convert(self, offset: int, *, private: bool) -> None:
        """Convert a step, and keep its content."""

    @abstractmethod
    def held(self) -> int:
        """Return the bytes that the VM's memory takes now, of both kinds."""

    def both_ways(self, *, dirty: bool) -> tuple[float, float, float]:
        """Convert to private and back; return the seconds of both, and the most bytes held.

        With ``dirty``, the side that gives up pages has written each of them before. Else the owner
        has only read them, and the guest has touched one of a step. After a conversion to private
        the guest touches one page of the step. After one to shared the owner reads each page:
        content that nobody reads would not have come over yet.
        """
        spent = [0.0, 0.0]
        most = 0
        for private in (True, False):
            for offset in range(0, self.size, STEP):
                self._use(offset, by_owner=private, dirty=dirty)
                began = time.perf_counter()
                self.convert(offset, private=private)
                if private:
                    touch(self._vcpu, offset, 1)
                else:
                    self._read(offset)
                spent[private] += time.perf_counter() - began
                most = max(most, self.held())
        return spent[True], spent[False], most

    def _use(self, offset: int, *, by_owner: bool, dirty: bool) -> None:
        if not by_owner:
            if dirty:
                touch(self._vcpu, offset, PAGES)
        elif dirty:
            self.view[offset : offset + STEP] = bytes([1]) * STEP
        else:
            self._read(offset)

    def _read(self, offset: int) -> None:
        """Read each page of a step as the owner."""
        sum(self.view[offset : offset + STEP : PAGE_SIZE])

    def close(self) -> None:
        """End the vCPU and the mapping."""
        self._vcpu.close()
        self.view.release()
        self._mapping.close()


@final
class _InPlace(_Machine):
    """A VM with a guest_memfd of this project."""

    def __init__(self, vm: Vm, service_: Service, fd: int, size: int) -> None:
        super().__init__(vm, fd, size)
        self._service = service_

    def convert(self, offset: int, *, private: bool) -> None:
        """Convert a step by the file's ioctl."""
        attributes = KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
        KVM_SET_MEMORY_ATTRIBUTES2(
            self.shared_fd,
            kvm_memory_attributes2(offset=OWN + offset, size=STEP, attributes=attributes),
        )

    def held(self) -> int:
        """Return the bytes of the page cache and of the file behind it."""
        cached = memory.resident_pages(self.shared_fd, 0, OWN + self.size) * PAGE_SIZE
        (file,) = self._service.status()["descriptors"]
        return cached + int(file["resident"])


@final
class _Halves(_Machine):
    """A VM with a restricted half and a shared half, and memory to copy to and from."""

    def __init__(self, vm: Vm, restricted_fd: int, shared_fd: int, size: int) -> None:
        super().__init__(vm, shared_fd, size)
        self._restricted_fd = restricted_fd
        self._copy = memoryview(bytearray(STEP))

    def convert(self, offset: int, *, private: bool) -> None:
        """Copy the content, convert a step, and free its pages in the other half."""
        where = self.view[offset : offset + STEP]
        if private:
            self._copy[:] = where
        else:
            memory.fallocate(self._restricted_fd, memory.PUNCH, OWN + offset, STEP)
        self.vm.set_memory_attributes(MEMORY + offset, STEP, private=private)
        if private:
            memory.fallocate(self.shared_fd, memory.PUNCH, OWN + offset, STEP)
        else:
            where[:] = self._copy

    def held(self) -> int:
        """Return the bytes of both halves."""
        return sum(os.fstat(fd).st_blocks * 512 for fd in (self._restricted_fd, self.shared_fd))


@contextmanager
def _in_place(size: int) -> Generator[tuple[_Machine, int]]:
    """Make the VM of one file, and give the pid of its service."""
    with service(Options(guest_memfd=True)) as started, Vm(started, engine="software") as vm:
        fd = started.create_guest_memfd(OWN + size, _FLAGS)
        vm.set_user_memory_region2(
            slot=0,
            guest_phys_addr=guest_abi.PRIVATE_BASE,
            memory_size=OWN + size,
            guest_memfd=fd,
        )
        with closing(_InPlace(vm, started, fd, size)) as machine:
            yield machine, int(started.info["pid"])
        os.close(fd)


@contextmanager
def _halves(size: int) -> Generator[tuple[_Machine, int]]:
    """Make the VM of two halves, and give the pid of its service."""
    with (
        service() as started,
        Vm(started, engine="software") as vm,
        memory.memfd_create("shared") as shared,
    ):
        restricted_fd = started.memfd_restricted()
        show_halves(vm, restricted_fd, shared.fileno(), size)
        with closing(_Halves(vm, restricted_fd, shared.fileno(), size)) as machine:
            yield machine, int(started.info["pid"])
        os.close(restricted_fd)


class _Cost(NamedTuple):
    """Microseconds of a step, and the most MiB that were held."""

    to_private: float
    to_shared: float
    held: float


def _measured(
    make: Callable[[int], AbstractContextManager[tuple[_Machine, int]]], size: int, *, dirty: bool
) -> _Cost:
    with (
        make(size) as (machine, pid),
        one_core(pid, machine.vm.statistics()["pid"]),
    ):
        to_private, to_shared, held = machine.both_ways(dirty=dirty)
    each = 1e6 * STEP / size
    return _Cost(to_private * each, to_shared * each, held / (1 << 20))


def in_place(lab: Lab) -> Iterator[Figure]:
    """Convert in place and by two halves with a copy, clean and dirty, in steps of 2 MiB."""
    size = lab.amount(256 << 20, 8 << 20)
    for dirty in (False, True):
        rounds = [
            (_measured(_halves, size, dirty=dirty), _measured(_in_place, size, dirty=dirty))
            for _ in range(lab.rounds(3) + 1)
        ][1:]
        kind = "dirty" if dirty else "clean"
        both = _pairs(rounds, lambda side: side.to_private + side.to_shared)
        yield both.figure(f"{size >> 20} MiB in place and back, {kind}; 2 MiB", "µs", within(2))
        yield _pairs(rounds, lambda side: side.to_private).figure("  of that, to private", "µs")
        yield _pairs(rounds, lambda side: side.to_shared).figure("  of that, to shared", "µs")
        yield _pairs(rounds, lambda side: side.held).figure("  held", "MiB")


def _pairs(rounds: list[tuple[_Cost, _Cost]], part: Callable[[_Cost], float]) -> Pairs:
    return Pairs([part(halves) for halves, _ in rounds], [part(ours) for _, ours in rounds])


BENCHES: Final = {"in-place": in_place}
