"""The file of ``--json FILE``."""

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Final

from restrictedmem.paths import NewFile

STDOUT: Final = "-"


@contextmanager
def opened(path: str) -> Generator[Callable[[object], None]]:
    """Open a file, or stdout for ``-``; yield a function that writes an object.

    The function closes the file, and may be called once. The file is opened first, so that an error
    is known before the command does anything.

    Raises:
        OSError: as ``paths.NewFile``.
    """
    if path == STDOUT:
        yield lambda found: print(json.dumps(found))
        return
    with NewFile(path) as file:

        def write(found: object) -> None:
            file.write(json.dumps(found).encode() + b"\n")
            file.close()

        yield write
