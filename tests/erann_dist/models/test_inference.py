"""The evaluation form of the models: the same logits and features, with the BatchNorms folded."""

import pytest
import torch
from torch import nn

from erann_dist.errors import UserError
from erann_dist.models.base import AudioModel
from erann_dist.models.inference import inference_form
from erann_dist.models.mel_config import ERANN_MEL
from erann_dist.models.spec import build_model


def trained(name: str) -> AudioModel:
    """A model whose BatchNorms have statistics and weights that are not those of a new one."""
    torch.manual_seed(0)
    model = build_model(name, 7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


@pytest.mark.parametrize("name", ["ERANN-0-1", "ERANN-1-1", "ERANN-2-1", "ERANN-3-1", "CNN14-ERANN"])
def test_logits_and_features_are_the_models(name: str) -> None:
    model = trained(name)
    form = inference_form(model)
    x = 20 * torch.randn(3, 1, 128, 64) - 30
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.inference_mode():
        for expected, found in ((model(x), form(x)), (model.embed(x), form.embed(x))):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        torch.testing.assert_close(form(x), form(x), rtol=0, atol=0)  # nothing of it is written over
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    folded = [type(module).__name__ for module in form.modules()]
    assert folded.count("BatchNorm2d") == 1  # the input's
    with pytest.raises(RuntimeError, match="does not require grad"):
        form(x).sum().backward()


def test_a_model_without_features_says_so() -> None:
    with pytest.raises(UserError, match="X has no embeddings"):
        AudioModel("X", 2, ERANN_MEL).embed(torch.zeros(1, 1, 128, 64))


def test_features_have_the_papers_size() -> None:
    assert build_model("ERANN-3-2", 5).eval().embed(torch.randn(2, 1, 128, 64)).shape == (2, 256)
    assert build_model("CNN14-ERANN", 5).eval().embed(torch.randn(2, 1, 128, 64)).shape == (2, 2048)
