"""The training loop: the same function for every engine and every number of workers, exact at every checkpoint."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from erann_dist.data.manifest import load_manifest
from erann_dist.errors import UserError
from erann_dist.log.events import Evaluated, Event, Incident, Started
from erann_dist.recipe import OptimSection
from erann_dist.train import evaluation
from erann_dist.train.distributed import Workers, single_worker
from erann_dist.train.trainer import example_losses, train
from erann_dist.train.work_plan import assign_micro_batches, learning_rate, make_sampler
from tests.conftest import pack_here, small_recipe, write_tone_set
from tests.support.workers import CPU, losses, of_kind, train_alone, train_on

BATCHES = st.tuples(st.integers(1, 9), st.integers(1, 6), st.integers(1, 9)).filter(lambda x: x[0] >= x[2])


@given(BATCHES, st.integers(0, 10**6))
@settings(deadline=None)
def test_each_example_of_a_step_is_dealt_once(sizes: tuple[int, int, int], step: int) -> None:
    micro_batches, micro_batch, world_size = sizes
    optim = OptimSection(global_batch=micro_batches * micro_batch, micro_batch=micro_batch, examples=1)
    ranks = [assign_micro_batches(step, optim, rank, world_size) for rank in range(world_size)]
    assert len({len(dealt) for dealt in ranks}) == 1
    counted = [mb.examples for dealt in ranks for mb in dealt if mb.weight == 1]
    assert np.array_equal(np.concatenate(counted), step * optim.global_batch + np.arange(optim.global_batch))
    for dealt in ranks:
        assert {mb.weight for mb in dealt[1:-1]} <= {1.0}
        assert dealt[0].weight == 1
        if dealt[-1].weight == 0:
            assert np.array_equal(dealt[-1].examples, dealt[-2].examples)


@pytest.mark.parametrize("steps", [2, 7, 10, 100, 1001])
def test_one_cycle_is_torchs(steps: int) -> None:
    optim = OptimSection(lr=1e-3, schedule="one_cycle", examples=1)
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(adam, 1e-3, total_steps=steps, cycle_momentum=False)
    for step in range(steps):
        assert learning_rate(step, steps, optim) == pytest.approx(adam.param_groups[0]["lr"], rel=1e-9)
        adam.step()
        if step < steps - 1:
            scheduler.step()
    assert learning_rate(3, steps, optim.model_copy(update={"schedule": "constant"})) == 1e-3


@given(st.integers(2, 300), st.floats(0.01, 0.99), st.floats(1, 100), st.floats(1, 1e5))
@settings(deadline=None)
def test_one_cycle_of_another_shape_is_torchs(steps: int, pct_start: float, div: float, final_div: float) -> None:
    shape = {"pct_start": pct_start, "div_factor": div, "final_div_factor": final_div}
    optim = OptimSection.model_validate({"lr": 1e-3, "schedule": "one_cycle", "examples": 1, **shape})
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    assume(pct_start * steps != 1)  # the rate would have reached its maximum before the first step; torch divides by 0
    scheduler = torch.optim.lr_scheduler.OneCycleLR(adam, 1e-3, total_steps=steps, cycle_momentum=False, **shape)
    for step in range(steps):
        assert learning_rate(step, steps, optim) == pytest.approx(adam.param_groups[0]["lr"], rel=1e-6)
        adam.step()
        if step < steps - 1:
            scheduler.step()


def test_losses_of_mixed_labels() -> None:
    logits = torch.randn(4, 6, dtype=torch.float64)
    targets = torch.rand(4, 6, dtype=torch.float64)
    p = logits.sigmoid()
    expected = -(targets * p.log() + (1 - targets) * (1 - p).log()).mean(dim=1)
    torch.testing.assert_close(
        example_losses(logits, targets.float(), "tagging").double(), expected, atol=1e-5, rtol=1e-5
    )
    shares = targets / targets.sum(dim=1, keepdim=True)
    expected = -(shares * logits.log_softmax(dim=1)).sum(dim=1)
    torch.testing.assert_close(
        example_losses(logits, shares.float(), "classification").double(), expected, atol=1e-5, rtol=1e-5
    )


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "model" / "model.safetensors")


def test_deepspeed_equals_plain_pytorch_over_twenty_steps(tone_shards: Path, tmp_path: Path) -> None:
    curves = {}
    for engine in ("torch", "deepspeed"):
        sections = {"run": {"engine": engine}, "optim": {"examples": 320}, "data": {"crop_s": 0.5}}
        recipe = small_recipe(tone_shards, tmp_path / engine, **sections)
        curves[engine] = losses(train_alone(recipe))
    assert len(curves["torch"]) == 20
    np.testing.assert_allclose(curves["deepspeed"], curves["torch"], rtol=0, atol=1e-5)


ENGINES = [("torch", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2)]


def first_step(
    shards: Path, run_dir: Path, engine: str, stage: int, world_size: int
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of one step and the checkpoint behind it, whose first moments are a tenth of the step's gradient."""
    recipe = small_recipe(shards, run_dir, run={"engine": engine}, optim={"zero_stage": stage, "examples": 16})
    (loss,) = losses(train_on(world_size, recipe))
    return loss, load_file(run_dir / "checkpoints" / "step-00000001-0001" / "state.safetensors")


