"""The order in which the packages may import each other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ["erann_dist", "shards", "cluster", "jobs"]
FILES = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]


def imported_packages(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add((node.module or "").split(".")[0])
    return found


def test_every_package_is_seen() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_packages_above(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0]
    below = set(LAYERS[LAYERS.index(layer) + 1 :])
    assert not imported_packages(path) & below


@pytest.mark.parametrize("path", [p for p in FILES if p.relative_to(ROOT).parts[0] in ("erann_dist", "shards")])
def test_library_and_shards_know_nothing_of_ray(path: Path) -> None:
    assert "ray" not in imported_packages(path)
