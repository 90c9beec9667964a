"""Uids for services: each client's uid has one for itself, as long as there are enough.

The kernel's counts for a uid outlive the uid's processes, for instance the count of descriptors in
flight (unix(7)). So another client's uid gets a uid that nobody had, as long as there is one.
"""

import os
from collections.abc import Container, Sequence
from ctypes import c_int
from itertools import chain
from typing import final


@final
class Uids:
    """The uid of each client's services, remembered for this object's life."""

    def __init__(self, uids: Sequence[int]) -> None:
        self._uids = uids
        #: By client's uid. The client whose services ended the longest ago comes first.
        self._given: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._uids)

    def give(self, client: int, served: Container[int]) -> int | None:
        """Return the uid of a client's services; None when none can be given.

        Clients whose uids are in ``served`` keep theirs.
        """
        if client not in self._given:
            found = self._unused(client)
            if found is None:
                found = self._take_away(served)
            if found is None:
                return None
            self._given[client] = found
        return self._given[client]

    def rest(self, client: int) -> None:
        """Note that nothing is left of a client's services."""
        self._given[client] = self._given.pop(client)

    def _unused(self, client: int) -> int | None:
        given = set(self._given.values())
        # The client most often had the same uid with an earlier server.
        first = client % len(self._uids)
        every = chain(self._uids[first:], self._uids[:first])
        return next((uid for uid in every if uid not in given and not _has_processes(uid)), None)

    def _take_away(self, served: Container[int]) -> int | None:
        client = next((client for client in self._given if client not in served), None)
        return None if client is None else self._given.pop(client)


def _has_processes(uid: int) -> bool:
    """Say whether a uid has processes: services of an earlier server."""
    try:
        # Python takes an int, the kernel a uid_t.
        os.getpriority(os.PRIO_USER, c_int(uid).value)
    except ProcessLookupError:
        return False
    return True
