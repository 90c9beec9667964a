"""The consumers of a service: one thread serves the requests of each.

The control thread (``daemon``) adds consumers, and reads their numbers for STATUS.
"""

import logging
import os
import threading
from collections.abc import Callable
from errno import EIO, ENOMEM, EPERM, EPROTO
from functools import partial
from typing import Final, final

from restrictedmem import sync
from restrictedmem.mm.guest_memfd_file import GuestMemfdFile
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.service import wire
from restrictedmem.service.consumer_process import ConsumerProcess
from restrictedmem.service.options import VM, Options
from restrictedmem.service.signing import Signer
from restrictedmem.service.tokens import Tokens
from restrictedmem.service.wire import BindFlag, BindingFlag, Channel, Message
from restrictedmem.units import PageRange, pgoff_t

log = logging.getLogger(__name__)

#: Seconds that a consumer's process may take to end after its owner has let go of it, and the
#: number of slices of this wait.
_LINGER: Final = 0.2
_LINGER_SLICES: Final = 4
# Plain ints, because combining members of an enumeration takes as long as a message.
_EXCLUSIVE: Final = int(BindFlag.EXCLUSIVE)
_AGAIN: Final = int(BindFlag.AGAIN)
_HUGEPAGE: Final = int(BindingFlag.HUGEPAGE)
_PIN: Final = int(BindingFlag.PIN)
_RANGE: Final = int(BindingFlag.RANGE)
_GUEST_MEMFD: Final = int(BindingFlag.GUEST_MEMFD)
#: The end of a reason that explains nothing (``ConsumerProcess.notify``).
_GONE: Final = " is gone"
#: Number of consumers whose end is remembered.
_ENDINGS: Final = 256
#: Calls that only a consumer that is a VM may make.
_OF_VMS: Final = (wire.LAUNCHED.number, wire.SIGN.number)


@final
class Troubles:
    """The answers to requests that fail, and the last trouble for ``ps``.

    Any thread may use it.
    """

    def __init__(self) -> None:
        self.last = ""

    def answer(
        self, channel: Channel, dispatch: Callable[[Message], None], message: Message
    ) -> None:
        """Let ``dispatch`` answer a request; if it raises an error, answer with that."""
        try:
            dispatch(message)
        except Exception as error:  # noqa: BLE001  a bug must not hang the caller
            channel.reply_error(self.of(f"call {message.number}", error))

    def of(self, what: str, error: Exception) -> OSError:
        """Return the error that a caller is told of a failure.

        A bug is told as EIO; ``ps`` and the log have the rest.
        """
        if isinstance(error, OSError):
            return error
        if isinstance(error, MemoryError):
            return OSError(ENOMEM, os.strerror(ENOMEM))
        log.error(what, exc_info=error)
        self.last = f"{what}: {error!r}"
        return OSError(EIO, os.strerror(EIO))


@final
class Endings:
    """How consumers ended, by number. Any thread may use it."""

    def __init__(self) -> None:
        self._words: dict[int, str] = {}
        #: Why this service killed them, before it is known that they ended.
        self._reasons: dict[int, str] = {}

    def blame(self, consumer: int, reason: str) -> None:
        """Store why a consumer is killed, unless it had ended by itself."""
        if consumer not in self._words and not reason.endswith(_GONE):
            self._reasons[consumer] = reason

    def note(self, consumer: int, words: str) -> None:
        """Store how a consumer's process ended; keep the last ``_ENDINGS`` of them."""
        self._words[consumer] = self._reasons.pop(consumer, words)
        if len(self._words) > _ENDINGS:
            del self._words[next(iter(self._words))]

    def of(self, consumer: int) -> str:
        """Return how a consumer's process ended; empty when that is unknown or forgotten."""
        return self._words.get(consumer, "")


