"""The launch: an owner puts content into a guest, until the launch is measured and closed."""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from errno import EPERM
from typing import final

from restrictedmem import sync
from restrictedmem.protocol.measurement import Measurement, Run


@final
class Launch:
    """A VM's launch, which is open until its owner finishes it or runs a vCPU.

    The VM's thread and the vCPUs' threads use it.
    """

    def __init__(
        self, policy: int, private: Callable[[], Iterable[Run]], finished: Callable[[bytes], None]
    ) -> None:
        """Open the launch.

        Before the first vCPU enters the guest, ``private`` returns what is private, and
        ``finished`` takes the measurement.
        """
        self._mutex = sync.mutex()
        self._measurement = Measurement(policy)
        self._private = private
        self._finished = finished
        self._result: bytes | None = None

    @contextmanager
    def opened(self) -> Generator[Measurement]:
        """Keep the launch open meanwhile.

        The caller puts something in, and then extends the measurement by it.

        Raises:
            OSError: EPERM when the launch is finished.
        """
        with self._mutex:
            if self._result is not None:
                raise OSError(
                    EPERM, "the launch is finished: memory and registers are the guest's own"
                )
            yield self._measurement

    @property
    def finished(self) -> bool:
        """Whether the launch is finished."""
        return self._result is not None

    def finish(self) -> bytes:
        """Close the launch, unless it is closed already, and return the measurement.

        Raises:
            OSError: an error of ``finished``; the launch stays open then.
        """
        with self._mutex:
            if self._result is None:
                result = self._measurement.finish(self._private())
                self._finished(result)
                self._result = result
            return self._result
