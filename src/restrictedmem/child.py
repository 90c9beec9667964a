"""A forked child that tries something, so that the asking process is neither changed nor held up by it."""

import os
import pickle
import select
import signal
import traceback
from collections.abc import Callable
from errno import ECHILD, ETIMEDOUT
from typing import Final, NoReturn, TypeVar

from restrictedmem.abi import process
from restrictedmem.fd import OwnedFd
from restrictedmem.patience import Patience

#: Seconds that a probe in a child may take.
DEADLINE: Final = 5.0

_T = TypeVar("_T")


def in_child(probe: Callable[[], _T], deadline: float = DEADLINE) -> _T:
    """Return what a probe returns in a forked child, which does nothing else; the answer has to fit in a page.

    Raises:
        OSError: what the probe raised; ETIMEDOUT after ``deadline`` seconds; ECHILD when the child
            died of it, by a signal for instance; EAGAIN, EMFILE when there is no child to be had.
    """
    reader, writer = map(OwnedFd, os.pipe())
    with reader, writer:
        child = process.fork()
        if child == 0:
            _answer(probe, writer.fileno())
        writer.close()
        if not _ends(child, deadline):
            # Not waited for: a child stuck in the kernel would hold this process up too.
            os.kill(child, signal.SIGKILL)
            raise OSError(ETIMEDOUT, f"no answer within {deadline:g} s")
        _, status = os.waitpid(child, 0)
        answer = os.read(reader.fileno(), select.PIPE_BUF)
    if not answer:
        code = os.waitstatus_to_exitcode(status)
        raise OSError(
            ECHILD,
            f"the probe was killed by {signal.Signals(-code).name}"
            if code < 0
            else "the probe failed",
        )
    error: OSError | None
    value: _T
    error, value = pickle.loads(answer)
    if error is not None:
        raise error
    return value


def _ends(child: int, deadline: float) -> bool:
    """Say whether a child ends in time, what it has to undo in the kernel included; not reaped."""
    try:
        pidfd = OwnedFd(os.pidfd_open(child))
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    with pidfd:
        return Patience(deadline).wait(pidfd.fileno(), select.POLLIN)


def _answer(probe: Callable[[], object], writer: int) -> NoReturn:
    try:
        process.prctl(process.PR_SET_PDEATHSIG, signal.SIGKILL)
        try:
            answer = pickle.dumps((None, probe()))
        except OSError as error:
            answer = pickle.dumps((error, None))
        os.write(writer, answer)
        os._exit(0)
    except Exception:  # noqa: BLE001  a fault of the probe must not go on as a second copy of the caller
        traceback.print_exc()
    finally:
        os._exit(1)
