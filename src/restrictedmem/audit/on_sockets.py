"""Routes by the sockets of service and engine: the owner sends the requests of a consumer.

It sends them with the key of READY, without a key, and with other keys. An answer would give it
power over the guest, a report that the guest did not ask for, or the memory itself.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import closing
from errno import ECONNREFUSED
from functools import partial
from typing import Final

from restrictedmem.audit.attacker import Attacker
from restrictedmem.audit.attempt import Route
from restrictedmem.audit.pattern import Buffer
from restrictedmem.audit.reading import of_file
from restrictedmem.fd import OwnedFd, close_all
from restrictedmem.service import wire
from restrictedmem.service.address import address
from restrictedmem.service.wire import Call, Channel

#: Random keys that are tried, besides keys that differ a little from the right one.
_GUESSES: Final = 100
_NAMES: Final = "/proc/net/unix"

#: The requests that only a consumer may send, each with a valid body.
_CONSUMERS: Final = (
    (wire.LAUNCHED, wire.LAUNCH.pack(2, b"kernel", bytes(48))),
    (wire.SIGN, bytes(64)),
    (wire.REPORT, b"{}"),
    (wire.UNBIND, wire.NUMBER.pack(1)),
    (wire.FORK, wire.NUMBER.pack(1) + b"kvm {}"),
)


def _connect(name: str) -> Channel:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    channel = Channel(sock, "service", takes_fds=True)
    try:
        sock.connect(address(name))
    except BaseException:
        channel.close()
        raise
    return channel


def _enter(owner: Attacker) -> Channel:
    """Connect with the owner's key."""
    channel = _connect(owner.service.info["socket"])
    channel.call(wire.CONNECT, bytes.fromhex(owner.service.info["key"]))
    return channel


def _call(channel: Channel, call: Call, body: bytes) -> Iterator[Buffer]:
    """Send a request; yield the reply and the content of the files that came with it."""
    reply, fds = channel.call(call, body)
    yield reply
    for fd in fds:
        yield from of_file(fd.fileno())
    close_all(fds)


def _outside(call: Call, body: bytes, owner: Attacker) -> Iterator[Buffer]:
    with closing(_connect(owner.service.info["socket"])) as channel:
        yield from _call(channel, call, body)


def _inside(call: Call, body: bytes, owner: Attacker) -> Iterator[Buffer]:
    with closing(_enter(owner)) as channel:
        yield from _call(channel, call, body)


def _bind(owner: Attacker) -> Iterator[Buffer]:
    """Ask for the file behind the descriptor, as an engine does."""
    whole = wire.BIND_REQUEST.pack(owner.service.token_for(owner.fd), 0, 0, 0)
    yield from _inside(wire.BIND, whole, owner)


def _guess(owner: Attacker) -> Iterator[Buffer]:
    """Connect with keys that are almost right, of another length, or random."""
    key = bytes.fromhex(owner.service.info["key"])
    keys = [
        b"",
        key[:-1],
        key + b"\0",
        bytes(len(key)),
        *(os.urandom(len(key)) for _ in range(_GUESSES)),
    ]
    keys += [key[:at] + bytes([key[at] ^ 1]) + key[at + 1 :] for at in range(len(key))]
    refusal = OSError()
    for guess in keys:
        with closing(_connect(owner.service.info["socket"])) as channel:
            try:
                channel.call(wire.CONNECT, guess)
            except OSError as error:
                refusal = error
            else:
                yield b"a key that is none"
                return
    raise refusal


def _by_name(owner: Attacker) -> Iterator[Buffer]:
    """Send a request to each listening name that has the pid of a trusted process in it."""
    numbers = {str(pid) for pid in owner.processes.values()}
    refusal = OSError(ECONNREFUSED, "no name has the pid of a trusted process in it")
    with open(_NAMES, encoding="utf-8", errors="replace") as file:
        names = [fields[7] for line in file if len(fields := line.split()) == 8]
    for name in names:
        if name.startswith("@") and numbers & set(name[1:].split("/")):
            try:
                with closing(_connect(name)) as channel:
                    yield from _call(channel, wire.TOKEN, b"")
            except OSError as error:
                refusal = error
            else:
                return
    raise refusal


def _foreign(owner: Attacker) -> Iterator[Buffer]:
    """Send the service a descriptor of /dev/null and the restricted one.

    A service that held the restricted descriptor could not be killed.
    """
    with OwnedFd(os.open(os.devnull, os.O_RDONLY)) as null, closing(_enter(owner)) as channel:
        channel.call(wire.TOKEN, fds=[null.fileno(), owner.fd])
        yield b""


def _to_engine(call: Call, body: bytes, owner: Attacker) -> Iterator[Buffer]:
    # The VM's methods send only the requests of an owner.
    channel = owner.guest.vmm.vm._channel  # pyright: ignore[reportPrivateUsage]
    yield from _call(channel, call, body)


def routes() -> Iterator[Route]:
    """Yield the routes by the sockets."""
    for call, body in (
        *_CONSUMERS,
        (wire.TOKEN, b""),
        (wire.SPAWN, b"kvm {}"),
        (wire.SIGNING_KEY, b""),
    ):
        yield Route(
            "service's socket",
            f"{call.name} without the key",
            partial(_outside, call, body),
            power=True,
        )
    for call, body in _CONSUMERS:
        yield Route("service's socket", call.name, partial(_inside, call, body), power=True)
        yield Route("VM's socket", call.name, partial(_to_engine, call, body), power=True)
    yield Route("service's socket", "BIND", _bind, power=True)
    yield Route("service's socket", "wrong keys", _guess, power=True)
    yield Route("service's socket", "names of /proc/net/unix", _by_name, power=True)
    yield Route("service's socket", "descriptors", _foreign, power=True)
