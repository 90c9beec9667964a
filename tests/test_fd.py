"""Descriptors that a socket's end takes, or refuses."""

import os
import socket

import pytest

from restrictedmem.fd import KERNEL_REFUSES, refuse_fds, refuses_fds


def test_an_end_refuses_descriptors_from_then_on() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        assert not refuses_fds(ours)
        refuse_fds(ours)
        assert refuses_fds(ours) is KERNEL_REFUSES
        assert not refuses_fds(theirs)
        if KERNEL_REFUSES:
            with pytest.raises(PermissionError):
                socket.send_fds(theirs, [b"x"], [0])
        socket.send_fds(ours, [b"x"], [ours.fileno()])
        _, fds, _, _ = socket.recv_fds(theirs, 1, 1)
        os.close(*fds)
