"""Errors in the one form that all errors here have: ``CALL: strerror (detail)``.

The path is in ``filename``.
"""

import os
from errno import EIO, ENOMEM
from typing import Final

#: MAX_ERRNO of the kernel.
_LARGEST: Final = 4095
#: Exit status of a child whose program failed with something other than an errno.
FAULT: Final = 255


def failed(call: str, errno: int | None, detail: str = "", path: str | None = None) -> OSError:
    """Return the error of a call: its name, the errno's text, and further detail.

    ``errno`` comes from an OSError or from another process. A value that is no errno becomes EIO.
    ``path`` is the file that the call was about.
    """
    number = errno if errno is not None and 0 < errno <= _LARGEST else EIO
    words = f"{call}: {os.strerror(number)}" + (f" ({detail})" if detail else "")
    return OSError(number, words) if path is None else OSError(number, words, path)


def named(call: str, error: OSError, path: str | None = None) -> OSError:
    """Return an error of Python, or of a part of a call, as the error of ``call``.

    The detail is all that ``error`` says beside the errno's text. The path of ``error`` stays,
    unless ``path`` is given.
    """
    known = error.filename if isinstance(error.filename, str) else None
    detail = detail_of(error)
    # ``error`` may have been made for this call.
    detail = detail.removeprefix(f"{call}: ") if detail != call else ""
    return failed(call, error.errno, detail, known if path is None else path)


def line_of(error: OSError) -> str:
    """Return an error in one line: its path if any, the call, the errno's text, the detail."""
    text = error.strerror or str(error)
    return text if error.filename is None else f"{error.filename}: {text}"


def detail_of(error: OSError) -> str:
    """Return what an error says beside its errno's text; empty if it says nothing else.

    For an error in the form above, this is the call and its detail.
    """
    text = error.strerror or str(error)
    if error.errno is None:
        return text
    words = os.strerror(error.errno)
    if text == words:
        return ""
    call, _, detail = text.partition(f": {words}")
    if not detail:
        return call
    if not (detail.startswith(" (") and detail.endswith(")")):
        # The errno's text stands in a text of another form, such as a list of errors.
        return text
    return f"{call}: {detail[2:-1]}"


def status_of(error: BaseException) -> int:
    """Return the status that tells a parent why its child failed: an errno, or ``FAULT``."""
    if isinstance(error, MemoryError):
        return ENOMEM
    return (
        error.errno
        if isinstance(error, OSError) and error.errno is not None and 0 < error.errno < FAULT
        else FAULT
    )
