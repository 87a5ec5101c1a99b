"""Tagging a whole shard set: the scores that evaluate finds, on any number of workers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from erann_dist.data.manifest import load_manifest
from erann_dist.models.spec import build_model
from erann_dist.train import evaluation
from erann_dist.train.distributed import Workers
from shards.sources.audioset import read_audioset
from tests.conftest import pack_here, write_tone_set
from tests.support.workers import run_workers


def score_both_ways(workers: Workers, shards: str) -> tuple[np.ndarray, np.ndarray] | None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build_model("ERANN-2-1", 3)
    manifest = load_manifest(Path(shards))
    predictions = evaluation.score(model, manifest, workers, loader_threads=2)
    scores = evaluation.score_stream(model, "tagging", manifest, workers, threads=2)
    return (predictions.scores, scores) if predictions and scores is not None else None


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_scores_of_evaluate_on_any_number_of_workers(tone_shards: Path, workers: int) -> None:
    (expected, scores), *others = run_workers(score_both_ways, workers, str(tone_shards))
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert others == [None] * (workers - 1)


def test_more_workers_than_clips(tmp_path: Path) -> None:
    shards = pack_here(read_audioset(*write_tone_set(tmp_path, 2)), tmp_path / "shards")
    (expected, scores), *_ = run_workers(score_both_ways, 3, str(shards))
    np.testing.assert_allclose(scores, expected, atol=1e-6)
