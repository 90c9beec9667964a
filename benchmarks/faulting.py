"""Guests that fault as fast as they can, as load during a measurement."""

import json
import os
import signal
import socket
import threading
import time
from types import TracebackType
from typing import Any, Final, NoReturn, Self, final

from benchmarks.common import BenchError
from benchmarks.guest import HEAP_OFFSET, spin
from restrictedmem.abi import memory
from restrictedmem.fd import OwnedFd, receive_with_fds, send_with_fds
from restrictedmem.service.client import Service

#: Seconds between punches of a guest's whole heap. Meanwhile the guest faults it in again.
_PUNCH_INTERVAL: Final = 0.01


@final
class FaultingGuest:
    """A process with a guest that writes to its whole heap, over and over, and the guest's owner.

    The owner may punch the heap again and again.
    """

    def __init__(self, started: Service, heap: int, *, punched: bool) -> None:
        """Start the guest on ``heap`` bytes of heap, with a service that may serve others too.

        Unless ``punched``, the guest faults only in its first pass.

        Raises:
            BenchError: the guest does not start.
        """
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._child = os.fork()
        if self._child == 0:
            self._sock.close()
            _be_owner(started, heap, theirs, punched=punched)
        theirs.close()
        _, fds = receive_with_fds(self._sock, 64)
        if not fds:
            self._end()
            raise BenchError("a guest did not start", "scripts/test tests/test_run.py says why")
        #: The guest's private memory; its heap begins at ``HEAP_OFFSET``.
        self.descriptor: OwnedFd = fds[0]

    def stop(self) -> dict[str, Any]:
        """Return the engine's statistics, with ``seconds``, and end the guest."""
        self._sock.send(b"stop")
        found: dict[str, Any] = json.loads(self._sock.recv(1 << 16))
        self._end()
        return found

    def _end(self) -> None:
        self._sock.close()
        if self._child:
            os.kill(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)
            self._child = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()
        self.descriptor.close()


def _be_owner(started: Service, heap: int, parent: socket.socket, *, punched: bool) -> NoReturn:
    status = 1
    try:
        with spin(started, heap, "loop") as vmm:
            threading.Thread(target=vmm.vcpus[0].run, daemon=True).start()
            began = time.monotonic()
            send_with_fds(parent, b"running", [vmm.restricted_fd])
            parent.settimeout(_PUNCH_INTERVAL if punched else None)
            while not _asked_to_stop(parent):
                memory.fallocate(vmm.restricted_fd, memory.PUNCH, HEAP_OFFSET, heap)
            parent.send(
                json.dumps({**vmm.vm.statistics(), "seconds": time.monotonic() - began}).encode()
            )
            parent.settimeout(None)
            # The parent kills this process here: the guest's thread never ends by itself.
            parent.recv(1)
        status = 0
    finally:
        os._exit(status)


def _asked_to_stop(parent: socket.socket) -> bool:
    try:
        parent.recv(64)
    except TimeoutError:
        return False
    return True
