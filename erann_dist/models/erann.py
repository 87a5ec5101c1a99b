"""ERANN, efficient residual audio neural networks: Verbitskiy, Berikov, Vyshegorodtsev (2021), arXiv 2106.01621.

Table 1 of the paper gives the stages, Table 2 the residual block (ARB). A variant ERANN-s_m-W has the decreasing
temporal size parameter s_m (0 to 3: how many of the stages 1 to 3 shrink the time by 4 and not by 2) and the widening
factor W (8·W channels in stage 0, 128·W in stage 4).
"""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from erann_dist.models.base import AudioModel, Initialisation
from erann_dist.models.mel_config import ERANN_MEL

MEL_BINS = ERANN_MEL.mel_bins
NEGATIVE_SLOPE = 0.01
MAX_WIDTH = 32  # the paper's widest has 6; the number of parameters grows with its square, to 1.5 billion here
# Kernel size and second convolution's padding for a stride (Table 2). The first convolution always pads by 1.
_KERNELS = {1: (3, 3, 1), 2: (3, 3, 1), 4: (6, 5, 2)}


@dataclass(frozen=True)
class Variant:
    """Which ERANN: `s_m` in 0..3 and the widening factor `width`, 1 to MAX_WIDTH."""

    s_m: int
    width: int

    def __post_init__(self) -> None:
        if not 0 <= self.s_m <= 3 or not 1 <= self.width <= MAX_WIDTH:
            raise ValueError(f"there is no {self}: s_m is 0, 1, 2 or 3 and the width 1 to {MAX_WIDTH}")

    @classmethod
    def parse(cls, name: str) -> "Variant":
        """The variant called, for example, "ERANN-1-6"."""
        match = re.fullmatch(r"ERANN-([0-9]{1,9})-([0-9]{1,9})", name)
        if not match:
            raise ValueError(f"{name!r} is not an ERANN variant; write ERANN-<s_m>-<width>, for example ERANN-1-6")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"ERANN-{self.s_m}-{self.width}"

    @property
    def frame_multiple(self) -> int:
        """The number of input frames must be a multiple of this; otherwise shortcut and main path differ in length."""
        return 4**self.s_m


class ARB(nn.Module):
    """Audio residual block ARB(x, y, c) of Table 2: (B, c_in, F, T) -> (B, c_out, F / x, T / y)."""

    memory_format = torch.channels_last

    def __init__(self, c_in: int, c_out: int, stride: tuple[int, int]) -> None:
        super().__init__()
        (k1_f, k2_f, p_f), (k1_t, k2_t, p_t) = (_KERNELS[s] for s in stride)
        self.stride = stride
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, (k1_f, k1_t), stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, (k2_f, k2_t), padding=(p_f, p_t), bias=False)
        reshapes = c_in != c_out or stride != (1, 1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, bias=False) if reshapes else None

    def folded(self) -> nn.Module:
        """The same for evaluation, with bn2 folded into conv1."""
        return FoldedARB(self)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.leaky_relu(self.bn1(x), NEGATIVE_SLOPE))
        # Faster than NCHW on CPU and on tensor cores. Converting here, not the weights, suits DeepSpeed, which
        # flattens contiguous weights; from the first block on it is a no-op.
        h = h.contiguous(memory_format=self.memory_format)
        h = self.conv2(F.leaky_relu(self.bn2(h), NEGATIVE_SLOPE))
        if self.shortcut is None:
            return h + x
        # Slicing before a 1×1 convolution is the strided 1×1 convolution. Written as a stride it crashes in
        # backward on CPU in channels_last (torch 2.11 and 2.13).
        return h + self.shortcut(x[:, :, :: self.stride[0], :: self.stride[1]])


