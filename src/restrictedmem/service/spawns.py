"""Consumers that owners have asked for, until each is there: the spawner forks one at a time.

Whatever fails of one is the answer to whoever asked for it, and the next one's turn comes.
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
    """A consumer that was asked for: by whom, the body of SPAWN, and both ends of its socket."""

    connection: Connection
    consumer: ConsumerProcess
    body: bytes
    owners: socket.socket
    consumers: socket.socket


@final
class Spawns:
    """What the spawner has still to fork, for the control thread; it is asked for the first."""

    def __init__(self, spawner: Channel, consumers: Consumers, troubles: Troubles) -> None:
        self._spawner = spawner
        self._consumers = consumers
        self._troubles = troubles
        self._waiting: deque[_Spawn] = deque()
        self._spare = spare()

    def add(self, connection: Connection, name: str, body: bytes) -> None:
        """Have a consumer forked for a connection, which is busy until it was, or could not be: then it has its answer.

        Raises:
            OSError: EMFILE, ENFILE.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # An engine has somebody who looks at what comes (``kvm.checker``). Of other consumers'
        # owners it is refused from the first: they can speak before the consumer does anything.
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
        """Have the first one forked of those that can be asked for."""
        while self._waiting:
            spawn = self._waiting[0]
            try:
                requests, notify = spawn.consumer.give_sockets()
                with spawn.consumers, requests, notify:
                    body = wire.NUMBER.pack(spawn.consumer.number) + spawn.body
                    fds = [spawn.consumers.fileno(), requests.fileno(), notify.fileno()]
                    self._spawner.post(wire.FORK, body, fds)
            except Exception as error:  # noqa: BLE001  whatever it is, whoever asked has to hear it
                self._waiting.popleft()
                self._refuse(spawn, error)
            else:
                return

    def hear(self) -> bool:
        """Hear from the spawner what came of the first one; false when there is no spawner any more."""
        heard: Message | OSError | None
        try:
            heard = self._receive()
        except BlockingIOError:
            return True
        except OSError as error:
            heard = error
        except MemoryError:
            # What became of the first one is not known, and no other's turn would ever come.
            os._exit(ENOMEM)
        if heard is None:
            return False
        spawn = self._waiting.popleft()
        try:
            self._settle(spawn, heard)
        except Exception as error:  # noqa: BLE001  whatever it is, whoever asked has to hear it
            self._refuse(spawn, error)
        finally:
            self._ask()
        return True

    def _receive(self) -> Message | None:
        """Take what the spawner says; None when it is gone.

        Raises:
            OSError: EAGAIN when it says nothing now; EMFILE, ENOMEM when it did, and that is lost.
            MemoryError: when neither can be told.
        """
        # Its number is for the pidfd, unless another thread is faster.
        self._spare.close()
        try:
            return self._spawner.receive(socket.MSG_DONTWAIT)
        except OSError as error:
            # The kernel has cut the pidfd off.
            number = EMFILE if error.errno == EMSGSIZE else error.errno or EIO
            raise OSError(number, os.strerror(number)) from None
        except MemoryError:
            # What was not taken yet is still there, and nothing else can be: one FORK at a time.
            if patiently(lambda: speaks(self._spawner.sock)):
                raise BlockingIOError from None
            raise OSError(ENOMEM, os.strerror(ENOMEM)) from None
        finally:
            with suppress(OSError, MemoryError):
                self._spare = spare()

    def _settle(self, spawn: _Spawn, heard: Message | OSError) -> None:
        """Have a consumer served that was forked, and give whoever asked for it its socket, unless that has gone meanwhile."""
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
            except Exception as error:  # noqa: BLE001  as in ``hear``, but its thread ends the consumer
                consumer.kill()
                channel.reply_error(self._troubles.of("SPAWN", error))

    def _refuse(self, spawn: _Spawn, error: Exception) -> None:
        """End a consumer that cannot be, and say why to whoever asked for it."""
        spawn.connection.busy = False
        try:
            self._consumers.end(spawn.consumer)
        finally:
            with spawn.owners:
                if spawn.connection.channel.fileno() >= 0:
                    spawn.connection.channel.reply_error(self._troubles.of("SPAWN", error))
