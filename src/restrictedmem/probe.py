"""A forked child that tries something.

The process that asks is neither changed nor held up by it.
"""

import os
import pickle
import select
import signal
import traceback
from collections.abc import Callable
from errno import ECHILD, ETIMEDOUT
from typing import Final, TypeVar

from restrictedmem.child import ends, fork
from restrictedmem.fd import OwnedFd
from restrictedmem.patience import Patience

#: Seconds that a probe in a child may take.
DEADLINE: Final = 5.0

_T = TypeVar("_T")


def in_child(probe: Callable[[], _T], deadline: float = DEADLINE) -> _T:
    """Return what a probe returns in a forked child, which does nothing else.

    The answer has to fit into a page.

    Raises:
        OSError: the error of the probe; ETIMEDOUT after ``deadline`` seconds; ECHILD when the child
            died of the probe, for instance by a signal; EAGAIN, EMFILE when no child can be made.
    """
    reader, writer = map(OwnedFd, os.pipe())
    with reader, writer:
        child = fork(lambda: _answer(probe, writer.fileno()), bound=True)
        writer.close()
        ended = False
        try:
            ended = ends(child, Patience(deadline))
        finally:
            if not ended:
                # Do not wait for the child: if the kernel holds it, it would hold this process up
                # too.
                os.kill(child, signal.SIGKILL)
        if not ended:
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


def _answer(probe: Callable[[], object], writer: int) -> None:
    try:
        try:
            answer = pickle.dumps((None, probe()))
        except OSError as error:
            answer = pickle.dumps((error, None))
        os.write(writer, answer)
    except Exception:
        # Nobody else reports a fault of the probe.
        traceback.print_exc()
        raise
