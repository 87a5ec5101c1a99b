"""Prepares a command for submission: finds its run, collects its files, and rejects paths that the cluster lacks."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from cluster.submit.package import make_package
from cluster.submit.ray_jobs import Dependencies, Submission
from erann_dist.errors import UsageError
from erann_dist.recipe import RunSection, check, load_recipe, read_section, read_tree
from jobs.pipeline import Pipeline
from jobs.recipes import find_recipe
from jobs.terminal.progress import note
from jobs.training.cross_validation import read_design

COMMANDS = ("pretrain", "finetune", "study", "pipeline", "preflight")


@dataclass(frozen=True)
class _Part:
    """A recipe of the command, with the keys that are set in it."""

    path: Path
    settings: list[str]
    in_pipeline: bool = False  # Then its runs are written to the pipeline's folder.


def prepare(context: typer.Context, arguments: list[str], dependencies: Dependencies) -> Submission:
    """The submission for a command of erann.

    context: of any command of erann. arguments: those of erann, beginning with the command's name. Raises Typer's
    errors for arguments that the command itself rejects, UsageError and UserError.
    """
    name, *rest = arguments
    if name not in COMMANDS:
        raise UsageError(f"{name}: can't be submitted; these can: {', '.join(COMMANDS)}")
    typed = _typed(context, arguments)
    if typed.get("launcher") not in (None, "ray"):
        raise UsageError(f"--launcher {typed['launcher']}: runs on a cluster are launched by ray")
    recipes = _recipes(typed)
    if not recipes:
        raise UsageError(f"{name}: no recipe given")
    if typed.get("init") not in (None, "none"):
        _refuse_relative("--from", typed["init"])
    parts, run = _parts(name, typed, recipes)
    if name == "pipeline":
        _refuse_relative(f"{recipes[0]}: run.dir", run.rpartition("/")[0])
    files: dict[str, Path] = {}
    sent: dict[str, str] = {}  # New names of recipes that have another path in the package.
    for path in recipes:
        if path.exists():
            packed = _name_below_here(path) or f"recipes/{path.name}"
            if files.setdefault(packed, path) != path:
                raise UsageError(f"{path}: {files[packed]} has the same name; rename one of them")
            sent[str(path)] = packed
    for part in parts:
        tree = read_tree(find_recipe(part.path), part.settings)
        for key, place in _places(tree):
            if part.in_pipeline and key == "run.dir":
                continue
            _refuse_relative(f"{part.path}: {key}", place)
        also = [part.path] if part.in_pipeline and part.path.exists() else []
        for path in [*also, *_lists_of_keys(tree)]:
            files[_needed_below_here(path)] = path
    there = [sent.get(str(Path(each)), each) for each in rest]
    return Submission([name, *there], run, name != "preflight", make_package(files), dependencies)


def check_command(context: typer.Context, arguments: list[str]) -> None:
    """Check a command of erann that will run elsewhere: its options, and those of its recipes that are here.

    context, arguments: as for `prepare`. Raises Typer's errors, UsageError and UserError.
    """
    name = arguments[0] if arguments else ""
    typed = _typed(context, arguments)
    if name not in COMMANDS:
        return
    recipes = _recipes(typed)
    for recipe in recipes:
        try:
            find_recipe(recipe)
        except UsageError:
            if recipe.suffix not in (".yaml", ".yml"):
                raise
            note(f"{recipe} is not on this machine, so its keys are not checked")
            return
    _parts(name, typed, recipes)


def _recipes(typed: dict[str, Any]) -> list[Path]:
    return [Path(each) for each in typed.get("recipes") or [typed["recipe"]] if "=" not in str(each)]


def _typed(context: typer.Context, arguments: list[str]) -> dict[str, Any]:
    """The parsed parameters of a command of erann. Raises Typer's errors for wrong arguments, UsageError."""
    name, *rest = arguments or [""]
    group = context.find_root().command
    assert isinstance(group, TyperGroup)
    if name not in group.commands:
        raise UsageError(f"erann {name}: no such command; erann --help lists them")
    return group.commands[name].make_context(name, list(rest), parent=context).params


def _parts(name: str, typed: dict[str, Any], recipes: list[Path]) -> tuple[list[_Part], str]:
    """The recipes of the command's runs, and the folder of the run or of all runs."""
    overrides = [each for each in typed.get("recipes") or typed.get("overrides") or [] if "=" in each]
    if name == "pipeline":
        pipeline = check(Pipeline, read_tree(find_recipe(recipes[0]), overrides), str(recipes[0]))
        first = pipeline.pretrain
        recipe = load_recipe(find_recipe(Path(first.recipe)), first.settings())
        _require_ray(first.recipe, recipe.run)
        for stage in pipeline.finetune:
            settings = [f"model.variant={recipe.model.variant}", *stage.settings()]
            _require_ray(stage.recipe, read_design(find_recipe(Path(stage.recipe)), settings, None).run)
        parts = [_Part(Path(each.recipe), each.settings(), in_pipeline=True) for each in (first, *pipeline.finetune)]
        return parts, pipeline.run.url
    is_transfer = typed.get("kind") == "transfer"
    named = ["run.name=transfer", *overrides] if is_transfer else overrides
    runs = []
    for path in recipes:
        found = find_recipe(path)
        design = read_design(found, named, None) if is_transfer or name == "finetune" else load_recipe(found, named)
        _require_ray(path, design.run)
        runs.append(design.run)
    return [_Part(path, overrides) for path in recipes], runs[0].url


def _require_ray(recipe: str | Path, run: RunSection) -> None:
    if run.launcher != "ray":
        raise UsageError(f"{recipe}: run.launcher {run.launcher}: runs on a cluster are launched by ray")


def _places(tree: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The keys whose values are paths or URLs, and these values."""
    sections = {name: read_section(tree, name, "recipe") for name in ("data", "protocol", "model", "run")}
    for key in ("train", "eval"):
        for source in _sources(sections["data"], key):
            url = source.get("url") if isinstance(source, dict) else source
            yield f"data.{key}", str(url)
    if "shards" in sections["protocol"]:
        yield "protocol.shards", str(sections["protocol"]["shards"])
    yield "run.dir", str(sections["run"].get("dir", "runs"))
    if sections["model"].get("init", "none") != "none":
        yield "model.init", str(sections["model"]["init"])


def _sources(data: dict[str, Any], key: str) -> list[Any]:
    sources = data.get(key) or []
    return sources if isinstance(sources, list) else [sources]


def _lists_of_keys(tree: dict[str, Any]) -> Iterator[Path]:
    """The lists of clip keys given by relative paths, which are sent along; absolute ones must be on shared storage."""
    data = read_section(tree, "data", "recipe")
    for source in [*_sources(data, "train"), *_sources(data, "eval")]:
        for key in ("keys", "without"):
            if isinstance(source, dict) and source.get(key) and not Path(source[key]).is_absolute():
                yield Path(source[key])


def _refuse_relative(key: str, place: str) -> None:
    if "://" not in place and not Path(place).is_absolute():
        raise UsageError(
            f"{key}: {place} is a relative path, which the cluster does not have; give a path that all of its nodes "
            "share, or s3://bucket/prefix"
        )


def _name_below_here(path: Path) -> str | None:
    return None if path.is_absolute() or ".." in path.parts else path.as_posix()


def _needed_below_here(path: Path) -> str:
    name = _name_below_here(path)
    if name is None:
        raise UsageError(f"{path}: a file named in a recipe is sent only from below the current folder; move it there")
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    return name
