"""Each clip is scored once, at its own length, on any number of workers with the same result."""

import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from erann_dist.data.loader import Loader, whole_clips
from erann_dist.data.manifest import load_manifest
from erann_dist.data.sources import count_reported
from erann_dist.models.erann import ERANN
from erann_dist.models.log_mel import LogMel
from erann_dist.models.spec import build_model
from erann_dist.recipe import DataSource
from erann_dist.train import evaluation
from erann_dist.train.distributed import Workers, single_worker
from shards.sources.rows import Source, SourceRow, rows_table
from tests.conftest import pack_here
from tests.support.workers import CPU, run_workers


def score(workers: Workers, shards: str, clips: int = 40) -> tuple[np.ndarray, np.ndarray] | None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build_model("ERANN-2-1", 3)
    predictions = evaluation.score(
        model, load_manifest(Path(shards)).select(np.arange(40) < clips), workers, loader_threads=2
    )
    return (predictions.scores, predictions.targets) if predictions else None


def test_the_same_on_one_two_and_three_workers(tone_shards: Path) -> None:
    results = {n: run_workers(score, n, str(tone_shards)) for n in (1, 2, 3)}
    expected, targets = results[1][0]
    assert not np.isnan(expected).any()
    assert 1 < targets.sum(axis=1).max() <= 2
    for n in (2, 3):
        assert np.array_equal(results[n][0][0], expected)
        assert np.array_equal(results[n][0][1], targets)
        assert results[n][1:] == [None] * (n - 1)


def test_workers_without_a_batch_wait_for_the_others(tone_shards: Path) -> None:
    assert len(evaluation.evaluation_batches(load_manifest(tone_shards).select(np.arange(40) < 2))) < 3
    (expected, _), (found, _) = (run_workers(score, n, str(tone_shards), 2)[0] for n in (1, 3))
    assert found.shape == (2, 3)
    assert np.array_equal(found, expected)


def test_every_clip_is_in_one_batch_of_its_length(tone_shards: Path) -> None:
    manifest = load_manifest(tone_shards)
    batches = evaluation.evaluation_batches(manifest)
    assert sorted(np.concatenate([rows for _, rows in batches]).tolist()) == list(range(len(manifest)))
    for length, rows in batches:
        assert len(rows) <= evaluation.MICRO_BATCH
        assert set(-(-manifest.samples[rows] // 22_050) * 22_050) == {length}


def test_a_short_clip_is_padded_to_the_length_asked_for(tone_shards: Path) -> None:
    manifest = load_manifest(tone_shards)
    longest = int(manifest.samples.max())
    lengths = {length for length, _ in evaluation.evaluation_batches(manifest, longest + 22_050)}
    assert lengths == {-(-longest // 22_050) * 22_050 + 22_050}


def test_scores_are_the_models_on_the_whole_clip(tone_shards: Path) -> None:
    manifest = load_manifest(tone_shards)
    with single_worker(CPU) as workers:
        scores, _ = score(workers, str(tone_shards))
    torch.manual_seed(0)
    model = build_model("ERANN-2-1", 3).eval()
    for row in (0, 17, 39):
        crops = whole_clips(manifest, np.array([row]), int(manifest.samples[row]))
        (batch,) = Loader(manifest, [crops], threads=1)
        with torch.no_grad():
            expected = model(LogMel()(batch.pcm.float() / 32768)).sigmoid()[0]
        np.testing.assert_allclose(scores[row], expected, atol=1e-6)


def test_clips_of_one_length(tone_shards: Path) -> None:
    manifest = load_manifest(tone_shards)
    padded = -(-manifest.samples // 22_050)
    same = manifest.select(padded == padded.max())
    assert len(same) % evaluation.MICRO_BATCH
    with single_worker(CPU) as workers:
        model = build_model("ERANN-2-1", 3)
        predictions = evaluation.score(model, same, workers, loader_threads=1)
    assert predictions
    assert np.isfinite(predictions.scores).all()


def test_coverage_counts_the_rows_of_the_folds_asked_for(tmp_path: Path) -> None:
    import soundfile

    soundfile.write(tmp_path / "a.wav", np.zeros(4410), 44_100)
    places = [(1, None), (1, "missing"), (2, None), (2, "missing"), (2, "silent"), (2, "duplicate")]
    path = os.fsencode(tmp_path / "a.wav")
    rows = [SourceRow(str(i), [0], path, "x", fold=fold, reason=reason) for i, (fold, reason) in enumerate(places)]
    shards = pack_here(Source("s", "classification", ["a"], ["A"], rows_table(rows), []), tmp_path / "shards")
    assert count_reported(DataSource(url=str(shards))) == 3
    assert count_reported(DataSource(url=str(shards), fold=[1])) == 1
    assert count_reported(DataSource(url=str(shards), fold=[2])) == 2
    assert count_reported(DataSource(url=str(shards), fold=[3])) == 0


def test_predictions_and_detail(tone_shards: Path, tmp_path: Path) -> None:
    manifest = load_manifest(tone_shards)
    rng = np.random.default_rng(0)
    targets = manifest.targets(np.arange(40))
    targets[:, 1] = 0
    predictions = evaluation.Predictions(rng.random((40, 3), dtype=np.float32), targets)
    evaluation.write_predictions(tmp_path / "p.parquet", predictions, manifest)
    table = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert [row["key"] for row in table] == manifest.keys.to_pylist()
    assert table[3]["scores"] == pytest.approx(predictions.scores[3].tolist())
    assert table[3]["targets"] == np.flatnonzero(targets[3]).tolist()
    detail = evaluation.detail(predictions, manifest, listed=50)
    assert detail["coverage"] == 0.8
    assert detail["left_out"] == ["Tone, 1"]
    assert detail["per_class"][0]["positives"] == targets[:, 0].sum()
    assert detail["chance_mAP"] == pytest.approx(targets[:, [0, 2]].mean())


def diverged(bias: float) -> ERANN:
    """A model as a training that diverged leaves it."""
    torch.manual_seed(0)
    model = build_model("ERANN-2-1", 3)
    with torch.no_grad():
        model.fc2.bias[1] = bias
    return model


@pytest.mark.parametrize("bias", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_an_error(tone_shards: Path, bias: float) -> None:
    manifest = load_manifest(tone_shards)
    message = rf"the scores of 40 of 40 clips are not finite, the first is {manifest.keys[0]};"
    with single_worker(CPU) as workers:
        with pytest.raises(evaluation.NotFinite, match=message):
            evaluation.score(diverged(bias), manifest, workers, loader_threads=1)
        with pytest.raises(evaluation.NotFinite, match=message):
            evaluation.score_stream(diverged(bias), "tagging", manifest, workers, threads=1)


def test_predictions_that_are_not_finite_are_not_read(tone_shards: Path, tmp_path: Path) -> None:
    manifest = load_manifest(tone_shards)
    predictions = evaluation.Predictions(np.zeros((40, 3), np.float32), manifest.targets(np.arange(40)))
    predictions.scores[[3, 8], 1] = np.nan
    with (tmp_path / "x.parquet").open("wb") as file:
        evaluation.write_predictions(file, predictions, manifest)
    message = rf"x.parquet: the scores of 2 of 40 clips are not finite, the first is {manifest.keys[3]};"
    with (tmp_path / "x.parquet").open("rb") as file, pytest.raises(evaluation.NotFinite, match=message):
        evaluation.read_predictions(file, "x.parquet")
