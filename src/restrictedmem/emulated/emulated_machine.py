"""A machine of QEMU that boots a kernel, without KVM: what it runs, says and answers.

The machine has two serial ports. The first is the kernel's console. On the second, the channel, the
machine writes lines: ``up RELEASE`` when the kernel has started, ``end STATUS`` at the end, and
between them what its program writes.
"""

import os
import re
import select
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self, final

from restrictedmem.abi import memory
from restrictedmem.child import end_child, fork
from restrictedmem.emulated.initramfs import archive, needed_modules
from restrictedmem.fd import OwnedFd, readable
from restrictedmem.patience import SLICE, Clock, Patience

QEMU: Final = "qemu-system-x86_64"
BUSYBOX: Final = "busybox"
_PACKAGES: Final = "apt-get install qemu-system-x86 busybox-static"
#: Modules that are loaded if the kernel has them as modules: for the files of this machine,
#: /dev/fuse, and KVM.
MODULES: Final = ("9p", "9pnet_virtio", "virtio_pci", "fuse", "kvm-amd")
#: Seconds that a kernel may take to start.
BOOT_DEADLINE: Final = 120.0
#: Seconds from the end of a machine's program to the end of the machine.
_POWER_OFF: Final = 10.0
#: Bytes of the console that are looked at, and of what QEMU says.
_WORDS: Final = 1 << 24
#: At these offsets a kernel image for x86 has these bytes (Documentation/arch/x86/boot.rst).
_MAGIC: Final = ((0x1FE, b"\x55\xaa"), (0x202, b"HdrS"))
_OPTIONS: Final = (
    "it needs CONFIG_BLK_DEV_INITRD, CONFIG_SERIAL_8250_CONSOLE, CONFIG_BINFMT_ELF,"
    " CONFIG_BINFMT_SCRIPT and CONFIG_DEVTMPFS, not as modules; scripts/kernel-lab builds such a"
    " kernel"
)

