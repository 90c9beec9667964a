"""The program that ``scripts/fuzz`` starts for a target: libFuzzer, on the instrumented package."""

import importlib
import shlex
import sys
from typing import Any, Final

#: Without types, and not there unless somebody wants to search.
atheris: Final[Any] = importlib.import_module("atheris")

with atheris.instrument_imports(include=["restrictedmem"], enable_loader_override=False):
    from fuzz.targets import TARGETS


def main(name: str, options: list[str]) -> None:
    """Search for what makes a target fail; does not return."""
    # By its first argument libFuzzer starts itself again, in a shell.
    again = shlex.join([sys.executable, "-m", "fuzz.search", name])
    atheris.Setup([again, *options], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
