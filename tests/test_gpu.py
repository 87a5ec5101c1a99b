"""On an NVIDIA GPU (`make test-gpu`): the same function as on the CPU, with each engine and in each precision."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from erann_dist.log.events import Event, Started
from erann_dist.models.log_mel import LogMel
from erann_dist.models.spec import build_model
from erann_dist.recipe import AugmentSection, Recipe
from erann_dist.train.augment import draw_augment_params
from erann_dist.train.prefetch import DeviceBatch, prefetch_to_device
from tests.conftest import small_recipe
from tests.support.workers import losses, of_kind, run_workers, train_alone, train_events

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: make test-gpu")

GPU = torch.device("cuda", 0)


def train_there(recipe: Recipe) -> list[Event]:
    """In a process of its own: DeepSpeed takes only the first process group of one."""
    events: list[Event] = run_workers(train_events, 1, recipe.model_dump(), device=GPU)[0]
    return events


def test_front_end_and_model_give_what_they_give_on_the_cpu() -> None:
    torch.manual_seed(0)
    waveform = 0.1 * torch.randn(4, 44_100)
    log_mel, model = LogMel(), build_model("ERANN-3-1", 5).eval()
    with torch.no_grad():
        expected = log_mel(waveform)
        logits = model(expected)
        found = log_mel.to(GPU)(waveform.to(GPU))
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
        torch.backends.cudnn.allow_tf32 = False
        torch.testing.assert_close(model.to(GPU)(expected.to(GPU)).cpu(), logits, rtol=1e-3, atol=1e-4)


def test_batches_arrive_whole_and_in_order() -> None:
    """Each is copied while the one before is computed, from memory that the loader uses again."""
    params = draw_augment_params(np.arange(8), 128, 128, 0, AugmentSection())
    numbers = range(20)

    def load() -> list[DeviceBatch]:
        return [
            DeviceBatch(torch.full((16, 1 << 20), n, dtype=torch.int16), torch.full((16, 3), n), params, n, 0)
            for n in numbers
        ]

    for number, batch in zip(numbers, prefetch_to_device(load(), GPU), strict=True):
        assert batch.pcm.device == batch.targets.device == GPU
        assert batch.weight == number
        assert bool((batch.pcm == number).all())
        assert bool((batch.targets == number).all())


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("tf32", 1e-2), ("bf16", 5e-2), ("fp16", 5e-2)])
def test_the_loss_curve_is_the_cpus(
    tone_shards: Path, tmp_path: Path, engine: str, precision: str, tolerance: float
) -> None:
    optim = {"examples": 320, "lr": 1e-4}
    expected = losses(train_alone(small_recipe(tone_shards, tmp_path / "cpu", optim=optim)))
    recipe = small_recipe(
        tone_shards,
        tmp_path / "gpu",
        run={"engine": engine, "device": "cuda"},
        optim=optim | {"precision": precision, "max_bad_steps": 5},
        checkpoint={"every": 100, "keep_last": 9},
    )
    events = train_there(recipe)
    (started,) = of_kind(events, Started)
    assert started.device == "cuda:0"
    np.testing.assert_allclose(losses(events), expected, rtol=tolerance)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_resumed_it_goes_on_as_if_nothing_had_been(
    tone_shards: Path, tmp_path: Path, engine: str, precision: str
) -> None:
    settings = {
        "run": {"engine": engine, "device": "cuda"},
        "optim": {"precision": precision, "examples": 16 * 8},
        "checkpoint": {"every": 4, "keep_last": 9},
    }
    whole = losses(train_there(small_recipe(tone_shards, tmp_path / "whole", **settings)))
    resumed = small_recipe(tone_shards, tmp_path / "resumed", **settings)
    checkpoints = tmp_path / "resumed" / "checkpoints"
    name = "step-00000004-0001"
    shutil.copytree(tmp_path / "whole" / "checkpoints" / name, checkpoints / name)
    state = load_file(checkpoints / name / "state.safetensors")
    assert ("loss_scale" in " ".join(state)) == (precision == "fp16")
    events = train_there(resumed)
    (started,) = of_kind(events, Started)
    assert started.step == 4
    np.testing.assert_allclose(losses(events), whole[4:], rtol=1e-3)


def test_a_checkpoint_of_a_gpu_goes_on_on_the_cpu(tone_shards: Path, tmp_path: Path) -> None:
    settings = {"optim": {"examples": 16 * 8}, "checkpoint": {"every": 4, "keep_last": 9}}
    whole = losses(train_there(small_recipe(tone_shards, tmp_path / "gpu", **settings)))
    name = "step-00000004-0001"
    shutil.copytree(tmp_path / "gpu" / "checkpoints" / name, tmp_path / "cpu" / "checkpoints" / name)
    events = train_alone(small_recipe(tone_shards, tmp_path / "cpu", **settings))
    np.testing.assert_allclose(losses(events), whole[4:], rtol=1e-2)
