"""``restrictedmem verify`` and ``measure``: checks of reports, measurements of guests."""

import argparse
import json
import re
import string
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from typing import TYPE_CHECKING

from restrictedmem.cli import guest_arguments, values
from restrictedmem.cli.errors import CommandError
from restrictedmem.failure import named

if TYPE_CHECKING:
    from restrictedmem.service.report import Report

#: Bytes of a guest's memory by default.
_MEMORY = 64 << 20
_KEY_BYTES = 32
#: More characters than a report has in hexadecimal, with white space.
_LARGEST_REPORT = 1 << 16


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add both commands."""
    _add_measure(commands)
    parser = commands.add_parser(
        "verify",
        help="check a guest's report",
        description="Check the signature and the policy of a report that a guest asked for. Key,"
        " measurement and data\nare checked if their option is given; the output says which were"
        " not checked.\n\n"
        "Exit status 0 if the signature and every checked value are right, else 1.\n"
        "docs/understand/threat-model.md says what a report is worth.",
        epilog="examples:\n"
        "  echo report 42 | restrictedmem run seal | restrictedmem verify - --guest seal\n"
        "  restrictedmem verify seal.report --key service.pem --data 3432 --guest seal",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "report",
        metavar="REPORT",
        help="file with the report, in binary or hexadecimal; - for stdin",
    )
    parser.add_argument(
        "--key",
        metavar="KEY",
        help="expected public key of the service: 64 hexadecimal digits, or a file with PEM or the"
        " digits",
    )
    parser.add_argument(
        "--data",
        type=_data,
        metavar="HEX",
        help="expected data that the guest had signed, at most 64 bytes",
    )
    expected = parser.add_mutually_exclusive_group()
    expected.add_argument(
        "--measurement", type=_measurement, metavar="HEX", help="expected measurement"
    )
    expected.add_argument(
        "--guest",
        nargs=argparse.REMAINDER,
        metavar="GUEST",
        help="expected guest and its arguments: everything that follows on the command line",
    )
    _add_launch_options(parser)
    parser.add_argument(
        "--json", action="store_true", help="print the report and each check as JSON"
    )
    parser.set_defaults(
        main=main, error=parser.error, options=frozenset(parser._option_string_actions)
    )


def _add_measure(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "measure",
        help="compute the measurement of a guest",
        description="Print the measurement that a guest has when it is run with these arguments and"
        " this much memory. The guest is not run.",
    )
    _add_launch_options(parser)
    parser.add_argument("guest", metavar="GUEST", help=guest_arguments.KINDS)
    parser.add_argument(
        "args", nargs=argparse.REMAINDER, metavar="ARGS", help="arguments of the guest"
    )
    parser.set_defaults(main=measure, options=frozenset(parser._option_string_actions))


def _add_launch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory",
        type=values.memory_size,
        metavar="SIZE",
        help="size of the guest's private memory (default 64M)",
    )
    parser.add_argument(
        "--vcpus",
        type=values.count_of("vCPUs", values.MOST_VCPUS),
        metavar="N",
        help="number of the guest's vCPUs (default 1)",
    )
    parser.add_argument(
        "--debug",
        action="store_true",
        help="assume a policy that opens registers and private memory to the owner",
    )


def _hex(text: str, size: int) -> bytes:
    try:
        found = bytes.fromhex(text)
    except ValueError:
        raise argparse.ArgumentTypeError("not hexadecimal") from None
    if len(found) > size:
        raise argparse.ArgumentTypeError(f"{len(found)} bytes, at most {size} expected")
    return found


def _data(text: str) -> bytes:
    from restrictedmem.service.report import REPORT_DATA_BYTES

    return _hex(text, REPORT_DATA_BYTES).ljust(REPORT_DATA_BYTES, b"\0")


def _measurement(text: str) -> bytes:
    from restrictedmem.protocol.measurement import MEASUREMENT_BYTES

    found = _hex(text, MEASUREMENT_BYTES)
    if len(found) != MEASUREMENT_BYTES:
        raise argparse.ArgumentTypeError(f"{len(found)} bytes, {MEASUREMENT_BYTES} expected")
    return found


def measure(args: argparse.Namespace) -> int:
    """Run ``measure``."""
    print(_expected(args, args.guest, args.args).hex())
    return 0


def _expected(args: argparse.Namespace, name: str, arguments: list[str]) -> bytes:
    from restrictedmem.vmm.boot import expected_measurement

    size = _MEMORY if args.memory is None else args.memory
    guest_arguments.warn(name, arguments, args.options)
    with guest_arguments.naming(name):
        return expected_measurement(
            guest_arguments.read(name),
            arguments,
            private_size=size,
            vcpus=args.vcpus or 1,
            policy=_policy(args),
        )


def _policy(args: argparse.Namespace) -> int:
    from restrictedmem.protocol.vm_wire import POLICY_DEBUG, POLICY_EXPLICIT

    return POLICY_EXPLICIT | (POLICY_DEBUG if args.debug else 0)


class Outcome(Enum):
    """The result of a check."""

    GOOD = "good"
    BAD = "bad"
    NOT_CHECKED = "not checked"


@dataclass(frozen=True, slots=True)
class Check:
    """One value of a report, checked or not."""

    name: str
    state: Outcome
    detail: str


def main(args: argparse.Namespace) -> int:
    """Run ``verify``."""
    from restrictedmem.service.report import Report

    if args.guest == []:
        args.error("--guest needs a guest: it and its arguments come last on the command line")
    if args.guest is None and (args.memory is not None or args.vcpus is not None):
        args.error("--memory and --vcpus go with --guest")
    data = _read(args.report)
    try:
        report = Report.unpack(data)
    except OSError as error:
        raise named("report", error, "stdin" if args.report == "-" else args.report) from None
    checks = list(_checks(args, data, report))
    bad = [check.name for check in checks if check.state is Outcome.BAD]
    if args.json:
        json.dump(
            {
                "verified": not bad,
                "checks": [_as_data(check) for check in checks],
                "report": _fields(report),
            },
            sys.stdout,
        )
        print()
    else:
        for check in checks:
            print(f"{check.name:<12} {check.state.value:<12} {check.detail}")
        open_ = [check.name for check in checks if check.state is Outcome.NOT_CHECKED]
        print(
            f"not verified: {', '.join(bad)}"
            if bad
            else "verified" + (f", except for: {', '.join(open_)}" if open_ else "")
        )
    return 1 if bad else 0


def _read(name: str) -> bytes:
    """Read a report; a hexadecimal one may have white space anywhere."""
    if name == "-":
        try:
            data = sys.stdin.buffer.read(_LARGEST_REPORT)
        except OSError as error:
            raise named("read", error, "stdin") from None
    else:
        try:
            with open(name, "rb") as file:
                data = file.read(_LARGEST_REPORT)
        except OSError as error:
            raise named("open", error, name) from None
    digits = b"".join(data.split())
    if digits and not digits.strip(string.hexdigits.encode()):
        try:
            return bytes.fromhex(digits.decode())
        except ValueError:
            raise CommandError("the report has an odd number of hexadecimal digits") from None
    return data


def _checks(args: argparse.Namespace, data: bytes, report: "Report") -> Iterator[Check]:
    from restrictedmem.service.report import signed_by_its_key

    right = signed_by_its_key(data)
    key = report.public_key.hex()
    yield Check(
        "signature",
        Outcome.GOOD if right else Outcome.BAD,
        f"{'by' if right else 'not by'} the key that the report names",
    )
    if args.key is None:
        yield Check(
            "key", Outcome.NOT_CHECKED, f"nobody vouched for {key}; anyone can make a key (--key)"
        )
    else:
        yield _compare("key", _public_key(args.key), report.public_key)
    expected = (
        args.measurement if args.guest is None else _expected(args, args.guest[0], args.guest[1:])
    )
    if expected is None:
        text = f"any program may have sent it; {report.measurement.hex()} (--guest, --measurement)"
        yield Check("measurement", Outcome.NOT_CHECKED, text)
    else:
        yield _compare("measurement", expected, report.measurement)
    yield _check_policy(_policy(args), report.policy)
    if args.data is None:
        yield Check(
            "data", Outcome.NOT_CHECKED, f"it may be an old report; {report.data.hex()} (--data)"
        )
    else:
        yield _compare("data", args.data, report.data)


def _compare(name: str, expected: bytes, found: bytes) -> Check:
    if expected == found:
        return Check(name, Outcome.GOOD, found.hex())
    return Check(name, Outcome.BAD, f"{found.hex()}, expected {expected.hex()}")


def _check_policy(expected: int, found: int) -> Check:
    from restrictedmem.protocol.vm_wire import POLICY_DEBUG, POLICY_EXPLICIT

    words = [
        "the owner can look into the guest and change it"
        if found & POLICY_DEBUG
        else "no debugging",
        "pages are shared only when the guest asks"
        if found & POLICY_EXPLICIT
        else "the owner can make any page shared",
    ]
    unknown = found & ~(POLICY_DEBUG | POLICY_EXPLICIT)
    text = "; ".join(
        [*words, *([f"bits that this version does not know: {unknown:#x}"] if unknown else [])]
    )
    return Check("policy", Outcome.GOOD if found == expected else Outcome.BAD, f"{found}: {text}")


def _public_key(text: str) -> bytes:
    if re.fullmatch(rf"[0-9a-fA-F]{{{2 * _KEY_BYTES}}}", text):
        return bytes.fromhex(text)
    from restrictedmem.service.signing import read_public_key

    return read_public_key(text)


def _as_data(check: Check) -> dict[str, str]:
    return {**asdict(check), "state": check.state.value}


def _fields(report: "Report") -> dict[str, object]:
    return {
        name: value.hex() if isinstance(value, bytes) else value
        for name, value in asdict(report).items()
    }
