"""``restrictedmem ps``: the services of this machine, with their descriptors and VMs."""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from restrictedmem.text import plain
from restrictedmem.units import format_size

#: The most lines of one kind, and the most numbers in a line.
_SHOWN = 20
#: The most characters of a line: a service may send 32 MiB.
_WIDEST = 1000


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "ps",
        help="list services, their descriptors and VMs",
        description="List the services of this machine with their owners, descriptors and VMs. Of"
        " another user's service, only its existence is shown; root sees everything.",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    from restrictedmem.abi import process
    from restrictedmem.service import discover

    # Each service that is asked needs a descriptor.
    process.raise_fd_limit()
    found = discover.statuses()
    if args.json:
        # JSON is printed whole or not at all.
        print(json.dumps({"services": found}))
        return 0
    for line in _all_lines(found):
        print(plain(line[:_WIDEST]))
    if not found:
        print("no service is running")
    return 0


def _locked(report: dict[str, Any]) -> str:
    """Return how much memory a VM has locked.

    A third party's consumer may report nothing, or anything.
    """
    locked = report.get("locked_bytes")
    if type(locked) is not int or not 0 <= locked < 1 << 64:
        return ""
    why = report.get("unlocked_because") or "no private slot"
    return f", {format_size(locked)} locked" if locked else f", unlocked ({why})"


def _whose(service: dict[str, Any]) -> str:
    """Return a service's uid from the kernel, and the uid of its owner if it differs."""
    uid, owner = service["uid"], service["owner_uid"]
    return f"uid {uid}" if uid == owner else f"uid {uid} for uid {owner}"


def _all_lines(found: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of all services, at most 20 per uid of those without a state."""
    bad: Counter[int | None] = Counter()
    for service in found:
        if "error" not in service:
            yield from _lines(service)
            continue
        bad[service["uid"]] += 1
        if bad[service["uid"]] <= _SHOWN:
            yield f"service {service['pid']}: {service['error']}{_of(service)}"
    for uid, count in bad.items():
        if count > _SHOWN:
            yield f"… {count - _SHOWN} more without a state, of uid {uid} (--json lists all)"


def _of(service: dict[str, Any]) -> str:
    return "" if service["uid"] is None else f" (uid {service['uid']})"


def _lines(service: dict[str, Any]) -> list[str]:
    files = service["descriptors"]
    resident = sum(file["resident"] for file in files)
    lines = [
        f"service {service['pid']}: {_whose(service)}, owner {service['owner_pid']},"
        f" {service['way']}, {service['api']}, {len(files)} descriptors,"
        f" {format_size(resident)} resident"
    ]
    for file in files[:_SHOWN]:
        size, held = format_size(file["size"]), format_size(file["resident"])
        lines.append(
            f"  descriptor {file['ino']}: {size}, {held} resident, {file['notifiers']} notifiers"
        )
    if len(files) > _SHOWN:
        lines.append(f"  … {len(files) - _SHOWN} more (--json lists all)")
    consumers = service["consumers"]
    for vm in consumers[:_SHOWN]:
        # A third party's consumer may report anything.
        report: dict[str, Any] = vm["report"] if type(vm["report"]) is dict else {}
        more = ["…"] if len(vm["files"]) > _SHOWN else []
        files_of = " ".join([*map(str, vm["files"][:_SHOWN]), *more]) or "none"
        name = f"{vm['name']} {vm['number']}: pid {report.get('pid', '?')}"
        lines.append(
            f"  {name}, descriptors {files_of}{_locked(report)},"
            f" {vm['invalidations']} invalidations"
        )
    if len(consumers) > _SHOWN:
        lines.append(f"  … {len(consumers) - _SHOWN} more VMs and consumers (--json lists all)")
    if service["last_error"]:
        lines.append(f"  last error: {service['last_error']}")
    return lines
