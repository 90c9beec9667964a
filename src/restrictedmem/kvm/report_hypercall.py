"""Reports: the engine process answers the hypercall for one, and the owner hears nothing."""

from errno import EIO
from typing import final

from restrictedmem.service import wire
from restrictedmem.service.report import REPORT_DATA_BYTES
from restrictedmem.service.wire import Channel


@final
class Reporter:
    """The calls to the service that tell of a VM's launch and ask for signed reports."""

    def __init__(self, service: Channel, page: memoryview, policy: int, engine: str) -> None:
        """``page`` is the report page, which the VM's guest reads and writes."""
        self._service = service
        self._page = page
        self._policy = policy
        self._engine = engine

    def launched(self, measurement: bytes) -> None:
        """Tell the service the measurement of the launch, before the guest runs.

        Raises:
            OSError: ENOTCONN when the service is gone.
        """
        self._service.call(
            wire.LAUNCHED, wire.LAUNCH.pack(self._policy, self._engine.encode(), measurement)
        )

    def answer(self) -> int:
        """Have the page's first 64 bytes signed, and write the report to the page's start.

        Return the report's length, or a negative errno.
        """
        try:
            signed, _ = self._service.call(wire.SIGN, bytes(self._page[:REPORT_DATA_BYTES]))
        except OSError as error:
            return -(error.errno or EIO)
        self._page[: len(signed)] = signed
        return len(signed)
