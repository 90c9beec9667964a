"""The outcome of an operation, here or in a child: a value, an errno, or a fatal signal."""

import ctypes
import faulthandler
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from errno import errorcode
from types import FrameType


@dataclass(frozen=True, slots=True)
class Errno:
    """The outcome of an operation that was refused."""

    number: int

    def __repr__(self) -> str:
        return errorcode[self.number]


def outcome(operation: Callable[[], object]) -> object:
    """Return what an operation returns, its errno when it is refused."""
    try:
        return operation()
    except OSError as error:
        return Errno(error.errno or 0)


def checked(result: int) -> int:
    """Raise what libc left in errno when a call returned -1."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def in_child(body: Callable[[], object]) -> str:
    """Run a function in a child; return ``repr`` of its outcome, or a fatal signal's name."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            # A fatal signal can be the expected outcome. The output of the test run must not show
            # it as a crash.
            faulthandler.disable()
            os.close(ours)
            os.write(theirs, repr(outcome(body)).encode())
        finally:
            os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else said


def failing_at(number: int, act: Callable[[], object]) -> bool:
    """Do something whose call of a number finds no memory; False when it has fewer calls."""
    left = number

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal left
        if event in ("call", "c_call") and argument is not sys.setprofile:
            left -= 1
            if left < 0:
                sys.setprofile(None)
                raise MemoryError

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        act()
    except MemoryError:
        return True
    finally:
        sys.setprofile(before)
    return False
