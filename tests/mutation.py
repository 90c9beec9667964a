"""Small changes of the package's expressions, and the test files of a module (scripts/mutate)."""

import ast
import errno
import random
import re
from collections import Counter, deque
from collections.abc import Container, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final

PACKAGE: Final = "restrictedmem"
_WORD: Final = re.compile(r"[A-Za-z_]{4,}")

_COMPARISONS: Final[dict[type[ast.cmpop], type[ast.cmpop]]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_OPERATORS: Final[dict[type[ast.operator], type[ast.operator]]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
}
#: What becomes of a statement that is dropped, and of an errno. No code here has that errno.
DROPPED: Final = "pass"
OTHER_ERRNO: Final = str(errno.EDOTDOT)
_ERRNOS: Final = frozenset(errno.errorcode.values())
_NAMES: Final = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Mutant:
    """One change: bytes ``start`` to ``end`` of a file become ``text``.

    Lines ``old`` become ``new``.
    """

    file: str
    line: int
    start: int
    end: int
    text: str
    old: str
    new: str

    def applied(self, source: bytes) -> bytes:
        """Return the changed file."""
        return source[: self.start] + self.text.encode() + source[self.end :]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} `{self.old}` -> `{self.new}`"


def layer_of(path: Path) -> str:
    """Return a module's layer, from its path below the package.

    The layer is its first folder, or the package's name for a module without a folder.
    """
    return path.parts[0] if len(path.parts) > 1 else PACKAGE


