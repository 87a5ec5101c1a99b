"""What a training does when a step is not finite, when it is told to stop, when a checkpoint can't be written."""

import json
import multiprocessing
import signal
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from erann_dist.data.manifest import load_manifest
from erann_dist.errors import Stopped, UsageError, UserError
from erann_dist.log.events import CheckpointSaved, Evaluated, Event, Finished, Incident, Interruption, Started, Step
from erann_dist.models.erann import ERANN
from erann_dist.recipe import Recipe
from erann_dist.storage.folder import LocalFolder
from erann_dist.train import checkpoint, evaluation, trainer, watchdog
from erann_dist.train.checkpoint import Superseded
from erann_dist.train.distributed import Workers, single_worker
from erann_dist.train.trainer import example_losses, train
from erann_dist.train.work_plan import SamplePlan
from tests.conftest import small_recipe
from tests.support.workers import CPU, of_kind, run_workers, train_alone, train_on


def weights(recipe: Recipe, name: str = "model") -> dict[str, Tensor]:
    return load_file(Path(recipe.run_url, name, "model.safetensors"))


@pytest.fixture
def nan_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the loss of some micro-batches undefined; there are four in a step."""

    def spoil(*numbers: int, value: float = float("nan")) -> None:
        calls = iter(range(10**6))

        def losses(*arguments: Any) -> Tensor:
            return example_losses(*arguments) * (value if next(calls) in numbers else 1.0)

        monkeypatch.setattr(trainer, "example_losses", losses)

    return spoil


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_undefined_loss_ends_the_run(
    tone_shards: Path, tmp_path: Path, nan_at: Callable[..., None], value: float
) -> None:
    recipe = small_recipe(tone_shards, tmp_path / "run", checkpoint={"every": 1})
    nan_at(9, value=value)  # in step 3
    with pytest.raises(UserError) as error:
        train_alone(recipe)
    clips = load_manifest(str(tone_shards))
    keys = SamplePlan(recipe, clips).keys(2)
    assert len(keys) > 8
    assert str(error.value) == (
        f"step 3: the loss is {value}; clips {', '.join(keys[:8])}, …; last checkpoint "
        f"{tmp_path}/run/checkpoints/step-00000002-0001; bad step number 1, optim.max_bad_steps is 0; "
        "allow more, or start another run with a lower optim.lr"
    )


def test_the_keys_of_a_step_are_its_clips(tone_shards: Path, tmp_path: Path) -> None:
    recipe = small_recipe(tone_shards, tmp_path / "run")
    clips = load_manifest(str(tone_shards))
    draws = SamplePlan(recipe, clips)
    for step in (0, 5):
        rows = np.concatenate([crops.rows for crops in draws.crops([step], 0, 1)])
        assert sorted(draws.keys(step)) == sorted({clips.keys[int(row)].as_py() for row in rows})


def test_bad_steps_are_skipped_within_the_budget_and_remembered(
    tone_shards: Path, tmp_path: Path, nan_at: Callable[..., None]
) -> None:
    """A skipped step leaves weights, moments and running statistics as they were, and the run goes on."""
    settings = {"checkpoint": {"every": 1, "keep_last": 9}}
    recipe = small_recipe(tone_shards, tmp_path / "run", optim={"max_bad_steps": 2}, **settings)
    nan_at(4, 8)  # in steps 2 and 3
    events = train_alone(recipe)
    incidents = of_kind(events, Incident)
    assert [(each.step, each.kind) for each in incidents] == [(2, "bad_step"), (3, "bad_step")]
    assert incidents[0].text.startswith("skipped: the loss is nan; clips ")
    assert set(incidents[0].keys) == set(SamplePlan(recipe, load_manifest(str(tone_shards))).keys(1))
    folder = tmp_path / "run" / "checkpoints"
    first, *skipped = (load_file(folder / f"step-0000000{n}-0001" / "state.safetensors") for n in (1, 2, 3))
    for state in skipped:
        changed = {name for name, value in state.items() if not torch.equal(value, first[name])}
        assert {name.rpartition(".")[2] for name in changed} == {"num_batches_tracked"}
    steps = of_kind(events, Step)
    assert len(steps) == 4
    assert np.isfinite([steps[0].loss, steps[3].loss]).all()
    facts = json.loads((tmp_path / "run/checkpoints/step-00000004-0001/state.json").read_text())
    assert facts["bad_steps"] == [2, 3]


def test_a_resumed_run_remembers_its_bad_steps(tone_shards: Path, tmp_path: Path, nan_at: Callable[..., None]) -> None:
    recipe = small_recipe(tone_shards, tmp_path / "run", optim={"max_bad_steps": 1}, checkpoint={"every": 1})
    nan_at(0, 4)
    with pytest.raises(UserError, match="step 2: .*bad step number 2"):
        train_alone(recipe)
    nan_at(0)
    with pytest.raises(UserError, match="step 2: .*bad step number 2"):
        train_alone(recipe)
    nan_at()
    train_alone(recipe)


def train_until_told(workers: Workers, tree: dict[str, Any], told_rank: int, step: int) -> tuple[str, list[Event]]:
    """Train; one worker is told to stop while the step after `step` is computed."""
    recipe = Recipe.model_validate(tree)
    events: list[Event] = []
    asked = iter(range(10**6))

    def stop_request() -> Interruption | None:
        reached = workers.rank == told_rank and next(asked) >= step
        return Interruption("preemption", "node 10.0.0.7 goes") if reached else None

    try:
        train(recipe, replace(workers, stop_request=stop_request), events.append)
    except Stopped as stopped:
        return str(stopped), events
    return "", events


@pytest.mark.parametrize("told_rank", [0, 1])
def test_a_stop_request_loses_no_step(tone_shards: Path, tmp_path: Path, told_rank: int) -> None:
    """Whoever gets it, all workers stop at the same step, behind a checkpoint of it."""
    whole = small_recipe(tone_shards, tmp_path / "whole", run={"launcher": "ray", "workers": 2})
    expected = of_kind(train_on(2, whole), Step)
    recipe = small_recipe(tone_shards, tmp_path / "run", run={"launcher": "ray", "workers": 2})
    (text, events), (other, _) = run_workers(train_until_told, 2, recipe.model_dump(), told_rank, 1)
    assert text == other == "node 10.0.0.7 goes: stopped at step 2 of 4, whose checkpoint is saved"
    assert [event.step for event in of_kind(events, CheckpointSaved)] == [2]
    again = train_on(2, recipe)
    (started,) = of_kind(again, Started)
    assert started.step == 2
    (incident,) = of_kind(again, Incident)
    assert (incident.kind, incident.steps_lost) == ("failure", 0)
    assert [step.loss for step in of_kind(events + again, Step)] == [step.loss for step in expected]
    for name, value in weights(whole).items():
        assert torch.equal(weights(recipe)[name], value), name


def test_a_stop_request_changes_nothing_of_the_mean_of_the_last_checkpoints(tone_shards: Path, tmp_path: Path) -> None:
    """What was saved because of it is no part of the mean, and pushes nothing out that is."""
    settings: dict[str, Any] = {
        "optim": {"examples": 96},
        "evaluate": {"average_last": 2},
        "checkpoint": {"every": 2, "keep_last": 2},
    }
    whole = small_recipe(tone_shards, tmp_path / "whole", **settings)
    train_alone(whole)
    recipe = small_recipe(tone_shards, tmp_path / "run", **settings)
    for step in (2, 1):  # of each start: it stops behind steps 3 and 5
        with single_worker(CPU) as workers:
            text, _ = train_until_told(workers, recipe.model_dump(), 0, step)
        assert text
    train_alone(recipe)
    for name, value in weights(whole, "model-averaged").items():
        assert torch.equal(weights(recipe, "model-averaged")[name], value), name


def test_a_start_that_was_replaced_writes_no_model(
    tone_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(tone_shards, tmp_path / "run")
    score = evaluation.score

    def replaced_meanwhile(*arguments: Any, **settings: Any) -> Any:
        checkpoint.begin(LocalFolder(recipe.run_url))
        return score(*arguments, **settings)

    monkeypatch.setattr("erann_dist.train.evaluation.score", replaced_meanwhile)
    with pytest.raises(Superseded):
        train_alone(recipe)
    assert not (tmp_path / "run/model").exists()
    assert not (tmp_path / "run/predictions.parquet").exists()


def test_steps_that_the_log_does_not_tell_of_are_counted_as_lost(
    tone_shards: Path, tmp_path: Path, nan_at: Callable[..., None]
) -> None:
    settings: dict[str, Any] = {"optim": {"examples": 96}, "checkpoint": {"every": 2}, "run": {"log_every": 100}}
    recipe = small_recipe(tone_shards, tmp_path / "run", **settings)
    nan_at(12)  # in step 4
    with pytest.raises(UserError):
        train_alone(recipe)
    nan_at()
    (incident,) = of_kind(train_alone(recipe), Incident)
    assert (incident.step, incident.steps_lost) == (2, 1)
    assert incident.text == "the command before this one ended at step 3"


def test_the_mean_of_the_last_checkpoints_is_evaluated_too(tone_shards: Path, tmp_path: Path) -> None:
    settings = {"checkpoint": {"every": 1, "keep_last": 3}}
    recipe = small_recipe(tone_shards, tmp_path / "run", evaluate={"average_last": 3}, **settings)
    events = train_alone(recipe)
    assert [event.averaged for event in of_kind(events, Evaluated)] == [3, None]
    states = [load_file(path) for path in sorted(tmp_path.glob("run/checkpoints/*/state.safetensors"))]
    assert len(states) == 3
    for name, value in weights(recipe, "model-averaged").items():
        if value.is_floating_point():
            mean = torch.stack([state[f"model.{name}"] for state in states]).mean(dim=0)
            torch.testing.assert_close(value, mean, rtol=1e-5, atol=1e-7, msg=name)
    for name, value in weights(recipe).items():
        assert torch.equal(value, states[-1][f"model.{name}"]), name


def test_more_checkpoints_to_average_than_are_kept_are_refused(tone_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="average_last is 3, but checkpoint.keep_last only 2"):
        small_recipe(tone_shards, tmp_path / "run", evaluate={"average_last": 3})


def test_the_best_checkpoint_is_kept(tone_shards: Path, tmp_path: Path) -> None:
    settings = {"optim": {"examples": 96}, "checkpoint": {"every": 100, "keep_last": 1, "keep_best": 1}}
    recipe = small_recipe(tone_shards, tmp_path / "run", evaluate={"every": 1}, **settings)
    evaluated = of_kind(train_alone(recipe), Evaluated)
    # The others are deleted with the last checkpoint, before that is evaluated.
    scores = {event.step: event.metrics["mAP"] for event in evaluated if event.step < 6}
    best = min(scores, key=lambda step: (-scores[step], step))
    kept = {int(path.name.split("-")[1]) for path in tmp_path.glob("run/checkpoints/step-*")}
    assert kept == {best, 6}


def test_an_evaluation_in_which_the_run_was_lost_is_made_up_for(
    tone_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(tone_shards, tmp_path / "run", evaluate={"every": 2}, checkpoint={"every": 2})

    def be_lost(*_: Any, **__: Any) -> None:
        raise ConnectionResetError

    with monkeypatch.context() as patch:
        patch.setattr("erann_dist.train.evaluation.score", be_lost)
        with pytest.raises(ConnectionResetError):
            train_alone(recipe)
    events = train_alone(recipe)
    assert [event.step for event in of_kind(events, Started)] == [2]
    assert [event.step for event in of_kind(events, Evaluated)] == [2, 4]
    train_again = train_alone(recipe)
    assert [event.step for event in of_kind(train_again, Evaluated)] == [4]


def test_a_checkpoint_that_fails_does_not_end_the_run(
    tone_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = LocalFolder.write

    def fail(self: LocalFolder, name: str, data: bytes) -> None:
        if "step-00000002" in name:
            raise OSError(28, "No space left on device", name)
        write(self, name, data)

    monkeypatch.setattr(LocalFolder, "write", fail)
    recipe = small_recipe(tone_shards, tmp_path / "run", checkpoint={"every": 1})
    events = train_alone(recipe)
    (incident,) = of_kind(events, Incident)
    assert (incident.step, incident.kind) == (2, "checkpoint")
    assert "No space left on device" in incident.text
    assert [event.step for event in of_kind(events, CheckpointSaved)] == [1, 3, 4]
    (finished,) = of_kind(events, Finished)
    assert 0 < finished.goodput < 1


def test_fp16_on_a_cpu_is_refused(tone_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="optim.precision fp16 needs a GPU"):
        train_alone(small_recipe(tone_shards, tmp_path / "run", optim={"precision": "fp16"}))


def test_memory_that_is_too_small_for_whole_clips_says_so(
    tone_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("erann_dist.train.evaluation.score", too_much)
    with pytest.raises(UserError, match=r"too small to evaluate clips at their whole length, 16 at once; the longest"):
        train_alone(small_recipe(tone_shards, tmp_path / "run"))


def test_memory_that_is_too_small_for_the_weights_says_so(
    tone_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "make_engine", too_much)
    with pytest.raises(UserError, match="too small for the weights of ERANN-.* use a smaller model.variant"):
        train_alone(small_recipe(tone_shards, tmp_path / "run"))


def test_memory_that_is_too_small_says_what_would_fit(
    tone_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's memory, played by a model that takes no more than 3 examples at once."""
    forward = ERANN.forward

    def small(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, x, mask)

    monkeypatch.setattr(ERANN, "forward", small)
    recipe = small_recipe(tone_shards, tmp_path / "run", optim={"global_batch": 12, "micro_batch": 4})
    with pytest.raises(
        UserError, match=r"too small for optim.micro_batch=4 of 22050 samples; optim.micro_batch=2 would"
    ):
        train_alone(recipe)


