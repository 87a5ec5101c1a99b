"""The built-in recipes."""

from pathlib import Path

from erann_dist.errors import UsageError


def find_recipe(path: Path) -> Path:
    """The file at `path` or, if there is none, the built-in recipe of that name. Raises UsageError."""
    own = Path(__file__).parent / path.name
    if path.exists():
        return path
    if path.parent == Path(".") and own.exists():
        return own
    names = ", ".join(sorted(file.name for file in Path(__file__).parent.glob("*.yaml")))
    raise UsageError(f"{path}: no such recipe; the built-in ones are {names}")