def mutants_of(file: str, source: bytes) -> list[Mutant]:
    """Return every change there is of a file, in the order of their places."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found: list[Mutant] = []
    for node in _nodes(ast.parse(source)):
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start, end = (
            starts[node.lineno - 1] + node.col_offset,
            starts[node.end_lineno - 1] + node.end_col_offset,
        )
        before, behind = (
            source[starts[node.lineno - 1] : start],
            source[end : starts[node.end_lineno]],
        )
        old, *new = (
            _in_a_line(before + text + behind)
            for text in (source[start:end], *(text.encode() for text in _changes(node)))
        )
        found += [
            Mutant(file, node.lineno, start, end, text, old, line)
            for text, line in zip(_changes(node), new, strict=True)
        ]
    return sorted(found, key=lambda mutant: (mutant.start, mutant.end, mutant.text))


def _in_a_line(source: bytes) -> str:
    return " ".join(source.decode().split())


def _nodes(node: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """Walk through the nodes that are executed and that a test can tell apart.

    Annotations, texts, decorators, assertions and logging are left out.
    """
    if isinstance(node, ast.expr | ast.stmt):
        yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:  # pyright: ignore[reportUnknownVariableType]  a field is Any
            if isinstance(child, ast.AST) and not _is_beside_the_point(child):
                yield from _nodes(child)


def _is_beside_the_point(node: ast.AST) -> bool:
    match node:
        case ast.JoinedStr() | ast.Assert() | ast.Import() | ast.ImportFrom():
            return True
        case ast.If(test=ast.Name("TYPE_CHECKING")):
            return True
        case ast.Expr(ast.Call(ast.Attribute(ast.Name("log")))):
            return True
        case ast.ClassDef(bases=[ast.Attribute(attr="Structure")]):
            # Its fields have values for type checkers alone.
            return True
        case _:
            return False


def _changes(node: ast.expr | ast.stmt) -> Iterator[str]:
    """Yield the changed forms of a node, in parentheses if an expression may need them."""
    match node:
        case ast.Compare(left, operators, comparators):
            for index, operator in enumerate(operators):
                changed = [
                    *operators[:index],
                    _COMPARISONS[type(operator)](),
                    *operators[index + 1 :],
                ]
                yield f"({ast.unparse(ast.Compare(left, changed, comparators))})"
        case ast.BinOp(left, operator, right) if type(operator) in _OPERATORS and not (
            _is_text(left) or _is_text(right)
        ):
            yield f"({ast.unparse(ast.BinOp(left, _OPERATORS[type(operator)](), right))})"
        case ast.BoolOp(operator, values):
            other = ast.Or() if isinstance(operator, ast.And) else ast.And()
            yield f"({ast.unparse(ast.BoolOp(other, values))})"
        case ast.UnaryOp(ast.Not(), operand):
            yield f"({ast.unparse(operand)})"
        case ast.AugAssign(target, operator, value) if type(
            operator
        ) in _OPERATORS and not _is_text(value):
            yield ast.unparse(ast.AugAssign(target, _OPERATORS[type(operator)](), value))
        case ast.Constant(bool() as truth):
            yield str(not truth)
        case ast.Constant(int() as number):
            yield str(number + 1)
        case ast.Call(ast.Name(name), arguments, keywords) if name in _NAMES:
            yield ast.unparse(ast.Call(ast.Name(_NAMES[name]), arguments, keywords))
        case ast.Raise() | ast.Expr(ast.Call()):
            yield DROPPED
        case ast.Name(name) if name in _ERRNOS:
            yield OTHER_ERRNO
        case _:
            pass


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
    )


def choose(
    root: Path, layers: list[str], count: int, seed: int, texts: Container[str] | None = None
) -> list[Mutant]:
    """Choose lines of the package, from each layer in turn, and a change of each.

    With ``texts``, only changes to one of these texts count. There are fewer than ``count`` if
    there are no more lines.
    """
    source, chance = root / "src" / PACKAGE, random.Random(seed)
    lines: dict[str, list[list[Mutant]]] = {layer: [] for layer in layers}
    for path in sorted(source.rglob("*.py")):
        layer = layer_of(path.relative_to(source))
        if layer in lines:
            by_line: dict[int, list[Mutant]] = {}
            for mutant in mutants_of(str(path.relative_to(root)), path.read_bytes()):
                if texts is not None and mutant.text not in texts:
                    continue
                by_line.setdefault(mutant.line, []).append(mutant)
            lines[layer] += by_line.values()
    for of_layer in lines.values():
        chance.shuffle(of_layer)
    chosen: list[Mutant] = []
    while len(chosen) < count and any(lines.values()):
        chosen += [chance.choice(of_layer.pop()) for of_layer in lines.values() if of_layer]
    return chosen[:count]


def layers_of(root: Path) -> list[str]:
    """Return the layers there are, sorted."""
    source = root / "src" / PACKAGE
    return sorted({layer_of(path.relative_to(source)) for path in source.rglob("*.py")})


# The tests that belong to a module.


def tests_by_module(root: Path) -> dict[str, list[str]]:
    """Return, by the file of each module, the test files that lead to it.

    A file that is named as the module is comes before all, then those with the fewest imports in
    between. Of these the one with more of the module's rarer words comes first: each test of a
    command line is as near to all commands. A module's name in a string counts as an import of it,
    and the package's, which ``python -m`` is given, as one of the command line.
    """
    files = {
        ".".join(path.relative_to(root / "src").with_suffix("").parts).removesuffix(
            ".__init__"
        ): path
        for path in _package(root)
    }
    files |= {path.stem: path for path in sorted((root / "tests").glob("*.py"))}
    importers: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        imports = _imports(ast.parse(path.read_bytes()))
        # A test that goes through a package by itself ends with a dot.
        whole = tuple(
            package for package in imports if package.endswith(".") and name.startswith("test_")
        )
        for imported in files:
            if imported in imports or imported.startswith(whole):
                importers[imported].add(name)
    words = {path: set(_WORD.findall(path.read_text(encoding="utf-8"))) for path in files.values()}
    common = Counter(
        chain.from_iterable(words[path] for name, path in files.items() if name.startswith("test_"))
    )
    found: dict[str, list[str]] = {}
    for path in _package(root):
        name = next(name for name, file in files.items() if file == path)
        distances = _distances(name, importers)
        own = f"test_{name.rpartition('.')[2].strip('_')}"
        tests = [test for test in distances if test.startswith("test_")]
        shared = {
            test: sum(1 / common[word] for word in words[path] & words[files[test]])
            for test in tests
        }
        tests.sort(key=lambda test: (test != own, distances[test], -shared[test], test))
        found[str(path.relative_to(root))] = [str(files[test].relative_to(root)) for test in tests]
    return found


def _package(root: Path) -> list[Path]:
    return sorted((root / "src" / PACKAGE).rglob("*.py"))


def _imports(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(str() as module, names):
                found |= {module, *(f"{module}.{alias.name}" for alias in names)}
            case ast.Constant(str() as text):
                found.add(f"{PACKAGE}.__main__" if text == PACKAGE else text)
            case ast.JoinedStr([ast.Constant(str() as text), *_]) if text.startswith(
                f"{PACKAGE}."
            ) and text.endswith("."):
                found.add(text)
                # The command line knows its commands by name alone.
                found |= {
                    text + word.value
                    for word in ast.walk(tree)
                    if isinstance(word, ast.Constant) and isinstance(word.value, str)
                }
            case _:
                pass
    return found


def _distances(name: str, importers: dict[str, set[str]]) -> dict[str, int]:
    """Return how many imports lead from each module, at least, to the one of a name."""
    distances, queue = {name: 0}, deque([name])
    while queue:
        imported = queue.popleft()
        for importer in importers[imported] - distances.keys():
            distances[importer] = distances[imported] + 1
            queue.append(importer)
    return distances
