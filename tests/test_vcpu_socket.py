"""A vCPU's socket: what the engine hears of it while the vCPU runs."""

import os
import select
from errno import EPROTO

from outcomes import Errno, outcome
from planting import always, noting, stub
from restrictedmem.fd import OwnedFd
from restrictedmem.kvm.vcpu_socket import VcpuSocket


def listening(*, ended: bool) -> list[tuple[object, ...]]:
    """Listen for an owner that ends meanwhile, or does not; return what was watched for."""
    watched: list[tuple[object, ...]] = []
    server = stub(
        _owner=stub(fileno=always(7)), _watched=stub(modify=noting(watched)), _ended=False
    )

    def listen_for(events: int) -> None:
        VcpuSocket._listen_for(server, events)

    server._listen_for = listen_for
    with VcpuSocket._listening(server):
        watched.append(("runs",))
        server._ended = ended
    return watched


def test_a_message_is_noticed_only_while_the_guest_runs() -> None:
    assert listening(ended=False) == [
        (7, select.EPOLLIN | select.EPOLLRDHUP),
        ("runs",),
        (7, select.EPOLLRDHUP),
    ]


def test_an_owner_that_did_not_wait_gets_no_answer() -> None:
    assert outcome(lambda: listening(ended=True)) == Errno(EPROTO)


def test_a_socket_that_nobody_watches_any_more_is_no_error() -> None:
    with select.epoll() as watched, OwnedFd(os.eventfd(0)) as other:
        server = stub(_owner=other, _watched=watched)
        VcpuSocket._listen_for(server, select.EPOLLIN)
