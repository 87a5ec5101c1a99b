"""`erann report`: what its page says of runs and studies, and of what can't be read."""

import base64
import io
import json
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from erann_dist.data.manifest import load_manifest
from erann_dist.errors import UserError
from erann_dist.log.events import Evaluated, Finished, Incident
from erann_dist.log.run_log import read_log
from erann_dist.storage.folder import LocalFolder
from erann_dist.train.evaluation import Predictions, read_predictions, write_scores
from jobs.cli.__main__ import main
from jobs.html import page
from jobs.report.classes import class_table, confusion_matrix
from jobs.report.clips import Clip, Label, Sound, best_and_worst, clip_losses, gallery
from jobs.report.report import report
from jobs.report.run_part import notes
from tests.conftest import small_recipe
from tests.support.html_page import Page, require_self_contained
from tests.support.run_logs import started, step, write_log
from tests.support.workers import train_alone

HOSTILE = "<script>alert(1)</script>"
LABELS = ["bark", HOSTILE, "rain & wind"]
SCORES = np.array(
    [[0.9, 0.05, 0.05], [0.3, 0.6, 0.1], [0.1, 0.8, 0.1], [0.01, 0.98, 0.01], [0.25, 0.0, 0.75], [0.0, 0.0, 1.0]],
    np.float32,
)
TRUE = [0, 0, 1, 1, 2, 2]
KEYS = ["sure-bark", HOSTILE, "c", "d", "e", "sure-rain"]


def write_predictions(folder: Path, targets: Sequence[Sequence[int]], scores: np.ndarray = SCORES) -> None:
    columns = {"targets": pa.array(targets, pa.list_(pa.int16()))}
    labels = [f"id{c}" for c in range(scores.shape[1])]
    with LocalFolder(str(folder)).writing("predictions.parquet") as file:
        write_scores(file, pa.chunked_array([KEYS]), scores, labels, columns)


def classification_metrics(accuracy: float = 5 / 6, **others: Any) -> dict[str, Any]:
    return {
        "task": "classification",
        "accuracy": accuracy,
        "clips": 6,
        "listed": 8,
        "coverage": 0.75,
        "list_hash": "ab" * 32,
        "chance_accuracy": 1 / 3,
        "confusion": [[1, 1, 0], [0, 2, 0], [0, 0, 2]],
        "per_class": [
            {"id": f"id{c}", "name": name, "positives": 2, "accuracy": [0.5, 1.0, 1.0][c]}
            for c, name in enumerate(LABELS)
        ],
    } | others


