"""A debugger's gates without a debugger."""

from unittest.mock import MagicMock

from planting import fail, stub
from restrictedmem.vmm.gdb.gates import Gates


def test_who_waits_hears_that_the_gates_are_gone() -> None:
    changed = MagicMock()
    gates = stub(_over=True, _removed=False, _changed=changed, shut=fail, open=fail)
    Gates.remove(gates)
    assert gates._removed
    changed.notify_all.assert_called_once_with()
