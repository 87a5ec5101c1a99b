"""What all models have in common."""

from typing import Literal

from torch import Tensor, nn

from erann_dist.errors import UserError
from erann_dist.models.mel_config import MelConfig

# Of the weights. he: He et al. (2015), as each model's class describes; pytorch: the defaults of torch's layers.
Initialisation = Literal["he", "pytorch"]


class AudioModel(nn.Module):
    """A network from log-mel spectrograms in dB (B, 1, mel bins, frames) to logits (B, N).

    Apply a sigmoid (tagging) or a softmax (classification) to the logits for probabilities.
    """

    def __init__(self, name: str, num_classes: int, front_end: MelConfig) -> None:
        """name: model.variant."""
        super().__init__()
        self.name = name
        self.num_classes = num_classes
        self.front_end = front_end

    def embed(self, x: Tensor) -> Tensor:
        """The pooled features of spectrograms x, before the fully connected layers: (B, D).

        Raises UserError when the model has none.
        """
        raise UserError(f"{self.name} has no embeddings: its class has no method embed")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: optional (B, 1, mel bins, frames) bool, SpecAugment's: where it is True, x becomes the mean, 0."""
        raise NotImplementedError


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
