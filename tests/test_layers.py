"""Imports go down only, and the public face is what it says."""

import ast
from pathlib import Path

import pytest

import restrictedmem

SOURCE = Path(restrictedmem.__file__).parent
#: From the top down; a module may import from its own layer and those below it.
LAYERS = (
    ("cli", "__main__"),
    ("audit", "conformance"),
    ("check",),
    ("stress",),
    ("machine", "emulated"),
    ("vmm",),
    ("kvm",),
    ("protocol",),
    ("platform",),
    ("consumer",),
    ("syscall",),
    ("service",),
    ("guests",),
    ("fs",),
    ("mm",),
    ("devkvm",),
    (
        "abi",
        "burial",
        "child",
        "failure",
        "fd",
        "paths",
        "patience",
        "probe",
        "text",
        "threads",
        "units",
        "users",
        "version",
        "sync",
    ),
)
ROOT = "restrictedmem"


def layer_of(module: str) -> int:
    parts = module.split(".")
    if len(parts) == 1:
        return -1
    return next(index for index, names in enumerate(LAYERS) if parts[1] in names)


def imports_of(path: Path) -> list[str]:
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(ROOT):
            found += [
                f"{node.module}.{alias.name}" if node.module == ROOT else node.module
                for alias in node.names
            ]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith(ROOT)]
    return found


def modules() -> list[tuple[str, Path]]:
    return [
        (
            ".".join((ROOT, *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(
                ".__init__"
            ),
            path,
        )
        for path in sorted(SOURCE.rglob("*.py"))
    ]


@pytest.mark.parametrize(
    ("module", "path"), modules(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_imports_go_down(module: str, path: Path) -> None:
    if module == ROOT:
        # The package itself offers the public face; it may look anywhere, but only when called.
        top = [
            node
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        assert [ast.unparse(node) for node in top] == [
            "from restrictedmem.version import __version__ as __version__"
        ]
        return
    mine = layer_of(module)
    upward = [name for name in imports_of(path) if layer_of(name) < mine]
    assert not upward, f"{module} imports upward: {upward}"


def imported_modules(module: str, known: dict[str, Path]) -> set[str]:
    """Return the modules that one imports anywhere: in a function, for a type checker."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(known[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module in known:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in known else node.module for name in names}
    # A package's face is for others.
    return found - {ROOT}


def test_imports_have_no_circle() -> None:
    known = dict(modules())
    left = {module: imported_modules(module, known) for module in known}
    assert sum(map(len, left.values())) > 500
    while free := {module for module, needs in left.items() if not needs & left.keys()}:
        left = {module: needs for module, needs in left.items() if module not in free}
    assert not left, f"these import each other: {sorted(left)}"


#: Neither of two imports the other. The owner's process and the engine's trust each other with
#: nothing but messages. The search needs no process, and the run of processes no search.
APART = (("vmm", "kvm"), ("check", "stress"))


@pytest.mark.parametrize(
    ("layer", "other"), [order for pair in APART for order in (pair, pair[::-1])]
)
def test_neither_imports_the_other(layer: str, other: str) -> None:
    paths = sorted((SOURCE / layer).rglob("*.py"))
    assert paths
    for path in paths:
        assert not [name for name in imports_of(path) if name.split(".")[1] == other], path


def test_mm_and_the_fault_path_take_locks_only_from_sync() -> None:
    for path in [
        *sorted((SOURCE / "mm").glob("*.py")),
        SOURCE / "kvm" / "mmu.py",
        SOURCE / "kvm" / "page_fault.py",
        SOURCE / "kvm" / "engine_vcpu.py",
        SOURCE / "kvm" / "software" / "turns.py",
    ]:
        names = {
            alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        names |= {
            node.module or ""
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
        }
        assert not names & {"threading", "multiprocessing", "queue", "select", "socket"}, path.name


def test_one_module_forks() -> None:
    """Code that the child runs never returns into the code of the parent (tests/test_child.py)."""
    found = [module for module, path in modules() if "os.fork" in path.read_text(encoding="utf-8")]
    assert found == [f"{ROOT}.child"]


def test_the_public_face_is_documented() -> None:
    for name in restrictedmem.__all__:
        assert (getattr(restrictedmem, name).__doc__ or "").strip(), name


def test_the_package_imports_nothing_heavy() -> None:
    for module in ("cli.main", "cli.run", "cli.doctor", "cli.ps", "cli.serve"):
        path = SOURCE.joinpath(*module.split(".")).with_suffix(".py")
        top = [
            node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)
        ]
        assert not [
            node.module
            for node in top
            if node.module and node.module.split(".")[0] in ("rich", "unicorn")
        ], module


def test_no_file_is_longer_than_500_lines() -> None:
    root = SOURCE.parent.parent
    files = [path for place in (SOURCE, root / "tests") for path in place.rglob("*.py")]
    assert len(files) > 400
    longer = {
        str(path.relative_to(root)): lines
        for path in files
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 500
    }
    assert not longer
