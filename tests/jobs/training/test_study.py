"""Studies: which runs they make, what they refuse, and the tables that they write."""

import csv
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from erann_dist.data.manifest import load_manifest
from erann_dist.errors import UserError
from erann_dist.log.events import Event
from erann_dist.storage.folder import LocalFolder
from jobs.cli.__main__ import main
from jobs.terminal.show import study_page
from jobs.training import paper, study
from tests.conftest import copy_tree
from tests.support.folded import a_model, write_folded_set, write_protocol


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folded_set(tmp_path_factory.mktemp("tones"), [1, 2])


@pytest.fixture(autouse=True)
def speeds(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What was measured: variants and batches. Nothing is, which takes seconds."""
    measured: list[tuple[str, int]] = []

    def speed(model: Any, batch: int, frames: int) -> float:
        measured.append((str(model.variant), batch))
        return float(len(measured))

    monkeypatch.setattr(study, "_speed", speed)
    return measured


def write_pretraining(path: Path, shards: Path) -> Path:
    """A recipe of erann pretrain with the smallest variant and few steps."""
    tree = yaml.safe_load(write_protocol(path, shards).read_text())
    del tree["protocol"]
    tree["data"] |= {"train": {"url": str(shards), "fold": [1]}, "eval": {"url": str(shards), "fold": [2]}}
    tree["optim"] |= {"examples": 16}
    path.write_text(yaml.safe_dump(tree))
    return path


def tell(name: str, event: Event) -> None:
    pass


def transfer(path: Path, model: str, *overrides: str, seeds: tuple[int, ...] = (0,)) -> dict[str, Any]:
    rows = study.transfer_rows(["ERANN-3-1"], model)
    return study.run_transfer([path], rows, list(overrides), list(seeds), None, tell)


def test_the_augmentation_study(
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    speeds: list[tuple[str, int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [paper.Augmented("ERANN-3-1", 1, True, 1, 0.43), paper.Augmented("ERANN-3-1", 1, False, 4, 0.44)]
    monkeypatch.setattr(paper, "AUGMENTATION", rows)
    path = write_pretraining(tmp_path / "a.yaml", shards)
    overrides = ["run.name=table", "optim.lr=1e-3"]

    def run() -> dict[str, Any]:
        return study.run_grid("augmentation", study.augmentation_rows(), path, overrides, [0], None, tell)

    result = run()
    names = ["ERANN-3-1-1s-specaugment-mixup1-seed0", "ERANN-3-1-1s-no-specaugment-mixup4-seed0"]
    assert [row["runs"] for row in result["rows"]] == [[name] for name in names]
    settings = [yaml.safe_load((tmp_path / "runs/table" / name / "recipe.yaml").read_text()) for name in names]
    assert [(each["augment"]["mixup"], each["augment"]["mixup_on"]) for each in settings] == [
        ("none", "waveform"),
        ("modified", "log_mel"),
    ]
    assert [each["augment"]["specaugment"] for each in settings] == [True, False]
    assert {each["optim"]["lr"] for each in settings} == {1e-3}
    assert speeds == [("ERANN-3-1", 1), ("ERANN-3-1", 32)]  # once for both rows
    # The paper's figures are AudioSet's.
    assert [row["paper"] for row in result["rows"]] == [None, None]
    assert result["notes"] == [
        "not comparable with the paper's figures, which are for AudioSet: the evaluated clips are tones "
        "(classification, 3 classes)"
    ]
    with (tmp_path / "runs/table/table.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(line["accuracy"]) for line in table] == [row["accuracy"] for row in result["rows"]]
    models = {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/table/*/model/model.safetensors")}
    assert run() == result
    assert len(speeds) == 2
    assert {p: p.stat().st_mtime_ns for p in models} == models
    study_page(result)
    page = capsys.readouterr().out
    assert "…" not in page
    assert result["columns"][-1].replace("_", " ") in page.splitlines()[0]

    damaged = tmp_path / "runs/table" / names[0] / "model/metrics.json"
    damaged.write_text("{")
    again = run()
    assert [row["seeds"] for row in again["rows"]] == [0, 1]
    (failed,) = again["failed"]
    assert failed["why"].startswith(f"{damaged}: damaged (")

    repacked = write_folded_set(tmp_path / "again", [2, 1])  # other tones
    kept = copy_tree(shards, tmp_path / "kept")
    try:
        copy_tables(repacked, shards)
        with pytest.raises(UserError, match="runs/table: started when data.train held other clips"):
            run()
    finally:
        copy_tables(kept, shards)


def copy_tables(source: Path, target: Path) -> None:
    for table in source.glob("*.parquet"):
        shutil.copy(table, target)


def test_the_transfer_study(shards: Path, tmp_path: Path, speeds: list[tuple[str, int]]) -> None:
    path = write_protocol(tmp_path / "t.yaml", shards, optim={"examples": 16})
    a_model(tmp_path / "m-ERANN-3-1")
    result = transfer(path, f"{tmp_path}/m-{{variant}}", "run.name=both")
    scratch, finetuned = result["rows"]
    assert (scratch["run"], finetuned["run"]) == ("t-ERANN-3-1-scratch", "t-ERANN-3-1-finetuned")
    assert (scratch["init"], finetuned["init"]) == ("none", f"{tmp_path}/m-ERANN-3-1")
    for row in result["rows"]:
        folds = [tmp_path / "runs/both" / run / "model/metrics.json" for run in row["runs"]]
        accuracies = [json.loads(fold.read_text())["accuracy"] for fold in folds]
        assert len(accuracies) == 2
        assert row["accuracy"] == pytest.approx(sum(accuracies) / 2)
        assert (row["data_set"], row["seeds"], row["comparable"], row["clips_per_s_32"]) == ("tones", 1, True, 2.0)
        assert row["params_M"] > 0
        assert row["GMACs"] > 0
    assert len(speeds) == 2
    assert json.loads((tmp_path / "runs/both/results.json").read_text()) == result

    alone = transfer(path, "none", "run.name=both")
    assert alone["rows"] == [scratch]
    (note,) = alone["notes"]
    assert note.startswith(
        "not in this table, as they were not requested this time: t-ERANN-3-1-finetuned-seed0/fold-1"
    )

    # Another model at the same place; another data set under the same name.
    a_model(tmp_path / "m-ERANN-3-1", seed=2)
    with pytest.raises(UserError, match="finetuned-seed0: started with other weights than model.init now has"):
        transfer(path, f"{tmp_path}/m-{{variant}}", "run.name=both")
    other = write_folded_set(tmp_path / "other", [1, 2], "others")
    with pytest.raises(UserError, match=r"runs/both: holds a study of tones \(transfer\)"):
        transfer(write_protocol(tmp_path / "o.yaml", other), "none", "run.name=both")


def test_the_models_are_measured_at_the_median_clip(shards: Path, tmp_path: Path) -> None:
    clips = load_manifest(shards)
    measure = study._Measure(LocalFolder(str(tmp_path)))
    samples = np.full(len(clips), 44_100)
    expected = measure.of("ERANN-3-1", dataclasses.replace(clips, samples=samples))
    samples[len(samples) // 2] *= 10
    assert measure.of("ERANN-3-1", dataclasses.replace(clips, samples=samples)) == expected


def outcome(mean: float, failed: bool = False, comparable: bool = True) -> dict[str, Any]:
    return {
        "name": "x",
        "data_set": "esc50",
        "variant": "ERANN-2-5",
        "init": "none",
        "mean": mean,
        "failed": [{"fold": 2, "why": "burned"}] if failed else [],
        "comparable": comparable,
        "paper": None,
        "folds": [{"run": "fold-1"}],
    }


def test_only_whole_cross_validations_count() -> None:
    line = study._transfer_line("x", {}, [outcome(0.8), outcome(0.1, failed=True, comparable=False), outcome(0.9)])
    assert line["accuracy"] == pytest.approx(0.85)
    assert (line["seeds"], line["comparable"]) == (2, False)


def test_the_papers_rows() -> None:
    """Its tables on the small data sets: six variants from scratch, five fine-tuned."""
    scratch = [(f"ERANN-{v}", "none") for v in ("0-3", "1-3", "0-4", "1-4", "2-4", "2-5")]
    finetuned = [(f"ERANN-{v}", f"runs/ERANN-{v}") for v in ("2-4", "2-5", "0-6", "1-6", "2-6")]
    assert study.transfer_rows(None, "none") == scratch
    assert sorted(study.transfer_rows(None, "runs/{variant}")) == sorted(scratch + finetuned)
    assert study.transfer_rows(["ERANN-1-6"], "m") == [("ERANN-1-6", "none"), ("ERANN-1-6", "m")]


def test_ravdess_without_pitch_shift_has_figures_of_its_own() -> None:
    assert paper.accuracy("ravdess", "ERANN-1-3", finetuned=False, pitch_shift=True) == 0.731
    assert paper.accuracy("ravdess", "ERANN-1-3", finetuned=False, pitch_shift=False) == 0.669
    assert paper.accuracy("ravdess", "ERANN-2-4", finetuned=True, pitch_shift=False) is None
    assert paper.accuracy("esc50", "ERANN-2-4", finetuned=True, pitch_shift=False) == 0.949


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["augmentation", "{p}", "model.variant=ERANN-3-1"],
            "study augmentation sets model.variant for each of its rows",
        ),
        (["augmentation", "{p}", "data.crop_s=0.5"], "sets data.crop_s for each of its rows; omit it"),
        (["augmentation", "{p}", "augment={{mixup: none}}"], "sets augment.mixup for each of its rows"),
        (["augmentation", "{p}", "run.seed=1"], "sets run.seed for each of its rows; use --seed"),
        (["augmentation", "{p}", "--variant", "ERANN-3-1"], "study augmentation takes no --variant"),
        (["hyperparameters", "{p}", "model.variant=ERANN-3-1"], "use --variant"),
        (["hyperparameters", "{p}", "--seed", "1", "--seed", "1"], "--seed: 1 is given twice"),
        (["hyperparameters", "{p}", *["--variant", "ERANN-3-1"] * 2], "--variant: ERANN-3-1 is given twice"),
        (["transfer", "{t}", "--from", "none", "model.variant=ERANN-3-1"], "use --variant"),
        (["transfer", "{t}", "--from", "none", "run=foo"], "study transfer sets run.seed for each of its rows"),
        (["transfer", "{t}", "--from", "none", "--variant", "ERANN-9-1"], "model.variant: there is no ERANN-9-1"),
        (["transfer", "{t}", "{t}", "--from", "none"], "recipes of one name: t is given twice"),
        (["transfer", "run.name=x", "--from", "none"], "study transfer needs recipes of erann finetune"),
        (["transfer", "{t}"], "study transfer needs recipes of erann finetune, and --from"),
    ],
)
def test_what_is_refused(
    shards: Path,
    tmp_path: Path,
    arguments: list[str],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {
        "p": write_pretraining(tmp_path / "p.yaml", shards),
        "t": write_protocol(tmp_path / "t.yaml", shards),
    }
    monkeypatch.setattr(sys, "argv", ["erann", "study", *(each.format(**names) for each in arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert line in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "runs").exists()


def test_the_papers_figures_are_for_its_audioset(tone_shards: Path) -> None:
    info = load_manifest(tone_shards).info
    assert info.name == "audioset"
    assert "audioset (tagging, 3 classes)" in (study._why_not_comparable(info) or "")
    labels = [str(number) for number in range(527)]
    assert study._why_not_comparable(dataclasses.replace(info, label_ids=labels)) is None
