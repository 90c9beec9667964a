"""Other users' processes that take a name, and wait for who comes."""

import os
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress

from restrictedmem.fd import send_with_fds
from users import as_user


@contextmanager
def listening(
    name: str, uid: int, said: bytes = b"", fds: tuple[int, ...] = ()
) -> Generator[list[bytes]]:
    """Let another process listen on a name, and send a message to the first client.

    At the end, the bytes that it received are available.
    """
    heard: list[bytes] = []
    reader, writer = os.pipe()

    def listen() -> bytes:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind("\0" + name)
            listener.listen()
            os.write(writer, b".")
            with listener.accept()[0] as sock:
                sock.settimeout(10)
                if said:
                    # A client that does not want the message hangs up.
                    with suppress(BrokenPipeError):
                        send_with_fds(sock, said, fds)
                # With what was said still unread, the end is a reset.
                with suppress(ConnectionResetError):
                    return sock.recv(100)
                return b""

    thread = threading.Thread(target=lambda: heard.append(as_user(listen, uid)))
    thread.start()
    assert os.read(reader, 1) == b"."
    yield heard
    thread.join(20)
    assert not thread.is_alive(), "waited 20 s for the stranger to hear the end"
    os.close(reader)
    os.close(writer)
