"""HEAR's common API for embedding models (hearbenchmark.com/hear-api.html), as a module that its tools import.

python3 -m heareval.embeddings.runner jobs.recordings.hear --model runs/audioset/model
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erann_dist import SAMPLE_RATE
from erann_dist.models.inference import inference_form
from erann_dist.models.log_mel import LogMel
from erann_dist.train.model_folder import find_model
from erann_dist.train.model_folder import load_model as load_folder

_WINDOW_SECONDS = 0.5  # the least that every model takes
_HOP_SECONDS = 0.05
_BATCH = 32


class HearModel(nn.Module):
    """Waveforms (B, n) at 44.1 kHz to embeddings (B, D)."""

    sample_rate = SAMPLE_RATE

    def __init__(self, folder: str) -> None:
        super().__init__()
        model, _ = load_folder(find_model(folder))
        self.log_mel = LogMel(model.front_end)
        self.model = inference_form(model)
        self.scene_embedding_size = self.timestamp_embedding_size = self(torch.zeros(1, SAMPLE_RATE)).shape[1]

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return self.model.embed(self.log_mel(x)).float()


def load_model(model_file_path: str | Path = "") -> HearModel:
    """The model of a model folder or a run. Raises UsageError, UserError."""
    return HearModel(str(model_file_path))


def get_scene_embeddings(audio: Tensor, model: HearModel) -> Tensor:
    """One embedding of each whole sound: (n_sounds, n_samples) -> (n_sounds, D)."""
    return torch.cat([model(part) for part in audio.split(_BATCH)])


def get_timestamp_embeddings(audio: Tensor, model: HearModel) -> tuple[Tensor, Tensor]:
    """Embeddings (n_sounds, T, D) every 50 ms, of half a second around each time; and the times (n_sounds, T) in ms."""
    size, hop = round(_WINDOW_SECONDS * SAMPLE_RATE), round(_HOP_SECONDS * SAMPLE_RATE)
    frames = F.pad(audio, (size // 2, size - size // 2)).unfold(1, size, hop)  # (n_sounds, T, size)
    flat = frames.reshape(-1, size)
    embeddings = torch.cat([model(part) for part in flat.split(_BATCH)]).unflatten(0, frames.shape[:2])
    times = torch.arange(frames.shape[1], device=audio.device) * (1000.0 * hop / SAMPLE_RATE)
    return embeddings, times.expand(len(audio), -1)
