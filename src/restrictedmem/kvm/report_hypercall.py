"""Reports in the engine process: the hypercall that asks for one is answered here, and its owner hears nothing of it."""

from errno import EIO
from typing import final

from restrictedmem.service import wire
from restrictedmem.service.report import REPORT_DATA_BYTES
from restrictedmem.service.wire import Channel


@final
class Reporter:
    """What the service is told of a VM, and asked to sign for it."""

    def __init__(self, service: Channel, page: memoryview, policy: int, engine: str) -> None:
        """``page`` is the report page, which the VM's guest reads and writes."""
        self._service = service
        self._page = page
        self._policy = policy
        self._engine = engine

    def launched(self, measurement: bytes) -> None:
        """Tell the service what was launched, before the guest runs.

        Raises:
            OSError: ENOTCONN when the service is gone.
        """
        self._service.call(
            wire.LAUNCHED, wire.LAUNCH.pack(self._policy, self._engine.encode(), measurement)
        )

    def answer(self) -> int:
        """Put a signed report over the page's first 64 bytes there, and return its length, or a negative errno."""
        try:
            signed, _ = self._service.call(wire.SIGN, bytes(self._page[:REPORT_DATA_BYTES]))
        except OSError as error:
            return -(error.errno or EIO)
        self._page[: len(signed)] = signed
        return len(signed)
