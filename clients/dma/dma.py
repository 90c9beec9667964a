"""A DMA device behind an IOMMU: a whole consumer in one file (docs/use/consumers.md explains it).

The owner attaches windows of restricted files at device addresses. Then the owner has the device
move bytes between them.
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

# The calls of the owner. Addresses are device addresses. Addresses and lengths are in bytes.
# Presented token, address, first page, page after the last.
ATTACH, ATTACH_BODY = Call("ATTACH", 1), Struct("=16sQQQ")
DETACH, DETACH_BODY = Call("DETACH", 2), Struct("=Q")  # address
COPY, COPY_BODY = Call("COPY", 3), Struct("=QQQ")  # from, to, length
FILL, FILL_BODY = Call("FILL", 4), Struct("=QQB")  # to, length, byte
COMPARE, COMPARE_BODY = Call("COMPARE", 5), Struct("=QQQ")  # address, address, length; reply: EQUAL
STATUS = Call("STATUS", 6)  # reply: JSON
EQUAL = Struct("=Q")  # equal bytes before the first difference

LARGEST = 1 << 40  # the most bytes of a window
T = TypeVar("T")


class Window:
    """A range of one file at a device address: an IOMMU page table, and its ``NotifierOps``."""

    def __init__(self, device: "Device", address: int, end: int) -> None:
        self.device = device
        self.address = address
        self.end = end
        self.table: dict[int, int] = {}  # page of the file: order of its folio
        self.file: BoundFile

    def invalidate_start(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        """Unmap a range from the device."""
        # The device uses pages under this lock alone: no access is under way when this returns.
        with self.device.lock:
            self.device.invalidations += 1
            self.unmap(start, end)

    def invalidate_end(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        """Do nothing: the next access of the device faults and takes the page again."""

    def error(self, start: pgoff_t, end: pgoff_t) -> None:
        """Unmap pages that the machine has lost; get_page refuses the next access to them."""
        with self.device.lock:
            self.device.errors += 1
            self.unmap(start, end)

    def unmap(self, start: int, end: int) -> None:
        """Remove the table entries of a range; the range may reach beyond the window."""
        for pgoff in [pgoff for pgoff in self.table if start <= pgoff < end]:
            del self.table[pgoff]


class Device:
    """The device and its IOMMU."""

    def __init__(self, consumer: Consumer) -> None:
        self.consumer = consumer
        self.lock = sync.mutex()  # mmu_lock: guards every table, and is held during each access
        self.windows: dict[int, Window] = {}
        self.invalidations = self.errors = self.faults = self.retries = 0

    def attach(self, token: bytes, address: int, start: int, end: int) -> None:
        """Attach a window of a file at a device address."""
        size = end - start << PAGE_SHIFT
        if address & PAGE_MASK or not 0 < size <= LARGEST:
            raise OSError(
                EINVAL, "address is not page aligned, or the window is empty or too large"
            )
        if any(
            address < other.end and address + size > other.address
            for other in self.windows.values()
        ):
            raise OSError(EEXIST, "another window is there")
        window = Window(self, address, address + size)
        window.file = BoundFile.bind(
            self.consumer, token, PageRange(pgoff_t(start), pgoff_t(end)), window
        )
        self.windows[address] = window

    def detach(self, address: int) -> None:
        """Detach the window at a device address."""
        window = self.windows.pop(address, None)
        if window is None:
            raise OSError(ENOENT, f"no window begins at {address:#x}")
        with self.lock:
            window.table.clear()
        window.file.close()

    def access(self, address: int, act: Callable[[memoryview], T]) -> T:
        """Call ``act`` on the page at a device address; the page stays mapped meanwhile."""
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
        """Read bytes from one page."""
        at = address & PAGE_MASK
        return self.access(address, lambda page: bytes(page[at : at + length]))

    def write(self, address: int, data: bytes) -> None:
        """Write bytes to one page."""
        at = address & PAGE_MASK

        def act(page: memoryview) -> None:
            page[at : at + len(data)] = data

        self.access(address, act)

    def copy(self, source: int, destination: int, length: int) -> None:
        """Copy bytes from one device address to another."""
        for at, size in pieces(length, source, destination):
            self.write(destination + at, self.read(source + at, size))

    def fill(self, address: int, length: int, byte: int) -> None:
        """Fill a range with one byte."""
        for at, size in pieces(length, address):
            self.write(address + at, bytes((byte,)) * size)

    def compare(self, one: int, other: int, length: int) -> int:
        """Return how many bytes are equal before the first difference."""
        for at, size in pieces(length, one, other):
            mine, theirs = self.read(one + at, size), self.read(other + at, size)
            if mine != theirs:
                return at + next(index for index in range(size) if mine[index] != theirs[index])
        return length

    def status(self) -> dict[str, object]:
        """Return the counts since the start, and the numbers of mapped and of taken pages.

        Taken pages are the mapped ones, and lost ones until they are punched.
        """
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
        """Handle one call of the owner and return the reply."""
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
    """Cut ranges of one length at every page boundary of each; yield offset and size."""
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
    """Serve one device until its owner closes the connection."""
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
