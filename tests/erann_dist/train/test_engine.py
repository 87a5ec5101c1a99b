"""Each engine takes the same steps, as plain PyTorch would: clipped, scaled, skipped when they are not finite."""

import os
import shutil
from collections.abc import Callable
from functools import partialmethod

import pytest
import torch
from torch import Tensor

from erann_dist.models.erann import ERANN
from erann_dist.models.spec import build_model
from erann_dist.recipe import OptimSection
from erann_dist.train import engine as engines
from erann_dist.train.distributed import Workers
from erann_dist.train.engine import Engine, State, make_engine
from tests.support.workers import run_workers

ENGINES = [("torch", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2)]
LR = 1e-5


def new_model() -> ERANN:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return build_model("ERANN-3-1", 3)


def new_engine(kind: str, stage: int, workers: Workers, **optim: object) -> Engine:
    settings = OptimSection.model_validate({"examples": 1, "zero_stage": stage, **optim})
    return make_engine(kind, new_model(), settings, 1, workers)


def batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(4, 1, 128, 64, generator=generator), torch.rand(4, 3, generator=generator)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits - targets).square().sum()


def take_step(engine: Engine, workers: Workers, number: int, factor: float = 1.0) -> float:
    """Each worker has a batch of its own; a factor is the last one's alone. The step's loss."""
    inputs, targets = batch(workers.world_size * number + workers.rank)
    loss = loss_of(engine.forward(inputs, None), targets)
    loss = loss * (factor if workers.rank == workers.world_size - 1 else 1.0)
    engine.backward(loss)
    total = workers.all_reduce_sum(loss.detach().clone())
    engine.step(LR, total)
    return total.item()


def add_gradients(model: ERANN, workers: Workers, number: int) -> None:
    """Those of the batches that all workers have in this step."""
    for rank in range(workers.world_size):
        inputs, targets = batch(workers.world_size * number + rank)
        loss_of(model(inputs), targets).backward()


def require_moment(moment: str, found: State, adam: torch.optim.Adam, model: ERANN) -> None:
    expected = {f"{moment}.{name}": adam.state[p][moment] for name, p in model.named_parameters()}
    rounding = 1e-3 * max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=rounding, msg=name)


def check_adam(workers: Workers, kind: str, stage: int) -> None:
    """Betas and weight decay are those of the recipe."""
    settings = {"betas": (0.8, 0.9), "weight_decay": 0.1}
    engine = new_engine(kind, stage, workers, **settings)
    model = new_model()
    adam = torch.optim.Adam(model.parameters(), LR, **settings)  # type: ignore[arg-type]
    for number in range(3):
        add_gradients(model, workers, number)
        take_step(engine, workers, number)
        adam.step()
        adam.zero_grad()
    found = state_of(engine)
    for moment in ("exp_avg", "exp_avg_sq"):
        require_moment(moment, found, adam, model)
    weight = model.fc1.weight.detach()
    torch.testing.assert_close(found["model.fc1.weight"], weight, rtol=0, atol=0.1 * LR)


def state_of(engine: Engine) -> State:
    state: State = {}
    engine.state(state)
    return {name: value.clone() for name, value in state.items() if "running" not in name and "tracked" not in name}


def check_clipping(workers: Workers, kind: str, stage: int) -> None:
    for clip_norm in (None, 0.5, 1e9):
        engine = new_engine(kind, stage, workers, clip_norm=clip_norm)
        model = new_model()
        adam = torch.optim.Adam(model.parameters(), LR)
        for number in range(3):
            add_gradients(model, workers, number)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm or float("inf"))
            take_step(engine, workers, number)
            torch.testing.assert_close(engine.adam.norm, norm, rtol=1e-3, atol=0)
            assert not engine.adam.skipped
            adam.step()
            adam.zero_grad()
        found = state_of(engine)
        require_moment("exp_avg", found, adam, model)


