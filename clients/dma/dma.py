"""A DMA device whose IOMMU leads to restricted memory: a whole consumer, in one file (docs/use/consumers.md walks through it).

Its owner attaches windows of restricted files at device addresses, and has the device move bytes
between them.
"""

import json
import socket
from collections.abc import Callable, Iterator
from errno import EEXIST, EFAULT, EINVAL, ENOENT, EPROTO
from struct import Struct
from typing import TypeVar

from restrictedmem import sync
from restrictedmem.consumer import BoundFile, Consumer
from restrictedmem.fd import close_all
from restrictedmem.service.options import Options
from restrictedmem.service.wire import Call, Channel, Message
from restrictedmem.units import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, PageRange, pgoff_t

# What an owner says. Addresses are the device's; they and lengths are bytes.
# A presented token, address, first page, page after the last.
ATTACH, ATTACH_BODY = Call("ATTACH", 1), Struct("=16sQQQ")
DETACH, DETACH_BODY = Call("DETACH", 2), Struct("=Q")  # address
COPY, COPY_BODY = Call("COPY", 3), Struct("=QQQ")  # from, to, length
FILL, FILL_BODY = Call("FILL", 4), Struct("=QQB")  # to, length, byte
COMPARE, COMPARE_BODY = Call("COMPARE", 5), Struct("=QQQ")  # one, other, length; reply: EQUAL
STATUS = Call("STATUS", 6)  # reply: JSON
EQUAL = Struct("=Q")  # how many bytes are equal before one is not

LARGEST = 1 << 40  # bytes of a window
T = TypeVar("T")