def write_run(folder: Path, metrics: dict[str, Any] | None, **started_with: Any) -> Path:
    """A run of ten steps: with metrics finished, without them stopped at step 4."""
    end: list[Any] = [
        (50.0, Evaluated(10, 6, {"accuracy": 0.8}, averaged=2)),
        (60.0, Evaluated(10, 6, {"accuracy": 0.7})),
    ]
    write_log(
        LocalFolder(str(folder)),
        (10.0, started(launched=0.0, **started_with)),
        (20.0, step(4, seconds=8.0, loss=2.0)),
        (21.0, Evaluated(4, 6, {"accuracy": 0.95})),
        (22.0, Incident(4, "failure", f"worker 1 was lost {HOSTILE}", steps_lost=2, seconds_lost=65.0)),
        *([(40.0, step(10, seconds=12.0)), *end, (61.0, Finished(10, 50.0, 0.3))] if metrics else []),
    )
    recipe = small_recipe(Path("no/such/set"), folder).model_dump(mode="json", exclude_none=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if metrics:
        (folder / "model").mkdir()
        (folder / "model/metrics.json").write_text(json.dumps(metrics))
        write_predictions(folder, [[c] for c in TRUE])
    return folder


def page_of(*folders: Path) -> Page:
    report([str(folder) for folder in folders], folders[0].parent / "page.html", None)
    return Page((folders[0].parent / "page.html").read_text())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(
        tmp_path / "one", classification_metrics(), hardware=["H200", "H200"], versions={"torch": "2.11.0"}
    )


def test_the_page_of_a_classification_run(run: Path) -> None:
    page = page_of(run)
    assert ["1", HOSTILE, "", "1.0000", "2", ""] in page.cells
    assert ["3", "bark", "", "0.5000", "2", f"{HOSTILE} (1)"] in page.cells
    assert ["bark", "1", "1", ""] in page.cells  # of the confusion matrix
    assert f"bark predicted as {HOSTILE}: 1 of 2" in page.values("title")
    facts = {cells[0]: cells[1] for cells in page.cells if len(cells) == 2}
    assert facts["coverage"] == "6 of 8 listed clips (75.0%)"
    assert facts["hash of the list"] == "ab" * 32
    assert facts["hardware"] == "2 × H200"
    assert facts["versions"] == "torch 2.11.0"
    assert facts["evaluated on"] == "no/such/set"
    assert facts["throughput"].startswith("100.0 examples/s, 200.0 clips/s decoded, 1.0% waiting")
    assert facts["goodput"] == "32.8% of the time spent on steps that count; lost: 2 steps, 0:01:05"
    assert [f"worker 1 was lost {HOSTILE}", "2", "0:01:05"] in [cells[3:] for cells in page.cells]
    for text in (
        "0.8333",
        "accuracy; by chance 0.3333",
        "0.9500",
        "best accuracy during training, at step 4; selected on these clips",
    ):
        assert text in page.texts
    assert "variant: ERANN-3-1" in page.text
    assert len([label for label in page.values("aria-label") if label.endswith("over the steps")]) == 4
    assert "has not finished" not in page.text


def test_other_evaluations_of_the_model(run: Path) -> None:
    """What erann evaluate wrote, with its selection and what it has in common with another's."""
    absent = {"file": "list", "count": 4, "examples": ["a", HOSTILE, "c"]}
    common = {
        "file": "theirs/predictions.parquet",
        "clips": 5,
        "only_ours": 1,
        "only_theirs": 2,
        "list_hash": "cd" * 32,
        "ours": {"accuracy": 0.6},
        "theirs": {"accuracy": 0.8},
        "labels_differ": 1,
        "labels_example": {"key": "k", "ours": ["bark"], "theirs": []},
    }
    chosen = {"shards": "sets/x", "fold": [1, 2], "keys": "list", "not_in_set": [absent]}
    for name, others in (("x-fold1", {"selection": chosen, "common": common}), ("old", {})):
        (run / f"model/evaluations/{name}").mkdir(parents=True)
        (run / f"model/evaluations/{name}/metrics.json").write_text(json.dumps(classification_metrics(**others)))
    page = page_of(run)
    what, shared = "sets/x, folds 1, 2, the keys in list", "clips in common with theirs/predictions.parquet"
    assert ["x-fold1", what, "6", "accuracy", "0.8333", "", "ab" * 32] in page.cells
    assert ["x-fold1", shared, "5", "accuracy", "0.6000", "0.8000", "cd" * 32] in page.cells
    assert ["old", "old", "6", "accuracy", "0.8333", "", "ab" * 32] in page.cells
    assert f"list: 4 keys not in the set: a, {HOSTILE}, c, …" in page.texts
    assert any(text.startswith("1 clip with other labels there, such as k: bark here, no label") for text in page.texts)
    assert "Other evaluations" in page.text
    (run / "model/evaluations/old/metrics.json").write_text("{}")
    assert any("model/evaluations/old/metrics.json is damaged" in text for text in page_of(run).texts)


def test_the_worst_clips_come_first_with_their_labels(run: Path) -> None:
    page = page_of(run)
    worst, best = page.texts.index("worst"), page.texts.index("best")
    assert page.texts[worst + 1 : worst + 8] == [
        HOSTILE,
        "loss 1.20",
        HOSTILE,
        "60.0%",
        "✓ bark",
        "30.0%",
        "rain & wind",
    ]
    assert page.texts[best + 1] == "sure-rain"
    assert "img" not in page.tags
    assert "The spectrograms are omitted: no/such/set: no such folder" in page.text


def test_the_page_of_a_tagging_run(tmp_path: Path) -> None:
    per_class = [
        {"id": f"id{c}", "name": LABELS[c], "positives": 2, "ap": ap, "auc": ap}
        for c, ap in enumerate((0.25, None, 0.5))
    ]
    metrics = {key: value for key, value in classification_metrics().items() if "acc" not in key and key != "confusion"}
    metrics |= {"task": "tagging", "mAP": 0.375, "mAUC": 0.9, "d_prime": None, "chance_mAP": 0.3}
    folder = write_run(tmp_path / "one", metrics | {"per_class": per_class, "left_out": [HOSTILE]})
    write_predictions(folder, [[0, 1], [0], [], [1], [2], [2]])
    page = page_of(folder)
    assert ["1", "rain & wind", "", "0.5000", "0.5000", "2"] in page.cells
    assert ["3", HOSTILE, "", "–", "–", "2"] in page.cells
    assert f"Left out of the means, as they have no positives: {HOSTILE}." in page.texts
    assert "mAP; by chance 0.3000" in page.texts
    assert "d′" not in page.texts
    worst = page.texts.index("worst")
    assert page.texts[worst + 1 : worst + 5] == ["sure-bark", "loss 1.05", "✓ bark", "90.0%"]
    assert "Confusion matrix" not in page.texts


def test_the_losses_are_those_of_training() -> None:
    one_hot = np.eye(3, dtype=np.float32)[TRUE]
    predictions = Predictions(np.clip(SCORES, 1e-6, 1 - 1e-6), one_hot)
    scores, targets = torch.from_numpy(predictions.scores).double(), torch.from_numpy(one_hot).double()
    np.testing.assert_allclose(
        clip_losses(predictions, "classification"), F.nll_loss(scores.log(), targets.argmax(1), reduction="none")
    )
    expected = F.binary_cross_entropy(scores, targets, reduction="none").mean(dim=1)
    np.testing.assert_allclose(clip_losses(predictions, "tagging"), expected, rtol=1e-4)


def test_no_clip_is_among_the_best_and_among_the_worst() -> None:
    one_hot = np.eye(3, dtype=np.float32)[TRUE]
    for scores in (SCORES, np.where(SCORES > 0.9, np.nan, SCORES)):
        best, worst = best_and_worst(KEYS, Predictions(scores, one_hot), LABELS, "classification", 5)
        assert len(best) == len(worst) >= 1
        assert len({clip.row for clip in best + worst}) == len(best) + len(worst)
        assert np.isfinite([clip.loss for clip in best + worst]).all()


def test_the_page_needs_nothing_but_itself(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "two", classification_metrics(list_hash="cd" * 32))
    for folders in ([run], [run, other, write_folds(tmp_path / "study")]):
        page = page_of(*folders)
        require_self_contained(page)
        assert len(page.scripts) == 1
        assert HOSTILE in page.text


@settings(deadline=None)
@given(text=st.text(min_size=1), key=st.text(min_size=1))
def test_whatever_a_label_or_a_key_is_it_shows_as_text(text: str, key: str) -> None:
    per_class = [{"name": name, "clips": 1, "accuracy": 1.0} for name in (text, "b")]
    clip = Clip(0, key, 1.0, [Label(text, 0.5, True)])
    parts = [
        class_table(per_class, "accuracy", [[0, 1], [1, 0]]),
        confusion_matrix([text, "b"], [[0, 1], [1, 0]]),
        gallery([(clip, None, text), (clip, Sound(b"png", b"mp3", 1.0), key)]),
        notes([text]),
        page.figures([(text, text)]),
        page.facts([(text, key)]),
    ]
    found = Page(page.document(text, parts))
    assert ["1", text, "", "1.0000", "1", "b (1)"] in found.cells
    assert ["2", "b", "", "1.0000", "1", f"{text} (1)"] in found.cells
    assert ["", text, "b"] in found.cells
    assert [text, key] in found.cells
    assert f"{text} predicted as b: 1 of 1" in found.values("title")
    assert f"log-mel spectrogram of {key}" in found.values("alt")
    assert found.tags <= set(
        "html head meta title style body main section h2 h3 p div b span table thead tbody tr th td "
        "i figure img audio figcaption code ul li em".split()
    )


def test_several_runs_beside_each_other(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "two", classification_metrics(1.0, list_hash="cd" * 32))
    page = page_of(run, other)
    assert ["two", "ERANN-3-1", "finished", "accuracy", "1.0000", "0.9500", "6"] in [cells[:7] for cells in page.cells]
    assert "The runs were evaluated on different clips: their hashes differ." in page.texts
    assert {"#part-0", "#part-1"} <= set(page.values("href"))
    same = write_run(tmp_path / "three", classification_metrics(1.0))
    assert "on different clips" not in page_of(run, same).text


def test_a_run_that_has_not_finished(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "one", None))
    assert "This run has not finished: it was stopped or its machine lost at step 4 of 10." in page.text
    facts = {cells[0]: cells[1] for cells in page.cells if len(cells) == 2}
    assert facts["hardware"] == "cpu, name not logged"
    assert facts["training clips"] == "40"
    assert "0.9500" in page.texts
    assert "Classes" not in page.texts


