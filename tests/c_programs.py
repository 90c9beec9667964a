"""Programs in C for the client: compiled with sanitizers, and run."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "clients" / "c"

#: Seconds that a program may take.
PATIENCE = 60


def compiler() -> str:
    return shutil.which("cc") or "gcc"


def compile_c(source: Path, program: Path, *options: str) -> subprocess.CompletedProcess[str]:
    include = (f"-I{SOURCE}", f"-I{ROOT / 'guests' / 'include'}")
    command = [
        compiler(),
        "-std=gnu11",
        "-g",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Wshadow",
        "-Werror",
        *options,
        *include,
    ]
    return subprocess.run(
        [*command, "-o", str(program), str(source), "-pthread"],
        capture_output=True,
        text=True,
        check=False,
    )


def run(
    program: Path, *arguments: str | Path, data: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [program, *arguments], input=data, capture_output=True, timeout=PATIENCE, check=False
    )
