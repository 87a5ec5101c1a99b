"""Cross-validation: how a set is divided, what is refused before a run begins, and what the runs come to."""

import json
import os
import re
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from erann_dist.errors import Stopped, UserError
from erann_dist.models.spec import build_model
from erann_dist.recipe import Recipe, check, read_tree
from erann_dist.storage.folder import open_folder
from erann_dist.train.model_folder import initialise
from jobs.pipeline import Pipeline
from jobs.recipes import find_recipe
from jobs.terminal.show import folds_page
from jobs.training import cross_validation, scheduler
from jobs.training.cross_validation import CrossValidation, load_cross_validation
from jobs.training.finetune import finetune
from jobs.training.pretrain import check_run, only_one
from shards.sources.data_sets import DATA_SETS, DataSet, ShardSetFacts
from tests.conftest import small_recipe
from tests.support.folded import LABELS, a_model, write_folded_set, write_protocol
from tests.support.workers import train_alone


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folded_set(tmp_path_factory.mktemp("tones"), [1, 2, 3])


def run(validation: CrossValidation) -> dict[str, Any]:
    (result,) = finetune([validation], None, lambda name, event: None)
    return result


def test_each_fold_is_held_out_once(shards: Path, tmp_path: Path) -> None:
    validation = load_cross_validation(write_protocol(tmp_path / "t.yaml", shards), [], None)
    assert sorted(validation.recipes) == [1, 2, 3]
    for fold, recipe in validation.recipes.items():
        assert recipe.data.eval[0].fold == [fold]
        assert sorted([fold, *(recipe.data.train[0].fold or [])]) == [1, 2, 3]
        assert recipe.run_url == f"{tmp_path}/runs/t/fold-{fold}"
        assert recipe.optim.lr == 2e-4


def test_the_rate_is_the_protocols_unless_it_is_given(shards: Path, tmp_path: Path) -> None:
    path, model = write_protocol(tmp_path / "t.yaml", shards), a_model(tmp_path / "m")
    assert load_cross_validation(path, [], model).recipes[1].optim.lr == 1e-4
    assert load_cross_validation(path, ["optim.lr=0.5"], model).recipes[1].optim.lr == 0.5


def test_results_are_the_folds_own(shards: Path, tmp_path: Path) -> None:
    result = run(load_cross_validation(write_protocol(tmp_path / "t.yaml", shards), [], None))
    folder = tmp_path / "runs" / "t"
    assert json.loads((folder / "results.json").read_text()) == result
    hits, confusion = [], np.zeros((3, 3), int)
    for fold in result["folds"]:
        table = pq.read_table(folder / fold["run"] / "predictions.parquet")
        predicted = np.array(table["scores"].to_pylist()).argmax(axis=1)
        true = np.array(table["targets"].to_pylist())[:, 0]
        np.add.at(confusion, (true, predicted), 1)
        hits.append((true == predicted).mean())
        evaluated = [json.loads(line) for line in (folder / fold["run"] / "metrics.jsonl").read_text().splitlines()]
        scores = [line["metrics"]["accuracy"] for line in evaluated if line["event"] == "Evaluated"]
        assert (fold["accuracy"], fold["best_accuracy"]) == (scores[-1], max(scores))
        assert (fold["clips"], fold["train_clips"]) == (6, 12)
    assert [fold["accuracy"] for fold in result["folds"]] == pytest.approx(hits)
    assert (result["mean"], result["std"]) == pytest.approx((np.mean(hits), np.std(hits, ddof=1)))
    assert result["confusion"] == confusion.tolist()
    assert [each["name"] for each in result["per_class"]] == LABELS
    assert (result["comparable"], result["paper"]) == (True, None)


