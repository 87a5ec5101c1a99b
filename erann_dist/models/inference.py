"""Models in the form in which they are used rather than trained."""

import copy

from torch import nn

from erann_dist.models.base import AudioModel


def inference_form(model: AudioModel) -> AudioModel:
    """A copy for evaluation only: each block that has a form with its BatchNorms folded (`folded`) is in that form.

    Its logits are the model's in evaluation mode, within float32's rounding. It can't be trained, and its state dict is
    another.
    """
    form = copy.deepcopy(model).eval().requires_grad_(False)
    _fold(form)
    return form


def _fold(module: nn.Module) -> None:
    for name, child in module.named_children():
        folded = getattr(child, "folded", None)
        if folded is not None:
            setattr(module, name, folded())
        else:
            _fold(child)
