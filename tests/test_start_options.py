"""The options of a service and an engine, which an owner sends as JSON.

Malformed options have an errno and a text.
"""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from errno import EINVAL
from typing import Any

import pytest

from outcomes import Errno, outcome
from restrictedmem.protocol.vm_wire import Creation
from restrictedmem.service.options import Options
from restrictedmem.service.wire import Channel
from waiting import PATIENCE

GOOD = Options(consumers=(("dma", "/dma"),), memory_max=4096, become=(1, 2), deadline=1)
DEEP = "[" * 100_000

BAD: dict[str, Any] = {
    "api": "v11",
    "design": 5,
    "memory_max": -1,
    "backing": [],
    "pin": 1,
    "consumers": [["ab"]],
    "max_consumers": True,
    "usage": None,
    "deadline": float("nan"),
    "become": ["a", "b"],
    "signing_key": 5,
    "unknown": 0,
    "\ud800": 0,
}


def test_what_dump_wrote_is_read() -> None:
    assert Options.load(GOOD.dump()) == GOOD
    GOOD.check()
    replace(GOOD, become=None, memory_max=None, consumers=()).check()


@pytest.mark.parametrize("name", BAD)
def test_no_option(name: str) -> None:
    text = json.dumps({**asdict(GOOD), name: BAD[name]})
    with pytest.raises(OSError, match="start options: ") as caught:
        Options.load(text).check()
    assert caught.value.errno == EINVAL


@pytest.mark.parametrize(
    "text", ["", "{", "{}", "[]", "5", DEEP, '{"become": 5}', '{"become": null, "consumers": [5]}']
)
def test_no_options(text: str) -> None:
    assert outcome(lambda: Options.load(text)) == Errno(EINVAL)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "5", DEEP, '{"engine": []}', '{"policy": true}', '{"platform": []}', '{"x": 1}'],
)
def test_no_creation(text: str) -> None:
    assert outcome(lambda: Creation.load(text)) == Errno(EINVAL)


@pytest.mark.parametrize(
    "text",
    ["{", json.dumps({**asdict(GOOD), "\ud800": 0})],
    ids=["no JSON", "words that are no UTF-8"],
)
def test_the_owner_is_told(text: str) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        started = "import sys; from restrictedmem.service.start import main; main(sys.argv[1:])"
        command = [sys.executable, "-c", started, str(theirs.fileno()), text]
        done = subprocess.run(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            timeout=PATIENCE,
            check=False,
        )
        theirs.close()
        said = ours.recv(2000)
    assert done.returncode == 1
    assert int.from_bytes(said[:4], sys.byteorder) == EINVAL
    assert said[8:].startswith(b"start options: ")


def test_words_that_are_no_utf_8_are_said() -> None:
    """The name of a file in an error, say."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        Channel(theirs, "owner").reply_error(OSError(EINVAL, os.fsdecode(b"/\xff: wrong")))
        assert ours.recv(2000)[8:] == b"/?: wrong"
