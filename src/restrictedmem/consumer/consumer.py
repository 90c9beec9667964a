"""A consumer's two connections to its service.

The consumer asks on one and answers on the other, so neither waits for the other.
"""

import json
import os
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from errno import EACCES, EINVAL
from functools import partial
from typing import Final, TypeVar, final

from restrictedmem import sync, threads
from restrictedmem.failure import FAULT, detail_of, failed
from restrictedmem.fd import OwnedFd
from restrictedmem.mm.guest_memfd_file import Converts
from restrictedmem.mm.notifier import Notifier
from restrictedmem.service import wire
from restrictedmem.service.wire import BindFlag, Channel, Message
from restrictedmem.units import PageRange, pgoff_t

_N = TypeVar("_N", bound=Notifier)
_EXCLUSIVE: Final = int(BindFlag.EXCLUSIVE)
_AGAIN: Final = int(BindFlag.AGAIN)
_NOTHING: Final = PageRange(pgoff_t(0), pgoff_t(0))


@final
@dataclass(frozen=True, slots=True)
class Bound:
    """The service's answer to BIND.

    It has the binding's number, the file's inode number and limit in bytes, and two descriptors,
    which the receiver owns. ``flags`` is a ``wire.BindingFlag``. ``order`` is the order of the
    smallest folio of the backing.
    """

    number: int
    ino: int
    limit: int | None
    memfd: OwnedFd
    sequence: OwnedFd
    flags: int
    order: int


