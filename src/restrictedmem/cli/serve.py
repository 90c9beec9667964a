"""``restrictedmem serve``: services for owners that are not even trusted during the start."""

import argparse
import os
import pwd
import re
import signal
import socket
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from restrictedmem.cli import values
from restrictedmem.cli.errors import CommandError
from restrictedmem.cli.server_messages import ServerMessages
from restrictedmem.failure import line_of
from restrictedmem.mm import designs
from restrictedmem.mm.backing import KINDS, make_backing
from restrictedmem.mm.design import TEARDOWN

if TYPE_CHECKING:
    from restrictedmem.service.client_cgroups import ClientCgroups
    from restrictedmem.service.options import Options

#: The most services of one uid.
_PLACES = 64
#: Seconds that the reader of stderr has at the end.
_LAST_WORDS = 1.0
_MOST_MODE = 0o777
#: The largest uid; the next number means no uid.
_LAST_UID = (1 << 32) - 2
_CGROUP_HINT = (
    "start it in a cgroup of its own that it may write: systemd-run -p Delegate=memory"
    " (a unit: Delegate=memory); in a container, with /sys/fs/cgroup writable"
)
_KEY_HINT = "make one: umask 077; openssl genpkey -algorithm ed25519 -out FILE"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "serve",
        help="start services for other users",
        description="Listen on a socket and start a service for each client, under a uid that is"
        " not the client's. A service that its owner starts itself is safe from the owner only if"
        " the owner was honest at that time. A service started here is always safe from its owner."
        " Clients set RESTRICTEDMEM_SERVER to the socket. Start the command as root: only a mount"
        " made by root lets descriptors work for other users.",
    )
    parser.add_argument(
        "--socket",
        required=True,
        metavar="PATH",
        help="path of the socket, which is created, and removed at the end",
    )
    parser.add_argument(
        "--user",
        metavar="NAME|FIRST-LAST",
        help="user that the services become once they have mounted; or a range of uids that nobody"
        " else has, at least one for each uid of a client. The services of each client's uid then"
        " get a uid of their own (default: the services keep this command's uid)",
    )
    parser.add_argument(
        "--mode",
        type=_mode,
        default=0o666,
        metavar="OCTAL",
        help="mode of the socket, which says who may connect (default 666)",
    )
    parser.add_argument(
        "--max-per-user",
        type=values.count_of("services"),
        default=_PLACES,
        metavar="N",
        help="limit on the services of clients of one uid at the same time; beyond it, EAGAIN"
        " (default %(default)s)",
    )
    parser.add_argument(
        "--max-vms",
        type=values.count_of("VMs"),
        default=64,
        metavar="N",
        help="limit on the VMs and other consumers of one service at the same time; beyond it,"
        " EAGAIN (default 64)",
    )
    values.add_api(parser)
    parser.add_argument(
        "--signing-key",
        metavar="FILE",
        help="key that signs guests' reports: Ed25519 in PEM, mode 600 (default: a new key for each"
        " service)",
    )
    parser.add_argument(
        "--memory-max",
        type=values.memory_size,
        metavar="SIZE",
        help="limit on the memory of a descriptor; --client-memory limits a client, which may have"
        " many descriptors",
    )
    parser.add_argument(
        "--client-memory",
        type=values.memory_size,
        metavar="SIZE",
        help="limit on the memory of all services of clients of one uid together, with engines and"
        " guests. These are in a cgroup of their own; when it is full, the kernel kills only"
        " processes in it (docs/understand/threat-model.md; default: all services are in this"
        " command's cgroup)",
    )
    parser.add_argument(
        "--design",
        metavar="NAME",
        help=f"design of the notifications of a punch: {', '.join(designs.NAMES)}, each also with"
        f" {TEARDOWN} behind it (docs/understand/designs.md; default: that of --api)",
    )
    parser.add_argument(
        "--backing",
        choices=KINDS,
        default="memfd",
        help="pages behind the descriptors (docs/understand/folios.md; default memfd)",
    )
    parser.add_argument(
        "--pin",
        action="store_true",
        help="have consumers keep pages at their physical addresses (docs/understand/pinning.md)",
    )
    parser.add_argument(
        "--consumer",
        type=_named,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="Python program of a consumer. Any client may ask for NAME, and the program may then"
        " access the content of that client's descriptors (docs/use/consumers.md). The program is"
        " trusted as this command is. Can be repeated",
    )
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Serve until a signal comes; services that run by then go on."""
    from restrictedmem.abi import process
    from restrictedmem.service.client_services import ClientServices
    from restrictedmem.service.listener import listen
    from restrictedmem.service.options import Options

    uids = _uids(args.user)
    options = Options(
        api=args.api or values.DEFAULT_API,
        design=args.design,
        memory_max=args.memory_max,
        backing=args.backing,
        pin=args.pin,
        consumers=tuple(args.consumer),
        max_consumers=args.max_vms,
        become=_become(args.user) if not uids else (uids[0], uids[0]),
        signing_key=None if args.signing_key is None else _check_key(args.signing_key),
    )
    _check(options)
    process.raise_fd_limit()
    say = ServerMessages()
    stop = _stop_at(signal.SIGINT, signal.SIGTERM)
    with (
        _cgroups(args.client_memory) as cgroups,
        listen(args.socket, args.mode) as (listener, dangers),
    ):
        for danger in dangers:
            say(f"warning: {danger}, who can replace this socket by another one")
        server = ClientServices(listener, options, args.max_per_user, say, uids, cgroups)
        say(f"listening on {args.socket}")
        server.run(stop.fileno())
    say.flush(_LAST_WORDS)
    return 0


def _do_nothing(*_: object) -> None:
    """Handle a signal, which then only ends waits."""


def _stop_at(*numbers: signal.Signals) -> socket.socket:
    """Return a socket that is readable once one of some signals has come.

    Python's own handlers raise an exception, which would interrupt the cleanup at the end.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.detach(), warn_on_full_buffer=False)
    # Handlers are set for every signal, because a shell ignores SIGINT in background commands.
    for number in numbers:
        signal.signal(number, _do_nothing)
    # A parent that ignores SIGCHLD passes this on by exec, and then no child could be waited for.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return ours


