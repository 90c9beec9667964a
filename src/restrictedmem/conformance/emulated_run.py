"""A run of the suite under another kernel, which QEMU emulates."""

import base64
import json
import zlib
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, final

from restrictedmem.conformance import holder
from restrictedmem.conformance.case import Case
from restrictedmem.conformance.cases import CASES
from restrictedmem.conformance.columns import Column, column_of
from restrictedmem.conformance.result import Result, load
from restrictedmem.conformance.suite_run import DEADLINE, run
from restrictedmem.emulated import interpreter
from restrictedmem.emulated.emulated_machine import (
    EmulatedMachine,
    EmulationError,
    Kernel,
    initramfs,
)
from restrictedmem.service.exec_service import PACKAGE_ROOT

#: Seconds without a result that are allowed: a case has its own deadline there.
_SILENCE: Final = DEADLINE + 60.0
_ASKED: Final = "asked.json"
#: The standard streams are those of the console. Its last line is the program's, not the kernel's.
_PROGRAM: Final = """\
for place in tmp run var/tmp dev/shm sys/fs/cgroup; do /bin/busybox mkdir -p /$place; done
/bin/busybox mount -t cgroup2 cgroup2 /sys/fs/cgroup 2>/dev/null
ulimit -Hn 524288
export HOME=/run LANG=C.UTF-8 PATH=/bin
{python} -I -c '{start}' {there} /{asked} >/dev/ttyS1
status=$?
echo 0 >/proc/sys/kernel/printk
echo "end $status" >/dev/ttyS1
/bin/busybox poweroff -f
"""
_START: Final = (
    "import sys; sys.path.insert(0, sys.argv[1]);"
    " from restrictedmem.conformance.emulated_run import main; main(sys.argv[2])"
)


@final
class EmulatedRun:
    """A run whose ``release`` says which kernel it is, from the first result on."""

    def __init__(self, kernel: Kernel) -> None:
        """Take a kernel.

        Raises:
            EmulationError: as ``Kernel.check``.
        """
        kernel.check()
        self._kernel = kernel
        self.release = ""

    def run(self, columns: Sequence[Column], cases: Sequence[Case], jobs: int) -> Generator[Result]:
        """Run cases on columns under the kernel, as ``run.run`` does.

        The machine ends with the iterator, which has to be closed by the thread that began it.

        Raises:
            EmulationError: as ``EmulatedMachine.lines``.
            OSError: as open(2), memfd_create(2) and fork(2).
        """
        asked = json.dumps(
            {
                "columns": [column.name for column in columns],
                "cases": [case.id for case in cases],
                "jobs": jobs,
            }
        ).encode()
        program = _PROGRAM.format(
            python=interpreter.path(), start=_START, there=interpreter.THERE, asked=_ASKED
        )
        files = [(_ASKED, asked), _consumer(), *interpreter.files()]
        kernel = replace(self._kernel, processors=max(jobs, self._kernel.processors))
        unpack = zlib.decompressobj()
        with EmulatedMachine(kernel, initramfs(kernel, program, files)) as machine:
            for line in machine.lines(_SILENCE):
                self.release = machine.release
                try:
                    found = json.loads(unpack.decompress(base64.b64decode(line, validate=True)))
                    yield load(Result, found)
                except (ValueError, zlib.error) as error:
                    raise EmulationError(f"under the kernel: {line[:200]}") from error
            if machine.status:
                raise machine.failed()


def _consumer() -> tuple[str, bytes]:
    """Return the consumer's program as source, because a service takes no bytecode.

    Python finds it before the bytecode that lies beside it.
    """
    program = Path(holder.__file__)
    there = Path(interpreter.THERE, program.relative_to(PACKAGE_ROOT))
    return str(there), program.read_bytes()


def main(asked: str) -> None:
    """Run what a file asks for, under the kernel; write each result as a line.

    A line is JSON, which one stream of zlib has made smaller, in base64: an emulated serial port
    takes a processor 18 µs a byte.
    """
    with open(asked, encoding="utf-8") as file:
        found = json.load(file)
    known = {case.id: case for case in CASES}
    columns = [column_of(name) for name in found["columns"]]
    cases = [known[name] for name in found["cases"]]
    pack = zlib.compressobj()
    for result in run(columns, cases, found["jobs"]):
        line = pack.compress(json.dumps(result.dump()).encode()) + pack.flush(zlib.Z_SYNC_FLUSH)
        print(base64.b64encode(line).decode(), flush=True)