def check_not_finite(workers: Workers, kind: str, stage: int) -> None:
    for factor in (float("nan"), float("inf")):
        engine, undisturbed = (new_engine(kind, stage, workers) for _ in range(2))
        take_step(engine, workers, 0)
        before = state_of(engine)
        take_step(engine, workers, 1, factor)
        assert engine.adam.skipped
        after = state_of(engine)
        assert all(torch.equal(after[name], value) for name, value in before.items())
        take_step(engine, workers, 2)
        assert not engine.adam.skipped
        take_step(undisturbed, workers, 0)
        take_step(undisturbed, workers, 2)
        expected, found = state_of(undisturbed), state_of(engine)
        assert found["adam.step"] == 2
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def check_loss_scale(workers: Workers, kind: str, stage: int) -> None:
    """fp16's loss scale with fp32's arithmetic, for CPUs have no fp16."""
    engines._AUTOCAST = {}  # in a process of its own
    plain = new_engine(kind, stage, workers, clip_norm=0.5)
    scaled = new_engine(kind, stage, workers, clip_norm=0.5, precision="fp16")
    for number in range(3):
        take_step(plain, workers, number)
        take_step(scaled, workers, number)
    assert scaled.adam.scale == 65536
    torch.testing.assert_close(scaled.adam.norm, plain.adam.norm)
    expected, found = state_of(plain), state_of(scaled)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)

    before = state_of(scaled)["model.fc1.weight"]
    take_step(scaled, workers, 3, 1e35)
    assert (scaled.adam.skipped, scaled.adam.scale) == (1, 32768)
    assert torch.equal(state_of(scaled)["model.fc1.weight"], before)
    scaled.adam.steps_at_scale = torch.tensor(1998.0)
    take_step(scaled, workers, 4)
    assert scaled.adam.scale == 32768
    again = new_engine(kind, stage, workers, clip_norm=0.5, precision="fp16")
    state: State = {}
    scaled.state(state)
    again.load_state(state)
    for each in (scaled, again):
        take_step(each, workers, 5)
        assert (each.adam.scale, each.adam.steps_at_scale) == (65536, 0)


def check_bf16(workers: Workers, kind: str, stage: int) -> None:
    engine = new_engine(kind, stage, workers, precision="bf16")
    take_step(engine, workers, 0)
    assert engine.forward(batch(1)[0], None).dtype == torch.bfloat16
    state: State = {}
    engine.state(state)
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float32}


def check_compiled(workers: Workers, kind: str, backend: str) -> None:
    # In a process of its own.
    torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend=backend)
    eager, compiled = (new_engine(kind, 0, workers, compile=each) for each in (False, True))
    expected, found = ([take_step(each, workers, number) for number in range(3)] for each in (eager, compiled))
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0
    assert (counters["inductor"]["extern_calls"] > 0) == (backend == "inductor")
    assert expected[2] < 0.7 * expected[0]
    assert found == pytest.approx(expected, rel=1e-4)  # fused kernels sum in another order
    # To Adam's steps, and so to the losses, a wrong scale of the gradient makes no difference.
    torch.testing.assert_close(compiled.adam.norm, eager.adam.norm, rtol=1e-3, atol=0)


COMPILED = [("torch", 1), ("deepspeed", 2)]


@pytest.mark.parametrize(("kind", "world_size"), COMPILED)
def test_traced_steps_are_the_eager_ones(kind: str, world_size: int) -> None:
    """torch.compile's graphs of the forward and backward pass, computed without Inductor's kernels."""
    run_workers(check_compiled, world_size, kind, "aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler, g++")
@pytest.mark.parametrize(("kind", "world_size"), COMPILED)
def test_compiled_steps_are_the_eager_ones(kind: str, world_size: int) -> None:
    """The C++ compiler takes half a minute the first time; torch keeps what it made for the next."""
    run_workers(check_compiled, world_size, kind, "inductor")


@pytest.mark.parametrize(("kind", "stage"), ENGINES)
@pytest.mark.parametrize("check", [check_clipping, check_adam, check_not_finite, check_loss_scale, check_bf16])
def test_on_two_workers(check: Callable[[Workers, str, int], None], kind: str, stage: int) -> None:
    """check_clipping: steps are Adam's behind torch's clipping, and the norm is that of the whole gradient.
    check_adam: so are they with the recipe's betas and weight decay.
    check_not_finite: a step that is not finite on one worker leaves everything as it was on both.
    check_loss_scale: it does not show in the weights, is halved by an overflow, doubled after 2000 steps, and saved.
    check_bf16: weights, moments and statistics stay in fp32.
    """
    run_workers(check, 2, kind, stage)
