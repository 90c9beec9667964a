"""Programs that nobody here wrote, or that know nothing of Python, under ``restrictedmem exec``."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from conftest import I386
from restrictedmem import guests
from restrictedmem.abi import memory
from restrictedmem.devkvm import Kvm
from under_exec import EXEC, kill_supervisor_of, said

pytestmark = pytest.mark.requires("fuse", "seccomp")

ROOT = Path(__file__).parent.parent
PROGRAMS = Path(__file__).parent / "programs"
MAGIC = 0x5245534D
#: Creations that signals must neither lose nor double.
MANY = 100_000


def built(tmp_path: Path, command: Sequence[str | Path]) -> Path:
    """Compile a program, whose path is the last but one word of the command."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    return tmp_path / "program"


def compiled(tmp_path: Path, *words: str | Path) -> Path:
    return built(
        tmp_path,
        [
            shutil.which("cc") or "gcc",
            "-O2",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-o",
            tmp_path / "program",
            *words,
        ],
    )


# In C, on i386, in Go.


@pytest.fixture
def one_core() -> Iterator[None]:
    """Keep all processes on one core.

    Where a wake-up across cores is slow, 100,000 of them take minutes.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.mark.requires("cc")
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("one_core")
def test_a_hundred_thousand_descriptors_under_signals(tmp_path: Path) -> None:
    """With ten thousand signals a second, no descriptor is lost or made twice.

    The memory of supervisor and service does not grow.
    """
    storm = compiled(tmp_path, "-pthread", PROGRAMS / "storm.c")
    code = f"""
sys.path.insert(0, {str(Path(__file__).parent)!r})
from restrictedmem.service.client import Service
from under_exec import supervisor_of
service = Service.connect(os.environ["RESTRICTEDMEM_SERVER"])
supervisor = supervisor_of(os.environ["MARK"])
def sizes():
    def resident(pid):
        lines = open(f"/proc/{{pid}}/status")
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
    descriptors = len(os.listdir(f"/proc/{{supervisor}}/fd"))
    return resident(supervisor), resident(service.info["pid"]), descriptors