class FoldedARB(nn.Module):
    """An ARB for evaluation only: bn1 is a scale and a shift, bn2 is part of conv1, and memory is reused."""

    scale: Tensor
    shift: Tensor

    def __init__(self, block: ARB) -> None:
        super().__init__()
        bn = block.bn1
        assert bn.running_mean is not None
        assert bn.running_var is not None
        scale = bn.weight.detach() / torch.sqrt(bn.running_var + bn.eps)
        self.register_buffer("scale", scale[:, None, None])
        self.register_buffer("shift", (bn.bias.detach() - bn.running_mean * scale)[:, None, None])
        self.conv1 = fuse_conv_bn_eval(block.conv1, block.bn2)
        self.conv2 = block.conv2
        self.shortcut = block.shortcut
        self.stride = block.stride

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu_(torch.addcmul(self.shift, x, self.scale), NEGATIVE_SLOPE)
        h = F.leaky_relu_(self.conv1(h.contiguous(memory_format=ARB.memory_format)), NEGATIVE_SLOPE)
        h = self.conv2(h)
        # As in ARB.
        return h.add_(x if self.shortcut is None else self.shortcut(x[:, :, :: self.stride[0], :: self.stride[1]]))


class ERANN(AudioModel):
    """ERANN-s_m-W with N outputs: (B, 1, 128, T) log-mel spectrogram in dB -> (B, N) logits.

    The BatchNorm that standardises the input over the mel bins is part of the model. T must be a positive multiple of
    4 to the power of s_m.
    """

    def __init__(self, variant: Variant, num_classes: int, initialisation: Initialisation = "he") -> None:
        """initialisation: he (see `_initialise`) or pytorch, that of torch's layers. The paper does not give one."""
        super().__init__(str(variant), num_classes, ERANN_MEL)
        self.variant = variant
        w = variant.width
        self.input_bn = nn.BatchNorm2d(MEL_BINS)
        self.stages = nn.Sequential(_stage(1, 8 * w, (1, 1)))
        for number in (1, 2, 3, 4):
            stride_t = 4 if number <= variant.s_m else 2
            channels = 8 * w * 2**number
            self.stages.append(_stage(channels // 2, channels, (2, stride_t)))
        self.fc1 = nn.Linear(128 * w, 128 * w)
        self.fc2 = nn.Linear(128 * w, num_classes)
        if initialisation == "he":
            self._initialise()

    def _initialise(self) -> None:
        """He et al. (2015): for LeakyReLU where one precedes the layer; with unit gain for the linear path, the
        shortcuts and FC1, where it would double the input from stage to stage; and with small initial logits."""
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                linear_path = name.endswith("shortcut") or name == "fc1"
                nn.init.kaiming_normal_(layer.weight, a=1.0 if linear_path else NEGATIVE_SLOPE)
        for layer in (self.fc1, self.fc2):
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.fc2.weight, std=0.01)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, N) of log-mel spectrograms x (B, 1, 128, T).

        mask: optional (B, 1, 128, T) bool, SpecAugment's: where it is True, the output of the input BatchNorm is set to
        0, the mean. Raises ValueError for any other shape.
        """
        logits: Tensor = self.fc2(F.leaky_relu(self.fc1(self.embed(x, mask)), NEGATIVE_SLOPE))
        return logits

    def embed(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The features (B, 128·W) of log-mel spectrograms x (B, 1, 128, T): their mean plus their maximum over time and
        frequency. mask and errors: as in forward."""
        multiple = self.variant.frame_multiple
        if x.ndim != 4 or x.shape[1:3] != (1, MEL_BINS) or x.shape[3] < 1 or x.shape[3] % multiple:
            frames = "any T >= 1" if multiple == 1 else f"T a positive multiple of {multiple}"
            raise ValueError(f"{self.variant} takes (B, 1, {MEL_BINS}, T) with {frames}, not {tuple(x.shape)}")
        x = self.input_bn(x.transpose(1, 2)).transpose(1, 2)
        if mask is not None:
            x = x.masked_fill(mask, 0.0)
        x = self.stages(x)
        return x.mean(dim=(2, 3)) + x.amax(dim=(2, 3))


def _stage(c_in: int, c_out: int, stride: tuple[int, int]) -> nn.Sequential:
    return nn.Sequential(ARB(c_in, c_out, stride), *(ARB(c_out, c_out, (1, 1)) for _ in range(3)))
