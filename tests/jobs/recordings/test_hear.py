"""HEAR's API: the shapes, sizes and times that its tools check."""

from pathlib import Path

import torch

from jobs.recordings import hear
from tests.support.folded import a_model


def test_shapes_sizes_and_times(tmp_path: Path) -> None:
    model = hear.load_model(a_model(tmp_path / "model"))
    assert (model.sample_rate, model.scene_embedding_size, model.timestamp_embedding_size) == (44_100, 128, 128)
    torch.manual_seed(0)
    audio = torch.rand(2, 44_100) * 2 - 1
    scene = hear.get_scene_embeddings(audio, model)
    assert scene.shape == (2, 128)
    embeddings, times = hear.get_timestamp_embeddings(audio, model)
    assert embeddings.shape == (2, 21, 128)
    assert times.shape == (2, 21)
    torch.testing.assert_close(times[1], torch.arange(21) * 50.0)  # ms
    assert not embeddings.requires_grad
    # The one at 500 ms is that of the half second around it.
    middle = hear.get_scene_embeddings(audio[:, 11_025:33_075], model)
    torch.testing.assert_close(embeddings[:, 10], middle, rtol=1e-4, atol=1e-4)
