"""The record of the guests in a directory and the tools that made them (toolchain.json).

The Makefile runs ``record.py OUT`` with CC, CFLAGS and LDFLAGS in the environment: the compiler and
the flags with which every ELF in OUT was built. The script writes OUT/toolchain.json. With the same
tools, anyone can tell whether their own build came out the same.
"""

import hashlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path


def output(*command: str) -> str:
    """Run a command and return the first line it prints."""
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return text.splitlines()[0]


def variable(name: str) -> str:
    """Return a variable that the Makefile exports."""
    try:
        return os.environ[name]
    except KeyError:
        sys.exit(f"record.py: {name} is not set; run make")


def record(out: Path) -> dict[str, object]:
    """Describe the guests in a directory.

    The linker is the one that the compiler calls. It need not be the first ``ld`` in PATH.
    """
    compiler = shlex.split(variable("CC"))
    images = {elf.stem: elf.read_bytes() for elf in sorted(out.glob("*.elf"))}
    guests = {
        name: {"sha256": hashlib.sha256(image).hexdigest(), "size": len(image)}
        for name, image in images.items()
    }
    return {
        "compiler": output(*compiler, "--version"),
        "linker": output(output(*compiler, "-print-prog-name=ld"), "--version"),
        "cflags": shlex.split(variable("CFLAGS")),
        "ldflags": shlex.split(variable("LDFLAGS")),
        "guests": guests,
    }


def main() -> None:
    """Write the record."""
    if len(sys.argv) != 2:
        sys.exit("usage: record.py OUT")
    out = Path(sys.argv[1])
    text = json.dumps(record(out), indent=2) + "\n"
    (out / "toolchain.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
