"""Probes for measurements and attacks: tracing, pinning or blocking pages, a compiler."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from restrictedmem.abi import io_uring as ring
from restrictedmem.abi import mount
from restrictedmem.abi import userfaultfd as uffd
from restrictedmem.machine.finding import Finding, State, reason, setting
from restrictedmem.probe import in_child

_TRACEFS: Final = Path("/sys/kernel/tracing")


def probe() -> Iterator[Finding]:
    """Yield the findings about the laboratory."""
    yield tracefs()
    yield io_uring()
    yield userfaultfd()
    yield ptrace()
    yield compiler()


def tracefs() -> Finding:
    """Look for KVM's trace events in tracefs.

    Where tracefs is not mounted, the probe makes a mount of its own. That mount lasts for a moment
    and is attached nowhere.
    """
    name = "KVM trace events"
    consequence = "only the kernel engine itself counts its exits and faults"
    try:
        if (_TRACEFS / "events").is_dir():
            where, found = f"in {_TRACEFS}", _kvm_events(_TRACEFS)
        else:
            where, found = "tracefs can be mounted", in_child(_events_of_own_mount)
    except OSError as error:
        return Finding(
            name,
            State.NO,
            f"tracefs: {reason(error)}",
            consequence,
            "run as root, and: sudo mount -t tracefs tracefs /sys/kernel/tracing",
        )
    if not found:
        return Finding(
            name,
            State.NO,
            f"{where}, without events of KVM",
            consequence,
            "sudo modprobe kvm; a kernel with CONFIG_FTRACE",
        )
    return Finding(name, State.YES, f"{where}, with {' and '.join(found)}")


def _events_of_own_mount() -> list[str]:
    with mount.fsopen("tracefs") as context:
        mount.fsconfig_create(context)
        with mount.fsmount(context, 0) as root:
            return _kvm_events(Path(f"/proc/self/fd/{root.fileno()}"))


def _kvm_events(tracefs: Path) -> list[str]:
    return [name for name in ("kvm", "kvmmmu") if (tracefs / "events" / name).is_dir()]


def io_uring() -> Finding:
    """Make a ring, with which an attacker can pin pages."""
    name = "io_uring"
    setting_text = (
        f"kernel.io_uring_disabled {setting('/proc/sys/kernel/io_uring_disabled') or 'unknown'}"
    )
    try:
        in_child(lambda: ring.io_uring_setup(1).close())
    except OSError as error:
        return Finding(
            name,
            State.NO,
            f"{reason(error)}; {setting_text}",
            "attacks that pin pages by io_uring are not tried",
            "sudo sysctl kernel.io_uring_disabled=0",
        )
    return Finding(name, State.YES, setting_text)


def userfaultfd() -> Finding:
    """Make a userfaultfd, with which an attacker can block a fault.

    One that is not limited to user mode also blocks faults of the kernel.
    """
    name = "userfaultfd"
    setting_text = (
        "vm.unprivileged_userfaultfd"
        f" {setting('/proc/sys/vm/unprivileged_userfaultfd') or 'unknown'}"
    )
    try:
        in_child(lambda: uffd.userfaultfd(0).close())
    except OSError as error:
        first = error
    else:
        return Finding(name, State.YES, f"faults of the kernel included; {setting_text}")
    try:
        in_child(lambda: uffd.userfaultfd(uffd.UFFD_USER_MODE_ONLY).close())
    except OSError:
        return Finding(
            name,
            State.NO,
            reason(first),
            "attacks that block a fault are not tried",
            "a kernel with CONFIG_USERFAULTFD",
        )
    return Finding(
        name,
        State.PARTLY,
        f"faults of user mode only; {setting_text}",
        "attacks that block a fault inside a system call are not tried",
        "sudo sysctl vm.unprivileged_userfaultfd=1, or run as root",
    )


def ptrace() -> Finding:
    """Read Yama's setting for ptrace.

    Nobody can trace a service in any case, because it is undumpable.
    """
    name = "ptrace of one's own"
    scope = setting("/proc/sys/kernel/yama/ptrace_scope")
    meaning = {
        None: "no Yama: any process of the same user",
        "0": "any process of the same user",
        "1": "children only",
        "2": "root only",
    }
    detail = (
        meaning.get(scope, "nobody")
        if scope is None
        else f"Yama ptrace_scope {scope}: {meaning.get(scope, 'nobody')}"
    )
    if scope in (None, "0"):
        return Finding(name, State.YES, detail)
    return Finding(
        name,
        State.PARTLY,
        detail,
        "an attack by ptrace would fail because of Yama, so it proves less about the service",
        "sudo sysctl kernel.yama.ptrace_scope=0 (3 lasts until the next boot)",
    )


def compiler() -> Finding:
    """Look for a C compiler, which only benchmarks and the rebuilding of guests need."""
    name = "C compiler"
    for command in ("cc", "gcc", "clang"):
        path = shutil.which(command)
        if path is None:
            continue
        try:
            said = subprocess.run(
                [path, "--version"], check=False, capture_output=True, text=True, timeout=5
            ).stdout
        except (OSError, subprocess.TimeoutExpired) as error:
            return Finding(
                name,
                State.PARTLY,
                f"{path}: {error}",
                "no benchmarks against C",
                "sudo apt install gcc libc6-dev binutils make",
            )
        first = said.partition("\n")[0]
        return Finding(name, State.YES, re.sub(r"\s+", " ", first) or path)
    return Finding(
        name,
        State.NO,
        "not installed",
        "no comparison with C in benchmarks, no rebuilding of guests",
        "sudo apt install gcc libc6-dev binutils make",
    )
