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
    """A call that cannot be done for what came with it; other than after a malformed message, the connection goes on."""


def serve_one(
    channel: Channel, receive: Callable[[], Message | None], dispatch: Callable[[Message], None]
) -> bool:
    """Receive one request and have it answered, whatever goes wrong, so that nobody waits for ever.

    False when there will be no other: the owner is gone, or what it sent was no request.
    ``hang_up`` is then due.
    """
    try:
        message = receive()
    except BlockingIOError:
        # Whoever gave us our end may have kept a copy of it, and taken the request away.
        return True
    except OSError as error:
        channel.reply_error(error)
        return isinstance(error, RefusedError)
    except MemoryError:
        # What was asked may be lost.
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
    except Exception as error:  # noqa: BLE001 - the owner gets it.
        channel.reply_error(OSError(EIO, f"{type(error).__name__}: {error}"))
    finally:
        close_all(message.fds)
    return True


def hang_up(channel: Channel) -> None:
    """Let the owner find the end of the stream behind the last reply, even where a copy of the socket stays open."""
    with suppress(OSError):
        channel.sock.shutdown(socket.SHUT_RDWR)
        # Closed with messages unread, it would be ECONNRESET in place of that reply. None can be
        # added any more. Descriptors stay: to drop a socket that lingers (SO_LINGER) takes as long
        # as the owner likes.
        while not brings_fds(channel.sock, socket.MSG_DONTWAIT) and channel.sock.recv(
            MAX_MESSAGE, socket.MSG_DONTWAIT
        ):
            pass