def test_a_run_in_which_nothing_happened_yet(tmp_path: Path) -> None:
    write_log(LocalFolder(f"{tmp_path}/one"))
    page = page_of(tmp_path / "one")
    assert "no event is logged" in page.text
    assert "No steps are logged yet." in page.texts


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("model/metrics.json", None, "model/metrics.json is missing."),
        ("model/metrics.json", b"{", "model/metrics.json is damaged"),
        ("model/metrics.json", b'{"task": "tagging"}', "model/metrics.json is damaged: missing clips, coverage"),
        ("model/metrics.json", b"[]", "model/metrics.json is damaged"),
        (
            "model/metrics.json",
            json.dumps(classification_metrics(per_class=[])).encode(),
            "model/metrics.json is damaged: per_class: ",
        ),
        (
            "model/metrics.json",
            json.dumps(classification_metrics(confusion=[[1]])).encode(),
            "model/metrics.json is damaged: the confusion matrix is not one of 3 classes",
        ),
        ("predictions.parquet", None, "predictions.parquet is missing."),
        ("predictions.parquet", b"PAR1", "predictions.parquet: damaged"),
        ("recipe.yaml", None, "recipe.yaml is missing."),
        ("recipe.yaml", b"model: {", "recipe.yaml can't be parsed"),
        ("recipe.yaml", b"model: {depth: 3}", "recipe.yaml can't be parsed"),
        ("recipe.yaml", b"\xff\xfe", "recipe.yaml can't be parsed"),
    ],
)
def test_what_is_missing_or_damaged_is_a_note(run: Path, name: str, content: bytes | None, note: str) -> None:
    (run / name).unlink() if content is None else (run / name).write_bytes(content)
    result = report([str(run)], None, None)
    assert result["report"] == f"{run}/report.html"
    assert any(line.startswith(f"one: {note}") for line in result["notes"])
    page = Page((run / "report.html").read_text())
    assert note in page.text
    assert ("Classes" in page.texts) == (name != "model/metrics.json")


