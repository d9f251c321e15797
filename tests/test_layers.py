"""Packages stand above each other: none imports what is above it, however late in a function."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOP = ("distilled", "dashboard", "share", "calls", "cli")
"""Modules beside the packages: the library's and the commands' faces."""
DOCUMENTED = re.findall(r"^\| `(\w+)/` \|", (ROOT / "docs" / "code.md").read_text(), re.MULTILINE)
"""From the top of the page, which is the top of the house."""
ORDER = (*reversed(DOCUMENTED), *TOP)


def layer_of(module: str) -> str:
    return module.removeprefix("cvdd").lstrip(".").partition(".")[0]


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def arrows_up(source: str, layer: str) -> list[str]:
    names = (name for name in imported(ast.parse(source)) if name.startswith("cvdd."))
    known = [name for name in names if layer_of(name) in ORDER]
    return [name for name in known if ORDER.index(layer_of(name)) > ORDER.index(layer)]


def test_no_package_imports_what_is_above_it() -> None:
    files = [path for path in (ROOT / "cvdd").rglob("*.py") if path != ROOT / "cvdd" / "__init__.py"]
    layers = {path: layer_of(".".join(path.relative_to(ROOT).with_suffix("").parts)) for path in files}
    assert set(layers.values()) == set(ORDER)
    assert not {
        str(path.relative_to(ROOT)): found
        for path, layer in layers.items()
        if (found := arrows_up(path.read_text(), layer))
    }


def test_an_import_of_what_is_above_is_found() -> None:
    late = "def work() -> None:\n    from cvdd.chain.images import make_images\n"
    assert arrows_up(late, "synthesis") == ["cvdd.chain.images.make_images"]
    assert arrows_up(late, "verbs") == []
    assert arrows_up("import cvdd.cli\n", "commands") == ["cvdd.cli"]
    assert arrows_up("from cvdd import share\n", "report") == ["cvdd.share"]
