"""The service and its owner's forks, threads and other processes."""

import json
import os
import signal
import socket
import threading

import pytest

from owned_service import in_fork, service, works
from processes import exists, family, stop, wait_gone
from restrictedmem.fd import receive_with_fds, send_with_fds
from restrictedmem.fs.owner_abi import TOKEN_BYTES
from restrictedmem.service.client import Service
from restrictedmem.service.wire import Channel
from waiting import wait_until

__all__ = ["service"]

pytestmark = pytest.mark.requires("fuse")


def test_children_share_it_and_outlive_their_parent() -> None:
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        try:
            ours.close()
            service = Service.start()
            fd = service.memfd_restricted()
            if os.fork() == 0:
                theirs.recv(1)
                answer = (
                    works(fd),
                    works(service.memfd_restricted()),
                    len(service.status()["descriptors"]),
                )
                theirs.send(json.dumps(answer).encode())
                theirs.recv(1)
            else:
                theirs.send(str(service.info["pid"]).encode())
        finally:
            os._exit(0)
    with ours:
        theirs.close()
        relatives = family(int(ours.recv(20)))
        os.waitpid(child, 0)
        ours.send(b".")
        assert json.loads(ours.recv(200)) == [True, True, 2]
        assert all(map(exists, relatives))
    wait_gone(relatives)


def test_a_passed_descriptor_keeps_it() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        try:
            ours.close()
            service = Service.start()
            send_with_fds(theirs, str(service.info["pid"]).encode(), [service.memfd_restricted()])
            theirs.recv(1)
        finally:
            os._exit(0)
    with ours:
        theirs.close()
        said, (fd,) = receive_with_fds(ours, 20)
        relatives = family(int(said))
    os.waitpid(child, 0)
    with fd:
        assert works(fd.fileno())
        assert all(map(exists, relatives))
    wait_gone(relatives)


def test_a_descriptor_in_flight_keeps_it() -> None:
    service = Service.start()
    relatives = family(service)
    ours, theirs = socket.socketpair()
    fd = service.memfd_restricted()
    send_with_fds(theirs, b".", [fd])
    os.close(fd)
    service.close()
    assert all(map(exists, relatives))
    _, (received,) = receive_with_fds(ours, 1)
    with received:
        assert works(received.fileno())
    ours.close()
    theirs.close()
    wait_gone(relatives)


def _create_many(service: Service, count: int) -> list[int]:
    found: list[int] = []
    for _ in range(count):
        fd = service.memfd_restricted()
        found.append(os.fstat(fd).st_ino)
        assert os.readlink(f"/proc/self/fd/{fd}") == "/restrictedmem (deleted)"
        os.close(fd)
    return found


def test_parent_and_children_create_at_the_same_time(service: Service) -> None:
    joins = [in_fork(lambda: _create_many(service, 200)) for _ in range(3)]
    inodes = _create_many(service, 200)
    for join in joins:
        found = join()
        assert isinstance(found, list), found
        inodes += found
    assert len(set(inodes)) == 800
    # A close does not wait for RELEASE.
    wait_until(lambda: service.status()["descriptors"] == [], "the end of all files")


def test_threads_create_at_the_same_time(service: Service) -> None:
    inodes: list[int] = []
    threads = [
        threading.Thread(target=lambda: inodes.extend(_create_many(service, 100))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(inodes)) == 800


def test_parent_and_child_ask_at_the_same_time(service: Service) -> None:
    def ask() -> int:
        fd = service.memfd_restricted()
        for _ in range(60):
            assert len(service.token_for(fd)) == TOKEN_BYTES
            assert service.status()["pid"] == service.info["pid"]
        return os.fstat(fd).st_ino

    join = in_fork(ask)
    assert ask() != join()


def test_a_child_may_be_forked_while_a_thread_asks(service: Service) -> None:
    service.status()
    # Another thread may hold this lock at the moment of the fork.
    with service._mutex:
        join = in_fork(lambda: service.status()["pid"])
    assert join() == service.info["pid"]


def test_an_interrupted_call_leaves_no_reply_to_the_next(service: Service) -> None:
    class InterruptError(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise InterruptError

    fd = service.memfd_restricted()
    before = signal.signal(signal.SIGUSR1, interrupt)
    stop(service.info["pid"])
    alarm = threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    try:
        alarm.start()
        with pytest.raises(InterruptError):
            service.status()
    finally:
        os.kill(service.info["pid"], signal.SIGCONT)
        alarm.join()
        signal.signal(signal.SIGUSR1, before)
    assert len(service.token_for(fd)) == TOKEN_BYTES
    assert service.status()["descriptors"] == [
        {"ino": os.fstat(fd).st_ino, "size": 0, "resident": 0, "notifiers": 0}
    ]
    os.close(fd)


def test_a_call_that_waited_for_an_interrupted_one_goes_on(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed_by_another(client: Service) -> Channel:
        monkeypatch.undo()
        channel = client._own_channel()
        channel.close()
        return channel

    monkeypatch.setattr(Service, "_own_channel", closed_by_another)
    assert service.status()["pid"] == service.info["pid"]
