"""Every attack of the tables, by an ordinary user and by root without capabilities.

The tables say what each attack must come to. After each, another party's service, VM and descriptor
work, and nothing of the attacker's is left.
"""

from collections.abc import Iterator

import pytest

import attacks_on_commands
import attacks_on_isolation
import attacks_on_others
import attacks_with_files
from field import Attack, Party, carry_out
from restrictedmem.service.client import Service
from users import ORDINARY

pytestmark = [pytest.mark.requires("fuse", "root", "seccomp"), pytest.mark.timeout(200)]

ATTACKS = {
    **attacks_on_isolation.ATTACKS,
    **attacks_on_others.ATTACKS,
    **attacks_on_commands.ATTACKS,
    **attacks_with_files.ATTACKS,
}


def _marks(attack: Attack) -> list[pytest.MarkDecorator]:
    return [pytest.mark.alone(attack.alone)] if attack.alone else []


@pytest.fixture(scope="module")
def bystander() -> Iterator[Party]:
    with Service.start() as service:
        party = Party(service)
        yield party
        party.close()


@pytest.mark.parametrize("uid", [pytest.param(ORDINARY, id="user"), pytest.param(0, id="root")])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=_marks(attack)) for name, attack in ATTACKS.items()]
)
def test_an_attack_comes_to_what_is_right(name: str, uid: int, bystander: Party) -> None:
    pytest.importorskip("unicorn")
    carry_out(ATTACKS[name], uid, bystander)
