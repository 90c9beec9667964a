"""Serving one socket of the engine process."""

import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from errno import EIO, ENOMEM, EPROTO

from restrictedmem.fd import brings_fds, close_all
from restrictedmem.service.wire import MAX_MESSAGE, Channel, Message


class RefusedError(OSError):
    """A call that cannot be done because of what came with it.

    The connection goes on, unlike after a malformed message.
    """


def serve_one(
    channel: Channel, receive: Callable[[], Message | None], dispatch: Callable[[Message], None]
) -> bool:
    """Receive one request and answer it, even by an error, so that nobody waits for ever.

    Return False when there will be no other request: the owner is gone, or it sent no request. The
    caller then calls ``hang_up``.
    """
    try:
        message = receive()
    except BlockingIOError:
        # The process that gave us our end may have kept a copy of it, and taken the request away.
        return True
    except OSError as error:
        channel.reply_error(error)
        return isinstance(error, RefusedError)
    except MemoryError:
        # The request may be lost.
        channel.reply_error(OSError(ENOMEM, os.strerror(ENOMEM)))
        return False
    if message is None:
        return False
    try:
        dispatch(message)
    except OSError as error:
        channel.reply_error(error)
    except MemoryError:
        channel.reply_error(OSError(ENOMEM, os.strerror(ENOMEM)))
    except (struct.error, ValueError) as error:
        channel.reply_error(OSError(EPROTO, str(error)))
    except Exception as error:  # noqa: BLE001 - the owner gets the error.
        channel.reply_error(OSError(EIO, f"{type(error).__name__}: {error}"))
    finally:
        close_all(message.fds)
    return True


def hang_up(channel: Channel) -> None:
    """End the stream behind the last reply, even where a copy of the socket stays open."""
    with suppress(OSError):
        channel.sock.shutdown(socket.SHUT_RDWR)
        # If the socket were closed with unread messages, the owner would get ECONNRESET in place of
        # that reply. So they are read, and none can be added any more. Messages with descriptors
        # stay: to drop a socket that lingers (SO_LINGER) takes as long as the owner likes.
        while not brings_fds(channel.sock, socket.MSG_DONTWAIT) and channel.sock.recv(
            MAX_MESSAGE, socket.MSG_DONTWAIT
        ):
            pass
