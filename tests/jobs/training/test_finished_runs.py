"""A run whose results are damaged is finished again; one whose folder is removed ends with one line."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest

from erann_dist.errors import UserError
from erann_dist.log.events import Event, Incident, Phase, Started, Step
from erann_dist.log.run_log import read_log
from erann_dist.recipe import Recipe
from erann_dist.storage.folder import LocalFolder
from erann_dist.train.checkpoint import Removed
from jobs.training.pretrain import pretrain
from tests.conftest import copy_tree, small_recipe


@pytest.fixture(scope="module")
def finished(tone_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    train(small_recipe(tone_shards, run, evaluate={"average_last": 2}, checkpoint={"every": 2, "keep_last": 2}))
    return run


def train(recipe: Recipe) -> tuple[list[Event], dict[str, Any]]:
    events: list[Event] = []
    return events, pretrain(recipe, "auto", None, events.append)


def hashes(run: Path) -> dict[str, str]:
    names = ("model/model.safetensors", "model/metrics.json", "model/config.json", "model-averaged/model.safetensors")
    return {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in names}


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return copy_tree(finished, tmp_path / "run")


def recipe_of(shards: Path, run: Path) -> Recipe:
    return small_recipe(shards, run, evaluate={"average_last": 2}, checkpoint={"every": 2, "keep_last": 2})


def test_nothing_is_done_again_for_one_that_is_whole(tone_shards: Path, run: Path) -> None:
    events, _ = train(recipe_of(tone_shards, run))
    assert [type(event) for event in events] == [Phase]  # which says that it is finished


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model/model.safetensors", "removed"),
        ("model/model.safetensors", "altered"),
        ("model/metrics.json", "removed"),
        ("model/metrics.json", "altered"),
        ("predictions.parquet", "removed"),
        ("model-averaged/model.safetensors", "altered"),
    ],
)
def test_results_are_made_again_from_the_last_checkpoint(tone_shards: Path, run: Path, name: str, damage: str) -> None:
    before = hashes(run)
    if damage == "removed":
        (run / name).unlink()
    else:
        (run / name).write_bytes((run / name).read_bytes()[:-1])
    events, outcome = train(recipe_of(tone_shards, run))
    (incident,) = (event for event in events if isinstance(event, Incident) and event.kind == "checkpoint")
    assert name in incident.text
    assert incident.text in [line.get("text") for line in read_log(LocalFolder(str(run)))]
    assert not [event for event in events if isinstance(event, Step)]
    assert [event.resumed_from for event in events if isinstance(event, Started)] == [
        f"{run}/checkpoints/step-00000004-0001"
    ]
    assert hashes(run) == before
    assert outcome["model"] == f"{run}/model"


def test_without_a_checkpoint_they_can_not_be(tone_shards: Path, run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "model/model.safetensors").unlink()
    with pytest.raises(UserError, match="model/model.safetensors"):
        train(recipe_of(tone_shards, run))
    assert (run / "model/config.json").exists()


def test_a_run_that_was_cleaned_up_stays_finished(tone_shards: Path, run: Path) -> None:
    """Its checkpoints and predictions were removed to save space; its model is whole."""
    shutil.rmtree(run / "checkpoints")
    (run / "predictions.parquet").unlink()
    events, outcome = train(recipe_of(tone_shards, run))
    assert [type(event) for event in events] == [Phase]  # which says that it is finished
    assert outcome["model"] == f"{run}/model"


@pytest.mark.parametrize("what", ["run", "run/starts"])
def test_a_folder_that_is_removed_while_it_trains(tone_shards: Path, tmp_path: Path, what: str) -> None:
    recipe = small_recipe(tone_shards, tmp_path / "run", checkpoint={"every": 2, "max_failed": 5})

    def remove(event: Event) -> None:
        if isinstance(event, Step) and event.step == 1:
            shutil.rmtree(tmp_path / what)

    with pytest.raises(Removed, match=str(tmp_path / "run")):
        pretrain(recipe, "auto", None, remove)