def _mode(text: str) -> int:
    if not re.fullmatch("[0-7]{1,4}", text) or int(text, 8) > _MOST_MODE:
        raise argparse.ArgumentTypeError(f"{text} is not a mode: 000 to 777")
    return int(text, 8)


def _named(text: str) -> tuple[str, str]:
    name, found, path = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"{text}: write NAME=PATH")
    return name, os.path.abspath(path)


def _check(options: "Options") -> None:
    """Check what would fail for every client: options, machine, consumers' programs."""
    from restrictedmem.service import program

    try:
        options.check()
        make_backing(options.backing).close()
        for name, path in options.consumers:
            program.load(name, path)
    except OSError as error:
        raise CommandError(line_of(error)) from None


def _cgroups(limit: int | None) -> "AbstractContextManager[ClientCgroups | None]":
    if limit is None:
        return nullcontext()
    from restrictedmem.service.client_cgroups import ClientCgroups

    try:
        return ClientCgroups(limit)
    except OSError as error:
        raise CommandError(f"--client-memory: {line_of(error)}", _CGROUP_HINT) from None


def _check_key(path: str) -> str:
    """Check that the key can be read, print its public key, and return its absolute path."""
    from restrictedmem.service.signing import Signer

    try:
        key = Signer.load(path).make_key()
    except OSError as error:
        raise CommandError(f"--signing-key: {line_of(error)}", _KEY_HINT) from None
    print(f"reports are signed by {key.hex()}", file=sys.stderr, flush=True)
    return os.path.abspath(path)


def _uids(text: str | None) -> range:
    """Return a range of uids, empty when ``--user`` is not a range."""
    found = re.fullmatch(r"(\d{1,10})-(\d{1,10})", text or "")
    if not found:
        return range(0)
    first, last = map(int, found.groups())
    if not 0 < first <= last <= _LAST_UID:
        raise CommandError(
            f"--user: {text} is not a range of uids",
            f"use uids from 1 to {_LAST_UID} that nobody has",
        )
    _check_root()
    return range(first, last + 1)


def _check_root() -> None:
    if os.geteuid():
        raise CommandError(
            "only root can become another user", "start it as root, or without --user"
        )


def _become(name: str | None) -> tuple[int, int] | None:
    if name is None:
        return None
    _check_root()
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        raise CommandError(f"no user named {name}", f"make one: useradd --system {name}") from None
    return found.pw_uid, found.pw_gid
