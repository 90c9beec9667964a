"""Errors in the one form that they all have: ``CALL: strerror (detail)``, the path in ``filename``."""

import os
from errno import EIO, ENOMEM
from typing import Final

#: MAX_ERRNO of the kernel.
_LARGEST: Final = 4095
#: The exit status of a child whose program failed with what is no errno.
FAULT: Final = 255


def failed(call: str, errno: int | None, detail: str = "", path: str | None = None) -> OSError:
    """Return the error of a call: its name, the errno's words, and what else is known of it.

    ``errno`` is that of an OSError at hand, or another process's word; what is none is EIO.
    ``path`` is what the call was about.
    """
    number = errno if errno is not None and 0 < errno <= _LARGEST else EIO
    words = f"{call}: {os.strerror(number)}" + (f" ({detail})" if detail else "")
    return OSError(number, words) if path is None else OSError(number, words, path)


def named(call: str, error: OSError, path: str | None = None) -> OSError:
    """Return an error of Python's, or of a part of a call, as that of ``call``.

    What it says beside the errno's words becomes the detail. Its own path stays, unless another is
    given.
    """
    known = error.filename if isinstance(error.filename, str) else None
    detail = detail_of(error)
    # It may have been made for this call.
    detail = detail.removeprefix(f"{call}: ") if detail != call else ""
    return failed(call, error.errno, detail, known if path is None else path)


def line_of(error: OSError) -> str:
    """Return an error in one line: the path, if it has one, the call, the errno's words, and what else is known."""
    text = error.strerror or str(error)
    return text if error.filename is None else f"{error.filename}: {text}"


def detail_of(error: OSError) -> str:
    """Return what an error says beside its errno's words; empty when that is nothing.

    Of one in the form above, the call and its detail.
    """
    text = error.strerror or str(error)
    if error.errno is None:
        return text
    words = os.strerror(error.errno)
    if text == words:
        return ""
    call, found, detail = text.partition(f": {words}")
    inner = detail.removeprefix(" (").removesuffix(")")
    return f"{call}: {inner}" if found and inner else call


def status_of(error: BaseException) -> int:
    """Return the exit status with which a child tells its parent what it failed with: an errno, or ``FAULT``."""
    if isinstance(error, MemoryError):
        return ENOMEM
    return (
        error.errno
        if isinstance(error, OSError) and error.errno is not None and 0 < error.errno < FAULT
        else FAULT
    )
