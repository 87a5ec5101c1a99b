"""The order in which the packages, and the folders in them, may import each other: docs/architecture.md names them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The lower ones first. A file imports from its own folder and from lower ones; "." stands for the files of a package
# that are not named here.
LAYERS = {
    "erann_dist": ". storage formats models recipe data log train".split(),
    "shards": "sources .".split(),
    "cluster": ". render preflight submit".split(),
    "jobs": (
        ". terminal html runs training recordings shard_sets plan preflight report pipeline submission demo bench cli"
    ).split(),
}
PACKAGES = list(LAYERS)
FILES = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts)
         for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}  # fmt: skip
MODULES = {name.removesuffix(".__init__"): path for path, name in FILES.items()}


def imported(path: Path) -> set[str]:
    """The modules that a file imports, at its top or in a function; of foreign ones the whole name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inside & MODULES.keys()) or {node.module}
            if not inside <= MODULES.keys():
                found.add(node.module)
    return found


def layer(module: str) -> tuple[int, int]:
    """Where a module stands: its package's place, and its folder's in that."""
    package, _, rest = module.partition(".")
    folder = rest.split(".")[0]
    order = LAYERS[package]
    return PACKAGES.index(package), order.index(folder if folder in order else ".")


def cycles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> Iterator[list[str]]:
        if name in way:
            yield [*way[way.index(name) :], name]
        elif name not in done:
            for other in sorted(graph.get(name, ())):
                yield from visit(other, [*way, name])
            done.add(name)

    for name in graph:
        yield from visit(name, [])


def test_every_package_and_folder_is_seen() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(PACKAGES)
    for package, order in LAYERS.items():
        folders = {path.name for path in (ROOT / package).iterdir() if (path / "__init__.py").exists()}
        assert folders - {"recipes"} <= set(order), package


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_nothing_of_a_higher_layer(path: Path) -> None:
    own = layer(FILES[path])
    higher = [name for name in imported(path) if name.split(".")[0] in PACKAGES and layer(name) > own]
    assert not higher


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name: imported(path) & MODULES.keys() - {name} for name, path in MODULES.items()}
    assert not list(cycles(graph))


@pytest.mark.parametrize("path", [p for p in FILES if FILES[p].split(".")[0] in ("erann_dist", "shards")])
def test_library_and_shards_know_nothing_of_ray(path: Path) -> None:
    assert "ray" not in {name.split(".")[0] for name in imported(path)}
