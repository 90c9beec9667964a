"""A guest for debuggers, and a process that runs it with the GDB stub."""

import contextlib
import io
import os
import shutil
import subprocess
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.vmm import elf
from restrictedmem.vmm.gdb.stub import serve
from restrictedmem.vmm.vmm import Ended, Vmm
from waiting import wait_until

ROOT = Path(__file__).parent.parent
DEADLINE = 20.0

PRIVATE_SIZE = 4 << 20

GUEST = """
#include <restrictedmem/guest.h>

static volatile u64 counter, seen;

static __attribute__((noinline)) u64 twice(u64 x)
{
	counter += x;
	return 2 * x;
}

static __attribute__((noinline)) void spin(void)
{
	for (;;)
		asm volatile("lock incq %0" : "+m"(counter) : : "cc");
}

int secondary(const struct boot_info *boot, u64 index)
{
	(void)boot;
	seen = index;
	spin();
	return 0;
}

int main(const struct boot_info *boot)
{
	static const char text[] = "hello\\n";
	const char *args = (const char *)boot->args;
	u64 sum = 0;

	/* The others have their say before this one ends the guest. */
	while (boot->vcpus > 1 && !seen)
		;

	if (boot->argc && args[0] == 's')
		spin();
	if (boot->argc && args[0] == 'd')
		asm volatile("divl %0" : : "r"(0) : "eax", "edx", "cc");
	for (u64 i = 1; i <= 3; i++)
		sum += twice(i);
	if (guest_write(boot, STREAM_OUT, text, sizeof text - 1))
		return 1;
	return (int)sum;
}
"""
#: The command that the stub tells its user to type first: `watch` fails without it.
OWN_WATCHPOINTS = "set can-use-hw-watchpoints 0"
#: The value that main returns.
STATUS = 12


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a guest with symbols."""
    folder = tmp_path_factory.mktemp("guest")
    (folder / "guest.c").write_text(GUEST)
    flags = (
        "-g -O1 -std=gnu11 -march=x86-64 -ffreestanding -fno-pie -mgeneral-regs-only "
        "-mno-red-zone -fcf-protection=none"
    )
    flags += (
        " -fno-stack-protector -nostdlib -static -no-pie -Wl,--build-id=none "
        "-Wl,-z,max-page-size=4096 -Wl,-z,noexecstack"
    )
    sources = [str(ROOT / "guests" / "start.S"), str(folder / "guest.c")]
    script = ["-I", str(ROOT / "guests" / "include"), f"-Wl,-T,{ROOT / 'guests' / 'guest.ld'}"]
    compiler = shutil.which("gcc") or "cc"
    subprocess.run(
        [compiler, *flags.split(), *script, "-o", str(folder / "guest.elf"), *sources], check=True
    )
    return folder / "guest.elf"


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with Service.start(Options()) as found:
        yield found


@dataclass(frozen=True)
class Host:
    service: Service
    engine: str


@pytest.fixture(
    scope="module", params=["software", pytest.param("kernel", marks=pytest.mark.requires("kvm"))]
)
def host(request: pytest.FixtureRequest, service: Service) -> Host:
    return Host(service, request.param)


@dataclass
class Run:
    """A guest under the stub."""

    vmm: Vmm
    port: int
    out: Path
    outcome: list[Ended | BaseException] = field(default_factory=list["Ended | BaseException"])

    def ended(self) -> Ended | BaseException:
        wait_until(lambda: bool(self.outcome), "the guest to end", DEADLINE)
        return self.outcome[0]


@contextlib.contextmanager
def debugged(
    host: Host, image: Path, tmp_path: Path, *arguments: str, vcpus: int = 1
) -> Generator[Run]:
    talk = io.StringIO()
    out = tmp_path / "out"
    with Vmm(PRIVATE_SIZE, host.service, vcpus=vcpus, engine=host.engine, debug=True) as vmm:
        vmm.load(elf.parse(image.read_bytes()), arguments)
        with serve(vmm, 0, "guest.elf", talk) as port:
            before, after = f"-ex '{OWN_WATCHPOINTS}'", f"-ex 'target remote 127.0.0.1:{port}'"
            assert talk.getvalue() == f"gdb: type  gdb guest.elf {before} {after}\n"
            run = Run(vmm, port, out)

            def drive() -> None:
                try:
                    with open(os.devnull, "rb") as empty, out.open("wb") as file:
                        run.outcome.append(vmm.run(empty, file, file))
                except BaseException as error:
                    run.outcome.append(error)

            thread = threading.Thread(target=drive, daemon=True)
            thread.start()
            try:
                yield run
            finally:
                vmm.stop()
                thread.join(DEADLINE)
                assert not thread.is_alive(), "the guest did not end"


def symbol(image: Path, name: str) -> int:
    listed = subprocess.run(["nm", str(image)], capture_output=True, text=True, check=True).stdout
    return next(int(line.split()[0], 16) for line in listed.splitlines() if line.split()[2] == name)


def counted(run: Run, image: Path) -> int:
    return int.from_bytes(run.vmm.vm.read_memory(symbol(image, "counter"), 8), "little")


def wait_for_more(run: Run, image: Path) -> None:
    before = counted(run, image)
    wait_until(lambda: counted(run, image) != before, "the guest to count", DEADLINE)