class Window:
    """Pages of one file at a device address: a table of the IOMMU, and what is told of those pages (``NotifierOps``)."""

    def __init__(self, device: "Device", address: int, end: int) -> None:
        self.device = device
        self.address = address
        self.end = end
        self.table: dict[int, int] = {}  # page of the file: order of its folio
        self.file: BoundFile

    def invalidate_start(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        """Take a range from the device; what it does to a page it does under the lock, so nothing is under way when this returns."""
        with self.device.lock:
            self.device.invalidations += 1
            self.unmap(start, end)

    def invalidate_end(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        """Do nothing: the device's next access asks for the page again."""

    def error(self, start: pgoff_t, end: pgoff_t) -> None:
        """Take lost pages from the device; get_page refuses its next access."""
        with self.device.lock:
            self.device.errors += 1
            self.unmap(start, end)

    def unmap(self, start: int, end: int) -> None:
        """Remove the entries of a range, which may reach beyond the window."""
        for pgoff in [pgoff for pgoff in self.table if start <= pgoff < end]:
            del self.table[pgoff]


class Device:
    """The device and its IOMMU."""

    def __init__(self, consumer: Consumer) -> None:
        self.consumer = consumer
        self.lock = sync.mutex()  # mmu_lock: of every table, and held while a page is used
        self.windows: dict[int, Window] = {}
        self.invalidations = self.errors = self.faults = self.retries = 0

    def attach(self, token: bytes, address: int, start: int, end: int) -> None:
        """Show a window of a file at an address."""
        size = end - start << PAGE_SHIFT
        if address & PAGE_MASK or not 0 < size <= LARGEST:
            raise OSError(
                EINVAL, "address is not page aligned, or the window is empty or too large"
            )
        if any(
            address < other.end and address + size > other.address
            for other in self.windows.values()
        ):
            raise OSError(EEXIST, "a window is there")
        window = Window(self, address, address + size)
        window.file = BoundFile.bind(
            self.consumer, token, PageRange(pgoff_t(start), pgoff_t(end)), window
        )
        self.windows[address] = window

    def detach(self, address: int) -> None:
        """Remove the window at an address."""
        window = self.windows.pop(address, None)
        if window is None:
            raise OSError(ENOENT, f"no window begins at {address:#x}")
        with self.lock:
            window.table.clear()
        window.file.close()

    def access(self, address: int, act: Callable[[memoryview], T]) -> T:
        """Use the page at an address, which stays mapped meanwhile."""
        window = next(
            (window for window in self.windows.values() if window.address <= address < window.end),
            None,
        )
        if window is None:
            raise OSError(EFAULT, f"nothing is at {address:#x}")
        pgoff = pgoff_t(window.file.window.start + (address - window.address >> PAGE_SHIFT))
        while True:
            with self.lock:
                if pgoff in window.table:
                    with window.file.page(pgoff) as page:
                        return act(page)
            self.faults += 1
            self.retries += window.file.fault(
                pgoff, self.lock, lambda order: window.table.update({pgoff: order})
            )

    def read(self, address: int, length: int) -> bytes:
        """Read bytes of one page."""
        at = address & PAGE_MASK
        return self.access(address, lambda page: bytes(page[at : at + length]))

    def write(self, address: int, data: bytes) -> None:
        """Write bytes of one page."""
        at = address & PAGE_MASK

        def act(page: memoryview) -> None:
            page[at : at + len(data)] = data

        self.access(address, act)

    def copy(self, source: int, destination: int, length: int) -> None:
        """Move bytes."""
        for at, size in pieces(length, source, destination):
            self.write(destination + at, self.read(source + at, size))

    def fill(self, address: int, length: int, byte: int) -> None:
        """Write one byte over and over."""
        for at, size in pieces(length, address):
            self.write(address + at, bytes((byte,)) * size)

    def compare(self, one: int, other: int, length: int) -> int:
        """Return how many bytes are equal before one is not."""
        for at, size in pieces(length, one, other):
            mine, theirs = self.read(one + at, size), self.read(other + at, size)
            if mine != theirs:
                return at + next(index for index in range(size) if mine[index] != theirs[index])
        return length

    def status(self) -> dict[str, object]:
        """Return counts since the start, and how many pages are mapped, and taken: those, and lost ones until they are punched."""
        mapped = sum(len(window.table) for window in self.windows.values())
        taken = sum(
            window.file.page_count(window.file.window.start, window.file.window.end)
            for window in self.windows.values()
        )
        counts = {
            "invalidations": self.invalidations,
            "errors": self.errors,
            "faults": self.faults,
            "retries": self.retries,
        }
        return {"windows": len(self.windows), "mapped": mapped, "taken": taken, **counts}

    def command(self, message: Message) -> bytes:
        """Do what the owner says; returns the reply."""
        match message.number:
            case ATTACH.number if len(message.body) == ATTACH_BODY.size:
                self.attach(*ATTACH_BODY.unpack(message.body))
            case DETACH.number:
                self.detach(*message.unpack(DETACH_BODY))
            case COPY.number:
                self.copy(*message.unpack(COPY_BODY))
            case FILL.number:
                self.fill(*message.unpack(FILL_BODY))
            case COMPARE.number:
                return EQUAL.pack(self.compare(*message.unpack(COMPARE_BODY)))
            case STATUS.number:
                self.consumer.report(self.status())
                return json.dumps(self.status()).encode()
            case _:
                raise OSError(EPROTO, f"no such call: {message.number}")
        return b""


def pieces(length: int, *addresses: int) -> Iterator[tuple[int, int]]:
    """Cut ranges of one length where any of them meets the end of a page; yields offset and size."""
    at = 0
    while at < length:
        size = min(length - at, *(PAGE_SIZE - (address + at & PAGE_MASK) for address in addresses))
        yield at, size
        at += size


def serve(
    owner: socket.socket,
    service: socket.socket,
    notify: socket.socket,
    options: Options,
    arguments: str,
) -> None:
    """Be one device until its owner lets go of it."""
    consumer = Consumer(service, notify)
    channel, device = Channel(owner, "owner"), Device(consumer)
    consumer.report(device.status())
    while message := channel.receive():
        try:
            channel.reply(device.command(message))
        except OSError as error:
            channel.reply_error(error)
        finally:
            close_all(message.fds)
    consumer.close()