@pytest.fixture(scope="module")
def reference(tone_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[float, dict[str, torch.Tensor]]:
    return first_step(tone_shards, tmp_path_factory.mktemp("reference") / "run", "torch", 0, 1)


@pytest.mark.parametrize(("engine", "stage"), ENGINES)
def test_gradients_and_statistics_are_the_same_on_any_number_of_workers(
    tone_shards: Path, tmp_path: Path, reference: tuple[float, dict[str, torch.Tensor]], engine: str, stage: int
) -> None:
    """Four micro-batches a step: even on 1 and 2 workers, uneven on 3, where two repeat their one with weight 0.

    The reference is plain PyTorch on one worker, so that a wrong scale can't hide behind Adam.
    """
    expected_loss, expected = reference
    for world_size in (1, 2, 3):
        loss, state = first_step(tone_shards, tmp_path / f"{world_size}", engine, stage, world_size)
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert state.keys() == expected.keys()
        # Some gradients are 0 but for rounding, such as the scale of a BatchNorm that another follows.
        rounding = 1e-6 * max(float(v.abs().max()) for k, v in expected.items() if k.startswith("exp_avg."))
        for name, value in expected.items():
            if name.startswith("exp_avg.") or "running" in name:
                tolerance = 1e-4 * float(value.abs().max()) + rounding
                torch.testing.assert_close(state[name], value, rtol=1e-3, atol=tolerance, msg=name)


@pytest.mark.parametrize("engine", [pytest.param("torch", marks=pytest.mark.slow), "deepspeed"])
def test_the_loss_curve_is_the_same_on_one_two_and_three_workers(
    tone_shards: Path, tmp_path: Path, engine: str
) -> None:
    """Over 20 steps. Rounding in the order of summation grows as training goes on, the more the higher the rate."""
    curves = {}
    for world_size in (1, 2, 3):
        sections = {"run": {"engine": engine}, "optim": {"examples": 320, "lr": 1e-4}, "data": {"crop_s": 0.5}}
        recipe = small_recipe(tone_shards, tmp_path / str(world_size), **sections)
        curves[world_size] = losses(train_on(world_size, recipe))
    assert len(curves[1]) == 20
    for world_size in (2, 3):
        np.testing.assert_allclose(curves[world_size], curves[1], rtol=1e-3)


@pytest.mark.parametrize(("engine", "stage"), ENGINES)
def test_resume_is_bit_identical(tone_shards: Path, tmp_path: Path, engine: str, stage: int) -> None:
    """A run that stopped after its first checkpoint and goes on ends with the weights of one that did not stop.

    On three workers: of two numbers the sum is the same in either order.
    """
    sections = {"run": {"engine": engine}, "optim": {"zero_stage": stage}, "checkpoint": {"every": 2, "keep_last": 9}}
    whole = small_recipe(tone_shards, tmp_path / "whole", **sections)
    expected = train_on(3, whole)
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    shutil.rmtree(cut / "model")
    shutil.rmtree(cut / "checkpoints" / "step-00000004-0001")
    events = train_on(3, small_recipe(tone_shards, cut, **sections))
    (started,) = [event for event in events if isinstance(event, Started)]
    assert started.resumed_from == str(cut / "checkpoints" / "step-00000002-0001")
    assert losses(events).tolist() == losses(expected)[2:].tolist()
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(weights(cut)[name], value), name
    steps = [json.loads(line) for line in (cut / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["event"] == "Step"] == [1, 2, 3, 4]


def test_spectrograms_mixed_and_pitches_shifted_are_the_same_on_two_workers_and_resumed(
    tone_shards: Path, tmp_path: Path
) -> None:
    """Micro-batches of eight, of whose sixteen crops several share a shift."""
    sections = {
        "augment": {"mixup_on": "log_mel", "pitch_shift": 2},
        "optim": {"micro_batch": 8, "examples": 64, "lr": 1e-4},
        "checkpoint": {"every": 2, "keep_last": 9},
    }
    expected = losses(train_alone(small_recipe(tone_shards, tmp_path / "whole", **sections)))
    assert len(expected) == 4
    on_two = losses(train_on(2, small_recipe(tone_shards, tmp_path / "two", **sections)))
    np.testing.assert_allclose(on_two, expected, rtol=1e-4)
    unshifted = sections | {"augment": {"mixup_on": "log_mel"}}
    assert (losses(train_alone(small_recipe(tone_shards, tmp_path / "unshifted", **unshifted))) != expected).all()
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut, ignore=shutil.ignore_patterns("model", "step-00000004-0001"))
    assert losses(train_alone(small_recipe(tone_shards, cut, **sections))).tolist() == expected[2:].tolist()
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(weights(cut)[name], value), name


def test_checkpoints_are_free_of_engine_stage_and_workers(tone_shards: Path, tmp_path: Path) -> None:
    """What two workers at stage 2 wrote goes on with one worker at stage 1, at stage 0 and in plain PyTorch."""
    start = {"checkpoint": {"every": 2, "keep_last": 9}}
    whole = small_recipe(tone_shards, tmp_path / "whole", run={"engine": "deepspeed"}, optim={"zero_stage": 2}, **start)
    expected = losses(train_on(2, whole))
    for engine, stage in (("deepspeed", 1), ("deepspeed", 0), ("torch", 2)):
        run_dir = tmp_path / f"{engine}-{stage}"
        shutil.copytree(tmp_path / "whole", run_dir, ignore=shutil.ignore_patterns("model", "step-00000004-0001"))
        recipe = small_recipe(tone_shards, run_dir, run={"engine": engine}, optim={"zero_stage": stage}, **start)
        np.testing.assert_allclose(losses(train_on(1, recipe)), expected[2:], rtol=1e-4)


def _rewrite_hash(run_dir: Path, digest: str) -> None:
    """Give the checkpoint another recipe's hash (and so drop its marker's), as if that recipe had made it."""
    path = run_dir / "checkpoints" / "step-00000001-0001"
    facts = json.loads((path / "state.json").read_text()) | {"recipe_hash": digest}
    (path / "state.json").write_text(json.dumps(facts))
    marker = {
        name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in ("state.safetensors", "state.json")
    }
    (path / "COMMITTED").write_text(json.dumps(marker))


def test_learns_the_tones(tone_shards: Path, tmp_path: Path) -> None:
    recipe = small_recipe(
        tone_shards,
        tmp_path / "learn",
        optim={"examples": 640, "micro_batch": 16},
        data={"crop_s": 1.0},
        augment={"mixup": "none", "specaugment": False},
    )
    events = train_alone(recipe)
    (evaluated,) = [event for event in events if isinstance(event, Evaluated)]
    assert losses(events)[-5:].mean() < losses(events)[:5].mean() / 2
    assert evaluated.metrics["mAP"] > 0.8
    metrics = json.loads((tmp_path / "learn" / "model" / "metrics.json").read_text())
    assert metrics["mAP"] == evaluated.metrics["mAP"]
    assert metrics["clips"] == metrics["listed"] == 40


def test_data_that_is_not_the_checkpoints_is_refused(tone_shards: Path, tmp_path: Path) -> None:
    recipe = small_recipe(tone_shards, tmp_path / "run", optim={"examples": 16})
    train_alone(recipe)
    others = pack_here_tones(tmp_path / "others", 24)
    with pytest.raises(UserError, match="other training clips"):
        train_alone(small_recipe(others, tmp_path / "run", optim={"examples": 16}))


def test_a_checkpoint_of_other_shapes_is_refused(tone_shards: Path, tmp_path: Path) -> None:
    recipe = small_recipe(tone_shards, tmp_path / "run", optim={"examples": 16})
    train_alone(recipe)
    wider = small_recipe(tone_shards, tmp_path / "run", optim={"examples": 16}, model={"variant": "ERANN-3-2"})
    _rewrite_hash(tmp_path / "run", wider.hash())
    with pytest.raises(UserError, match=r"model\.fc1\.bias is \(128,\) in the file, \(256,\) in the model"):
        train_alone(wider)


def pack_here_tones(folder: Path, clips: int) -> Path:
    from shards.sources.audioset import read_audioset

    return pack_here(read_audioset(*write_tone_set(folder, clips)), folder / "shards")


def test_a_step_of_more_examples_than_there_are_clips(tone_shards: Path, tmp_path: Path) -> None:
    """Clips are drawn again, by four workers with three clips too; one of the three classes has no clip."""
    keys = load_manifest(tone_shards).keys.to_pylist()
    (tmp_path / "three").write_text("\n".join(keys[:3]))
    three = {"url": str(tone_shards), "keys": str(tmp_path / "three")}
    data = {"train": three, "eval": three}
    curves = []
    for world_size in (1, 4):
        recipe = small_recipe(tone_shards, tmp_path / str(world_size), data=data, optim={"examples": 32})
        events = train_on(world_size, recipe)
        assert events[0].train_clips == 3
        curves.append(losses(events))
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)