def test_finished_folds_are_not_run_again(shards: Path, tmp_path: Path) -> None:
    path = write_protocol(tmp_path / "t.yaml", shards)
    first = run(load_cross_validation(path, [], None))
    logs = {p: p.read_bytes() for p in tmp_path.glob("runs/t/fold-*/metrics.jsonl")}
    assert len(logs) == 3
    assert run(load_cross_validation(path, [], None)) == first
    assert {p: p.read_bytes() for p in logs} == logs
    # What can't be read of a finished fold is told; the others count.
    folder = tmp_path / "runs/t"
    (folder / "fold-1/metrics.jsonl").write_text("")
    (folder / "fold-2/model/metrics.json").write_text('{"task": "classification"}')
    result = run(load_cross_validation(path, [], None))
    assert [fold["fold"] for fold in result["folds"]] == [1, 3]
    assert result["folds"][0]["accuracy"] == first["folds"][0]["accuracy"]
    assert (result["folds"][0]["best_accuracy"], result["folds"][0]["seconds"]) == (None, None)
    (failed,) = result["failed"]
    assert failed["why"].startswith(f"{folder}/fold-2/model/metrics.json: damaged (missing ")
    folds_page(result)
    # Nor may a run of its own or another command have the folder.
    recipe = small_recipe(shards, folder)
    with pytest.raises(UserError, match="is the folder of a study; give this run another run.name"):
        check_run(recipe, open_folder(str(folder)), "auto")
    with only_one(open_folder(str(folder))), pytest.raises(UserError, match="is being trained by another process"):
        run(load_cross_validation(path, [], None))
    for content in ("{}", "[", '{"kind": 3}'):
        (folder / "study.json").write_text(content)
        with pytest.raises(UserError, match="study.json: damaged .*; remove it if"):
            run(load_cross_validation(path, [], None))


def test_a_fold_that_fails_does_not_take_the_others_along(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    validation = load_cross_validation(write_protocol(tmp_path / "t.yaml", shards), [], None)
    (tmp_path / "runs" / "t" / "fold-2").mkdir(parents=True)
    (tmp_path / "runs" / "t" / "fold-2" / "model").write_text("in the way")
    result = run(validation)
    assert [fold["fold"] for fold in result["folds"]] == [1, 3]
    (failed,) = result["failed"]
    assert failed["fold"] == 2
    assert failed["why"].startswith(f"{tmp_path}/runs/t/fold-2/model")
    assert failed["why"].endswith("Not a directory, in the last of 3 starts")
    assert "Traceback" not in capfd.readouterr().err
    assert not result["comparable"]
    (tmp_path / "runs" / "t" / "fold-2" / "model").unlink()
    assert [fold["fold"] for fold in run(validation)["folds"]] == [1, 2, 3]


def test_fine_tuning_begins_with_the_models_weights(shards: Path, tmp_path: Path) -> None:
    url = a_model(tmp_path / "m")
    (tmp_path / "run").mkdir()
    (tmp_path / "m").rename(tmp_path / "run" / "model")
    given = build_model("ERANN-3-1", 5)
    initialise(given, str(tmp_path / "run"), [])  # a run's folder will do
    ours = build_model("ERANN-3-1", 3)
    fresh = {name: value.clone() for name, value in ours.state_dict().items()}
    initialise(ours, f"{tmp_path}/run/model", ["fc1", "fc2"])
    for name, value in ours.state_dict().items():
        if name.startswith(("fc1.", "fc2.")):
            assert torch.equal(value, fresh[name]), name
        else:
            assert torch.equal(value, given.state_dict()[name]), name
    assert not torch.equal(ours.stages[0][0].conv1.weight, fresh["stages.0.0.conv1.weight"])
    assert url.endswith("/m")


def test_a_run_begins_with_them_and_then_goes_its_own_way(shards: Path, tmp_path: Path) -> None:
    model = a_model(tmp_path / "m")
    path = write_protocol(tmp_path / "t.yaml", shards)
    # So small a rate that the weights are still there.
    recipe = load_cross_validation(path, ["optim.lr=1e-12", "optim.examples=16"], model).recipes[1]
    train_alone(recipe)
    ours, theirs = load_file(f"{recipe.run_url}/model/model.safetensors"), load_file(f"{model}/model.safetensors")
    for name in ("stages.0.0.conv1.weight", "fc1.weight"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-9)
    assert ours["fc2.weight"].shape == (3, 128)


def bad_front_end(folder: Path) -> None:
    front_end = json.loads((folder / "config.json").read_text())["front_end"]
    config(folder, front_end=front_end | {"hop": 320})


def cut_short(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def config(folder: Path, **changes: Any) -> None:
    kept = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(kept | changes))


def not_a_number(folder: Path, in_config: bool = True) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["fc1.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors")
    if in_config:
        config(folder, weights_sha256=None)


def a_folder_in_place_of_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (bad_front_end, "made for another front end"),
        (cut_short, "model.safetensors: can't be read"),
        (lambda folder: config(folder, variant="ERANN-2-1"), "do not belong together"),
        (lambda folder: config(folder, sample_rate=32_000), "needs 32000 Hz, models are trained at 44100 Hz"),
        (lambda folder: config(folder, label_names=["one"]), "has 5 label_ids, but 1 label_names"),
        (lambda folder: config(folder, label_ids="l0l1l"), r"not a model's configuration \(label_ids: "),
        (lambda folder: config(folder, depth=3), r"not a model's configuration \(depth: "),
        (not_a_number, "fc1.weight is not finite"),
        (lambda folder: not_a_number(folder, in_config=False), "damaged, or not the weights that config.json was"),
        (a_folder_in_place_of_weights, "model.safetensors: can't be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors: can't be read"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a model's configuration"),
        (lambda folder: (folder / "config.json").unlink(), "no model here"),
    ],
)
def test_a_model_that_can_not_be_begun_with(shards: Path, tmp_path: Path, spoil: Any, line: str) -> None:
    model = a_model(tmp_path / "m")
    spoil(tmp_path / "m")
    with pytest.raises(UserError, match=line):
        run(load_cross_validation(write_protocol(tmp_path / "t.yaml", shards), [], model))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["model.variant=ERANN-2-1"], "is an ERANN-3-1, model.variant is ERANN-2-1"),
        (["model.fresh=[fc3]"], "ERANN-3-1 has no layer fc3"),
        (["model.fresh=[]"], "has 5 labels, the clips have 3; add fc2 to model.fresh"),
        (["protocol.fold=present"], "no such key; did you mean folds"),
        (["protocol.folds=some"], "protocol: folds"),
        (["protocol.folds=actors"], "protocol.folds=actors is only for ravdess"),
        (["data.train=x"], "data.train: a cross-validation takes its clips from protocol.shards; remove this key"),
        (["data=x"], "data: input should be a section {key: value, ...}, not 'x'"),
        (["model=X"], "model: input should be a section {key: value, ...}, not 'X'"),
        (["model=null"], "model.variant: this key is required"),
        (["optim=3"], "optim: input should be a section {key: value, ...}, not 3"),
        (["run=foo"], "run: input should be a section {key: value, ...}, not 'foo'"),
        (["run.dir=5"], "run: dir: input should be a valid string, not 5"),
        (["run.name=../up"], "run: name: string should match pattern"),
        (["run.launcher=torchrun"], "run.launcher torchrun trains one run"),
        (["optim.precision=fp16", "run.device=cpu"], "fp16 needs a GPU"),
        (["optim.precision=fp16"], "fp16 needs a GPU"),
        (["data.cache={dir: /proc/none, max_bytes: 1GB}"], "/proc/none: no cache can be kept here"),
    ],
)
def test_settings_that_do_not_fit(shards: Path, tmp_path: Path, overrides: list[str], line: str) -> None:
    model = a_model(tmp_path / "m")
    with pytest.raises(UserError, match=re.escape(line)):
        run(load_cross_validation(write_protocol(tmp_path / "t.yaml", shards), overrides, model))
    assert not (tmp_path / "runs").exists()


