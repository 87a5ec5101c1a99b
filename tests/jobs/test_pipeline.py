"""The pipeline: what is wrong with any stage shows first, and a job that is stopped goes on."""

import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from erann_dist.errors import UserError
from erann_dist.log.run_log import read_log
from erann_dist.storage.folder import LocalFolder
from jobs import pipeline
from jobs.pipeline import Stage, load_pipeline
from tests.jobs.training.test_study import write_pretraining
from tests.support.commands import Running, erann
from tests.support.folded import write_folded_set, write_protocol


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folded_set(tmp_path_factory.mktemp("tones"), [1, 2])


def write_pipeline(folder: Path, shards: Path) -> Path:
    """Pretraining of one step, then two data sets of two folds."""
    write_pretraining(folder / "first.yaml", shards)
    for name in ("one", "two"):
        write_protocol(folder / f"{name}.yaml", shards, optim={"examples": 16})
    tree = {
        "pretrain": {"recipe": str(folder / "first.yaml")},
        "finetune": [{"recipe": str(folder / f"{name}.yaml")} for name in ("one", "two")],
        "run": {"dir": str(folder / "runs"), "name": "all"},
    }
    (folder / "all.yaml").write_text(yaml.safe_dump(tree))
    return folder / "all.yaml"


def test_settings_are_keys_of_sections() -> None:
    stage = Stage(recipe="x.yaml", set={"run": {"workers": {"min": 1, "max": 2}}, "model": {"fresh": ["fc1", "fc2"]}})
    assert stage.settings() == ['run.workers={"min": 1, "max": 2}', 'model.fresh=["fc1", "fc2"]']


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["finetune.0.set.model.fresh=[fc3]"], "ERANN-3-1 has no layer fc3"),
        (["finetune.1.set.model.variant=ERANN-2-1"], "two: the pretrained model: is an ERANN-3-1, model.variant is"),
        (["finetune.1.set.run.launcher=torchrun"], "run.launcher torchrun trains one run"),
        (["pretrain.set.run.launcher=torchrun"], "first.yaml: run.launcher torchrun trains one run"),
        (["finetune.1.set.run.launcher=ray"], "run.launcher is ray for some runs and none for others"),
        (["finetune.1.set.run.name=one"], "two cross-validations are named one"),
        (["finetune.1.set.run.name=first"], "two stages are called first"),
        (["finetune.1.set.optim.precision=fp16"], "fp16 needs a GPU"),
        (["finetune.1.set=3"], "finetune.1.set: "),
        (["run.name=held"], "held/two: is the folder of a run"),
    ],
)
def test_what_is_wrong_with_a_later_stage_shows_first(
    shards: Path, tmp_path: Path, overrides: list[str], line: str
) -> None:
    path = write_pipeline(tmp_path, shards)
    (tmp_path / "runs/held/two").mkdir(parents=True)
    (tmp_path / "runs/held/two/metrics.jsonl").touch()
    with pytest.raises(UserError) as refused:
        load_pipeline(path, overrides, None)
    assert line in str(refused.value)
    assert not (tmp_path / "runs/all").exists()


def test_a_folder_that_is_a_runs(shards: Path, tmp_path: Path) -> None:
    path = write_pipeline(tmp_path, shards)
    (tmp_path / "runs/all").mkdir(parents=True)
    (tmp_path / "runs/all/metrics.jsonl").touch()
    with pytest.raises(UserError, match="runs/all: is the folder of a run; give this one another run.name"):
        load_pipeline(path, [], None)


def test_the_cluster_is_large_enough_for_each_stage(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("cluster.embedded.ray_cluster", lambda address, cpus: asked.append(cpus))
    path = write_pipeline(tmp_path, shards)
    on_ray = [f"{stage}.set.run.launcher=ray" for stage in ("pretrain", "finetune.0", "finetune.1")]
    plan = load_pipeline(path, [*on_ray, "finetune.1.set.run.workers={min: 1, max: 2}"], None)
    pipeline._cluster(plan, None)
    assert asked == [2]


@pytest.mark.slow
def test_a_job_that_is_stopped_goes_on(shards: Path, tmp_path: Path) -> None:
    """Told to stop when its pretraining is done, then killed amid its folds, and run to the end."""
    path = write_pipeline(tmp_path, shards)
    runs = tmp_path / "runs/all"
    command = Running(tmp_path, "pipeline", path)
    try:
        command.wait_for(runs / "first/model/config.json")
        code = command.end(signal.SIGTERM)
        assert code == 143, command.text()
        assert "Traceback" not in command.text()
    finally:
        command.process.kill()
        command.process.wait()
    first = read_log(LocalFolder(str(runs / "first")))
    command = Running(tmp_path, "pipeline", path)
    try:
        command.wait_for(runs / "one/fold-1/model/config.json")
    finally:
        command.process.kill()
        command.process.wait()
    assert command.survivors() == []
    fold = read_log(LocalFolder(str(runs / "one/fold-1")))
    result = erann(tmp_path, "pipeline", path)
    assert [len(each["folds"]) for each in result["finetuned"]] == [2, 2]
    assert {each["init"] for each in result["finetuned"]} == {f"{runs}/first/model"}
    assert Path(result["report"]).exists()
    assert read_log(LocalFolder(str(runs / "first"))) == first  # not trained again
    assert read_log(LocalFolder(str(runs / "one/fold-1")))[: len(fold)] == fold
