"""The small VMM with several vCPUs."""

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from package_guests import Done, engine, load, run, service, talk
from restrictedmem import guests
from restrictedmem.protocol import exits, guest_abi
from restrictedmem.service.client import Service
from restrictedmem.vmm import elf
from restrictedmem.vmm.vmm import Ended, Vmm

__all__ = ["engine", "service"]

pytestmark = pytest.mark.requires("fuse")

GUESTS: Final = Path(__file__).parent.parent / "guests"
MIB: Final = 1 << 20


@pytest.fixture(name="build", scope="module")
def _build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], elf.Image]:
    tools = guests.toolchain()

    def build(source: str) -> elf.Image:
        out = tmp_path_factory.mktemp("guest")
        (out / "guest.c").write_text("#include <restrictedmem/guest.h>\n" + source)
        sources = ["start.S", str(out / "guest.c")]
        flags = [*tools["cflags"], "-Wno-unused-parameter", *tools["ldflags"]]
        subprocess.run(
            ["gcc", *flags, "-o", str(out / "guest.elf"), *sources],
            cwd=GUESTS,
            check=True,
            capture_output=True,
            text=True,
        )
        return elf.parse((out / "guest.elf").read_bytes())

    return build


LOOPING: Final = (
    'int secondary(const struct boot_info *boot, u64 index) { for (;;) asm volatile(""); }\n'
)


@pytest.mark.parametrize("vcpus", [1, 2, 4])
def test_counts_of_several_vcpus_add_up(service: Service, engine: str, vcpus: int) -> None:
    with Vmm(2 * MIB, service, engine=engine, vcpus=vcpus) as vmm:
        done = run(load(vmm, "spin", "smp", "20000"))
    assert done == Done(Ended(0), b"%d\n" % (20000 * vcpus), b"")


def test_vcpus_without_work_are_parked(service: Service, engine: str) -> None:
    with Vmm(MIB, service, engine=engine, vcpus=3) as vmm:
        assert (
            run(load(vmm, "sha256"), b"abc").out.split()[0].decode()
            == hashlib.sha256(b"abc").hexdigest()
        )


@pytest.mark.requires("cc")
def test_the_exit_of_one_ends_all(
    service: Service, engine: str, build: Callable[[str], elf.Image]
) -> None:
    with Vmm(MIB, service, engine=engine, vcpus=3) as vmm:
        vmm.load(
            build(
                LOOPING
                + "int main(const struct boot_info *boot) { return shared_read(1) ? 9 : 7; }\n"
            )
        )
        assert talk(vmm).end() == Ended(7)


@pytest.mark.requires("cc")
def test_one_that_waits_for_input_ends_with_the_others(
    service: Service, engine: str, build: Callable[[str], elf.Image]
) -> None:
    with Vmm(MIB, service, engine=engine, vcpus=2) as vmm:
        main = "int main(const struct boot_info *boot) { return (int)shared_read(1); }\n"
        vmm.load(
            build(
                main + "int secondary(const struct boot_info *boot, u64 index) { guest_exit(5); }\n"
            )
        )
        guest = talk(vmm)
        assert guest.wait() == Ended(5)
        guest.say.close()


@pytest.mark.requires("cc")
def test_a_guest_that_parks_all_its_vcpus_has_ended(
    service: Service, engine: str, build: Callable[[str], elf.Image]
) -> None:
    with Vmm(MIB, service, engine=engine, vcpus=2) as vmm:
        vmm.load(
            build(
                "int main(const struct boot_info *boot) "
                "{ return (int)hypercall(HYPERCALL_PARK, 0, 0, 0); }\n"
            )
        )
        assert run(vmm).ended == Ended(1, exits.Hypercall(guest_abi.PARK, (0, 0, 0, 0)))


@pytest.mark.requires("cc")
def test_each_vcpu_has_its_number_and_its_stack(
    service: Service, engine: str, build: Callable[[str], elf.Image]
) -> None:
    source = """
    static volatile u64 stacks[3];
    int secondary(const struct boot_info *boot, u64 index)
    {
        u64 here;

        stacks[index] = (u64)&here;
        return 0;
    }
    int main(const struct boot_info *boot)
    {
        u64 top = boot->private_base + boot->private_size;

        if (boot->vcpus != 3 || secondary(boot, 0))
            return 1;
        for (u64 i = 0; i < 3; i++) {
            while (!stacks[i])
                ;
            if (top - stacks[i] >= STACK_SIZE)
                return 2;
            top -= STACK_SIZE;
        }
        return guest_heap_end(boot) == top ? 0 : 3;
    }
    """
    with Vmm(MIB, service, engine=engine, vcpus=3) as vmm:
        vmm.load(build(source))
        assert run(vmm).ended == Ended(0)