def storm(count):
    command = [{str(storm)!r}, str(count), "1", "100"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
storm(2000)
before, created = sizes(), service.status()["usage"]["created"]
out = storm({MANY})
created = service.status()["usage"]["created"] - created
print((out, created, [after - was for was, after in zip(before, sizes())]))
"""
    out, created, (supervisor, service, descriptors) = said(
        code,
        "--json",
        str(tmp_path / "report"),
        environment={"MARK": f"{tmp_path}-storm"},
        patience=300,
    )
    assert (out, created) == ("failed 0, left open 0, interrupted often\n", MANY)
    assert (max(supervisor, service) < 1024, descriptors) == (True, 0), (
        f"grew by {supervisor} and {service} KiB"
    )


@pytest.mark.requires("cc")
def test_sixty_four_threads(tmp_path: Path) -> None:
    command = [
        *EXEC,
        "--json",
        str(tmp_path / "report"),
        "--",
        str(compiled(tmp_path, "-pthread", PROGRAMS / "storm.c")),
        "6400",
        "64",
        "100",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        "failed 0, left open 0, interrupted often\n",
        "",
    )
    assert json.loads((tmp_path / "report").read_text())["created"] == 6400


@pytest.mark.requires("go")
@pytest.mark.timeout(600)
def test_a_go_program(tmp_path: Path) -> None:
    shutil.copy(PROGRAMS / "storm.go", tmp_path)
    program = built(tmp_path, ["go", "build", "-o", tmp_path / "program", "storm.go"])
    done = subprocess.run(
        [*EXEC, "--json", str(tmp_path / "report"), "--", str(program), str(MANY)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr, done.stdout.split(",")[0]) == (0, "", "failed 0")
    assert json.loads((tmp_path / "report").read_text())["created"] == MANY


@pytest.mark.requires("i386")
def test_an_i386_program(tmp_path: Path) -> None:
    program = compiled(tmp_path, *I386, PROGRAMS / "i386.c")
    done = subprocess.run(
        [*EXEC, "--", program], capture_output=True, text=True, check=False, timeout=60
    )
    fd, bad, mapped, *rest = map(int, done.stdout.split())
    assert (fd, bad, mapped, done.returncode) == (3, -22, -19, 0)
    assert rest[:5] == [0, MAGIC, 0, MAGIC, -22]
    # The first mmap: memory, a file, memory in spite of the descriptor; the descriptor; arguments
    # that cannot be read.
    assert rest[5:] == [0, 0, 0, -19, -19, -19, -14, -14]


@pytest.mark.requires("cc")
@pytest.mark.parametrize(
    "engine", ["software", pytest.param("kernel", marks=pytest.mark.requires("kvm"))]
)
def test_a_vmm_in_c_runs_a_guest_on_a_descriptor_of_the_system_call(
    tmp_path: Path, engine: str
) -> None:
    vmm = compiled(
        tmp_path, "-I", ROOT / "guests" / "include", ROOT / "clients" / "c" / "vmm.c", "-pthread"
    )
    command = [
        *EXEC,
        "--json",
        str(tmp_path / "report"),
        "--",
        str(vmm),
        "-x",
        "-e",
        engine,
        str(guests.path("sha256")),
    ]
    done = subprocess.run(command, input=b"abc", capture_output=True, check=False, timeout=60)
    digest = b"ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert (done.returncode, done.stdout.split()[0]) == (0, digest), done.stderr
    assert json.loads((tmp_path / "report").read_text())["created"] == 1


# From distributions' packages.

SIZE = 65536
#: Commands on descriptor 3, which is restricted. Each prints the same as for a guest_memfd, or else
#: the words beside it.
COMMANDS: dict[str, str | None] = {
    "stat -c %s - <&3": None,
    "stat -L -c %F /dev/fd/3": None,
    # guest_memfd counts no blocks.
    "stat -L -c %b /dev/fd/3": "8",
    # By path, statfs is FUSE's.
    "stat -f -L -c %t /dev/fd/3": "65735546",
    "fallocate -l 4096 /dev/fd/3": None,
    "truncate -s 8192 /dev/fd/3": None,
    # Sized once, against a size that cannot be changed.
    "perl -e 'truncate(STDIN, 4096) or die \"$!\\n\"' <&3": "Operation not permitted",
    "perl -e 'sysread(STDIN, $x, 1) // die \"$!\\n\"' <&3": None,
    "cat <&3": None,
    "cat /dev/fd/3": None,
    "cp /dev/fd/3 /dev/null": None,
    "dd status=none <&3": None,
    "dd if=/dev/zero bs=1 count=1 status=none >&3": None,
    "dd if=/dev/zero bs=4096 seek=4 count=0 status=none >&3": None,
    "wc -c <&3": None,
    "tail -c 10 <&3": None,
    "sha256sum <&3": None,
    "gzip -c <&3": None,
    "grep x <&3": None,
    "sort <&3": None,
    "sed -n 1p <&3": None,
    "tar cf /dev/null /dev/fd/3": None,
    "flock -n 3 && echo locked": None,
    "git hash-object --stdin <&3": None,
    f"{sys.executable} -c 'import mmap; mmap.mmap(3, 4096)'": None,
    f"{sys.executable} -c 'import mmap; mmap.mmap(3, 4096, flags=mmap.MAP_PRIVATE)'": None,
    f"{sys.executable} -c 'import os; os.sendfile(1, 3, None, 10)'": None,
}


def says(command: str, fd: int) -> tuple[int, str]:
    """Return output and status of a shell's command, run as a child that has ``fd`` as 3."""
    words = ["bash", "-c", f"exec 3<&{fd}; {command}"]
    done = subprocess.run(
        words,
        pass_fds=[fd],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def successor() -> Iterator[int]:
    """Return a guest_memfd with a page in it, by a number that is not 3."""
    with ExitStack() as stack:
        vm = stack.enter_context(stack.enter_context(Kvm.open()).create_vm())
        file = stack.enter_context(vm.create_guest_memfd(SIZE, 0))
        memory.fallocate(file.fileno(), memory.FallocMode.KEEP_SIZE, 0, 4096)
        yield file.fileno()


@pytest.fixture(scope="module")
def under_exec() -> dict[str, tuple[int, str]]:
    """Return what all commands say of a descriptor that the system call gave."""
    code = (
        f"import json, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_exec_programs import COMMANDS, SIZE, says\n"
        "fd = call(0); os.ftruncate(fd, SIZE); os.posix_fallocate(fd, 0, 4096); os.dup2(fd, 30)\n"
        "print({command: says(command, 30) for command in COMMANDS})"
    )
    found: dict[str, tuple[int, str]] = said(code)
    return found


@pytest.mark.requires("kvm")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_distributions_program_says_what_it_says_of_a_guest_memfd(
    under_exec: dict[str, tuple[int, str]], successor: int, command: str
) -> None:
    if shutil.which(command.split(maxsplit=1)[0]) is None:
        pytest.skip(f"{command.split(maxsplit=1)[0]} is not installed")
    ours, theirs = under_exec[command], says(command, successor)
    words = COMMANDS[command]
    if words is None:
        assert ours == theirs
    else:
        assert ours[1].strip() == words != theirs[1].strip()


@pytest.mark.requires("qemu")
def test_qemu_cannot_have_it_as_a_guests_memory() -> None:
    backend = "memory-backend-file,id=m,size=64K,mem-path=/dev/fd/3,share=on"
    code = f"""
fd = call(0); os.ftruncate(fd, {SIZE})
command = ["qemu-system-x86_64", "-M", "none", "-display", "none", "-object", "{backend}"]
done = subprocess.run(command, pass_fds=[fd], capture_output=True, text=True)
print((done.returncode, done.stderr))
"""
    status, words = said(code)
    assert (status, words.split("RAM: ")[1]) == (1, "No such device or address\n")


@pytest.mark.requires("musl")
def test_a_program_of_another_c_library(tmp_path: Path) -> None:
    """The library's loader maps libraries without MAP_DENYWRITE.

    With a supervisor these calls stop there and go on; without one, the libraries are not loaded.
    """
    (tmp_path / "three.c").write_text("int three(void) { return 3; }\n")
    (tmp_path / "program.c").write_text(
        "int syscall(), three();\nint main() { return syscall(451, 0) != three(); }\n"
    )
    built(tmp_path, ["musl-gcc", "-shared", "-fPIC", "-o", "libthree.so", "three.c"])
    program = built(
        tmp_path,
        [
            "musl-gcc",
            "-w",
            "-o",
            "program",
            "program.c",
            "-L.",
            "-lthree",
            f"-Wl,-rpath,{tmp_path}",
        ],
    )
    script = f"{program}; echo $?; read supervisor; {program} 2>/dev/null; echo $?"
    mark = f"{tmp_path}-musl"
    command, pipe = [*EXEC, "--", "sh", "-c", script], subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, text=True, env={**os.environ, "MARK": mark}
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "0\n"
        kill_supervisor_of(mark)
        assert process.communicate("\n", timeout=60)[0] == "127\n"
