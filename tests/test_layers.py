"""Rooms and who may import whom: the order of ``ROOMS``, read from the import statements.

What is imported inside a function counts too, and so does what only type checkers import.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx

from benchmarks import code_lines

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (
    "gpdfx._links",
    "gpdfx.errors",
    "gpdfx.torch_private",
    "gpdfx.memory",
    "gpdfx.algebra",
    "gpdfx.calls",
    "gpdfx.branches",
    "gpdfx.control",
    "gpdfx.kernels",
    "gpdfx.passes.program",
    "gpdfx.passes.shares",
    "gpdfx.passes.folded",
    "gpdfx.passes.capture",
    "gpdfx.passes.rules",
    "gpdfx.passes.infer",
    "gpdfx.passes",
    "gpdfx.teacher",
    "gpdfx.access",
    "gpdfx.check",
    "gpdfx.files",
    "gpdfx.report",
    "gpdfx.models",
    "gpdfx.custom_ops",
    "gpdfx.compiler",
    "gpdfx.storage",
    "gpdfx.distill",
    "gpdfx",  # its face, gpdfx/__init__.py alone
    "gpdfx.data",
    "gpdfx.train",
    "gpdfx.cli",
    "gpdfx.__main__",
    "tests.helpers",
    "tests.networks",
    "tests.random_networks",
    "benchmarks",
    "tests",
)
"""A room imports from itself and from rooms above it."""
MOST = 12
"""Python files in one folder."""


def modules() -> dict[str, Path]:
    """All files by the names under which they are imported."""
    found = {}
    for folder, name in (
        ("gpdfx", "gpdfx"),
        ("passes", "gpdfx.passes"),
        ("kernels", "gpdfx.kernels"),
        ("benchmarks", "benchmarks"),
        ("tests", "tests"),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            inner = path.relative_to(ROOT / folder).with_suffix("")
            if folder != "gpdfx" or inner.parts[0] not in ("passes", "kernels"):
                found[".".join((name, *(p for p in inner.parts if p != "__init__")))] = path
    return found


MODULES = modules()


def room(module: str) -> str:
    """The room of a module: the longest name that it begins with."""
    found = [r for r in ROOMS if module == r or (r != "gpdfx" and module.startswith(f"{r}."))]
    assert found, f"{module} has no room"
    return max(found, key=len)


def targets(module: str, node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str]]:
    """What a statement imports of ours: modules, and the name in them."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, "") for alias in node.names if alias.name in MODULES)
        return
    package = module if MODULES[module].stem == "__init__" else module.rpartition(".")[0]
    above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
    base = ".".join([*above, *([node.module] if node.module else [])])
    for alias in node.names:
        inner = f"{base}.{alias.name}"
        if inner in MODULES:
            yield inner, ""
        elif base in MODULES:
            yield base, alias.name
        else:
            assert base.split(".")[0] not in ("gpdfx", "benchmarks", "tests"), (module, base)


def hidden(tree: ast.Module) -> set[ast.AST]:
    """The statements that only type checkers run."""
    blocks = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    return {inner for block in blocks for inner in ast.walk(block)}


def imports() -> Iterator[tuple[str, str, str, bool]]:
    """Importing module, imported module, name in it, and whether only type checkers see it."""
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text())
        unseen = hidden(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for target, name in targets(module, node):
                    yield module, target, name, node in unseen


IMPORTS = tuple(imports())
SEEN = [
    (module, target) for module, target, name, unseen in IMPORTS if name != "Report" or not unseen
]


def test_every_file_has_a_room() -> None:
    assert {room(module) for module in MODULES} <= set(ROOMS)
    assert len(IMPORTS) > 500


def test_rooms_import_from_rooms_above() -> None:
    wrong = {
        f"{module} imports {target}"
        for module, target in SEEN
        if ROOMS.index(room(target)) > ROOMS.index(room(module))
    }
    assert not wrong, "\n".join(sorted(wrong))


def test_no_circle_inside_a_room() -> None:
    graph = nx.DiGraph((m, t) for m, t in SEEN if room(m) == room(t) and m != t)
    circles = [sorted(part) for part in nx.strongly_connected_components(graph) if len(part) > 1]
    assert not circles, "\n".join(map(str, circles))


def test_type_checkers_alone_import_only_the_report() -> None:
    wrong = {
        f"{m} imports {t}: {name}" for m, t, name, unseen in IMPORTS if unseen and name != "Report"
    }
    assert not wrong, "\n".join(sorted(wrong))


def test_folders_fit_in_the_head() -> None:
    folders = {path.parent for name, path in MODULES.items() if name.startswith("gpdfx")}
    sizes = {str(f.relative_to(ROOT)): len([*f.glob("*.py")]) for f in folders}
    assert not {folder: size for folder, size in sizes.items() if size > MOST}


def test_lines_of_code_are_counted() -> None:
    source = '''"""Docstring
of a module."""

X = """text
in code"""  # a comment


def f(a,
      b):
    """Docstring."""
    # alone
    return [
        a,

        b,
    ]
"""About X."""
'''
    assert code_lines.code_lines(source) == 2 + 2 + 4
    found = code_lines.count([(p, "x = 1") for p in ("passes/rules/a.py", "passes/folded.py")])
    assert found == {"rules": 1, "fold": 1}
    assert code_lines.room_of("gpdfx/models.py") == "models"
    assert code_lines.sum_of("models") == "training"
    assert code_lines.sum_of("report") == "rest"
    assert "core                           1" in code_lines.table({"now": found})
    assert sum(code_lines.count(code_lines.as_they_are()).values()) > 10_000