def test_sets_that_do_not_fit(tone_shards: Path, tmp_path: Path) -> None:
    def refused(shards: Path, line: str, **protocol: Any) -> None:
        path = write_protocol(tmp_path / "t.yaml", shards, protocol={"shards": str(shards), **protocol})
        with pytest.raises(UserError, match=line):
            load_cross_validation(path, [], None)

    refused(tone_shards, "is for tagging")
    refused(write_folded_set(tmp_path / "one", [1]), "has 1 folds")
    part = write_folded_set(tmp_path / "part", [1, 2, 10], "urbansound8k")
    refused(part, "lacks urbansound8k's fold 3, 4, 5, 6, 7, 8, 9; protocol.folds=present")
    refused(
        write_folded_set(tmp_path / "case", [1, 2], labels=["Dog", "dog", "cat"]), "Dog and dog differ only in case"
    )
    refused(write_folded_set(tmp_path / "class", [1, 2], without=("high", 2)), "no clip of high outside fold 2")
    elsewhere = write_folded_set(tmp_path / "elsewhere", [-1, 1, 2], without=("high", 2))
    refused(elsewhere, "no clip of high outside fold 2")
    refused(write_folded_set(tmp_path / "slow", [1, 2], sample_rate=32_000), "is at 32000 Hz, ERANN needs 44100 Hz")


def test_the_folds_of_ones_own_set_are_those_that_it_has(tmp_path: Path) -> None:
    shards = write_folded_set(tmp_path / "set", [-1, 0, 2, 4])
    validation = load_cross_validation(write_protocol(tmp_path / "t.yaml", shards), [], None)
    assert sorted(validation.recipes) == [0, 2, 4]
    assert (validation.division.missing_clips, validation.division.not_comparable) == (0, None)