@final
class Consumers:
    """All consumers of a service, by number. Any thread may use it."""

    def __init__(
        self, tokens: Tokens, options: Options, signer: Signer, troubles: Troubles
    ) -> None:
        self._troubles = troubles
        self.endings = Endings()
        self._tokens = tokens
        self._options = options
        #: The device number of the service's files, once there is a mount.
        self.device = 0
        self._signer = signer
        self._all: dict[int, ConsumerProcess] = {}
        self._next = 1
        self._idle = threading.Condition(sync.mutex())

    def add(self, name: str) -> ConsumerProcess:
        """Make the service's end of a consumer; only the control thread may call this.

        Raises:
            OSError: EMFILE, ENFILE.
        """
        consumer = ConsumerProcess(name, self._next, self._options.deadline, self._failed)
        self._next += 1
        with self._idle:
            self._all[consumer.number] = consumer
        return consumer

    def all(self) -> list[ConsumerProcess]:
        """Return the consumers that there are."""
        with self._idle:
            return list(self._all.values())

    def wait_idle(self) -> None:
        """Wait until no consumer is left."""
        with self._idle:
            self._idle.wait_for(lambda: not self._all)

    def serve(self, consumer: ConsumerProcess) -> None:
        """Serve a consumer until it ends.

        This runs in a thread of its own, because a request may wait for other consumers, or free
        gigabytes.
        """
        dispatch = partial(self._dispatch, consumer)
        try:
            while message := consumer.receive():
                self._troubles.answer(consumer.requests, dispatch, message)
        except (OSError, MemoryError) as error:
            # The consumer's request may be lost.
            consumer.requests.reply_error(self._troubles.of(str(consumer), error))
        finally:
            self.end(consumer)

    def _dispatch(self, consumer: ConsumerProcess, message: Message) -> None:
        if message.number == wire.BIND.number:
            self._bind(consumer, message)
        elif message.number == wire.UNBIND.number:
            (number,) = message.unpack(wire.NUMBER)
            consumer.unbind(number)
            consumer.requests.reply()
        elif message.number == wire.ATTRIBUTES.number:
            number, start, end = message.unpack(wire.BOUND_PAGES)
            consumer.tell_attributes(number, PageRange(pgoff_t(start), pgoff_t(end)))
            consumer.requests.reply()
        elif message.number == wire.DEVICE.number:
            consumer.requests.reply(wire.NUMBER.pack(self.device))
        elif message.number == wire.REPORT.number:
            consumer.take_report(message.body)
            consumer.requests.reply()
        elif message.number in _OF_VMS and consumer.name != VM:
            raise OSError(EPERM, "reports are about VMs, and this consumer is not a VM")
        elif message.number == wire.LAUNCHED.number:
            consumer.launched(*message.unpack(wire.LAUNCH))
            consumer.requests.reply()
        elif message.number == wire.SIGN.number:
            body = consumer.report_over(
                message.body, self._options.api, self._signer.make_key()
            ).pack()
            consumer.requests.reply(body + self._signer.sign(body))
        else:
            raise OSError(EPROTO, f"no such call: {message.number}")

    def _bind(self, consumer: ConsumerProcess, message: Message) -> None:
        token, start, end, flags = message.unpack(wire.BIND_REQUEST)
        again = flags & _AGAIN
        ino, file = _bound_to(consumer, token) if again else self._tokens.take(token)
        try:
            self._let_end(consumer, file)
            backing = file.backing
            span = PageRange(pgoff_t(start), pgoff_t(end))
            binding = consumer.bind(ino, file, span, exclusive=bool(flags & _EXCLUSIVE))
            try:
                # Take the descriptors now that the binding holds them. Before it, they may be those
                # of the file's last holder.
                fds = [] if again else [backing.fileno(), file.sequence().fd.fileno()]
                how = (
                    (_HUGEPAGE if backing.hugepage else 0)
                    | (_PIN if self._options.pin else 0)
                    | (_RANGE if file.design.binds else 0)
                    | (_GUEST_MEMFD if isinstance(file, GuestMemfdFile) else 0)
                )
                consumer.requests.reply(
                    wire.BINDING.pack(
                        binding.number, ino, backing.limit or 0, how, backing.base_order
                    ),
                    fds,
                )
            except Exception as error:  # noqa: BLE001  after any error nobody knows of the binding
                # Reply first: a punch may wait for the consumer, which waits for this reply.
                consumer.requests.reply_error(self._troubles.of("BIND", error))
                consumer.unbind(binding.number)
        finally:
            file.put()

    def end(self, consumer: ConsumerProcess) -> None:
        """Close a consumer's connections and forget it."""
        try:
            consumer.close()
        except OSError as error:
            self._troubles.last = f"{consumer}: {error}"
        finally:
            with self._idle:
                del self._all[consumer.number]
                self._idle.notify_all()

    def _let_end(self, consumer: ConsumerProcess, file: RestrictedFile) -> None:
        """Wait a little for other consumers of a file to end.

        Their owner may have let go of them a moment ago.
        """

        def alone() -> bool:
            # All notifiers of a file are its holder's, and there may be thousands of them.
            return file.holder == consumer.number or not file.notifier_count

        with self._idle:
            # Wait in slices, because time in which this process did not run does not count.
            for _ in range(_LINGER_SLICES):
                if self._idle.wait_for(alone, _LINGER / _LINGER_SLICES):
                    return

    def _failed(self, consumer: ConsumerProcess, reason: str) -> None:
        # A FUSE thread calls this in the middle of an invalidation, while it holds the file's
        # semaphore. The thread that serves the consumer does the rest.
        self._troubles.last = reason
        self.endings.blame(consumer.number, reason)
        consumer.kill()


def _bound_to(consumer: ConsumerProcess, token: bytes) -> tuple[int, RestrictedFile]:
    """Return inode number and file of the binding that is named in a token's place.

    The caller gets a reference to the file, as for a token.
    """
    (number,) = wire.NUMBER.unpack_from(token)
    binding = consumer.binding(number)
    binding.file.get()
    return binding.ino, binding.file
