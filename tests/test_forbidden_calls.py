"""Kernels and containers that do not tell which folios pages have.

No descriptor, file or service fails because of that.
"""

import os
from errno import ENOSYS, EOPNOTSUPP, EPERM
from pathlib import Path

import dma
import pytest

from outcomes import Errno, outcome
from restrictedmem.abi import memory, userfaultfd
from restrictedmem.mm.backing import MemfdBacking
from restrictedmem.mm.design import TEARDOWN
from restrictedmem.mm.designs import NAMES
from restrictedmem.mm.folios import NOT_TOLD
from restrictedmem.probe import in_child
from restrictedmem.service.client import Service
from restrictedmem.service.options import Options
from restrictedmem.service.wire import Channel
from restrictedmem.units import PAGE_SIZE as PAGE
from users import forbid
from waiting import wait_until

DMA = Path(__file__).parent.parent / "clients" / "dma" / "dma.py"
LOOKS = ("folio", "folio-poc")


def device(service: Service, fd: int) -> Channel:
    """Start a consumer that has pages of a descriptor."""
    found = Channel(service.spawn("dma"), "the device")
    found.call(dma.ATTACH, dma.ATTACH_BODY.pack(service.token_for(fd), 0, 0, 16))
    found.call(dma.FILL, dma.FILL_BODY.pack(0, 2 * PAGE, 7))
    return found


def alone(service: Service) -> bool:
    return not service.status()["consumers"]


def life_of_a_file(design: str) -> tuple[int, object, int, int]:
    """Return the service's pid, the outcome of a punch that a consumer hears of, and what is left.

    The last is measured after a punch without a consumer.
    """
    with Service.start(Options(design=design, consumers=(("dma", str(DMA)),))) as service:
        fd, other = service.memfd_restricted(), service.memfd_restricted()
        first = device(service, fd)
        punched = outcome(lambda: memory.fallocate(fd, memory.PUNCH, 0, PAGE))
        # After any error, the mount still has the operation.
        os.posix_fallocate(other, 0, PAGE)
        first.close()
        wait_until(lambda: alone(service), "the consumer's end")
        # The file is the next one's, and its owner's to free.
        device(service, fd).close()
        wait_until(lambda: alone(service), "the next consumer's end")
        last_error = service.status()["last_error"]
        assert last_error == "", last_error
        memory.fallocate(fd, memory.PUNCH, 0, 16 * PAGE)
        return service.info["pid"], punched, os.fstat(fd).st_blocks, os.fstat(other).st_blocks * 512


@pytest.mark.requires("fuse")
@pytest.mark.parametrize("number", [ENOSYS, EPERM])
@pytest.mark.parametrize(
    "design", [name + teardown for name in NAMES for teardown in ("", TEARDOWN)]
)
def test_no_file_is_lost_where_folios_cannot_be_told(design: str, number: int) -> None:
    calls = [memory.SYS_cachestat, userfaultfd.SYS_userfaultfd[os.uname().machine]]

    def under_a_filter() -> tuple[int, object, int, int]:
        forbid(number, calls)
        return life_of_a_file(design)

    pid, punched, left, others = in_child(under_a_filter, 60)
    refused = EOPNOTSUPP if number == ENOSYS else number
    assert punched == (Errno(refused) if design.removesuffix(TEARDOWN) in LOOKS else None)
    assert (left, others) == (0, PAGE)
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"), "the service's end")


@pytest.mark.parametrize("number", NOT_TOLD)
def test_a_limit_holds_where_nothing_counts_a_range(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, offset: int, length: int) -> int:
        raise OSError(number, f"cachestat of {length} at {offset} of {fd}")

    monkeypatch.setattr(memory, "resident_pages", refuse)
    backing = MemfdBacking(limit=4 * PAGE)
    backing.allocate(0, 4 * PAGE)
    with pytest.raises(OSError, match="the limit is") as caught:
        backing.allocate(0, PAGE)
    assert caught.value.strerror is not None
    assert backing.resident() == 4 * PAGE
    backing.close()