@final
class Consumer:
    """The restricted files of this process; a thread of its own answers the service.

    When the service ends, the memory is gone, and so the process ends.
    """

    def __init__(self, service: socket.socket, notify: socket.socket) -> None:
        """Take over both sockets that ``serve`` was given for the service.

        Raises:
            OSError: EAGAIN when no thread can be started.
        """
        self.requests = Channel(service, "service", takes_fds=True)
        self._notify = Channel(notify, "service")
        self._known = sync.condition(sync.mutex())
        self._notifiers: dict[int, Notifier] = {}
        #: How many BIND calls are under way, whose bindings this process does not know yet.
        self._binding = 0
        threads.start(self._answer_all)

    def register_notifier(self, token: bytes, make: Callable[[Bound], _N]) -> _N:
        """Register a notifier for the whole file (``restrictedmem_register_notifier``).

        The holder of the file's descriptor has presented ``token``. ``make`` gets the new binding,
        descriptors included, and returns the notifier. The notifier gets no callback before that.

        Raises:
            OSError: EINVAL for a token of no restricted descriptor, while another consumer has the
                file, and where its design has bindings; what ``make`` raises.
        """
        return self._bind(token, _NOTHING, 0, make)

    def bind(
        self, token: bytes, span: PageRange, make: Callable[[Bound], _N], *, exclusive: bool = True
    ) -> _N:
        """Bind pages of a file to a notifier, in the design ``bindings``.

        This is ``restrictedmem_bind``. In all else it does what ``register_notifier`` does.

        Raises:
            OSError: EINVAL for a token of no restricted descriptor, while another consumer has the
                file, for an empty range, and as ``RestrictedFile.bind``; what ``make`` raises.
        """
        if not len(span):
            raise failed("bind", EINVAL, f"no pages in {span}")
        return self._bind(token, span, _EXCLUSIVE if exclusive else 0, make)

    def bind_again(
        self, binding: int, span: PageRange, make: Callable[[int], _N], *, exclusive: bool = True
    ) -> _N:
        """Bind further pages of a file of which this consumer has a binding.

        ``make`` gets the number of the new binding.

        Raises:
            OSError: ENOENT if this consumer has no such binding; EINVAL as ``bind``; what ``make``
                raises.
        """
        flags = _AGAIN | _EXCLUSIVE if exclusive else _AGAIN
        with self._asking():
            body, _ = self.requests.call(
                wire.BIND,
                wire.BIND_REQUEST.pack(wire.NUMBER.pack(binding), span.start, span.end, flags),
            )
            number: int = wire.BINDING.unpack(body)[0]
            return self._register(number, partial(make, number))

    def _bind(self, token: bytes, span: PageRange, flags: int, make: Callable[[Bound], _N]) -> _N:
        # Fail now if there is no room for two descriptors. Otherwise they would be lost with the
        # reply, and with them the binding's number.
        with OwnedFd(os.dup(self.requests.fileno())), OwnedFd(os.dup(self.requests.fileno())):
            pass
        with self._asking():
            try:
                body, fds = self.requests.call(
                    wire.BIND, wire.BIND_REQUEST.pack(token, span.start, span.end, flags)
                )
            except OSError as error:
                # EINVAL for both failures, of fget and of file_is_restrictedmem.
                raise failed(
                    "bind", EINVAL if error.errno == EACCES else error.errno, detail_of(error)
                ) from None
            number, ino, limit, how, order = wire.BINDING.unpack(body)
            memfd, sequence = fds
            return self._register(
                number,
                partial(make, Bound(number, ino, limit or None, memfd, sequence, how, order)),
            )

    @contextmanager
    def _asking(self) -> Generator[None]:
        with self._known:
            self._binding += 1
        try:
            yield
        finally:
            with self._known:
                self._binding -= 1
                self._known.notify_all()

    def _register(self, number: int, make: Callable[[], _N]) -> _N:
        try:
            notifier = make()
        except BaseException:
            self._remember(number, _DEAF)
            self.unbind(number)
            raise
        self._remember(number, notifier)
        return notifier

    def _remember(self, number: int, notifier: Notifier) -> None:
        with self._known:
            self._notifiers[number] = notifier
            self._known.notify_all()

    def device(self) -> int:
        """Return the device number of the service's files.

        Raises:
            OSError: ENOTCONN.
        """
        return int(wire.NUMBER.unpack(self.requests.call(wire.DEVICE)[0])[0])

    def unbind(self, number: int) -> None:
        """Unregister a notifier, which then gets no callback any more.

        With invalidation at teardown, it gets its last callback before this returns.

        Raises:
            OSError: ENOENT if there is no such binding; ENOTCONN.
        """
        self.requests.call(wire.UNBIND, wire.NUMBER.pack(number))
        del self._notifiers[number]

    def report(self, report: dict[str, object]) -> None:
        """Send the service a report of this process for ``ps``; the pid is added.

        Raises:
            OSError: ENOTCONN.
        """
        self.requests.call(wire.REPORT, json.dumps({"pid": os.getpid(), **report}).encode())

    def close(self) -> None:
        """Unregister everything.

        The process holds no page of any file any more, and is about to end.
        """
        with suppress(OSError):
            for number in tuple(self._notifiers):
                self.unbind(number)

    # The notify thread.

    def _answer_all(self) -> None:
        try:
            while message := self._notify.receive():
                reply = self._answer(message)
                if reply is not None:
                    self._notify.reply(reply)
        finally:
            # The service is gone, or has sent a message that this process cannot obey. If the
            # process went on, it would use freed pages.
            os._exit(FAULT)

    def _answer(self, message: Message) -> bytes | None:
        """Do what a message says, and return the reply, or None if there is none."""
        number, first, last, folio = message.unpack(wire.INVALIDATION)
        start, end, order = pgoff_t(first), pgoff_t(last), None if folio == wire.NO_FOLIO else folio
        if message.number == wire.INVALIDATE_END.number:
            # A binding that was removed meanwhile needs no end.
            found = self._notifiers.get(number)
            if found is not None:
                found.invalidate_end(start, end, order)
            return None
        notifier = self._find(number)
        match message.number:
            case wire.INVALIDATE_START.number:
                notifier.invalidate_start(start, end, order)
            case wire.ERROR.number:
                notifier.error(start, end)
            case wire.PRIVATE.number | wire.SHARED.number:
                if isinstance(notifier, Converts):
                    notifier.convert(start, end, private=message.number == wire.PRIVATE.number)
            case _:
                return wire.COUNT.pack(notifier.page_count(start, end))
        return b""

    def _find(self, number: int) -> Notifier:
        """Return a binding's notifier, and wait while a BIND call is under way.

        The service may send a callback for a new binding before BIND has returned here. If the
        reply to BIND was lost, the notifier is ``_DEAF``: no thread here has a page of this
        binding.
        """
        with self._known:
            self._known.wait_for(lambda: number in self._notifiers or not self._binding)
            return self._notifiers.get(number, _DEAF)


@final
class _Deaf:
    """The notifier of a binding that is not in use (``Notifier``)."""

    def invalidate_start(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        """Do nothing."""

    def invalidate_end(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        """Do nothing."""

    def error(self, start: pgoff_t, end: pgoff_t) -> None:
        """Do nothing."""

    def page_count(self, start: pgoff_t, end: pgoff_t) -> int:
        """Return 0."""
        return 0


_DEAF: Final = _Deaf()
