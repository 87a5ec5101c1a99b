"""The recipes that come with the program."""

from pathlib import Path

from erann_dist.errors import UsageError


def find_recipe(path: Path) -> Path:
    """The file at `path`, else the recipe of that name that comes with the program. Raises UsageError."""
    own = Path(__file__).parent / path.name
    if path.exists():
        return path
    if path.parent == Path(".") and own.exists():
        return own
    names = ", ".join(sorted(file.name for file in Path(__file__).parent.glob("*.yaml")))
    raise UsageError(f"{path}: no such recipe; with the program come {names}")
