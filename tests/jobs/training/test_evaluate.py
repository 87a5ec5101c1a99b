"""Evaluations on a part of a set, and two evaluations compared on the clips that they share."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from erann_dist.data.manifest import load_manifest
from erann_dist.errors import UsageError, UserError
from erann_dist.models.spec import build_model
from erann_dist.recipe import DataSource
from erann_dist.storage.folder import LocalFolder
from erann_dist.train.evaluation import read_detail
from erann_dist.train.metrics import tagging_metrics
from erann_dist.train.model_folder import ModelInfo, save_model
from jobs.cli.__main__ import main
from jobs.training.evaluate import evaluate


@pytest.fixture(scope="module")
def keys(tone_shards: Path) -> list[str]:
    found: list[str] = load_manifest(tone_shards).keys.to_pylist()
    return found


def model_in(folder: Path, shards: Path, seed: int) -> str:
    torch.manual_seed(seed)
    info = load_manifest(shards).info
    fits = ModelInfo("ERANN-3-1", info.task, info.label_ids, info.label_names, 44_100)
    save_model(LocalFolder(str(folder)), build_model("ERANN-3-1", 3), fits, {}, "")
    return str(folder)


@pytest.fixture(scope="module")
def model(tone_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_in(tmp_path_factory.mktemp("ours") / "model", tone_shards, 1)


@pytest.fixture(scope="module")
def theirs(tone_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What another lab's model gave for the whole set."""
    root = tmp_path_factory.mktemp("theirs")
    evaluated(model_in(root / "model", tone_shards, 2), root / "out", url=str(tone_shards))
    return root / "out/predictions.parquet"


def evaluated(model: str, out: Path, common: Path | None = None, **choice: Any) -> dict[str, Any]:
    source = DataSource(**choice)
    return evaluate(model, source, str(common) if common else None, out, "none", 1, "cpu", lambda event: None)


def sha256(keys: list[str]) -> str:
    return hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()


def write_keys(path: Path, keys: list[str]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"score": [0.5] * len(keys), "key": keys}), path)
    elif path.suffix == ".csv":
        path.write_text("\ufeffname,key\r\n" + "".join(f'"a, b",{key}\r\n' for key in keys), newline="")
    else:
        path.write_text("\n".join(keys))
    return str(path)


def averages(predictions: Path, keys: list[str]) -> float:
    """mAP on some of the clips, computed apart."""
    rows = {row["key"]: row for row in pq.read_table(predictions).to_pylist()}
    targets = np.array([[c in rows[key]["targets"] for c in range(3)] for key in keys])
    return tagging_metrics(np.array([rows[key]["scores"] for key in keys]), targets).mean_ap


@pytest.mark.parametrize("name", ["list.txt", "list.csv", "list.parquet"])
def test_metrics_on_the_clips_of_a_list(
    model: str, tone_shards: Path, keys: list[str], tmp_path: Path, name: str
) -> None:
    wanted, absent = keys[5:17], ["n0", "n1", "n2", "n3"]
    path = write_keys(tmp_path / name, [*wanted, *absent])
    result = evaluated(model, tmp_path / "out", url=str(tone_shards), keys=path)
    assert result["clips"] == 12
    assert result["list_hash"] == sha256(wanted)
    assert result["mAP"] == pytest.approx(averages(tmp_path / "out/predictions.parquet", wanted))
    not_in_set = [{"file": path, "count": 4, "examples": ["n0", "n1", "n2"]}]
    assert result["selection"] == {"shards": str(tone_shards), "keys": path, "not_in_set": not_in_set}
    assert read_detail((tmp_path / "out/metrics.json").read_bytes())["selection"] == result["selection"]


def test_metrics_without_the_clips_of_a_list(model: str, tone_shards: Path, keys: list[str], tmp_path: Path) -> None:
    path = write_keys(tmp_path / "bad", keys[:30])
    result = evaluated(model, tmp_path / "out", url=str(tone_shards), without=path)
    assert result["list_hash"] == sha256(keys[30:])
    assert result["selection"]["not_in_set"] == []


