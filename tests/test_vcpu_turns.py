"""Turns of a VM's vCPUs on the software engine."""

import threading

from restrictedmem.kvm.software.turns import Turns
from waiting import wait_until


def test_the_vcpu_that_has_waited_longest_is_next() -> None:
    turns, order = Turns(), list[str]()
    first = turns.join(lambda: None)
    turns.take(first)

    def wait(name: str) -> None:
        mine = turns.join(lambda: None)
        turns.take(mine)
        order.append(name)
        turns.give(mine)

    threads = [threading.Thread(target=wait, args=(name,)) for name in "abcd"]
    for count, thread in enumerate(threads, 1):
        thread.start()
        wait_until(lambda: len(turns._waiting) == count, "the vCPU to wait")  # noqa: B023
    turns.give(first)
    for thread in threads:
        thread.join(20)
    assert order == list("abcd")
