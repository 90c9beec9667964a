"""The attribute of each guest page, private or shared, whatever slots there are.

This follows v9 5/8 and v10 2/9. KVM keeps the attributes in an xarray, with one entry a page.
"""

from typing import final

from restrictedmem.mm.notifier import Api
from restrictedmem.mm.page_attributes import PageAttributes
from restrictedmem.units import gfn_t


@final
class Attributes(PageAttributes[gfn_t]):
    """The attributes of all guest pages.

    Only the VM's thread writes it.
    """

    __slots__ = ("_api",)

    def __init__(self, api: Api) -> None:
        """Begin with every page shared (v10) or private (v9)."""
        super().__init__(private=api is Api.V9)
        self._api = api

    def forbids_mmio(self, gfn: int) -> bool:
        """Say whether an access to a page without a slot is a memory fault.

        In v10 it is one if the page is private. v9 looked at attributes only where a slot was.
        """
        return self._api is Api.V10 and self.is_private(gfn)
