"""The models that `model.variant` may name. Another one is a file and an entry here."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from erann_dist.models.base import AudioModel, Initialisation, count_macs
from erann_dist.models.cnn14 import CNN14, PANNS_MEL
from erann_dist.models.erann import ERANN, Variant
from erann_dist.models.log_mel import ERANN_MEL


@dataclass(frozen=True)
class ModelSpec:
    """All that the rest of the program asks of a family of models."""

    names: str  # which there are, for messages
    normalise: Callable[[str], str]  # a name as it is stored; ValueError when the family has none of that name
    build: Callable[[str, int, Initialisation], AudioModel]  # by name, for so many classes
    head_layers: tuple[str, ...]  # the last ones, in their order; the very last has an output for each class
    description: str  # for the model card: what it is, and its source


def _is(name: str) -> Callable[[str], str]:
    def normalise(given: str) -> str:
        if given != name:
            raise ValueError(f"there is no {given!r}; write {name}")
        return name

    return normalise


_PANNS = "the baseline of PANNs (arXiv 1912.10211)"
# By what their names begin with, the longest that fits.
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
    """The family that a name belongs to. ValueError when there is none."""
    fitting = [begin for begin in MODELS if name.startswith(begin)]
    if not fitting:
        known = "; ".join(spec.names for spec in MODELS.values())
        raise ValueError(f"{name!r} is no model; there are {known}")
    return MODELS[max(fitting, key=len)]


def model_name(name: str) -> str:
    """The name as it is stored. ValueError when there is no such model."""
    return model_spec(name).normalise(name)


def build_model(name: str, num_classes: int, initialisation: Initialisation = "he") -> AudioModel:
    """A model with new weights, from torch's generator. ValueError when there is none of that name."""
    return model_spec(name).build(name, num_classes, initialisation)


def macs_of(name: str, num_classes: int, samples: int) -> int:
    """Multiply-accumulate operations of a model for one clip of so many samples at 44.1 kHz."""
    with torch.device("meta"):
        model = build_model(name, num_classes)
    return count_macs(model, model.front_end.frames(samples))