def fold(number: int, **others: Any) -> dict[str, Any]:
    return {
        "fold": number,
        "run": f"fold-{number}",
        "accuracy": 0.7,
        "best_accuracy": 0.95,
        "best_step": 4,
        "clips": 6,
        "train_clips": 40,
        "seconds": 100.0,
    } | others


def write_folds(folder: Path, **others: Any) -> Path:
    """A cross-validation of two folds that were run and one that failed."""
    for number in (1, 2):
        write_run(folder / f"fold-{number}", classification_metrics(list_hash=f"{number}" * 64))
    result = {
        "kind": "folds",
        "name": "toy",
        "data_set": "toy10",
        "variant": "ERANN-3-1",
        "init": "none",
        "folds_asked": "official",
        "comparable": True,
        "why_not_comparable": None,
        "folds": [fold(1), fold(2, accuracy=0.9, best_accuracy=None, best_step=None)],
        "failed": [{"fold": 3, "why": f"no clips {HOSTILE}"}],
        "mean": 0.8,
        "std": 0.1,
        "best_mean": 0.95,
        "labels": LABELS,
        "confusion": [[2, 2, 0], [0, 4, 0], [0, 0, 4]],
        "per_class": [{"name": name, "clips": 4, "accuracy": [0.5, 1.0, 1.0][c]} for c, name in enumerate(LABELS)],
        "paper": {"accuracy": 0.892, "what": "ERANN-1-3 from scratch"},
    }
    (folder / "results.json").write_text(json.dumps(result | others))
    return folder


