"""The service's side of a consumer process: its bindings, and the notifier that reaches it."""

import json
import math
import secrets
import select
import signal
import socket
import struct
from collections.abc import Callable
from contextlib import ExitStack, suppress
from errno import EINVAL, ENOENT, EPERM, EPROTO, errorcode
from typing import Final, cast, final

from restrictedmem import sync
from restrictedmem.burial import bury
from restrictedmem.fd import MSG_CTRUNC, HasFileno, OwnedFd, readable, receive_flags, refuse_fds
from restrictedmem.mm.guest_memfd_file import GuestMemfdFile
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.patience import Patience
from restrictedmem.service import wire
from restrictedmem.service.options import VM
from restrictedmem.service.report import REPORT_DATA_BYTES, Report
from restrictedmem.service.wire import Call, Channel, Message
from restrictedmem.units import MAX_FILE_BYTES, PAGE_SHIFT, PageRange, pgoff_t
from restrictedmem.version import __version__

#: Head of a message: number of the call or errno, and zero (``wire``).
_HEAD: Final = struct.Struct("=II")
_MAX_PAGES: Final = MAX_FILE_BYTES >> PAGE_SHIFT
#: Seconds that a killed process may take to end. The kernel may hold it for as long as a file
#: system's server likes.
_END: Final = 5.0
#: Made beforehand, because there may be no memory when it is needed.
_BROKEN_OFF: Final = "a call of a consumer was broken off"
#: Most levels of nesting in a report. Commands that show it to people nest it a little deeper.
_MAX_DEPTH: Final = 8


