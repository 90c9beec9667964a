"""Files of a design, and the few things tests of designs do to them."""

from model_backing import ModelBacking, Recorder
from restrictedmem.abi.memory import PUNCH, FallocMode
from restrictedmem.mm.backing import Backing
from restrictedmem.mm.designs import make
from restrictedmem.mm.inode import Inode
from restrictedmem.mm.restrictedmem import RestrictedFile
from restrictedmem.units import MAX_FILE_BYTES, PAGE_SHIFT, PAGE_SIZE, PageRange, pgoff_t

KEEP = int(FallocMode.KEEP_SIZE)
ALL = PageRange(pgoff_t(0), pgoff_t(MAX_FILE_BYTES >> PAGE_SHIFT))


def make_file(design: str, backing: Backing | None = None) -> RestrictedFile:
    return RestrictedFile(
        make(design), ModelBacking() if backing is None else backing, Inode.make(0, 0)
    )


def register(file: RestrictedFile, span: PageRange = ALL) -> Recorder:
    recorder = Recorder(file.backing)
    if file.design.binds:
        file.bind(span.start, span.end, recorder, exclusive=True)
    else:
        file.register_notifier(recorder)
    return recorder


def pages(start: int, end: int) -> PageRange:
    return PageRange(pgoff_t(start), pgoff_t(end))


def punch(file: RestrictedFile, start: int, end: int) -> None:
    file.fallocate(PUNCH, start * PAGE_SIZE, (end - start) * PAGE_SIZE)


def huge(count: int = 3) -> ModelBacking:
    """So many huge pages from 0 on, which no punch splits."""
    backing = ModelBacking(order=9, splits=False)
    backing.place(0, 9, count)
    return backing
