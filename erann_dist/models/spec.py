"""The models that `model.variant` may name. To add one, add a file and an entry here."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from erann_dist.models.base import AudioModel, Initialisation
from erann_dist.models.cnn14 import CNN14, PANNS_MEL
from erann_dist.models.erann import ERANN, Variant
from erann_dist.models.mel_config import ERANN_MEL


@dataclass(frozen=True)
class ModelSpec:
    """Everything the rest of the program needs to know about a family of models."""

    names: str  # the names in the family, for messages
    normalise: Callable[[str], str]  # a name as it is stored; ValueError when the family has no such model
    build: Callable[[str, int, Initialisation], AudioModel]  # from the name and the number of classes
    head_layers: tuple[str, ...]  # the last layers, in order; the very last has an output for each class
    description: str  # for the model card: what it is, and its source


def _is(name: str) -> Callable[[str], str]:
    def normalise(given: str) -> str:
        if given != name:
            raise ValueError(f"there is no {given!r}; write {name}")
        return name

    return normalise


_PANNS = "the baseline of PANNs (arXiv 1912.10211)"
# By the prefix of the models' names; the longest match counts.
MODELS: dict[str, ModelSpec] = {
    "ERANN": ModelSpec(
        "ERANN-<s_m>-<width>, for example ERANN-1-6",
        lambda name: str(Variant.parse(name)),
        lambda name, classes, initialisation: ERANN(Variant.parse(name), classes, initialisation),
        ("fc1", "fc2"),
        "An ERANN (arXiv 2106.01621)",
    ),
    "CNN14": ModelSpec(
        "CNN14",
        _is("CNN14"),
        lambda name, classes, initialisation: CNN14(name, classes, PANNS_MEL, initialisation),
        ("fc1", "fc2"),
        f"A CNN14, {_PANNS}, at its own 32 kHz and 64 mel bins",
    ),
    "CNN14-ERANN": ModelSpec(
        "CNN14-ERANN",
        _is("CNN14-ERANN"),
        lambda name, classes, initialisation: CNN14(name, classes, ERANN_MEL, initialisation),
        ("fc1", "fc2"),
        f"A CNN14, {_PANNS}, with ERANN's front end",
    ),
}


def model_spec(name: str) -> ModelSpec:
    """The family that a name belongs to. Raises ValueError when there is none."""
    prefixes = [prefix for prefix in MODELS if name.startswith(prefix)]
    if not prefixes:
        known = "; ".join(spec.names for spec in MODELS.values())
        raise ValueError(f"{name!r} is not a model; the models are {known}")
    return MODELS[max(prefixes, key=len)]


def model_name(name: str) -> str:
    """The name as it is stored. Raises ValueError when there is no such model."""
    return model_spec(name).normalise(name)


def build_model(name: str, num_classes: int, initialisation: Initialisation = "he") -> AudioModel:
    """A model with new weights, from torch's generator. Raises ValueError when there is no such model."""
    return model_spec(name).build(name, num_classes, initialisation)


def macs_of(name: str, num_classes: int, samples: int) -> int:
    """Multiply-accumulate operations of the convolutions and FC layers for a clip of this many samples (44.1 kHz)."""
    with torch.device("meta"):
        model = build_model(name, num_classes).eval()
        log_mel = torch.empty(1, 1, model.front_end.mel_bins, model.front_end.frames(samples))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(log_mel)
    return counter.get_total_flops() // 2