def test_what_two_evaluations_have_in_common(
    model: str, theirs: Path, tone_shards: Path, keys: list[str], tmp_path: Path
) -> None:
    """Theirs lacks some clips, has others, has its labels in another order, and one clip's labels differ."""
    table = pq.read_table(theirs).slice(10)
    ids = table.schema.metadata[b"labels"].decode().split("\n")
    turned = pa.table(
        {
            "key": [*table["key"].to_pylist()[:-1], "other"],
            "scores": pa.array([row[::-1] for row in table["scores"].to_pylist()], pa.list_(pa.float32())),
            "targets": pa.array(
                [[0, 1, 2]] + [sorted(2 - c for c in row) for row in table["targets"].to_pylist()[1:]],
                pa.list_(pa.int16()),
            ),
        }
    )
    file = tmp_path / "theirs.parquet"
    pq.write_table(turned.replace_schema_metadata({"labels": "\n".join(reversed(ids))}), file)
    result = evaluated(
        model, tmp_path / "out", file, url=str(tone_shards), without=write_keys(tmp_path / "w", keys[20:25])
    )
    shared = [*keys[10:20], *keys[25:39]]
    common = result["common"]
    assert common["clips"] == len(shared)
    assert (common["only_ours"], common["only_theirs"]) == (11, 6)
    assert common["list_hash"] == sha256(shared)
    assert common["ours"]["mAP"] == pytest.approx(averages(tmp_path / "out/predictions.parquet", shared))
    assert common["theirs"]["mAP"] == pytest.approx(averages(theirs, shared))  # against the labels here
    assert common["labels_differ"] == 1
    assert common["labels_example"]["key"] == keys[10]
    assert common["labels_example"]["theirs"] == ["Tone, 0", "Tone, 1", "Tone, 2"]
    assert len(common["labels_example"]["ours"]) < 3
    assert result["clips"] == 35  # the metrics of the evaluation itself are on all of its clips
    assert read_detail((tmp_path / "out/metrics.json").read_bytes())["common"] == common


def test_an_evaluation_has_everything_in_common_with_itself(
    model: str, theirs: Path, tone_shards: Path, tmp_path: Path
) -> None:
    mine = str(theirs.parents[1] / "model")
    common = evaluated(mine, tmp_path / "out", theirs, url=str(tone_shards))["common"]
    assert common["ours"] == common["theirs"]
    assert (common["only_ours"], common["only_theirs"], common["labels_differ"]) == (0, 0, 0)


def forged(path: Path, theirs: Path, how: str) -> str:
    table = pq.read_table(theirs)
    if how == "other labels":
        table = table.replace_schema_metadata({"labels": "/m/000\n/m/001\nx"})
    elif how == "other keys":
        table = table.set_column(0, "key", pa.array([f"k{i}" for i in range(len(table))]))
    elif how == "twice":
        table = pa.concat_tables([table, table.slice(0, 2)])
    elif how == "no labels":
        table = table.drop_columns(["scores"])
    pq.write_table(table, path)
    return str(path)


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("other labels", r"scores other labels \(x is not one of the set's\); only evaluations with the same labels"),
        ("other keys", "has none of the 40 clips to evaluate: a key there is 'k0', one here '0"),
        ("twice", "has 2 keys twice"),
        ("no labels", "has no column scores"),
    ],
)
def test_predictions_that_can_not_be_compared_are_one_line_before_the_work(
    model: str, theirs: Path, tone_shards: Path, tmp_path: Path, how: str, line: str
) -> None:
    file = forged(tmp_path / "p.parquet", theirs, how)
    with pytest.raises(UserError, match=line) as error:
        evaluated(model, tmp_path / "out", Path(file), url=str(tone_shards))
    assert str(error.value).startswith(file)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_predictions_that_are_not_there(model: str, tone_shards: Path, tmp_path: Path) -> None:
    for name, line in (("nowhere.parquet", "No such file"), (".", "is a folder; a file is needed")):
        with pytest.raises(UsageError, match=line):
            evaluated(model, tmp_path / "out", tmp_path / name, url=str(tone_shards))


def erann(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["erann", *map(str, arguments)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capfd.readouterr()
    return int(stop.value.code or 0), out or err


def test_the_command_prints_selection_and_comparison(
    model: str,
    theirs: Path,
    tone_shards: Path,
    keys: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_keys(tmp_path / "some", [*keys[:9], "gone"])
    command = ("evaluate", model, tone_shards, "--keys", path, "--common", theirs)
    code, page = erann(capfd, monkeypatch, *command)
    assert code == 0
    assert f"keys {path}" in page
    assert f"{path}: 1 key not in the set: gone" in page
    assert f"9 clips in common with {theirs} (0 only here, 31 only there)" in page
    assert f"hash of the list of clips in common: {sha256(keys[:9])}" in page
    assert (Path(model) / f"evaluations/{tone_shards.name}-keys-some/metrics.json").is_file()
    code, text = erann(capfd, monkeypatch, *command, "--json")
    result = json.loads(text)
    assert result["selection"]["keys"] == path
    assert result["common"]["clips"] == result["clips"] == 9
    assert f"{result['common']['theirs']['mAP']:.4f}" in page
    (tmp_path / "none").write_text("gone\n")
    code, line = erann(capfd, monkeypatch, "evaluate", model, tone_shards, "--keys", tmp_path / "none")
    assert code == 2
    assert "none of its 1 keys is in" in line
