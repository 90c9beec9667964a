"""A process of a run, and the socket between it and its parent.

The parent sends one byte, which means stop. The process sends one message, its report in JSON.
"""

import json
import signal
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any, final

from restrictedmem.child import end_child, fork
from restrictedmem.fd import readable
from restrictedmem.stress.finding import PATIENCE, Finding
from restrictedmem.stress.plan import NAMES
from restrictedmem.stress.progress import Progress


@final
class Child:
    """One process of a run, as its parent sees it."""

    def __init__(self, name: str, run: Callable[[Progress, socket.socket], None]) -> None:
        """Fork the process, which calls ``run`` and then ends."""
        self.name = name
        self.progress = Progress(NAMES)
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.report: dict[str, Any] | None = None

        def body() -> None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            self.sock.close()
            run(self.progress, theirs)

        self._pid = fork(body)
        theirs.close()

    def poll(self) -> None:
        """Take the process's report, if there is one.

        Raises:
            Finding: the process found something, or died.
        """
        if self.report is None and readable([self.sock], 0):
            self.take_report()

    def take_report(self) -> None:
        """Wait for the process's report.

        Raises:
            Finding: the process found something, died, or sends nothing.
        """
        if self.report is not None:
            return
        # The process's own deadlines come earlier, and their findings say more.
        self.sock.settimeout(3 * PATIENCE)
        try:
            data = self.sock.recv(1 << 16)
        except TimeoutError:
            raise Finding(f"hang: waited {3 * PATIENCE:g} s for the {self.name} to end") from None
        if not data:
            raise Finding(f"the {self.name} died")
        report = self.report = json.loads(data)
        if "failure" in report:
            raise Finding(f"{self.name}: {report['failure']}")

    def stop(self) -> None:
        """Tell the process to end."""
        with suppress(BrokenPipeError):
            self.sock.send(b".")

    def end(self) -> None:
        """Kill the process if it still runs, and wait for it."""
        self.sock.close()
        if self._pid:
            end_child(self._pid)
            self._pid = 0

    def close(self) -> None:
        """End the process, and release the memory of its progress."""
        self.end()
        self.progress.close()


@contextmanager
def reporting(parent: socket.socket) -> Generator[dict[str, Any]]:
    """Send the parent the block's report, and why the block failed, if it did."""
    report: dict[str, Any] = {}
    try:
        yield report
    except Finding as finding:
        report["failure"] = str(finding)
    except BaseException as error:  # noqa: BLE001 - the parent has to hear of any exception
        report["failure"] = f"{type(error).__name__}: {error}"
    parent.send(json.dumps(report).encode())


def told_to_stop(parent: socket.socket) -> bool:
    """Return whether the parent has said stop, or is gone."""
    try:
        parent.recv(1, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    return True
