"""A run that meets damage and goes on: bad clips within the budget, caches that are full; and what it says of them."""

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from erann_dist.data.cache import ClipCache
from erann_dist.data.manifest import load_manifest
from erann_dist.errors import UserError
from erann_dist.log.events import Event, Incident, Step
from erann_dist.log.run_log import read_log
from erann_dist.recipe import Recipe
from erann_dist.storage.folder import LocalFolder
from erann_dist.train import checkpoint
from erann_dist.train.distributed import single_worker
from erann_dist.train.trainer import train
from tests.conftest import copy_tree, small_recipe
from tests.support.workers import CPU, train_alone, train_on

BAD = (7, 20, 31)


@pytest.fixture
def damaged(tone_shards: Path, tmp_path: Path) -> Path:
    """A set with three damaged clips; beside it the lists `bad`, of their keys, and `sound`, of two others."""
    shards = copy_tree(tone_shards, tmp_path / "shards")
    manifest = load_manifest(shards)
    for row in BAD:
        path = Path(str(manifest.tars[manifest.shards[row]]))
        data = bytearray(path.read_bytes())
        data[int(manifest.offsets[row]) + 500] ^= 1
        path.write_bytes(data)
    for name, rows in (("bad", BAD), ("sound", (0, 1))):
        (tmp_path / name).write_text("\n".join(manifest.keys[row].as_py() for row in rows))
    return shards


def tolerant(shards: Path, run_dir: Path, budget: int, **sections: dict[str, Any]) -> Recipe:
    """A recipe that evaluates on the two sound clips."""
    source = {"eval": {"url": str(shards), "keys": str(shards.parent / "sound")}, "max_bad_clips": budget}
    return small_recipe(shards, run_dir, data=source | sections.pop("data", {}), **sections)


def lines(shards: Path) -> set[str]:
    """What is to be said of the bad clips."""
    m = load_manifest(shards)
    hint = f"check the set with erann verify {shards}"
    return {f"{m.tars[m.shards[row]]}: clip {m.keys[row]} is damaged; {hint}" for row in BAD}


def losses(events: list[Event]) -> list[float]:
    return [event.loss for event in events if isinstance(event, Step)]


def incidents(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Incident) and event.kind != "failure"]


def logged(recipe: Recipe) -> list[str]:
    """The incidents in the run's log, but for those of a new start."""
    found = read_log(LocalFolder(recipe.run_url))
    return [line["text"] for line in found if line["event"] == "Incident" and line["kind"] != "failure"]


def assert_same_weights(one: Recipe, other: Recipe) -> None:
    expected, found = (load_file(Path(recipe.run_url) / "model" / "model.safetensors") for recipe in (one, other))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_without_a_budget_the_first_bad_clip_ends_the_run(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        train_alone(tolerant(damaged, tmp_path / "run", 0))
    assert str(error.value) in lines(damaged)
    assert checkpoint.committed(LocalFolder(str(tmp_path / "run"))) == []


def test_one_bad_clip_too_many_ends_the_run(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is damaged; .*; it is bad clip number 3, data.max_bad_clips is 2$"):
        train_alone(tolerant(damaged, tmp_path / "run", 2))


def test_bad_clips_are_replaced_and_told_alike_on_one_and_two_workers(damaged: Path, tmp_path: Path) -> None:
    curves = []
    for world_size in (1, 2):
        recipe = tolerant(damaged, tmp_path / f"run{world_size}", 3)
        events = train_on(world_size, recipe)
        run = LocalFolder(recipe.run_url)
        facts, _ = checkpoint.load(run, checkpoint.committed(run)[-1])
        assert facts.bad_clips == sorted((tmp_path / "bad").read_text().split())
        assert sorted(incidents(events)) == sorted(lines(damaged))
        assert logged(recipe) == incidents(events)
        curves.append(losses(events))
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-4)


def test_a_run_with_bad_clips_goes_on_as_it_was(damaged: Path, tmp_path: Path) -> None:
    """Stopped after two steps of four, it ends with the same weights, and tells of no clip twice."""
    every = {"checkpoint": {"every": 2, "keep_last": 9}, "optim": {"examples": 64}}
    whole, cut = (tolerant(damaged, tmp_path / name, 3, **every) for name in ("whole", "cut"))
    expected = train_alone(whole)
    shutil.copytree(
        Path(whole.run_url), Path(cut.run_url), ignore=shutil.ignore_patterns("model", "step-00000004-0001")
    )
    events = train_alone(cut)
    assert losses(events) == losses(expected)[2:]
    assert_same_weights(whole, cut)
    assert sorted(logged(cut)) == sorted(logged(whole)) == sorted(lines(damaged))


def test_the_weights_are_the_same_with_every_kind_of_cache(tone_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "one").write_text(load_manifest(tone_shards).keys[0].as_py())
    data = {"eval": {"url": str(tone_shards), "keys": str(tmp_path / "one")}, "crop_s": 0.5}
    none = small_recipe(tone_shards, tmp_path / "none", data=data)
    train_alone(none)
    for form in ("flac", "pcm"):
        for state in ("cold", "warm", "spoiled", "full"):
            cache = {"dir": str(tmp_path / f"{form}-cache"), "max_bytes": 64 << 20, "format": form}
            if state == "spoiled":
                for path in Path(str(cache["dir"])).iterdir():
                    content = bytearray(path.read_bytes())
                    content[len(content) // 3 :: 1000] = bytes(x ^ 1 for x in content[len(content) // 3 :: 1000])
                    path.write_bytes(content[: len(content) * 2 // 3])
            if state == "full":
                cache |= {"dir": str(tmp_path / f"{form}-full"), "max_bytes": 3 << 20}
            recipe = small_recipe(tone_shards, tmp_path / f"{form}-{state}", data=data | {"cache": cache})
            events = train_alone(recipe)
            assert_same_weights(none, recipe)
            first = next(event for event in events if isinstance(event, Step))
            assert first.cache_hits is not None
            assert (first.cache_hits == 1) == (state == "warm"), (form, state)
            assert incidents(events) == logged(recipe), (form, state)
            full = [f"{cache['dir']}: the cache is full"] if state == "full" else []
            assert [text.partition(";")[0] for text in incidents(events)] == full, (form, state)


def test_the_cache_is_closed_behind_the_loaders_threads(
    tone_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would go on writing to files that others have opened meanwhile."""
    alive = []
    close = ClipCache.close

    def watched(cache: ClipCache) -> None:
        alive.append([thread.name for thread in threading.enumerate() if thread.name.startswith("loader")])
        close(cache)

    def stop(event: Event) -> None:
        if isinstance(event, Step):
            raise KeyboardInterrupt

    monkeypatch.setattr(ClipCache, "close", watched)
    cache = {"cache": {"dir": str(tmp_path / "cache"), "max_bytes": 64 << 20}}
    recipe = small_recipe(tone_shards, tmp_path / "run", data=cache)
    with single_worker(CPU) as workers, pytest.raises(KeyboardInterrupt):
        train(recipe, workers, stop)
    assert alive == [[]]