def test_the_page_of_a_cross_validation(tmp_path: Path) -> None:
    page = page_of(write_folds(tmp_path / "study"))
    assert ["1", "", "0.7000", "6", "40", "0:01:40"] in page.cells
    assert ["2", "", "0.9000", "6", "40", "0:01:40"] in page.cells
    assert ["mean ± deviation", "", "0.8000 ± 0.1000"] in [cells[:3] for cells in page.cells]
    assert ["paper, ERANN-1-3 from scratch", "", "0.892"] in [cells[:3] for cells in page.cells]
    assert ["bark", "2", "2", ""] in page.cells
    assert ["3", "bark", "", "0.5000", "4", f"{HOSTILE} (2)"] in page.cells
    assert ["fold-2", "", "6", "8", "75.0%", "2" * 16 + "…"] in page.cells
    assert "ERANN-3-1 on toy10, from scratch, folds: official" in page.text
    assert f"The fold 3 failed: no clips {HOSTILE}" in page.texts
    assert "Not comparable" not in page.text
    worst = page.texts.index("worst")
    assert page.texts[worst + 1 : worst + 3] == [HOSTILE, "fold-1, loss 1.20"]
    assert {"fold-1", "fold-2"} <= set(page.texts)  # the runs, to be unfolded
    assert "details" in page.tags


def test_the_best_step_stands_apart_from_the_result(tmp_path: Path) -> None:
    page = page_of(write_folds(tmp_path / "study"))
    title = page.texts.index("Not the result: the best step, selected on the test fold")
    assert "0.8000 ± 0.1000" in page.texts[:title]
    assert "0.9500" in page.texts[title:]
    assert ["1", "0.9500", "4"] in page.cells
    assert "2" not in [cells[0] for cells in page.cells if len(cells) == 3]  # its best step is not known


def test_folds_that_are_not_comparable_say_so(tmp_path: Path) -> None:
    not_known: dict[str, Any] = dict.fromkeys(("mean", "std", "best_mean", "paper"))
    not_known |= {"labels": [], "confusion": [], "per_class": []}
    study = write_folds(
        tmp_path / "study", comparable=False, why_not_comparable=f"3 of 5 {HOSTILE}", folds=[], **not_known
    )
    page = page_of(study)
    assert f"Not comparable with the paper's figures: 3 of 5 {HOSTILE}" in page.texts


def test_a_fold_whose_run_is_gone(tmp_path: Path) -> None:
    study = write_folds(tmp_path / "study")
    shutil.rmtree(study / "fold-1")
    page = page_of(study)
    assert f"The run fold-1 is no longer there: {study}/fold-1/metrics.jsonl is missing." in page.texts
    assert ["1", "", "0.7000", "6", "40", "0:01:40"] in page.cells


