"""``restrictedmem ps``: the services of this machine and what they hold."""

import argparse
import json
import sys
from typing import Any

from restrictedmem.units import format_size


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "ps",
        help="list services, their descriptors and VMs",
        description="List the services of this machine, their owners, descriptors and VMs. Another user's service says nothing "
        "but that it is there; root sees all.",
    )
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    from restrictedmem.service import discover

    found: list[dict[str, Any]] = []
    for pid in discover.pids():
        try:
            found.append(discover.status_of(pid))
        except (ConnectionRefusedError, FileNotFoundError):
            # It ended between the list and the question.
            continue
        except OSError as error:
            found.append({"pid": pid, "error": error.strerror})
    if args.json:
        json.dump({"services": found}, sys.stdout)
        print()
        return 0
    for service in found:
        print("\n".join(_lines(service)))
    if not found:
        print("no service runs")
    return 0


def _locked(report: dict[str, Any]) -> str:
    """Say what a VM has locked; another consumer does not report it."""
    if "locked_bytes" not in report:
        return ""
    locked = report["locked_bytes"]
    return f", {format_size(locked)} locked" if locked else f", unlocked ({report['unlocked_because'] or 'no private slot'})"


def _lines(service: dict[str, Any]) -> list[str]:
    if "error" in service:
        return [f"service {service['pid']}: {service['error']}"]
    files = service["descriptors"]
    resident = sum(file["resident"] for file in files)
    lines = [
        f"service {service['pid']}: uid {service['owner_uid']}, owner {service['owner_pid']}, {service['way']}, {service['api']}, "
        f"{len(files)} descriptors, {format_size(resident)} resident"
    ]
    for file in files[:20]:
        size, held = format_size(file["size"]), format_size(file["resident"])
        lines.append(f"  descriptor {file['ino']}: {size}, {held} resident, {file['notifiers']} notifiers")
    if len(files) > 20:
        lines.append(f"  … {len(files) - 20} more (--json lists all)")
    for vm in service["consumers"]:
        report = vm["report"]
        files_of = " ".join(map(str, vm["files"])) or "none"
        name = f"{vm['name']} {vm['number']}: pid {report.get('pid', '?')}"
        lines.append(f"  {name}, descriptors {files_of}{_locked(report)}, {vm['invalidations']} invalidations")
    if service["last_error"]:
        lines.append(f"  last error: {service['last_error']}")
    return lines