@final
class Binding:
    """A consumer's use of one file.

    It is the ``Notifier`` that carries the file's invalidations to the consumer.
    """

    def __init__(
        self, consumer: "ConsumerProcess", number: int, ino: int, file: RestrictedFile
    ) -> None:
        self.number = number
        self.ino = ino
        self.file = file
        self._consumer = consumer

    def invalidate_start(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        """Tell the consumer, and wait until it uses no page of the range."""
        self._consumer.invalidations += 1
        self._consumer.in_progress += 1
        self._notify(wire.INVALIDATE_START, start, end, order)

    def invalidate_end(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        """Tell the consumer that it may go on; do not wait until it does."""
        try:
            self._consumer.tell(wire.INVALIDATE_END, self._pack(start, end, order))
        except MemoryError:
            # The consumer would wait for this message for ever, and the other consumers have still
            # to be told.
            self._consumer.fail(_BROKEN_OFF)
        self._consumer.in_progress -= 1

    def error(self, start: pgoff_t, end: pgoff_t) -> None:
        """Tell the consumer, and wait until it has given the pages up."""
        self._notify(wire.ERROR, start, end, None)

    def convert(self, start: pgoff_t, end: pgoff_t, *, private: bool) -> None:
        """Tell the consumer, and wait until it has noted it (``mm.guest_memfd_file.Converts``)."""
        self._notify(wire.PRIVATE if private else wire.SHARED, start, end, None)

    def page_count(self, start: pgoff_t, end: pgoff_t) -> int:
        """Ask the consumer for its pages; a consumer that is late or gone holds none."""
        reply = self._notify(wire.PAGE_COUNT, start, end, None, wire.COUNT.size)
        count: int = wire.COUNT.unpack(reply)[0] if reply else 0
        if count > end - start:
            self._consumer.fail(
                f"{self._consumer} answered PAGE_COUNT with {count} of {end - start} pages"
            )
            return 0
        return count

    def _notify(
        self, call: Call, start: pgoff_t, end: pgoff_t, order: int | None, size: int = 0
    ) -> bytes:
        return self._consumer.notify(call, self._pack(start, end, order), size)

    def _pack(self, start: pgoff_t, end: pgoff_t, order: int | None) -> bytes:
        return wire.INVALIDATION.pack(
            self.number, start, end, wire.NO_FOLIO if order is None else order
        )


@final
class ConsumerProcess:
    """One consumer process, reached over two sockets.

    The consumer asks on one socket, and answers invalidations on the other. So a consumer that
    waits for an answer of the service can still answer the service.
    """

    def __init__(
        self,
        name: str,
        number: int,
        deadline: float,
        failed: Callable[["ConsumerProcess", str], None],
    ) -> None:
        """Make both connections.

        ``failed`` is called with the reason when the consumer breaks the protocol, or does not end.
        """
        self.name = name
        self.number = number
        self.report: dict[str, object] = {}
        self.invalidations = 0
        #: Invalidations whose end is still to come.
        self.in_progress = 0
        self.bindings: dict[int, Binding] = {}
        self._vm = secrets.token_bytes(16)
        self._launch: tuple[int, str, bytes] | None = None
        self._failed = failed
        self._next_binding = 1
        self._mutex = sync.mutex()
        self._gone = False
        self._deadline = deadline
        #: A pidfd of the consumer's process, from the fork on.
        self.process: OwnedFd | None = None
        self.requests, self._their_requests = Channel.pair(str(self))
        self._notify, self._their_notify = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._notify, self._their_notify):
            refuse_fds(end)
        self._notify.setblocking(False)
        # Held for one round trip.
        self._turn = sync.mutex()

    def __str__(self) -> str:
        return f"{self.name} {self.number}"

    def give_sockets(self) -> tuple[socket.socket, socket.socket]:
        """Return the consumer's ends; the caller closes them once the consumer has them."""
        return self._their_requests, self._their_notify

    def receive(self) -> Message | None:
        """Wait for the consumer's next request; return None when the consumer has ended.

        The end of the connection does not tell that, because the consumer's children may keep it
        open.

        Raises:
            OSError: as ``Channel.receive``.
        """
        if self.process is not None:
            ends: list[HasFileno] = [self.requests, self.process]
            # poll(2) fails when the limit on descriptors is below two.
            with suppress(OSError):
                if self.process in readable(ends):
                    return None
        return self.requests.receive()

    def notify(self, call: Call, body: bytes, size: int) -> bytes:
        """Make one round trip to the consumer, whose reply has ``size`` bytes.

        A consumer that is late or gone, or answers anything else, is ended, so that it does not
        hold up the owner. The result is then empty.
        """
        with self._turn:
            if self._gone:
                return b""
            try:
                return self._make_round_trip(call, body, size)
            except BaseException:
                # For instance, there was no memory. The answer may still come, and the next call
                # would take it for its own.
                self.fail(_BROKEN_OFF)
                raise

    def _make_round_trip(self, call: Call, body: bytes, size: int) -> bytes:
        patience = Patience(self._deadline)
        try:
            self._send(call, body, patience)
            if not patience.wait(self._notify.fileno(), select.POLLIN):
                raise TimeoutError
            reply, flags = receive_flags(self._notify, _HEAD.size + size + 1)
        except TimeoutError:
            self.fail(f"{self} did not answer {call.name} within {self._deadline:g} s")
        except OSError as error:
            self.fail(f"{self}: {call.name}: {error.strerror}")
        else:
            wrong = _wrong(reply, flags, size)
            if not wrong:
                return reply[_HEAD.size :]
            said = reply or flags & MSG_CTRUNC
            self.fail(
                f"{self} answered {call.name} with {wrong}"
                if said
                else f"{self}: {call.name}: {self} is gone"
            )
        return b""

    def tell(self, call: Call, body: bytes) -> None:
        """Send a message that has no reply.

        A consumer that takes no messages any more is ended as in ``notify``.
        """
        if not self._gone:
            try:
                self._send(call, body, Patience(self._deadline))
            except OSError as error:
                self.fail(f"{self} takes no {call.name}: {error.strerror or 'its socket is full'}")

    def _send(self, call: Call, body: bytes, patience: Patience) -> None:
        message = _HEAD.pack(call.number, 0) + body
        while True:
            try:
                self._notify.send(message, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                if not patience.wait(self._notify.fileno(), select.POLLOUT):
                    raise TimeoutError from None
            else:
                return

    def fail(self, reason: str) -> None:
        """End a consumer that broke the protocol.

        Nobody waits for it any more. Its bindings go with its connection.
        """
        with self._mutex:
            if self._gone:
                return
            self._gone = True
            self.requests.sock.shutdown(socket.SHUT_RDWR)
        self._failed(self, reason)

    def all_bindings(self) -> list[Binding]:
        """Return the current bindings; any thread may call this."""
        return list(self.bindings.values())

    def take_report(self, body: bytes) -> None:
        """Store the consumer's own report for ``ps``: an object in JSON.

        Raises:
            OSError: EPROTO for anything else, and for a report that could not be shown.
        """
        try:
            report: object = json.loads(body)
        except (ValueError, RecursionError):
            report = None
        if not isinstance(report, dict) or not _can_be_shown(cast(object, report), _MAX_DEPTH):
            raise OSError(
                EPROTO, "a report must be an object in JSON of numbers and printable texts"
            )
        self.report = cast(dict[str, object], report)

    def launched(self, policy: int, engine: bytes, measurement: bytes) -> None:
        """Record how a guest was launched.

        Raises:
            OSError: EPERM when it was launched before; EPROTO for an engine whose name is not
                printable ASCII.
        """
        if self._launch is not None:
            raise OSError(EPERM, "the guest was launched before")
        name = engine.rstrip(b"\0").decode("latin-1")
        if not (name.isascii() and name.isprintable()):
            raise OSError(EPROTO, "the engine's name is not printable ASCII")
        self._launch = policy, name, measurement

    def report_over(self, data: bytes, api: str, public_key: bytes) -> Report:
        """Return a report on the guest, over 64 bytes of its choice.

        Raises:
            OSError: EINVAL for another length; EPERM for a guest that was not launched.
        """
        if self._launch is None:
            raise OSError(EPERM, "the guest was not launched")
        if len(data) != REPORT_DATA_BYTES:
            raise OSError(EINVAL, f"a report takes {REPORT_DATA_BYTES} bytes of data")
        policy, engine, measurement = self._launch
        return Report(policy, measurement, data, self._vm, engine, api, __version__, public_key)

    def bind(self, ino: int, file: RestrictedFile, span: PageRange, *, exclusive: bool) -> Binding:
        """Register a notifier on a file, or bind a range of it, and hold the file.

        The range is bound if the file's design has bindings. An empty range asks for a notifier in
        any design. A page belongs to one consumer, as on hardware, where the RMP or a consumer's
        own key ensures that. So pages that another consumer has left in the file are dropped first.
        The memfd and the sequence page that the other consumer was given are replaced, too.

        Raises:
            OSError: EINVAL while another consumer has the file, for a range that no file has, and
                as in ``RestrictedFile``; EMFILE, ENFILE, ENOMEM when no memfd or sequence page can
                be made.
        """
        # A file in a pool of huge pages ends with a whole huge page.
        order = file.backing.base_order
        if not 0 <= span.start <= span.end <= _MAX_PAGES >> order << order:
            raise OSError(EINVAL, f"{span} is not a range of a file")
        if isinstance(file, GuestMemfdFile) and (
            self.name != VM or span.end << PAGE_SHIFT > file.size
        ):
            raise OSError(EINVAL, "a guest_memfd is bound to VMs, and within its size")
        binding = Binding(self, self._next_binding, ino, file)
        file.get()
        self.bindings[binding.number] = binding
        try:
            self._register(binding, span, exclusive=exclusive)
        except BaseException:
            del self.bindings[binding.number]
            file.put()
            raise
        self._next_binding += 1
        return binding

    def _register(self, binding: Binding, span: PageRange, *, exclusive: bool) -> None:
        file = binding.file
        # When two consumers come at the same time, one of them finds the other's notifier.
        with file.taking:
            if file.holder not in (None, self.number):
                file.renew()
            # The consumer is sent both descriptors. Without them there is no binding.
            file.backing.fileno()
            file.sequence()
            file.holder = self.number
            if file.design.binds and len(span):
                file.bind(span.start, span.end, binding, exclusive=exclusive)
            else:
                file.register_notifier(binding)

    def binding(self, number: int) -> Binding:
        """Return the binding of a number.

        Raises:
            OSError: ENOENT when there is none.
        """
        if number not in self.bindings:
            raise OSError(ENOENT, f"no binding {number}")
        return self.bindings[number]

    def tell_attributes(self, number: int, span: PageRange) -> None:
        """Tell the consumer which pages of a range of a guest_memfd are private.

        Raises:
            OSError: ENOENT when there is no such binding; EINVAL for another kind of file.
        """
        binding = self.binding(number)
        if not isinstance(binding.file, GuestMemfdFile):
            raise OSError(EINVAL, "the file has no attributes")
        binding.file.tell_attributes(binding, span)

    def unbind(self, number: int) -> None:
        """Unregister one notifier and let its file go.

        Raises:
            OSError: ENOENT when there is no such binding.
        """
        binding = self.binding(number)
        del self.bindings[number]
        try:
            binding.file.unregister_notifier(binding)
        finally:
            binding.file.put()

    def kill(self) -> None:
        """Kill the process, even if it is stopped."""
        with self._mutex:
            # Once the pidfd is closed, its number may be another file's.
            if self.process is not None and not self.process.closed:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self.process.fileno(), signal.SIGKILL)

    def close(self) -> None:
        """End the consumer, and unregister everything once its process has ended.

        Until then the process may use what it has mapped. A killed process that the kernel holds
        executes nothing any more. After a while its files go to another consumer, in another memfd.
        If a part fails, the rest is still done: a binding that stayed would keep its file from
        everybody else.
        """
        with self._mutex:
            self._gone = True
        with ExitStack() as rest:
            rest.callback(self._close_process)
            rest.callback(bury, self._notify)
            for number in list(self.bindings):
                rest.callback(self.unbind, number)
            bury(self.requests.sock)
            self._notify.shutdown(socket.SHUT_RDWR)
            if self.process is not None:
                self.kill()
                if not Patience(_END).wait(self.process.fileno(), select.POLLIN):
                    self._failed(self, f"{self} was killed, and does not end")

    def _close_process(self) -> None:
        with self._mutex:
            if self.process is not None:
                self.process.close()


def _wrong(reply: bytes, flags: int, size: int) -> str:
    """Say what is wrong with a consumer's answer; empty when it is right.

    The answer should have ``size`` bytes.
    """
    if flags & MSG_CTRUNC:
        return "descriptors"
    if len(reply) < _HEAD.size:
        return "a malformed reply"
    number, _ = _HEAD.unpack_from(reply)
    if number:
        return errorcode.get(number, f"errno {number}")
    return "" if len(reply) == _HEAD.size + size else "a reply of another size"


def _can_be_shown(value: object, depth: int) -> bool:
    """Say whether a JSON value can be put into JSON again, and be shown on a terminal.

    It may be nested ``depth`` levels deep, and JSON around it nests it a little deeper.
    """
    match value:
        case str():
            return value.isprintable()
        case float():
            return math.isfinite(value)
        case list() | dict():
            items = cast(
                list[object], [*value, *value.values()] if isinstance(value, dict) else value
            )
            return depth > 0 and all(_can_be_shown(item, depth - 1) for item in items)
        case _:
            return True
