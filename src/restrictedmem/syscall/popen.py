"""Starting a program that has the system call, as ``subprocess.Popen`` starts any."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from errno import EACCES, ENOENT
from typing import Any, Final

from restrictedmem.failure import failed
from restrictedmem.service.exec_service import PACKAGE_ROOT
from restrictedmem.syscall.exec_program import CallOptions

_START: Final = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from restrictedmem.cli.main import run; run()"
)


def popen(
    arguments: Sequence[str | os.PathLike[str]], call: CallOptions | None = None, **options: Any
) -> subprocess.Popen[Any]:
    """Start a program under a supervisor of its own; return a ``subprocess.Popen``.

    ``options`` are those of ``subprocess.Popen``, except ``shell`` and ``executable``. This starts
    ``restrictedmem exec``, which the program replaces. So ``pid`` is the program's, and this
    process may have any number of threads. The program finds the service behind its descriptors by
    ``service.SERVER_VARIABLE``.

    Raises:
        TypeError: for a string in place of a sequence, or one of those two options.
        OSError: ENOENT, EACCES as ``subprocess.Popen`` for a program that is not found or cannot be
            executed; EAGAIN, ENOMEM.
    """
    if (
        isinstance(arguments, str | bytes)
        or options.get("shell")
        or options.get("executable") is not None
    ):
        raise TypeError(
            "popen takes a sequence of arguments, whose first is the program; "
            "it does not take the options shell and executable"
        )
    call = call or CallOptions()
    words = [os.fspath(argument) for argument in arguments]
    _check(words[0], options)
    # Pass only options that were asked for: exec refuses those that a server or an outer exec
    # decides.
    usual = CallOptions()
    own = [] if call.api == usual.api else ["--api", call.api]
    own += [] if call.number == usual.number else ["--syscall-number", str(call.number)]
    own += [] if call.cachestat else ["--no-cachestat"]
    own += [] if call.memory_max is None else ["--memory-max", str(call.memory_max)]
    return subprocess.Popen(
        [sys.executable, "-I", "-c", _START, PACKAGE_ROOT, "exec", *own, "--", *words], **options
    )


def _check(program: str, options: dict[str, Any]) -> None:
    named = bool(os.path.dirname(program))
    # A relative path is relative to the directory where the program is to run.
    here = os.fsdecode(options.get("cwd") or "")
    place = os.path.join(here, program) if named else program
    path = os.pathsep.join(
        os.path.join(here, directory or ".") for directory in os.get_exec_path(options.get("env"))
    )
    if shutil.which(place, path=path) is None:
        number = EACCES if named and os.path.exists(place) else ENOENT
        raise failed("popen", number, path=program)