def hang(folder: str, rank: int) -> None:
    tempfile.tempdir = folder
    with watchdog.watching("some/run", rank, 0.5) as watching:
        watching._armed = 0.0
        watching.alive()
        multiprocessing.Event().wait(60)


def work(folder: str) -> None:
    tempfile.tempdir = folder
    with watchdog.watching("some/run", 0, 2.0) as watching:
        for _ in range(40):
            watching.alive()
            multiprocessing.Event().wait(0.1)


def test_a_worker_that_hangs_is_ended_and_leaves_its_stacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    context = multiprocessing.get_context("forkserver")
    hung = [context.Process(target=hang, args=(str(tmp_path), rank)) for rank in range(2)]
    for process in hung:
        process.start()
    for process in hung:
        process.join()
        assert process.exitcode == -signal.SIGALRM
    left = watchdog.stacks_left("some/run")
    assert sorted(rank for rank, _ in left) == ["rank0", "rank1"]
    assert all("in hang" in text for _, text in left)
    assert watchdog.stacks_left("some/run") == []
    assert list(tmp_path.glob("erann-*")) == []


def test_a_worker_that_works_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    process = multiprocessing.get_context("forkserver").Process(target=work, args=(str(tmp_path),))
    process.start()
    while process.is_alive():
        assert watchdog.stacks_left("some/run") == []
    assert process.exitcode == 0
    assert list(tmp_path.glob("erann-*")) == []