INIT: Final = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /root /tmp /run
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox mkdir -p /dev/pts /dev/shm
/bin/busybox ln -s /proc/self/fd /dev/fd
for name in 0:stdin 1:stdout 2:stderr; do
    /bin/busybox ln -s /proc/self/fd/${{name%:*}} /dev/${{name#*:}}
done
/bin/busybox stty -opost
for module in {modules}; do /bin/busybox insmod /$module 2>/dev/null; done
echo "up $(/bin/busybox uname -r)" >/dev/ttyS1
{program}
"""


class EmulationError(Exception):
    """A kernel that cannot be emulated, and what a person can do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel image, and what its machine has."""

    image: Path
    #: The kernel's directory in /lib/modules.
    modules: Path | None = None
    memory: str = "3G"
    processors: int = 2

    def check(self) -> None:
        """Look whether the image is one, and the programs are there.

        Raises:
            EmulationError: if not.
            OSError: as open(2).
        """
        for name in (QEMU, BUSYBOX):
            if shutil.which(name) is None:
                raise EmulationError(f"{name} is not installed", _PACKAGES)
        if not self.image.is_file():
            raise EmulationError(f"{self.image}: no such file", "name a bzImage or a vmlinuz")
        with self.image.open("rb") as file:
            head = file.read(0x206)
        if any(head[at : at + len(magic)] != magic for at, magic in _MAGIC):
            raise EmulationError(
                f"{self.image}: no kernel image for x86-64", "name a bzImage or a vmlinuz"
            )
        if self.modules is not None and not self.modules.is_dir():
            raise EmulationError(f"{self.modules}: no such directory")


def initramfs(kernel: Kernel, program: str, files: Sequence[tuple[str, bytes]] = ()) -> bytes:
    """Return an initramfs with files, which runs lines of shell when the kernel is up.

    Raises:
        EmulationError: if busybox needs libraries.
        OSError: as open(2).
    """
    busybox = Path(shutil.which(BUSYBOX) or BUSYBOX).read_bytes()
    # The name of a dynamic linker is in the first page of a file that has one.
    if b"/ld-" in busybox[:4096]:
        raise EmulationError("busybox needs shared libraries here", _PACKAGES)
    modules = [] if kernel.modules is None else [*needed_modules(kernel.modules, MODULES)]
    init = INIT.format(modules=" ".join(name for name, _ in modules), program=program)
    return b"".join(archive([("init", init.encode()), ("bin/busybox", busybox), *modules, *files]))


@final
class EmulatedMachine:
    """A machine that runs. The end of ``with`` ends it, and leaves no process and no file.

    The thread that makes it has to outlive it (``child.die_with``).
    """

    def __init__(self, kernel: Kernel, first: bytes, *, attached: bool = False) -> None:
        """Boot a kernel with an initramfs.

        An ``attached`` machine has this machine's files, read-only, as the tag ``here`` of 9p, and
        stdout gets what its console says.

        Raises:
            OSError: as memfd_create(2) and fork(2).
        """
        #: The kernel's release, when it is up.
        self.release = ""
        #: The exit status of the program, when it has ended.
        self.status: int | None = None
        self._stack = ExitStack()
        with self._stack, memory.memfd_create("initramfs") as given:
            self._console, self._channel, self._words = (
                self._stack.enter_context(memory.memfd_create(name))
                for name in ("console", "channel", "words")
            )
            with open(os.dup(given.fileno()), "wb") as file:
                file.write(first)
            numbers = [each.fileno() for each in (self._console, self._channel, given)]
            words = self._words.fileno()
            command = _command(kernel, *numbers, attached=attached)
            pid = fork(
                lambda: _execute(command, words, numbers, attached=attached),
                bound=True,
                keep=[*numbers, words],
            )
            self._stack.callback(end_child, pid)
            self._pidfd = self._stack.enter_context(OwnedFd(os.pidfd_open(pid)))
            self._stack = self._stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def lines(self, silence: float) -> Iterator[str]:
        """Yield the lines of the machine's program as they come, until it ends.

        Raises:
            EmulationError: if the kernel does not come up, panics, ends early, or says nothing for
                ``silence`` seconds.
        """
        for line in self._said(silence):
            word, _, rest = line.partition(" ")
            if word == "up" and not self.release:
                self.release = rest
            elif word == "lacks":
                raise EmulationError(f"Linux {self.release} cannot be used: it has no {rest}")
            elif word == "end":
                self.status = int(rest)
                return
            else:
                yield line
        raise self._trouble("ended before its program did")

    def failed(self) -> EmulationError:
        """Return the error of a program whose status is not 0."""
        return EmulationError(
            f"the program under Linux {self.release} ended with {self.status}{self._last()}"
        )

    def wait(self) -> None:
        """Wait until the machine has powered off, for a while."""
        Patience(_POWER_OFF).wait(self._pidfd.fileno(), select.POLLIN)

    def _said(self, silence: float) -> Iterator[str]:
        """Yield the lines of the channel, until the machine ends."""
        at, got, clock, ended = 0, b"", Clock(), False
        while True:
            piece = os.pread(self._channel.fileno(), 1 << 16, at)
            if piece:
                at, clock = at + len(piece), Clock()
                *lines, got = (got + piece).split(b"\n")
                yield from (line.decode(errors="replace").rstrip("\r") for line in lines)
            elif ended:
                return
            else:
                ended = bool(readable([self._pidfd], SLICE))
                limit = silence if self.release else BOOT_DEADLINE
                if clock.look() > limit:
                    raise self._trouble(f"has said nothing for {limit:g} s")

    def _trouble(self, what: str) -> EmulationError:
        """Return the error of a machine that does not go on."""
        console, words = _text(self._console), _text(self._words)
        if words and not console:
            return EmulationError(words.partition("\n")[0])
        who = f"Linux {self.release}" if self.release else "the kernel"
        hint = "" if self.release else _OPTIONS
        panic = re.search(r"Kernel panic - not syncing: ([^\r\n]*)", console)
        if panic:
            return EmulationError(f"{who} panicked: {panic[1]}", hint)
        return EmulationError(f"{who} {what}{self._last()}", hint)

    def _last(self) -> str:
        """Return the last line of the console, in parentheses."""
        last = _text(self._console).rpartition("\n")[2]
        return f" ({last})" if last else ""


def _text(file: OwnedFd) -> str:
    return os.pread(file.fileno(), _WORDS, 0).decode(errors="replace").strip()


def _command(
    kernel: Kernel, console: int, channel: int, first: int, *, attached: bool
) -> list[str]:
    """Return the command of QEMU."""
    # A machine whose kernel has had an oops gives no more answers. Panics are shown at level 1. The
    # timer of a busy machine may be too late for the check of the kernel.
    append = (
        "console=ttyS0 loglevel=1 panic=-1 oops=panic no_timer_check mitigations=off"
        " secretmem.enable=1"
    )
    options = {
        "accel": "tcg,thread=multi",
        "machine": "q35",
        "cpu": "max,+svm",
        "smp": str(kernel.processors),
        "m": kernel.memory,
        "display": "none",
        "kernel": str(kernel.image),
        "initrd": f"/dev/fd/{first}",
        "append": append,
    }
    if attached:
        options["virtfs"] = (
            "local,path=/,mount_tag=here,security_model=none,readonly=on,multidevs=remap"
        )
    ports = ["stdio" if attached else f"file:/dev/fd/{console}", f"file:/dev/fd/{channel}"]
    return [
        shutil.which(QEMU) or QEMU,
        *(word for name, value in options.items() for word in (f"-{name}", value)),
        *(word for port in ports for word in ("-serial", port)),
        "-nodefaults",
        "-no-reboot",
    ]


def _execute(command: list[str], words: int, keep: list[int], *, attached: bool) -> None:
    """Become QEMU, in a session of its own: signals of the terminal are for this program."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    if not attached:
        os.dup2(words, 1)
    os.dup2(words, 2)
    for each in keep:
        os.set_inheritable(each, True)
    os.execv(command[0], command)
