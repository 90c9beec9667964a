"""A consumer that takes every page of a window, and keeps it: the program of ``TAKE``.

Cases of placement ask it for pages, because a page of a descriptor is pinned once a consumer has
taken it.
"""

import os
import socket
from struct import Struct
from typing import Final

from restrictedmem.consumer import BoundFile, Consumer
from restrictedmem.service.options import Options
from restrictedmem.service.wire import Call, Channel
from restrictedmem.units import PageRange, pgoff_t

NAME: Final = "holder"
#: Token of a file and number of its pages; the reply is the consumer's process.
TAKE, TAKE_BODY, TAKEN = Call("TAKE", 1), Struct("=16sQ"), Struct("=Q")


class _Quiet:
    """Callbacks of a consumer that never touches the pages which it holds."""

    def invalidate_start(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        """Do nothing: no access is ever under way."""

    def invalidate_end(self, start: pgoff_t, end: pgoff_t, order: int | None) -> None:
        """Do nothing: punched pages are not taken again."""

    def error(self, start: pgoff_t, end: pgoff_t) -> None:
        """Do nothing."""


def serve(
    owner: socket.socket,
    service: socket.socket,
    notify: socket.socket,
    options: Options,
    arguments: str,
) -> None:
    """Hold pages until the owner closes the connection."""
    consumer = Consumer(service, notify)
    channel = Channel(owner, "owner")
    held: list[BoundFile] = []
    while message := channel.receive():
        try:
            token, count = message.unpack(TAKE_BODY)
            window = PageRange(pgoff_t(0), pgoff_t(count))
            held.append(BoundFile.bind(consumer, token, window, _Quiet()))
            for page in range(count):
                held[-1].get_page(pgoff_t(page))
            channel.reply(TAKEN.pack(os.getpid()))
        except OSError as error:
            channel.reply_error(error)
    for file in held:
        file.close()
    consumer.close()
