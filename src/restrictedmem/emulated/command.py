"""A command under another kernel, on this machine's files, which are read-only there."""

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from restrictedmem.emulated.emulated_machine import BUSYBOX, EmulatedMachine, Kernel, initramfs

_NO_9P: Final = "9p: CONFIG_NET_9P_VIRTIO, CONFIG_9P_FS and CONFIG_VIRTIO_PCI, or --modules"
_PROGRAM: Final = """\
options=trans=virtio,version=9p2000.L,msize=512000,ro,cache=loose
if ! /bin/busybox mount -t 9p -o $options here /root 2>/dev/null; then
    echo 'lacks {lack}' >/dev/ttyS1
    exec /bin/busybox sleep 1000
fi
for place in proc sys dev; do /bin/busybox mount --bind /$place /root/$place; done
for place in run var/tmp dev/shm; do /bin/busybox mount -t tmpfs tmpfs /root/$place; done
/bin/busybox mount -t devpts devpts /root/dev/pts
export HOME=/run TMPDIR=/var/tmp PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
exec /bin/busybox switch_root /root /bin/sh -c {command}
"""
#: The command that the program runs. It uses switch_root, because in a chroot there would be no
#: user namespaces (unshare(2)). systemd gives users this hard limit of descriptors, the kernel
#: 4,096.
_COMMAND: Final = """ulimit -Hn 524288
cd {place} && {command}
echo "end $?" >/dev/ttyS1
# The kernel has nothing to add to the output of the command.
echo 0 >/proc/sys/kernel/printk
{busybox} poweroff -f
"""


def run_command(kernel: Kernel, command: Sequence[str], place: Path) -> int:
    """Run a command in a directory, as root; return its exit status. stdout gets what it writes.

    Raises:
        EmulationError: as ``Kernel.check`` and ``EmulatedMachine.lines``. The command may be
            silent.
        OSError: as open(2), memfd_create(2) and fork(2).
    """
    kernel.check()
    script = _COMMAND.format(
        place=shlex.quote(str(place)), command=shlex.join(command), busybox=shutil.which(BUSYBOX)
    )
    program = _PROGRAM.format(lack=_NO_9P, command=shlex.quote(script))
    with EmulatedMachine(kernel, initramfs(kernel, program), attached=True) as machine:
        for _ in machine.lines(float("inf")):
            pass
        # What the console still has to say comes first.
        machine.wait()
        assert machine.status is not None
        return machine.status
