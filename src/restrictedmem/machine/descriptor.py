"""Probes for the descriptor: /dev/fuse, ways to mount it, and the kernel's FUSE protocol."""

import grp
import os
import pwd
import re
import resource
import shutil
import stat
import struct
import subprocess
from collections.abc import Iterator
from errno import EACCES, EAGAIN, ENODEV, ENOENT, ENXIO, EPERM
from typing import Final

from restrictedmem.abi import fuse, process
from restrictedmem.fd import readable
from restrictedmem.fs.mount_ways import DEVICE, Way, mount_detached, mount_fusermount
from restrictedmem.fs.mounter import enter_user_namespace
from restrictedmem.machine.finding import Finding, State, reason, setting
from restrictedmem.probe import in_child

_CLONE_SYSCTL: Final = "/proc/sys/kernel/unprivileged_userns_clone"
_NAMESPACES_SYSCTL: Final = "/proc/sys/user/max_user_namespaces"
_APPARMOR_SYSCTL: Final = "/proc/sys/kernel/apparmor_restrict_unprivileged_userns"
_APPARMOR_ENABLED: Final = "/sys/module/apparmor/parameters/enabled"
_AFTER_DEVICE: Final = "it could not be tried without /dev/fuse"


def probe() -> Iterator[Finding]:
    """Yield the findings about the descriptor."""
    device = fuse_device()
    yield device
    yield user_namespaces()
    tried = {way: try_way(way) for way in Way} if device.state is State.YES else {}
    yield own_mount(tried.get(Way.OWN))
    yield namespace_mount(tried.get(Way.USERNS))
    yield fusermount(tried.get(Way.FUSERMOUNT))
    yield protocol([minor for minor in tried.values() if isinstance(minor, int)])
    yield descriptors_at_once()


def fuse_device() -> Finding:
    """Open /dev/fuse; this alone has no effect."""
    name = DEVICE
    consequence = "no restricted descriptor can be made"
    try:
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        match error.errno:
            case e if e in (ENOENT, ENODEV, ENXIO):
                remedy = "sudo modprobe fuse (for a container: start it with --device /dev/fuse)"
            case e if e == EACCES:
                remedy = (
                    "sudo chmod 0666 /dev/fuse (until the next boot; for good: sudo apt install"
                    " udev, whose rule sets this mode at each boot)"
                )
            case _:
                remedy = (
                    "allow the device to this container: --device /dev/fuse, or a device cgroup"
                    " rule for 10:229"
                )
        return Finding(
            name, State.NO, f"{reason(error)}; {device_mode(DEVICE)}", consequence, remedy
        )
    return Finding(name, State.YES, device_mode(DEVICE))


def device_mode(path: str) -> str:
    """Return which users a device's mode allows to open it."""
    try:
        status = os.stat(path)
    except OSError:
        return f"there is no {path}"
    mode = stat.S_IMODE(status.st_mode)
    who = [_user_name(status.st_uid)]
    if mode & 0o060 == 0o060:
        who.append(f"group {_group_name(status.st_gid)}")
    if mode & 0o006 == 0o006:
        who = ["everyone"]
    return f"mode {mode:04o}, for {' and '.join(who)}"


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def try_way(way: Way) -> int | OSError:
    """Make a mount for a moment in a child, and return the minor version of the FUSE protocol.

    The child answers no request. If the child fails, return its error.
    """
    try:
        return in_child(lambda: _offered_minor(way))
    except OSError as error:
        return error


def _offered_minor(way: Way) -> int:
    if way is Way.USERNS:
        enter_user_namespace(process.CLONE_NEWNS)
    device, root = (
        mount_fusermount() if way is Way.FUSERMOUNT else mount_detached(allow_other=way is Way.OWN)
    )
    with root, device:
        # The kernel queues INIT when the mount is made. A read without this check could wait for
        # ever.
        if not readable([device], 1):
            raise OSError(EAGAIN, "the kernel sent no INIT")
        request = os.read(device.fileno(), fuse.MIN_READ_BUFFER)
    _, minor = struct.unpack_from("=II", request, fuse.IN_HEADER.size)
    return int(minor)


def own_mount(tried: int | OSError | None) -> Finding:
    """Judge an attempt to mount in this process's own namespaces."""
    name = Way.OWN.value
    match tried:
        case None:
            return Finding(name, State.UNKNOWN, _AFTER_DEVICE)
        case int():
            return Finding(
                name,
                State.YES,
                "fsopen, fsmount and allow_other: a descriptor works for every user who gets it",
            )
        case OSError() as error:
            without = "" if _privileged() else " (no CAP_SYS_ADMIN)"
            return Finding(
                name,
                State.NO,
                f"{reason(error)}{without}",
                "another user cannot use a descriptor that is passed to it",
                "run the program as root (sudo)",
            )


def _privileged() -> bool:
    return bool(process.effective_capabilities() >> process.CAP_SYS_ADMIN & 1)


def namespace_mount(tried: int | OSError | None) -> Finding:
    """Judge an attempt to mount inside a user namespace."""
    name = f"{Way.USERNS.value} mount"
    match tried:
        case None:
            return Finding(name, State.UNKNOWN, _AFTER_DEVICE)
        case int():
            return Finding(
                name,
                State.YES,
                "no privilege needed; a descriptor works for its owner's uid and gid alone",
            )
        case OSError() as error:
            return Finding(
                name,
                State.NO,
                reason(error),
                "an ordinary user needs fusermount3",
                "see user namespaces",
            )


