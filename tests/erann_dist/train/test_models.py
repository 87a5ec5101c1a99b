"""What a model may be like, shown with that of docs/extending/index.md: without BatchNorm, with dropout."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from erann_dist.data.sources import load_source
from erann_dist.errors import Stopped, UserError
from erann_dist.log.events import Emit, Interruption, Step
from erann_dist.models import spec
from erann_dist.models.base import AudioModel
from erann_dist.recipe import Recipe
from erann_dist.storage.folder import LocalFolder
from erann_dist.train.distributed import single_worker
from erann_dist.train.evaluation import read_detail, score
from erann_dist.train.model_folder import initialise, load_model
from erann_dist.train.trainer import train
from tests.conftest import small_recipe
from tests.support.workers import CPU, train_alone
from tests.test_extending import follow


@pytest.fixture(autouse=True)
def pooled(monkeypatch: pytest.MonkeyPatch) -> type[AudioModel]:
    model: type[AudioModel] = follow("A model", spec, monkeypatch)["Pooled"]
    return model


class Noise(nn.Module):
    """Random without being one of torch's dropout layers."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) if self.training else x


def recipe_of(shards: Path, run: Path) -> Recipe:
    return small_recipe(shards, run, model={"variant": "POOLED"}, optim={"examples": 128, "lr": 0.01})


def test_it_is_trained_evaluated_and_loaded(tone_shards: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tone_shards, tmp_path / "run")
    events = train_alone(recipe)
    losses = [event.loss for event in events if isinstance(event, Step)]
    assert losses[-1] < losses[0]
    model, info = load_model(LocalFolder(str(tmp_path / "run" / "model")))
    assert (info.variant, info.front_end["mel_bins"]) == ("POOLED", 32)
    assert "A POOLED, trained by erann-dist" in (tmp_path / "run" / "model" / "README.md").read_text()
    with single_worker(CPU) as workers:
        predictions = score(model, load_source(recipe.data.eval[0]), workers, loader_threads=1)
    assert predictions is not None
    found = read_detail((tmp_path / "run" / "model" / "metrics.json").read_bytes())
    assert found["clips"] == len(predictions.scores)


@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.5), nn.AlphaDropout(0.5), Noise()], ids=["dropout", "alpha", "function"]
)
def test_random_choices_are_the_same_after_a_stop(
    tone_shards: Path,
    tmp_path: Path,
    pooled: Callable[[str, int], Any],
    monkeypatch: pytest.MonkeyPatch,
    layer: nn.Module,
) -> None:
    """Bit-identical weights, whatever draws from torch's generator: it is keyed by the examples."""

    def build(name: str, classes: int, _: str) -> AudioModel:
        model: AudioModel = pooled(name, classes)
        model.dropout = layer
        return model

    monkeypatch.setitem(spec.MODELS, "POOLED", replace(spec.MODELS["POOLED"], build=build))
    train_alone(recipe_of(tone_shards, tmp_path / "whole"))
    recipe, steps = recipe_of(tone_shards, tmp_path / "stopped"), []
    with single_worker(CPU) as workers:

        def stop() -> Interruption | None:
            return Interruption("stop", "enough") if len(steps) >= 3 else None

        emit: Emit = lambda event: steps.append(event) if isinstance(event, Step) else None  # noqa: E731
        with pytest.raises(Stopped, match="^enough: stopped at step 4 of 8"):
            train(recipe, replace(workers, stop_request=stop), emit)
    train_alone(recipe)
    whole, stopped = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_weights_fit_only_the_same_model(tone_shards: Path, tmp_path: Path, pooled: Callable[[str, int], Any]) -> None:
    train_alone(recipe_of(tone_shards, tmp_path / "run"))
    folder = str(tmp_path / "run")
    kept = pooled("POOLED", 3)
    initialise(kept, folder, ["last"])
    trained = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert torch.equal(kept.hidden.weight, trained["hidden.weight"])
    assert not torch.equal(kept.last.weight, trained["last.weight"])
    with pytest.raises(UserError, match=r"has 3 labels, the clips have 7; add last to model.fresh$"):
        initialise(pooled("POOLED", 7), folder, ["hidden"])
    with pytest.raises(UserError, match=r"POOLED has no layer fc2; its last layers are hidden and last$"):
        initialise(kept, folder, ["fc2"])
