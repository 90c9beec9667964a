"""A guest that holds the pattern: ``spin hold`` in a VM of its own, and requests to it."""

import os
import threading
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from errno import EIO, ETIMEDOUT
from pathlib import Path
from typing import Final, final

from restrictedmem import guests
from restrictedmem.failure import failed
from restrictedmem.fd import readable
from restrictedmem.service.client import Service
from restrictedmem.threads import begin
from restrictedmem.vmm import elf
from restrictedmem.vmm.vmm import Vmm

#: Seconds that the guest may take to fill its memory, to answer, or to end.
DEADLINE: Final = 30.0
_SYS_POLL: Final = 7


def image() -> elf.Image:
    """Return the guest's program."""
    return elf.parse(guests.path("spin").read_bytes())


@final
class HeldGuest:
    """The owner's access to its guest: the VMM, the guest's input and output, and its heap.

    ``start`` and ``end`` are the guest addresses of the heap.
    """

    def __init__(self, vmm: Vmm, requests: int, replies: int, runs: threading.Thread) -> None:
        """Wait until the guest holds the pattern; the caller owns both pipe ends.

        Raises:
            OSError: ETIMEDOUT if the guest does not answer, EIO if it ended.
        """
        self.vmm = vmm
        self._requests = requests
        self._replies = replies
        self._runs = runs
        word, *heap = self._answer().split()
        if word != "ready" or len(heap) != 2:
            raise failed("prove", EIO, f"the guest did not say that it is ready, but: {word}")
        self.start, self.end = (int(address, 16) for address in heap)

    def ask(self, request: str | bytes) -> str:
        """Return the guest's answer to a line (guests/hold.h).

        Raises:
            OSError: ETIMEDOUT if there is no answer, EIO if the guest ended.
        """
        self.send(request)
        return self._answer()

    def send(self, request: str | bytes) -> None:
        """Send the guest a line."""
        os.write(
            self._requests, (request.encode() if isinstance(request, str) else request) + b"\n"
        )

    def check(self, start: int, end: int) -> str:
        """Make the guest compare a range of addresses with the pattern; return its answer."""
        return self.ask(f"check {start:x} {end - start:x}")

    def wait_idle(self) -> None:
        """Wait until the guest waits for a line, outside guest code.

        Preconditions: the calling process runs the guest.

        Raises:
            OSError: ETIMEDOUT if the guest does not wait in time.
        """
        deadline = time.monotonic() + DEADLINE
        # The vCPU's thread waits for the engine in recvmsg(2), and for the guest's input in
        # poll(2).
        while (
            not Path(f"/proc/self/task/{self._runs.native_id}/syscall")
            .read_text(encoding="ascii")
            .startswith(f"{_SYS_POLL} ")
        ):
            if time.monotonic() > deadline:
                raise failed(
                    "prove", ETIMEDOUT, f"the guest did not wait for a line within {DEADLINE:g} s"
                )
            time.sleep(0.001)

    def wait_end(self) -> None:
        """Wait until the guest has ended for any reason."""
        self._runs.join(DEADLINE)

    def _answer(self) -> str:
        answer = b""
        while not answer.endswith(b"\n"):
            if not readable([self._replies], DEADLINE):
                raise failed("prove", ETIMEDOUT, f"the guest did not answer within {DEADLINE:g} s")
            got = os.read(self._replies, 4096)
            if not got:
                raise failed("prove", EIO, "the guest ended")
            answer += got
        return answer.decode(errors="replace").rstrip("\n")


@contextmanager
def held_guest(
    service: Service, size: int, seed: int, engine: str, *, debug: bool = False
) -> Generator[HeldGuest]:
    """Run a guest that holds the pattern of ``seed`` in ``size`` bytes of private memory.

    It ends with the block.

    Raises:
        OSError: as ``Vmm``; ETIMEDOUT and EIO as ``HeldGuest``.
    """
    input_, requests = os.pipe()
    replies, output = os.pipe()
    with ExitStack() as stack:
        for ours in (requests, replies):
            stack.callback(os.close, ours)
        stdin, stdout = (
            stack.enter_context(open(input_, "rb", 0)),
            stack.enter_context(open(output, "wb", 0)),
        )
        vmm = stack.enter_context(Vmm(size, service, engine=engine, debug=debug))
        vmm.load(image(), ["hold", f"{seed:016x}"])

        def run() -> None:
            # After any error, a thread that waits for the guest finds the end of its output.
            with suppress(OSError):
                vmm.run(stdin, stdout, stdout)
            stdout.close()

        runs = threading.Thread(target=run, name="guest", daemon=True)
        begin(runs)
        try:
            yield HeldGuest(vmm, requests, replies, runs)
        finally:
            vmm.stop()
            runs.join()