def fusermount(tried: int | OSError | None) -> Finding:
    """Look for fusermount3 and judge an attempt to mount with it."""
    name = Way.FUSERMOUNT.value
    helper = shutil.which(name)
    if helper is None:
        return Finding(
            name,
            State.NO,
            "not installed",
            "only the other two ways are left to an ordinary user",
            "sudo apt install fuse3",
        )
    others = re.search(r"^\s*user_allow_other\b", setting("/etc/fuse.conf") or "", re.MULTILINE)
    installed = (
        f"{_version_of(helper)}, user_allow_other {'set' if others else 'not set'}"
        " in /etc/fuse.conf (not needed)"
    )
    match tried:
        case None:
            return Finding(name, State.UNKNOWN, f"{installed}; {_AFTER_DEVICE}")
        case int():
            return Finding(name, State.YES, installed)
        case OSError() as error:
            return Finding(
                name,
                State.NO,
                f"{installed}; {reason(error)}",
                "only the other two ways are left to an ordinary user",
                _fusermount_remedy(helper) if error.errno == EPERM else "",
            )


def _fusermount_remedy(helper: str) -> str:
    status = os.stat(helper)
    if not (status.st_mode & stat.S_ISUID and status.st_uid == 0):
        return "sudo apt install --reinstall fuse3 (the helper has to be set-uid root)"
    if process.prctl(process.PR_GET_NO_NEW_PRIVS):
        return (
            "allow new privileges (systemd: NoNewPrivileges=no, container: without"
            " --security-opt no-new-privileges)"
        )
    return "give this container CAP_SYS_ADMIN, or run outside of it"


def _version_of(helper: str) -> str:
    said = subprocess.run(
        [helper, "--version"], check=False, capture_output=True, text=True, timeout=5
    ).stdout
    found = re.search(r"[\d.]+\d", said)
    return f"version {found[0]}" if found else "installed"


def user_namespaces() -> Finding:
    """Enter a user namespace in a child, with its maps; on failure, report what forbids it."""
    name = "user namespaces"
    limit = setting(_NAMESPACES_SYSCTL)
    apparmor = setting(_APPARMOR_SYSCTL)
    detail = f"at most {limit}" if limit else "no limit known"
    if apparmor is not None:
        detail += f"; AppArmor restricts them: {'yes' if apparmor != '0' else 'no'}"
    elif setting(_APPARMOR_ENABLED) == "Y":
        detail += "; AppArmor is on and does not restrict them"
    else:
        detail += "; no AppArmor"
    try:
        in_child(enter_user_namespace)
    except OSError as error:
        return Finding(
            name,
            State.NO,
            f"{reason(error)}; {detail}",
            "an ordinary user can mount through fusermount3 alone",
            _namespace_remedy(error, limit, apparmor),
        )
    if _privileged() and (apparmor not in (None, "0") or setting(_CLONE_SYSCTL) == "0"):
        return Finding(
            name,
            State.PARTLY,
            f"for root; {detail}",
            "an ordinary user can mount through fusermount3 alone",
            _namespace_remedy(PermissionError(EPERM, ""), limit, apparmor),
        )
    return Finding(name, State.YES, detail)


def _namespace_remedy(error: OSError, limit: str | None, apparmor: str | None) -> str:
    if limit == "0":
        return "sudo sysctl user.max_user_namespaces=10000"
    if setting(_CLONE_SYSCTL) == "0":
        return "sudo sysctl kernel.unprivileged_userns_clone=1"
    if apparmor not in (None, "0") and error.errno in (EPERM, EACCES):
        return (
            "sudo apt install fuse3 (or, for every program: sudo sysctl"
            " kernel.apparmor_restrict_unprivileged_userns=0)"
        )
    return "sudo apt install fuse3 (in a container: a seccomp profile that allows unshare)"


def protocol(minors: list[int]) -> Finding:
    """Judge the FUSE protocol by the minor versions that INIT gave on the mounts made."""
    name = "FUSE protocol"
    if not minors:
        return Finding(name, State.UNKNOWN, "it could not be asked for without a mount")
    minor = max(minors)
    needed = f"{fuse.KERNEL_VERSION}.{fuse.OLDEST_MINOR_VERSION}"
    said = f"{fuse.KERNEL_VERSION}.{minor} offered, {needed} needed"
    if minor < fuse.OLDEST_MINOR_VERSION:
        return Finding(
            name,
            State.NO,
            said,
            "close() of a descriptor could hang when its service dies",
            "Linux 5.16 or later",
        )
    return Finding(name, State.YES, said)


def descriptors_at_once() -> Finding:
    """Report how many descriptors a service can hold.

    The service has a memfd for each descriptor that has pages.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    detail = f"RLIMIT_NOFILE {soft:,}, raised by the service to {hard:,}"
    if hard < 10_000:
        return Finding(
            "descriptors at once",
            State.PARTLY,
            detail,
            f"a service has room for fewer than {hard:,} descriptors",
            "sudo prlimit --pid $$ --nofile=20000:20000 (this shell)",
        )
    return Finding("descriptors at once", State.YES, detail)
