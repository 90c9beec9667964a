"""Consumers that owners have asked for, until each is there; the spawner forks one at a time.

If one cannot be made, its request gets the error, and the next one's turn comes.
"""

import os
import socket
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from errno import EIO, EMFILE, EMSGSIZE, ENOMEM
from functools import partial
from typing import final

from restrictedmem import threads
from restrictedmem.fd import refuse_fds, spare, speaks
from restrictedmem.patience import patiently
from restrictedmem.service import wire
from restrictedmem.service.consumer_process import ConsumerProcess
from restrictedmem.service.consumers import Consumers, Troubles
from restrictedmem.service.door import Connection
from restrictedmem.service.options import VM
from restrictedmem.service.wire import Channel, Message


@final
@dataclass(eq=False, slots=True)
class _Spawn:
    """A requested consumer: the connection, the body of SPAWN, both ends of its socket."""

    connection: Connection
    consumer: ConsumerProcess
    body: bytes
    owners: socket.socket
    consumers: socket.socket


@final
class Spawns:
    """The consumers that the spawner has still to fork, for the control thread.

    The spawner was asked for the first of them.
    """

    def __init__(self, spawner: Channel, consumers: Consumers, troubles: Troubles) -> None:
        self._spawner = spawner
        self._consumers = consumers
        self._troubles = troubles
        self._waiting: deque[_Spawn] = deque()
        self._spare = spare()

    def add(self, connection: Connection, name: str, body: bytes) -> None:
        """Have a consumer forked for a connection.

        The connection is busy until the consumer was forked, or could not be. Then it has its
        answer.

        Raises:
            OSError: EMFILE, ENFILE.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # An engine has a checker, which looks at what comes (``kvm.checker``). Other consumers
        # refuse descriptors from the first, because their owners can speak before the consumers do
        # anything.
        if name != VM:
            refuse_fds(theirs)
        try:
            consumer = self._consumers.add(name)
        except BaseException:
            ours.close()
            theirs.close()
            raise
        connection.busy = True
        self._waiting.append(_Spawn(connection, consumer, body, ours, theirs))
        if len(self._waiting) == 1:
            self._ask()

    def _ask(self) -> None:
        """Ask the spawner for the first consumer for which that does not fail."""
        while self._waiting:
            spawn = self._waiting[0]
            try:
                requests, notify = spawn.consumer.give_sockets()
                with spawn.consumers, requests, notify:
                    body = wire.NUMBER.pack(spawn.consumer.number) + spawn.body
                    fds = [spawn.consumers.fileno(), requests.fileno(), notify.fileno()]
                    self._spawner.post(wire.FORK, body, fds)
            except Exception as error:  # noqa: BLE001  the caller has to hear of any error
                self._waiting.popleft()
                self._refuse(spawn, error)
            else:
                return

    def hear(self) -> bool:
        """Receive the spawner's answer about the first one.

        Returns false when the spawner is gone.
        """
        heard: Message | OSError | None
        try:
            heard = self._receive()
        except BlockingIOError:
            return True
        except OSError as error:
            heard = error
        except MemoryError:
            # Nobody knows what became of the first one, and no other's turn would ever come.
            os._exit(ENOMEM)
        if heard is None:
            return False
        spawn = self._waiting.popleft()
        try:
            self._settle(spawn, heard)
        except Exception as error:  # noqa: BLE001  the caller has to hear of any error
            self._refuse(spawn, error)
        finally:
            self._ask()
        return True

    def _receive(self) -> Message | None:
        """Receive a message of the spawner's; return None when the spawner is gone.

        Raises:
            OSError: EAGAIN when there is none now; EMFILE, ENOMEM when there was one, and it is
                lost.
            MemoryError: when neither can be told.
        """
        # The pidfd gets this number, unless another thread is faster.
        self._spare.close()
        try:
            return self._spawner.receive(socket.MSG_DONTWAIT)
        except OSError as error:
            # The kernel has cut the pidfd off.
            number = EMFILE if error.errno == EMSGSIZE else error.errno or EIO
            raise OSError(number, os.strerror(number)) from None
        except MemoryError:
            # A message that was not received is still there. There can be no other: one FORK at a
            # time.
            if patiently(lambda: speaks(self._spawner.sock)):
                raise BlockingIOError from None
            raise OSError(ENOMEM, os.strerror(ENOMEM)) from None
        finally:
            with suppress(OSError, MemoryError):
                self._spare = spare()

    def _settle(self, spawn: _Spawn, heard: Message | OSError) -> None:
        """Have a forked consumer served, and give its socket to the requesting connection.

        The connection may have gone meanwhile.
        """
        if isinstance(heard, OSError):
            raise heard
        if heard.number:
            raise OSError(
                heard.number, heard.body.decode(errors="replace") or os.strerror(heard.number)
            )
        channel, consumer = spawn.connection.channel, spawn.consumer
        consumer.process = heard.take_fd()
        threads.start(partial(self._consumers.serve, consumer))
        spawn.connection.busy = False
        with spawn.owners:
            try:
                if channel.fileno() >= 0:
                    channel.reply(str(consumer.number).encode(), [spawn.owners.fileno()])
            except Exception as error:  # noqa: BLE001  the consumer's thread ends it
                consumer.kill()
                channel.reply_error(self._troubles.of("SPAWN", error))

    def _refuse(self, spawn: _Spawn, error: Exception) -> None:
        """End a consumer that could not be made, and report the error.

        The connection that asked for the consumer gets the error.
        """
        spawn.connection.busy = False
        try:
            self._consumers.end(spawn.consumer)
        finally:
            with spawn.owners:
                if spawn.connection.channel.fileno() >= 0:
                    spawn.connection.channel.reply_error(self._troubles.of("SPAWN", error))
