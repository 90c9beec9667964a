"""Changes that are done whole, where half of one would let an owner deceive its guest or whoever reads a report."""

import os
from collections.abc import Generator
from contextlib import contextmanager

from restrictedmem.failure import status_of


@contextmanager
def whole() -> Generator[None]:
    """Do what changes nothing when it raises OSError, or end this process.

    An engine that failed half way, for want of memory, may have told the attributes and left a vCPU
    the other half, or have put in what it did not measure. The owner, who can limit the memory,
    would use that.
    """
    try:
        yield
    except OSError:
        # Foreseen: what was not done is told.
        raise
    except BaseException as error:  # noqa: BLE001  there is nobody to raise to
        os._exit(status_of(error))


@contextmanager
def begun() -> Generator[None]:
    """Do what nothing can take back: an OSError in the middle is not one of a call that changed nothing.

    Raises:
        RuntimeError: in place of OSError, which is its cause.
    """
    try:
        yield
    except OSError as error:
        raise RuntimeError(str(error)) from error
