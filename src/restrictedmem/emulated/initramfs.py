"""The first file system of a kernel: an archive of files, and modules of the kernel in it."""

import lzma
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath


def archive(files: Iterable[tuple[str, bytes]]) -> Iterator[bytes]:
    """Yield an initramfs (cpio "newc") of executable files and their directories."""
    made = {".", "/"}
    number = 0

    def entry(name: str, data: bytes, mode: int) -> bytes:
        nonlocal number
        number += 1
        path = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
        head = b"070701" + b"".join(b"%08x" % value for value in fields) + path
        return head.ljust(-(-len(head) // 4) * 4, b"\0") + data.ljust(-(-len(data) // 4) * 4, b"\0")

    for name, data in files:
        for above in reversed(PurePosixPath(name).parents):
            if str(above) not in made:
                made.add(str(above))
                yield entry(str(above), b"", 0o40755)
        yield entry(name, data, 0o100755)
    yield entry("dev", b"", 0o40755)
    yield entry("TRAILER!!!", b"", 0)


def needed_modules(directory: Path, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each of these modules that exists, after those it depends on."""
    known = {path.name.split(".")[0].replace("-", "_"): path for path in directory.rglob("*.ko*")}
    done: set[str] = set()

    def add(name: str) -> Iterator[tuple[str, bytes]]:
        if name in done or name not in known:
            return
        done.add(name)
        path = known[name]
        content = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        depends = re.search(rb"\0depends=([^\0]*)\0", content)
        for other in depends[1].decode().split(",") if depends else ():
            yield from add(other.replace("-", "_"))
        yield f"{name}.ko", content

    for name in names:
        yield from add(name.replace("-", "_"))
