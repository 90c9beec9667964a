"""Changes that are done whole or not at all.

By half of such a change an owner could deceive its guest, or the reader of a report.
"""

import os
from collections.abc import Generator
from contextlib import contextmanager

from restrictedmem.failure import status_of


@contextmanager
def whole() -> Generator[None]:
    """Do what raises OSError only if it changed nothing; at other exceptions, exit.

    An engine that failed half way, for want of memory, may have set the attributes and left a vCPU
    the other half. Or it may have put in content that it did not measure. The owner, who can limit
    the memory, would use that.
    """
    try:
        yield
    except OSError:
        # This was foreseen: the caller tells what was not done.
        raise
    except BaseException as error:  # noqa: BLE001  there is nobody to raise to
        os._exit(status_of(error))


@contextmanager
def begun() -> Generator[None]:
    """Do a change that cannot be undone.

    An OSError in its middle is not the error of a call that changed nothing.

    Raises:
        RuntimeError: in place of OSError, which is its cause.
    """
    try:
        yield
    except OSError as error:
        raise RuntimeError(str(error)) from error
