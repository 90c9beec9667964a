"""Serving one socket of the engine process."""

import struct
from collections.abc import Callable
from errno import EIO, EPROTO

from restrictedmem.fd import close_all
from restrictedmem.service.wire import Channel, Message


def serve_one(channel: Channel, dispatch: Callable[[Message], None]) -> bool:
    """Receive one request and have it answered, whatever goes wrong, so that nobody waits for ever; false when the owner is gone."""
    try:
        message = channel.receive()
    except OSError as error:
        channel.reply_error(error)
        return False
    if message is None:
        return False
    try:
        dispatch(message)
    except OSError as error:
        channel.reply_error(error)
    except (struct.error, ValueError) as error:
        channel.reply_error(OSError(EPROTO, str(error)))
    except Exception as error:  # noqa: BLE001 - the owner gets it.
        channel.reply_error(OSError(EIO, f"{type(error).__name__}: {error}"))
    finally:
        close_all(message.fds)
    return True
