"""Stop requests, and several vCPUs that take turns on the software engine."""

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from benchmarks.common import Figure, Lab, below, percentile, service
from benchmarks.guest import HEAP_OFFSET, OVERHEAD, SPIN
from restrictedmem import guests
from restrictedmem.abi import memory
from restrictedmem.protocol import exits
from restrictedmem.service.client import Service
from restrictedmem.vmm import elf
from restrictedmem.vmm.vmm import Vmm

_VCPUS: Final = 4
_HEAP: Final = 8 << 20
_PROBE: Final = elf.parse(guests.path("probe").read_bytes())


def _interrupts(
    started: Service, image: elf.Image, vcpus: int, count: int, *, punched: bool
) -> list[float]:
    """Interrupt vCPUs in turn while all of them loop.

    Returns the milliseconds from each request to the return of KVM_RUN.
    """
    found: list[float] = []
    with Vmm(_HEAP + OVERHEAD, started, vcpus=vcpus, engine="software") as vmm:
        vmm.load(image, ["loop"])
        ended = [threading.Semaphore(0) for _ in vmm.vcpus]
        go_on = [threading.Semaphore(0) for _ in vmm.vcpus]
        times = [0.0] * vcpus
        over = threading.Event()

        def run(index: int) -> None:
            while not over.is_set():
                exit_ = vmm.vcpus[index].run()
                times[index] = time.perf_counter()
                if isinstance(exit_, exits.Interrupted):
                    ended[index].release()
                    go_on[index].acquire()

        threads = [threading.Thread(target=run, args=[index]) for index in range(vcpus)]
        for thread in threads:
            thread.start()
        for number in range(count):
            index = number % vcpus
            if punched:
                memory.fallocate(vmm.restricted_fd, memory.PUNCH, HEAP_OFFSET, _HEAP)
            # So long that the guest runs again, whichever vCPU has its turn, and not always the
            # same.
            time.sleep(0.002 + number % 7 / 1000)
            began = time.perf_counter()
            vmm.vcpus[index].interrupt()
            ended[index].acquire()
            found.append((times[index] - began) * 1e3)
            go_on[index].release()
        over.set()
        for index, thread in enumerate(threads):
            vmm.vcpus[index].interrupt()
            go_on[index].release()
            thread.join()
    return found


def interrupt(lab: Lab) -> Iterator[Figure]:
    """Interrupt a guest that never exits by itself."""
    count = lab.amount(1000, 20)
    cases = [
        ("an endless loop", _PROBE, 1, 1.0),
        (f"{_VCPUS} vCPUs, all faulting", SPIN, _VCPUS, 5.0),
    ]
    with service() as started:
        for what, image, vcpus, limit in cases:
            times = _interrupts(started, image, vcpus, count, punched=vcpus > 1)
            note = (
                f"median {statistics.median(times):.3f} ms, slowest {max(times):.3f} ms of {count}"
            )
            yield Figure(
                f"stop request, {what}; p99",
                "ms",
                None,
                percentile(times, 99),
                None,
                below(limit, f"under {limit:g} ms"),
                note,
            )


def turns(lab: Lab) -> Iterator[Figure]:
    """Let vCPUs that take turns share the work that one vCPU does alone."""
    count = lab.amount(4_000_000, 20_000)
    with service() as started:

        def run(vcpus: int) -> float:
            with (
                Vmm(_HEAP + OVERHEAD, started, vcpus=vcpus, engine="software") as vmm,
                open("/dev/null", "r+b", buffering=0) as null,
            ):
                vmm.load(SPIN, ["smp", str(count // vcpus)])
                vmm.run(null, null, null)
                return vmm.elapsed / 1e6

        pairs = [(run(1), run(_VCPUS)) for _ in range(lab.rounds(5) + 1)][1:]
    alone, together = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    ratio = statistics.median(ours / floor for floor, ours in pairs)
    what = f"{count} atomic increments by {_VCPUS} vCPUs (floor: by one)"
    yield Figure(what, "ms", statistics.median(alone), statistics.median(together), ratio)


BENCHES: Final[dict[str, Callable[[Lab], Iterator[Figure]]]] = {
    "interrupt": interrupt,
    "turns": turns,
}
