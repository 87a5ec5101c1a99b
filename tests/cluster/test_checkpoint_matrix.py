"""Checkpoints are free of the number of workers and of the ZeRO stage: any writes the same bytes, any loads them.

What n workers at stage a write after steps of their own is loaded by a plain engine and written again; what that
wrote is loaded by m workers at stage b and written again. All with the same bytes: so do all pairs of (n, a), (m, b).
"""

import hashlib
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from erann_dist.models.spec import build_model
from erann_dist.recipe import OptimSection
from erann_dist.train import engine as engines
from erann_dist.train.distributed import Workers, single_worker
from erann_dist.train.engine import Engine, State, make_engine
from erann_dist.train.work_plan import assign_micro_batches
from tests.support.workers import CPU, run_workers

STAGES = (0, 1, 2)


def new_engine(workers: Workers, kind: str, stage: int) -> Engine:
    """With the loss scale of fp16 and, as CPUs have no fp16, the arithmetic of fp32."""
    engines._AUTOCAST = {}
    torch.set_num_threads(1)
    torch.manual_seed(workers.rank)  # what is loaded counts
    optim = OptimSection(examples=1, zero_stage=stage, precision="fp16")
    return make_engine(kind, build_model("ERANN-3-1", 3), optim, 1, workers)


def take_steps(engine: Engine, workers: Workers, number: int) -> None:
    for step in range(number):
        inputs = torch.randn(2, 1, 128, 64, generator=torch.Generator().manual_seed(10 * step + workers.rank))
        loss = engine.forward(inputs, None).square().mean()
        engine.backward(loss)
        # One of them overflows: Adam's step is then not the number of steps.
        engine.step(1e-3, torch.full((), float("nan")) if step == 1 else loss.detach())


def write(engine: Engine, workers: Workers) -> bytes | None:
    state: State | None = {} if workers.is_rank_zero else None
    engine.state(state)
    return None if state is None else safetensors.torch.save(state)


def train_and_write(workers: Workers, stages: tuple[int, ...]) -> list[tuple[bytes | None, bytes | None]]:
    """What each stage's engine writes after three steps; and after two more."""
    written = []
    for stage in stages:
        engine = new_engine(workers, "deepspeed", stage)
        take_steps(engine, workers, 3)
        first = write(engine, workers)
        take_steps(engine, workers, 2)
        written.append((first, write(engine, workers)))
    return written


def load_and_write(workers: Workers, stages: tuple[int, ...], path: str) -> list[str | None]:
    """Hashes of what each stage's engine writes of what it has loaded."""
    state = safetensors.torch.load(Path(path).read_bytes())
    digests = []
    for stage in stages:
        engine = new_engine(workers, "deepspeed", stage)
        engine.load_state(state)
        data = write(engine, workers)
        digests.append(data and hashlib.sha256(data).hexdigest())
        assert_loaded(engine, state)
    return digests


def assert_loaded(engine: Engine, state: dict[str, Tensor]) -> None:
    """The weights that the next step is computed with, and the loss scale."""
    for name, value in engine.model.state_dict().items():
        assert torch.equal(value, state[f"model.{name}"]), name
    assert engine.adam.scale == state["loss_scale.scale"]
    assert engine.adam.steps_at_scale == state["loss_scale.steps"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a plain engine writes after some steps."""
    path = tmp_path_factory.mktemp("plain") / "state"
    with pytest.MonkeyPatch.context() as patch, single_worker(CPU) as workers:
        patch.setattr(engines, "_AUTOCAST", engines._AUTOCAST)
        engine = new_engine(workers, "torch", 0)
        take_steps(engine, workers, 3)
        data = write(engine, workers)
    assert data
    path.write_bytes(data)
    state = safetensors.torch.load(data)
    assert state["adam.step"] == 2
    assert state["loss_scale.scale"] == 32768
    return path


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_all_load_and_write_the_same_bytes(plain: Path, world_size: int) -> None:
    digests, *others = run_workers(load_and_write, world_size, STAGES, str(plain))
    assert digests == [hashlib.sha256(plain.read_bytes()).hexdigest()] * len(STAGES)
    assert all(digests == [None] * len(STAGES) for digests in others)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_what_is_written_after_steps_is_what_a_plain_engine_makes_of_it(world_size: int) -> None:
    written, *_ = run_workers(train_and_write, world_size, STAGES)
    assert len(written) == len(STAGES)
    for first, second in written:
        assert first != second
        with pytest.MonkeyPatch.context() as patch, single_worker(CPU) as workers:
            patch.setattr(engines, "_AUTOCAST", engines._AUTOCAST)
            engine = new_engine(workers, "torch", 0)
            engine.load_state(safetensors.torch.load(first))
            assert write(engine, workers) == first


def test_the_next_examples_are_the_same_for_any_number_of_workers() -> None:
    optim = OptimSection(global_batch=64, micro_batch=8, examples=1)
    for step in (0, 7):
        expected = [
            example for micro_batch in assign_micro_batches(step, optim, 0, 1) for example in micro_batch.examples
        ]
        for world_size in (2, 3, 4):
            ranks = [assign_micro_batches(step, optim, rank, world_size) for rank in range(world_size)]
            assert [e for dealt in ranks for mb in dealt if mb.weight for e in mb.examples] == expected
