"""Every attack of the tables, by an ordinary user and by root without capabilities; what is right is in the table.

After each, another party's service, VM and descriptor work, and nothing of the attacker's is left.
"""

from collections.abc import Iterator

import pytest

import attacks_on_isolation
import attacks_on_others
from field import Party, carry_out
from restrictedmem.service.client import Service
from users import ORDINARY

pytestmark = [pytest.mark.requires("fuse", "root", "seccomp"), pytest.mark.timeout(200)]

ATTACKS = {**attacks_on_isolation.ATTACKS, **attacks_on_others.ATTACKS}


@pytest.fixture(scope="module")
def bystander() -> Iterator[Party]:
    with Service.start() as service:
        party = Party(service)
        yield party
        party.close()


@pytest.mark.parametrize("uid", [pytest.param(ORDINARY, id="user"), pytest.param(0, id="root")])
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_comes_to_what_is_right(name: str, uid: int, bystander: Party) -> None:
    pytest.importorskip("unicorn")
    carry_out(ATTACKS[name], uid, bystander)