def test_balanced_sampling_of_clips_without_labels_is_refused(tone_shards: Path, tmp_path: Path) -> None:
    clips = load_manifest(tone_shards)
    bare = replace(clips, label_values=clips.label_values[:0], label_offsets=0 * clips.label_offsets)
    with pytest.raises(UserError, match=f"{tone_shards}: no clip has a label, which data.sampling=balanced needs"):
        make_sampler(small_recipe(tone_shards, tmp_path / "run"), bare)


def test_more_workers_than_micro_batches_are_refused(tone_shards: Path, tmp_path: Path) -> None:
    """As torchrun can start them, whatever the recipe says."""
    recipe = small_recipe(tone_shards, tmp_path / "run")
    with pytest.raises(UserError, match="5 workers for 4 micro-batches a step; start at most 4"):
        train(recipe, Workers(0, 5, torch.device("cpu")), lambda event: None)


def test_an_evaluation_that_is_not_finite(tone_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the way it is an incident, for a running statistic may recover; at the end there is no model to write."""
    real = evaluation.require_finite

    def with_nan(scores: Any, *others: Any) -> None:
        scores[5] = np.nan
        real(scores, *others)

    monkeypatch.setattr(evaluation, "require_finite", with_nan)
    recipe = small_recipe(tone_shards, tmp_path / "run", evaluate={"every": 2})
    events: list[Event] = []
    message = "the scores of 1 of 40 clips are not finite"
    with single_worker(CPU) as workers, pytest.raises(evaluation.NotFinite, match=message):
        train(recipe, workers, events.append)
    (incident,) = of_kind(events, Incident)
    assert (incident.kind, incident.step) == ("evaluation", 2)
    assert of_kind(events, Evaluated) == []
    assert not (tmp_path / "run/model").exists()
