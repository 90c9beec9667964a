"""Where ``--json FILE`` goes."""

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Final

from restrictedmem.paths import NewFile

STDOUT: Final = "-"


@contextmanager
def opened(path: str) -> Generator[Callable[[object], None]]:
    """Open a file, or stdout for ``-``; yields what writes an object to it and closes it, once.

    What cannot be opened is known before anything is done.

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
