"""The launch: what an owner puts into a guest before it runs, until it is measured and closed."""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from errno import EPERM
from typing import final

from restrictedmem import sync
from restrictedmem.protocol.measurement import Measurement, Run


@final
class Launch:
    """A VM's launch: open until its owner finishes it, or runs a vCPU; used by the VM's thread and by those of its vCPUs."""

    def __init__(
        self, policy: int, private: Callable[[], Iterable[Run]], finished: Callable[[bytes], None]
    ) -> None:
        """Open it; before the first vCPU enters the guest ``private`` says what is private, and ``finished`` takes the measurement."""
        self._mutex = sync.mutex()
        self._measurement = Measurement(policy)
        self._private = private
        self._finished = finished
        self._result: bytes | None = None

    @contextmanager
    def opened(self) -> Generator[Measurement]:
        """Keep the launch open meanwhile, to put something in and then extend the measurement by it.

        Raises:
            OSError: EPERM when it is finished.
        """
        with self._mutex:
            if self._result is not None:
                raise OSError(
                    EPERM, "the launch is finished: memory and registers are the guest's own"
                )
            yield self._measurement

    @property
    def finished(self) -> bool:
        """Whether it is closed."""
        return self._result is not None

    def finish(self) -> bytes:
        """Close the launch, if that was not done yet, and return the measurement.

        Raises:
            OSError: what ``finished`` raised; the launch stays open then.
        """
        with self._mutex:
            if self._result is None:
                result = self._measurement.finish(self._private())
                self._finished(result)
                self._result = result
            return self._result