def test_the_page_of_a_study(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    write_run(folder / "a", classification_metrics())
    rows = [
        {
            "run": "a",
            "runs": ["a"],
            "variant": "ERANN-2-5",
            "specaugment": True,
            "mAP": 0.4321,
            "paper": 0.443,
            "parameters": 38195809,
        },
        {"run": "b", "runs": ["b"], "variant": HOSTILE, "specaugment": False, "mAP": None, "paper": None},
    ]
    result = {"kind": "study", "name": "augmentation", "columns": ["variant", "specaugment"], "rows": rows}
    (folder / "results.json").write_text(json.dumps(result | {"failed": [{"run": "b", "why": "it burned"}]}))
    page = page_of(folder)
    assert ["run", "variant", "specaugment", "mAP", "parameters", "paper"] in page.cells
    assert ["a", "ERANN-2-5", "yes", "0.4321", "38,195,809", "0.443"] in page.cells
    assert ["b", HOSTILE, "no", "–", "–", "–"] in page.cells
    assert "The run b failed: it burned" in page.texts
    assert "The run b is no longer there" not in page.text


@pytest.fixture(scope="module")
def trained(tone_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A real run, and the shard set of its own that it was evaluated on."""
    root = tmp_path_factory.mktemp("trained")
    shards = shutil.copytree(tone_shards, root / "shards")
    recipe = small_recipe(shards, root / "run")
    train_alone(recipe)
    (root / "run/recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    return root / "run", shards


def test_the_page_of_a_real_run(trained: tuple[Path, Path]) -> None:
    run, _ = trained
    result = report([str(run)], None, None)
    assert result["notes"] == []
    page = Page((run / "report.html").read_text())
    require_self_contained(page)
    sources = [(kind, base64.b64decode(data)) for kind, _, data in (src.partition(",") for src in page.values("src"))]
    images = [Image.open(io.BytesIO(data)) for kind, data in sources if kind == "data:image/png;base64"]
    sounds = [soundfile.info(io.BytesIO(data)) for kind, data in sources if kind == "data:audio/mpeg;base64"]
    assert len(images) == len(sounds) == 12
    assert all(sound.format == "MP3" and 0.9 < sound.duration < 1.6 for sound in sounds)
    for image in images:
        assert image.height == 128
        assert 100 < image.width <= 320
        assert np.asarray(image).std() > 1
    line = next(line for line in read_log(LocalFolder(str(run))) if line["event"] == "Started")
    assert line["hardware"][0]
    assert f"1 × {line['hardware'][0]}" in page.texts
    assert f"torch {version('torch')}" in page.text
    metrics = json.loads((run / "model/metrics.json").read_text())
    assert f"{metrics['mAP']:.4f}" in page.texts
    assert metrics["list_hash"] in page.texts
    assert result["bytes"] < 1_000_000


@pytest.mark.parametrize("change", ["other clips", "gone", "damaged"])
def test_a_shard_set_that_can_no_longer_be_read(trained: tuple[Path, Path], tmp_path: Path, change: str) -> None:
    run, shards = trained
    copy = shutil.copytree(run, tmp_path / "run")
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text())
    source = recipe["data"]["eval"][0]
    if change == "other clips":
        (tmp_path / "keys").write_text(load_manifest(shards).keys[0].as_py() + "\n")
        source["keys"] = str(tmp_path / "keys")
    else:
        source["url"] = str(tmp_path / "shards")
    if change == "damaged":
        for tar in shutil.copytree(shards, tmp_path / "shards").glob("*.tar"):
            tar.write_bytes(b"\0" * tar.stat().st_size)
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    page = page_of(copy)
    assert "img" not in page.tags
    told = {"other clips": "no longer the clips that were evaluated", "gone": "no such folder", "damaged": "is damaged"}
    assert "The spectrograms are omitted: " in page.text
    assert told[change] in page.text
    assert "worst" in page.texts


def test_predictions_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_predictions(tmp_path, [[0, 1], [0], [], [1], [2], [2]])
    with (tmp_path / "predictions.parquet").open("rb") as file:
        keys, labels, predictions = read_predictions(file)
    assert keys == KEYS
    assert labels == ["id0", "id1", "id2"]
    assert np.array_equal(predictions.scores, SCORES)
    assert predictions.targets.tolist()[:3] == [[1, 1, 0], [1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("targets", [[[3]] * 6, [[0]] * 5])
def test_predictions_that_do_not_fit_together(tmp_path: Path, targets: list[list[int]]) -> None:
    if len(targets) == 6:
        write_predictions(tmp_path, targets)
    else:
        (tmp_path / "predictions.parquet").write_bytes(b"")
    with (
        (tmp_path / "predictions.parquet").open("rb") as file,
        pytest.raises(UserError, match="predictions.parquet: damaged"),
    ):
        read_predictions(file)


@pytest.fixture
def erann(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Run the command in this process: its exit code, stdout and last line on stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["erann", "report", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return int(stop.value.code or 0), out, err.strip()

    return run


def test_the_command(erann: Any, run: Path, tmp_path: Path) -> None:
    code, out, _ = erann(run)
    assert code == 0
    assert out.startswith(f"{run}/report.html: ")
    code, out, _ = erann(run, "--out", tmp_path / "page.html", "--json")
    result = json.loads(out)
    assert code == 0
    assert result["report"] == f"{tmp_path}/page.html"
    assert result["runs"] == [str(run)]
    assert result["bytes"] == (tmp_path / "page.html").stat().st_size
    (run / "recipe.yaml").unlink()
    assert erann(run)[1].startswith("one: recipe.yaml is missing.\n")


def test_a_run_in_the_folder_one_is_in(erann: Any, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    assert erann(".")[0] == 0
    assert "one" in Page((run / "report.html").read_text()).texts


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["{root}/nowhere"], 2, "{root}/nowhere: no such folder"),
        (
            ["{root}"],
            2,
            "{root}: no run (metrics.jsonl is missing) and no study; list the runs in it with erann runs FOLDER",
        ),
        (["{run}", "--out", "{root}"], 2, "{root}: is a folder; give the file to write"),
        (["{run}", "--out", "{root}/no/page.html"], 1, "{root}/no/page.html.part: No such file or directory"),
        (
            ["{damaged}"],
            1,
            "{damaged}/results.json: damaged (missing study.columns, study.failed, study.name, study.rows); "
            "run the study again to rewrite it",
        ),
    ],
)
def test_bad_input(erann: Any, run: Path, tmp_path: Path, arguments: list[str], code: int, line: str) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/results.json").write_text('{"kind": "study"}')
    names = {"run": str(run), "root": str(tmp_path), "damaged": str(tmp_path / "damaged")}
    outcome = erann(*[argument.format(**names) for argument in arguments])
    assert outcome == (code, "", f"erann: {line.format(**names)}")


def test_a_study_that_has_not_finished(erann: Any, tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text("{}")
    code, _, line = erann(tmp_path)
    assert code == 1
    assert "it has not finished" in line


@pytest.mark.parametrize("inside", [{"folds": [{}]}, {"per_class": []}, {"mean": "high"}, {"confusion": [[1]]}])
def test_results_that_are_damaged_inside(erann: Any, tmp_path: Path, inside: dict[str, Any]) -> None:
    code, _, line = erann(write_folds(tmp_path / "study", **inside))
    assert code == 1
    assert line.startswith(f"erann: {tmp_path}/study/results.json: ")
    assert line.endswith("run the study again to rewrite it")


@pytest.mark.parametrize("content", ["{", "[]", '{"kind": "other"}', "3"])
def test_damaged_results(erann: Any, tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    code, _, line = erann(tmp_path)
    assert code == 1
    assert line.startswith(f"erann: {tmp_path}/results.json: damaged (")
