"""CNN14, the baseline of the paper's tables: Kong et al. (2020), PANNs, arXiv 1912.10211, Table 1 and section III.

Six blocks of two 3×3 convolutions, each but the last followed by 2×2 average pooling, then the mean over the mel bins,
the maximum plus the mean over time, and two FC layers.
"""

import copy

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from erann_dist.models.base import AudioModel, Initialisation
from erann_dist.models.mel_config import MelConfig

# PANNs' own: 32 kHz, 100 frames per second, librosa's mel filters. (PANNs reflects the sound at a clip's ends; here it
# is padded with zeros.)
PANNS_MEL = MelConfig(
    window=1024,
    hop=320,
    mel_bins=64,
    f_min=50.0,
    f_max=14_000.0,
    mel_scale="slaney",
    half_second=50,
    sample_rate=32_000,
)
_CHANNELS = (64, 128, 256, 512, 1024, 2048)
_BLOCK_DROPOUT, _HEAD_DROPOUT = 0.2, 0.5


class ConvBlock(nn.Module):
    """Two convolutions with BatchNorm and ReLU, then average pooling: (B, c_in, T, F) -> (B, c_out, T / p, F / p)."""

    def __init__(self, c_in: int, c_out: int, pool: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.pool = pool
        self.dropout = nn.Dropout(_BLOCK_DROPOUT)

    def folded(self) -> nn.Module:
        """The same for evaluation, with each BatchNorm folded into the convolution before it."""
        block = copy.deepcopy(self)
        block.conv1, block.conv2 = fuse_conv_bn_eval(self.conv1, self.bn1), fuse_conv_bn_eval(self.conv2, self.bn2)
        for name in ("bn1", "bn2"):
            block.add_module(name, nn.Identity())
        return block

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        y: Tensor = self.dropout(F.avg_pool2d(x, self.pool) if self.pool > 1 else x)
        return y


class CNN14(AudioModel):
    """CNN14 with N outputs: (B, 1, mel bins, T) log-mel spectrogram in dB -> (B, N) logits. T is 32 or more."""

    def __init__(
        self, name: str, num_classes: int, front_end: MelConfig, initialisation: Initialisation = "he"
    ) -> None:
        """initialisation: he, for ReLU and with small initial logits, or pytorch. PANNs uses Xavier uniform."""
        super().__init__(name, num_classes, front_end)
        self.bn0 = nn.BatchNorm2d(front_end.mel_bins)
        c_ins = (1, *_CHANNELS[:-1])
        pools = (2, 2, 2, 2, 2, 1)
        self.blocks = nn.Sequential(*(ConvBlock(*sizes) for sizes in zip(c_ins, _CHANNELS, pools, strict=True)))
        self.fc1 = nn.Linear(2048, 2048)
        self.fc2 = nn.Linear(2048, num_classes)
        self.dropout = nn.Dropout(_HEAD_DROPOUT)
        if initialisation == "he":
            for layer in self.modules():
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            for layer in (self.fc1, self.fc2):
                nn.init.zeros_(layer.bias)
            nn.init.normal_(self.fc2.weight, std=0.01)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, N) of log-mel spectrograms x (B, 1, mel bins, T). Raises ValueError for any other shape."""
        x = self.dropout(F.relu(self.fc1(self.dropout(self.embed(x, mask)))))
        logits: Tensor = self.fc2(x)
        return logits

    def embed(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The features (B, 2048) of log-mel spectrograms: maximum plus mean over time. mask, errors: as in forward."""
        bins = self.front_end.mel_bins
        if x.ndim != 4 or x.shape[1:3] != (1, bins) or x.shape[3] < 32:
            raise ValueError(f"{self.name} takes (B, 1, {bins}, T) with T >= 32, not {tuple(x.shape)}")
        x = self.bn0(x.transpose(1, 2)).transpose(1, 2)
        if mask is not None:
            x = x.masked_fill(mask, 0.0)
        x = self.blocks(x.transpose(2, 3)).mean(dim=3)
        return x.amax(dim=2) + x.mean(dim=2)
