"""The programs that may hold restricted memory (docs/use/consumers.md).

They are the library's own, and those that the starter of a service names. All are loaded before the
service is ready, because the owner's files may be other files later.
"""

import importlib
import socket
import sys
from collections.abc import Callable, Iterable
from errno import EFBIG, ENOEXEC
from types import ModuleType
from typing import Final, TypeAlias, final

from restrictedmem.failure import failed, named
from restrictedmem.service.options import VM, Options

#: The function that a program offers as ``serve``. Its arguments: the owner's socket, the two
#: sockets to the service, the service's options, the owner's arguments.
Serve: TypeAlias = Callable[[socket.socket, socket.socket, socket.socket, Options, str], object]

#: Modules with ``preload()`` and ``serve``.
_OWN: Final = {VM: "restrictedmem.kvm.engine_process"}
#: Size of the largest program that is read, in bytes.
_LARGEST: Final = 1 << 20


def load(name: str, path: str) -> Serve:
    """Run a program's top level and return its function ``serve``.

    No bytecode is read or written, so that ``path`` alone says what is trusted.

    Raises:
        OSError: ENOENT, EACCES, EISDIR as open(2); EFBIG beyond 1 MiB; ENOEXEC when the program
            fails, or has no function ``serve``.
    """
    try:
        with open(path, "rb") as file:
            source = file.read(_LARGEST + 1)
    except OSError as error:
        raise named(f"consumer {name}", error, path) from None
    if len(source) > _LARGEST:
        raise failed(f"consumer {name}", EFBIG, path=path)
    module = ModuleType(f"consumer {name}")
    module.__file__ = path
    # Dataclasses look their module up there.
    sys.modules[module.__name__] = module
    try:
        exec(compile(source, path, "exec"), module.__dict__)  # noqa: S102  a program is what it is
    except (Exception, SystemExit) as error:  # noqa: BLE001
        raise failed(
            f"consumer {name}", ENOEXEC, f"{type(error).__name__}: {error}", path
        ) from None
    serve: Serve | None = getattr(module, "serve", None)
    if not callable(serve):
        raise failed(f"consumer {name}", ENOEXEC, "it has no function serve", path)
    return serve


@final
class Programs:
    """The programs that a service's spawner can start, by name."""

    def __init__(self, named: Iterable[tuple[str, str]]) -> None:
        self._paths = dict(named)
        self._loaded: dict[str, Serve | OSError] = {}

    def __contains__(self, name: str) -> bool:
        return name in _OWN or name in self._paths

    def load(self, *, devices: bool) -> None:
        """Load all programs, for a process that will load nothing later.

        ``find`` raises what failed here. With ``devices``, the programs open their devices, too:
        the process is about to become a user who may not.
        """
        for name, module in _OWN.items():
            program = importlib.import_module(module)
            program.preload(devices=devices)
            self._loaded[name] = program.serve
        for name, path in self._paths.items():
            try:
                self._loaded[name] = load(name, path)
            except OSError as error:
                self._loaded[name] = error

    def find(self, name: str) -> Serve:
        """Return the function to call in a process of its own.

        Raises:
            OSError: as ``load`` of this module.
        """
        found = self._loaded[name]
        if isinstance(found, OSError):
            raise OSError(found.errno, found.strerror, found.filename)
        return found
