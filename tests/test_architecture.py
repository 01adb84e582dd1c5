"""The arrows of docs/architecture.md, read from the imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("pipelines", "training", "jobs")
ALLOWED = {  # prefixes
    "pipelines": ("pipelines",),
    "training": ("training", "pipelines.dataset"),
    "jobs": ROOMS,
}


def imports(path: Path) -> set[str]:
    """Modules of ours that a file imports, wherever in it; `from a import b` counts as a.b if that is a module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = ROOT.joinpath(*node.module.split("."), f"{alias.name}.py")
                found.add(f"{node.module}.{alias.name}" if inner.exists() else node.module)
    return {name for name in found if name.split(".")[0] in ROOMS}


@pytest.mark.parametrize("path", [p for room in ROOMS for p in sorted((ROOT / room).rglob("*.py"))], ids=str)
def test_imports_run_downwards_only(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    assert [name for name in imports(path) if not name.startswith(ALLOWED[room])] == []


def test_the_loop_knows_neither_ray_nor_mlflow() -> None:
    text = (ROOT / "training" / "loop.py").read_text()
    modules = {
        getattr(n, "module", None) or n.names[0].name
        for n in ast.walk(ast.parse(text))
        if isinstance(n, (ast.Import, ast.ImportFrom))
    }
    assert not {name for name in modules if name and name.split(".")[0] in ("ray", "mlflow")}


def test_functions_stay_short() -> None:
    """Sixty lines of body at most, docstring apart; a longer one has two natures."""
    for path in (p for room in ROOMS for p in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
                length = (node.end_lineno or 0) - first.lineno + 1
                assert length <= 60, f"{path.name}:{node.lineno} {node.name} has {length} lines"