def test_clips_that_a_data_set_lacks_are_counted(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_protocol(tmp_path / "t.yaml", shards)
    tones = DataSet(lambda options: pytest.fail("is not read"), shard_sets={"tones": ShardSetFacts(3, 19)})
    monkeypatch.setitem(DATA_SETS, "tones", tones)
    division = load_cross_validation(path, [], None).division
    assert (division.missing_clips, division.not_comparable) == (1, "18 clips of 19")
    monkeypatch.setattr(cross_validation, "_ENOUGH", 0.9)
    division = load_cross_validation(path, [], None).division
    assert (division.missing_clips, division.not_comparable) == (1, None)


def test_two_in_one_folder(shards: Path, tmp_path: Path) -> None:
    validation = load_cross_validation(write_protocol(tmp_path / "t.yaml", shards), [], None)
    with pytest.raises(UserError, match="two cross-validations are named t; give each its own run.name"):
        finetune([validation, validation], None, lambda name, event: None)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("all_finished", [True, False])
def test_told_to_stop_as_the_last_run_ends(
    shards: Path, tmp_path: Path, all_finished: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = load_cross_validation(write_protocol(tmp_path / "t.yaml", shards), [], None).recipes

    def told(waiting: dict[str, Recipe], *_: Any) -> dict[str, scheduler.Ended]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {name: scheduler.Ended({"accuracy": 1.0}) for name in waiting if all_finished or name != "2"}

    monkeypatch.setattr(scheduler, "_run", told)
    with nullcontext() if all_finished else pytest.raises(Stopped, match="stop requested by SIGTERM"):
        scheduler.run_all({str(fold): recipe for fold, recipe in recipes.items()}, None, lambda name, event: None)


def test_part_of_a_data_set_is_not_comparable(tmp_path: Path) -> None:
    part = write_folded_set(tmp_path / "part", [1, 2, 10], "urbansound8k")
    path = write_protocol(tmp_path / "t.yaml", part, protocol={"shards": str(part), "folds": "present"})
    validation = load_cross_validation(path, [], None)
    assert sorted(validation.recipes) == [1, 2, 10]
    assert validation.division.not_comparable == "folds 1, 2, 10 of 10, 18 clips of 8732"


def test_a_folder_that_holds_something_else(shards: Path, tmp_path: Path) -> None:
    path = write_protocol(tmp_path / "t.yaml", shards)
    run(load_cross_validation(path, ["optim.examples=16"], None))
    with pytest.raises(UserError, match=r"started with a different recipe \(optim.lr: 0.0002 -> 0.001\)"):
        run(load_cross_validation(path, ["optim.examples=16", "optim.lr=1e-3"], None))
    other = write_folded_set(tmp_path / "other", [1, 2], "others")
    with pytest.raises(UserError, match="holds a study of tones"):
        run(load_cross_validation(write_protocol(tmp_path / "o.yaml", other), ["run.name=t"], None))
    inside = load_cross_validation(path, [f"run.dir={tmp_path}/runs/t", "run.name=fold-1"], None)
    with pytest.raises(UserError, match="fold-1: is the folder of a run"):
        run(inside)


@pytest.mark.parametrize(("name", "folds"), [("esc50", 5), ("urbansound8k", 10), ("ravdess", 4)])
def test_recipes_that_come_along(tmp_path: Path, name: str, folds: int) -> None:
    shards = write_folded_set(tmp_path / "set", list(range(1, folds + 1)), name)
    path = find_recipe(Path(f"{name}.yaml"))
    validation = load_cross_validation(path, [f"protocol.shards={shards}", f"run.dir={tmp_path}"], None)
    assert sorted(validation.recipes) == list(range(1, folds + 1))
    first = validation.recipes[1]
    assert (first.optim.lr, first.optim.schedule, first.optim.global_batch) == (2e-4, "constant", 32)
    assert validation.division.not_comparable
    assert validation.division.not_comparable.startswith(f"{6 * folds} clips of ")


def test_the_pipeline_that_comes_along() -> None:
    path = find_recipe(Path("pipeline.yaml"))
    pipeline = check(Pipeline, read_tree(path, ["pretrain.set.run.workers=8"]), str(path))
    assert pipeline.pretrain.settings() == ["run.workers=8"]
    assert [find_recipe(Path(stage.recipe)).stem for stage in pipeline.finetune] == ["esc50", "urbansound8k", "ravdess"]
