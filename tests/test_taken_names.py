"""A name of a service, or of ``exec``, that a stranger took when the process was gone.

The stranger gets nothing.
"""

import json
import os
import socket
from errno import EACCES, ENOTCONN

import pytest

from field import works
from outcomes import Errno, outcome
from processes import family, wait_gone
from restrictedmem import fd
from restrictedmem.fd import (
    OwnedFd,
    _inode,
    _peer_pidfd,
    is_same_peer,
    receive_with_fds,
    send_with_fds,
)
from restrictedmem.service import wire
from restrictedmem.service.client import Service
from restrictedmem.vmm.vm import Vm
from strangers import listening
from users import ORDINARY, as_user, enter_user_namespace

pytestmark = pytest.mark.requires("root")

#: An ordinary user.
OTHER = 1000


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("uid", [ORDINARY, 0], ids=["a stranger", "the same user"])
def test_a_service_that_is_gone_is_not_taken_for_who_has_its_name(uid: int) -> None:
    with Service.start() as service:
        assert works(service)
        service.after_fork_in_child()
        everybody = family(service)
        os.kill(service.info["pid"], 9)
        wait_gone(everybody)
        with listening(service.info["socket"][1:], uid) as heard:
            assert outcome(lambda: Vm(service)) == Errno(ENOTCONN)
        assert heard == [b""]


@pytest.mark.requires("fuse")
def test_whoever_is_made_an_owner_knows_the_service() -> None:
    with Service.start() as service:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            service.share(theirs)
            with Service(ours) as other:
                assert works(other)
                assert fd.peer_credentials(other._witness)[0] == service.info["pid"]


@pytest.mark.parametrize("uid", [ORDINARY, 0], ids=["a stranger", "the same user"])
def test_an_abstract_name_is_to_be_this_users(uid: int) -> None:
    name = f"restrictedmem-test/{os.getpid()}/{os.urandom(4).hex()}"
    info = {**dict.fromkeys(("way", "api", "design", "socket"), ""), "key": ""}
    said = wire.READY.number.to_bytes(8, "little") + json.dumps(info).encode()

    def connect() -> bool:
        with Service.connect("@" + name):
            return True

    witness, other = socket.socketpair()
    with witness, other, listening(name, uid, said, (0, witness.fileno())):
        assert outcome(connect) == (Errno(EACCES) if uid else True)


# The identity of the other end.


def made_by_another() -> socket.socket:
    """Return one end of a connection that a child of this process has made."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        try:
            one, other = socket.socketpair()
            send_with_fds(theirs, b".", [one.fileno(), other.fileno()])
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    with ours, theirs:
        _, (end, rest) = receive_with_fds(ours, 1)
    rest.close()
    return socket.socket(fileno=end.detach())


def test_the_same_user_is_told_by_its_processes() -> None:
    first, second = socket.socketpair()
    with first, second, made_by_another() as other:
        assert is_same_peer(first, second)
        assert not is_same_peer(first, other)


def test_who_is_not_known_is_told_by_pidfds_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the other's number were this process's, or neither could be seen."""
    first, second = socket.socketpair()
    with first, second, made_by_another() as other, socket.socket(socket.AF_UNIX) as nobodys:

        def peer_pidfd(sock: socket.socket) -> int:
            # One that is gone has none: the first process stands for it.
            return os.pidfd_open(1) if sock is other else _peer_pidfd(sock)

        def peer_credentials(_: socket.socket) -> tuple[int, int, int]:
            return 0, 65534, 65534

        monkeypatch.setattr(fd, "_peer_pidfd", peer_pidfd)
        monkeypatch.setattr(fd, "peer_credentials", peer_credentials)

        def body() -> list[bool]:
            enter_user_namespace(OTHER)
            found = [is_same_peer(first, sock) for sock in (second, other, nobodys)]
            monkeypatch.setattr(fd, "_inode", older)
            return [*found, is_same_peer(first, second)]

        def older(number: int) -> int:
            # All have one inode.
            OwnedFd(number).close()
            return 1

        inodes = {_inode(os.pidfd_open(pid)) for pid in (os.getpid(), 1)}
        assert as_user(body, OTHER) == [len(inodes) == 2, False, False, False]
