"""A ready service loads nothing any more.

A module that a process imports late comes from files that may have changed since its start. The
files of a private service are its owner's. The owner could so run code of its own where the memory
is.
"""

import encodings.ascii
import encodings.latin_1
import linecache
import os
import sys
import threading
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import ParamSpec

from restrictedmem.failure import FAULT

_P = ParamSpec("_P")

#: Imported above, because other modules look them up by name, later.
_BY_NAME = encodings.ascii, encodings.latin_1


def seal() -> None:
    """Make every later import fail, in this process and its children.

    No source file is read any more, either.

    Preconditions: all that will be used has been imported.
    """
    sys.path.clear()
    sys.meta_path[:] = [_Closed]
    sys.path_hooks.clear()
    sys.path_importer_cache.clear()
    # A traceback shows source lines, and decodes them as the source asks.
    linecache.getline = _no_line
    linecache.getlines = _no_lines
    linecache.updatecache = _no_lines
    linecache.checkcache = _nothing
    linecache.lazycache = _not_lazy
    # The interpreter's own hooks open the source without linecache.
    sys.excepthook = _tell
    threading.excepthook = _tell_of_thread
    sys.unraisablehook = _tell_of_unraisable


def end_when_lost() -> None:
    """Make an uncaught exception end this process (``FAULT``), once it was reported.

    This includes an exception in a callback of a C library: ctypes drops it, and the library goes
    on.
    """
    # sys.excepthook gets the exceptions that come before the callback is called.
    sys.excepthook = _ending(sys.excepthook)
    sys.unraisablehook = _ending(sys.unraisablehook)


def _ending(tell: Callable[_P, object]) -> Callable[_P, None]:
    def end(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            tell(*args, **kwargs)
        finally:
            os._exit(FAULT)

    return end


class _Closed:
    """The only finder that is left (``importlib.abc.MetaPathFinder``)."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        """Find nothing."""
        raise ModuleNotFoundError(f"{name}: nothing is loaded once a service is ready", name=name)


def _no_line(filename: str, lineno: int, module_globals: object = None) -> str:
    return ""


def _no_lines(filename: str, module_globals: object = None) -> list[str]:
    return []


def _nothing(filename: str | None = None) -> None:
    return None


def _not_lazy(filename: str, module_globals: object) -> bool:
    return False


def _tell(
    kind: type[BaseException], value: BaseException | None, trace: TracebackType | None
) -> None:
    if sys.stderr is not None:
        sys.stderr.write("".join(traceback.format_exception(kind, value, trace)))


def _tell_of_thread(told: threading.ExceptHookArgs) -> None:
    _tell(told.exc_type, told.exc_value, told.exc_traceback)


def _tell_of_unraisable(told: "sys.UnraisableHookArgs") -> None:
    _tell(told.exc_type, told.exc_value, told.exc_traceback)
