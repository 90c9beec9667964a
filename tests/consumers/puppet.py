"""A consumer that does what a test says, in JSON, and may break each rule that consumers have."""

import json
import os
import signal
import socket
import threading
from contextlib import suppress
from typing import Any, Final

from restrictedmem.consumer import BoundFile, Consumer
from restrictedmem.fd import OwnedFd
from restrictedmem.service.options import Options
from restrictedmem.service.wire import Call, Channel
from restrictedmem.units import PageRange, pgoff_t

_SO_PASSRIGHTS: Final = 83


class Ops:
    """Notes what it hears; ``manner`` is what it does at the next invalidate_start."""

    def __init__(self, notify: socket.socket) -> None:
        self.heard: list[list[object]] = []
        self.balanced = threading.Condition()
        self.manner = ""
        self.notify = notify

    def invalidate_start(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        self.heard.append(["start", start, end, order])
        match self.manner:
            case "stop":
                # To this very thread, which so cannot answer first.
                signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "raise":
                raise RuntimeError("a bug")
            case "garbage" | "refuse" | "refuse in numbers" | "short" | "empty":
                answers = {
                    "garbage": bytes(8) + b"more",
                    "refuse": (22).to_bytes(8, "little"),
                    "short": b"x",
                    "empty": b"",
                }
                answers["refuse in numbers"] = (0x8000_0005).to_bytes(8, "little")
                self.notify.send(answers[self.manner])
            case _:
                pass

    def invalidate_end(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        with self.balanced:
            self.heard.append(["end", start, end, order])
            self.balanced.notify_all()

    def error(self, start: pgoff_t, end: pgoff_t) -> None:
        self.heard.append(["error", start, end])


class Puppet:
    def __init__(self, consumer: Consumer, notify: socket.socket) -> None:
        self.consumer = consumer
        self.notify = notify
        self.files: list[BoundFile] = []
        self.ops: list[Ops] = []

    def bind(self, token: str, start: int, end: int, exclusive: bool = True) -> int:
        ops, window = Ops(self.notify), PageRange(pgoff_t(start), pgoff_t(end))
        self.files.append(
            BoundFile.bind(self.consumer, bytes.fromhex(token), window, ops, exclusive=exclusive)
        )
        self.ops.append(ops)
        return len(self.files) - 1

    def register_notifier(self, token: str, start: int, end: int) -> int:
        ops, window = Ops(self.notify), PageRange(pgoff_t(start), pgoff_t(end))
        self.files.append(
            BoundFile.register_notifier(self.consumer, bytes.fromhex(token), window, ops)
        )
        self.ops.append(ops)
        return len(self.files) - 1

    def call(self, file: int, name: str, *arguments: int) -> object:
        """Call a method of a bound file."""
        return getattr(self.files[file], name)(*arguments)

    def manner(self, file: int, manner: str) -> None:
        self.ops[file].manner = manner

    def heard(self, file: int) -> list[list[object]]:
        """Return the callbacks, once each start has had its end.

        The service does not wait for the end.
        """
        ops = self.ops[file]
        with ops.balanced:
            if not ops.balanced.wait_for(
                lambda: (
                    sum({"start": 1, "end": -1}.get(str(what[0]), 0) for what in ops.heard) == 0
                ),
                5,
            ):
                raise TimeoutError("waited 5 s for the end of an invalidation")
        return ops.heard

    def read(self, file: int, pgoff: int) -> int:
        return self.files[file].page(pgoff_t(pgoff))[0]

    def write(self, file: int, pgoff: int, byte: int) -> None:
        page = self.files[file].page(pgoff_t(pgoff))
        page[:] = bytes([byte]) * len(page)

    def request(self, number: int, body: str) -> str:
        """Ask the service for something, as it is; bodies are in hexadecimal digits."""
        return self.consumer.requests.call(Call("REQUEST", number), bytes.fromhex(body))[0].hex()

    def pid(self) -> int:
        return os.getpid()

    def leave(self) -> int:
        """Leave a process with copies of all descriptors, in its own session.

        Its parent has ended at return.
        """
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.setsid()
            if os.fork() == 0:
                os.write(writer, os.getpid().to_bytes(4, "little"))
                while True:
                    signal.pause()
            os._exit(0)
        os.waitpid(child, 0)
        os.close(writer)
        with open(reader, "rb") as pipe:
            return int.from_bytes(pipe.read(4), "little")

    def wakes(self) -> int:
        """Return the descriptor that signals are written to, -1 for none."""
        return signal.set_wakeup_fd(-1)


def serve(
    owner: socket.socket,
    service: socket.socket,
    notify: socket.socket,
    options: Options,
    arguments: str,
) -> None:
    trusting = arguments == "trusting"
    if trusting:
        # The service has refused them. Kernels before Linux 6.16 lack the option.
        with suppress(OSError):
            owner.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 1)
    channel, consumer = Channel(owner, "owner", takes_fds=trusting), Consumer(service, notify)
    puppet = Puppet(consumer, notify)
    held: list[OwnedFd] = []
    while message := channel.receive():
        held += message.fds
        name, *values = json.loads(message.body)
        try:
            result: Any = getattr(puppet, name)(*values)
            channel.reply(json.dumps(result).encode())
        except OSError as error:
            channel.reply_error(error)
    if arguments != "careless":
        consumer.close()
