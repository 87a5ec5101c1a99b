"""Compares the training loop, DeepSpeed and Ray with a bare PyTorch loop, on the same machine and data.

The ways to train are interleaved: bare, x, bare, y, bare, … and each turn is compared with the mean of the bare turns
before and after it. Each way has its own worker processes, with the same number, threads and allocator settings, which
live as long as the measurement; only the whole job is started again for each of its turns, as a user would start it.

Bare, plain and DeepSpeed get the same synthetic int16 batches from memory: `_BenchTrainer` replaces the loader, and
everything else in `train` is unchanged. The whole job reads real shards.
"""

import ctypes
import dataclasses
import gc
import multiprocessing
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn
from torch._C._distributed_c10d import FileStore
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from cluster.environment import WORKER_ENVIRONMENT, is_first_process
from cluster.launch import launch
from erann_dist.data.loader import Batch, Loader
from erann_dist.data.sources import load_sources, load_train_and_eval
from erann_dist.environment import end_with_parent
from erann_dist.errors import UserError
from erann_dist.log.events import Emit, Event, Step
from erann_dist.models.base import AudioModel
from erann_dist.models.erann import ARB, ERANN, Variant
from erann_dist.models.log_mel import LogMel
from erann_dist.models.mel_config import ERANN_MEL
from erann_dist.models.spec import build_model
from erann_dist.recipe import AugmentSection, Recipe
from erann_dist.train.augment import Inputs, clip_positions, draw_augment_params, make_inputs, spec_augment_mask
from erann_dist.train.distributed import Workers, pick_device, process_group
from erann_dist.train.engine import autocast
from erann_dist.train.prefetch import DeviceBatch
from erann_dist.train.run import Run
from erann_dist.train.trainer import BatchSource, Trainer, example_losses, train
from erann_dist.train.work_plan import MicroBatchCrops, micro_batches_per_rank
from jobs.bench.flops import peak_flops, training_flops
from jobs.terminal.progress import console
from jobs.terminal.show import console as out
from jobs.terminal.show import facts_page
from jobs.training.pretrain import launch_spec
from jobs.training.probe_run import changed, endless

_BARE = "bare"
_STAGES = (0, 1, 2)
_GPU_STEP = 0.106  # seconds: 32 examples with ERANN-1-6, as an H200 took (docs/reference/benchmarks-gpu.md)
_LOG_EVERY = 10  # the recipe's default
_WARM_UP = 3  # steps of a turn that are not counted
_JOB_WARM_UP = 30  # of the whole job: its loader fills its queue
_JOB_STEPS = 40
_NULL_STEPS = 20  # Steps with the null model for each step of a real turn.
_NULL_MICRO_BATCH = 32
_POOL = 4  # synthetic batches


@dataclass(frozen=True)
class Turn:
    """A stretch of training; the steps after the warm-up are counted."""

    way: str  # bare, plain, deepspeed_<stage>, loader (the recipe's engine with the real loader) or job
    recipe: Recipe
    warm_up: int  # steps
    steps: int
    null: bool = False  # with the null model
    channels_last: bool = True  # the memory format of an ERANN's convolutions
    timed: bool = False  # measure the time of parts of the loop, which itself costs some time


@dataclass(frozen=True)
class Window:
    """Some steps of a turn."""

    step: int  # the last of them
    steps: int
    seconds: float
    data_wait: float = 0.0  # share of the seconds


@dataclass(frozen=True)
class Measured:
    """The measurements of a turn, on the first worker."""

    step_s: float  # seconds of a step
    data_wait: float = 0.0  # share of them
    parts_s: dict[str, float] = field(default_factory=dict)  # seconds of a step in parts of the loop, if timed


def bench_train(recipe: Recipe, steps: int, rounds: int, job_rounds: int) -> dict[str, Any]:
    """Compare each way with the bare loop, first with the recipe's model, then with the null model."""
    os.environ.update(WORKER_ENVIRONMENT)
    classes = load_train_and_eval(recipe.data)[0].num_classes  # Errors in the sets are raised here.
    engines = ["plain", *(f"deepspeed_{stage}" for stage in _STAGES)]
    launcher, engine = recipe.run.launcher, _engine_way(recipe)
    short, long = endless(recipe, _WARM_UP), endless(recipe, _LOG_EVERY)
    null_recipe = changed(
        long,
        data={"crop_s": 0.5},
        augment={"mixup_on": "waveform", "pitch_shift": 0, "specaugment": False},
        optim={"micro_batch": _NULL_MICRO_BATCH, "global_batch": _NULL_MICRO_BATCH * recipe.run.max_workers},
    )
    device = pick_device(recipe.run.device)
    use = None  # Share of the GPUs' peak FLOP/s that one example per second takes.
    if device.type == "cuda":
        peak = recipe.run.max_workers * peak_flops(recipe.run.device, recipe.optim.precision)
        use = training_flops(recipe.model.variant, classes, recipe.data.crop_samples) / peak
    with tempfile.TemporaryDirectory(prefix="erann-bench-") as scratch, Groups(recipe, scratch) as groups:

        def real(way: str) -> Measured:
            return groups.take(Turn(way, short, warm_up=_WARM_UP, steps=steps))

        def job(way: str) -> Measured:
            warm_up, steps = (_LOG_EVERY, 2 * _LOG_EVERY) if way == _BARE else (_JOB_WARM_UP, _JOB_STEPS)
            return groups.take(Turn(way, long, warm_up, steps))

        def null(way: str) -> Measured:
            return groups.take(Turn(way, null_recipe, 2 * _LOG_EVERY, _NULL_STEPS * steps, null=True))

        job_pairs = _interleaved(["loader", "job"], job_rounds, job)  # First, as errors in the clips are raised here.
        pairs = _interleaved(engines, rounds, real) | job_pairs
        null_pairs = _interleaved([*engines, "loader"], rounds, null) | _interleaved(["job"], job_rounds, null)
        timed = groups.take(Turn("plain", null_recipe, 2 * _LOG_EVERY, _NULL_STEPS * steps, null=True, timed=True))

    ratios = {way: [bare.step_s / own.step_s for own, bare in each] for way, each in pairs.items()}
    medians = {way: round(statistics.median(each), 4) for way, each in ratios.items()}
    layers = _layers(null_pairs, engine, launcher) | {f"loop: {k}": v for k, v in timed.parts_s.items()}
    bare_s = statistics.median(bare.step_s for each in pairs.values() for _, bare in each)
    return {
        "variant": recipe.model.variant,
        "device": str(device),
        "workers": recipe.run.max_workers,
        "threads": recipe.run.threads,
        "precision": recipe.optim.precision,
        "global_batch": recipe.optim.global_batch,
        "micro_batch": recipe.optim.micro_batch,
        "crop_s": recipe.data.crop_s,
        "bare_step_ms": round(1000 * bare_s, 2),
        **{f"bare_{name}": value for name, value in _speeds(recipe, bare_s, use).items()},
        "plain_ratio": medians["plain"],
        "deepspeed_ratio": medians[f"deepspeed_{recipe.optim.zero_stage}"],
        **{f"deepspeed_{stage}_ratio": medians[f"deepspeed_{stage}"] for stage in _STAGES},
        "loader_ratio": medians["loader"],
        f"{launcher}_ratio": medians["job"],
        "data_wait": round(statistics.median(own.data_wait for own, _ in pairs["job"]), 4),
        "ways": {
            way: {
                **_speeds(recipe, statistics.median(own.step_s for own, _ in each), use),
                "ratio": medians[way],
                "rounds": [round(ratio, 4) for ratio in ratios[way]],
            }
            for way, each in pairs.items()
        },
        "null_step_us": round(1e6 * statistics.median(bare.step_s for each in null_pairs.values() for _, bare in each)),
        "us_per_step": {layer: round(1e6 * seconds) for layer, seconds in layers.items()},
        "share_of_gpu_step": {layer: round(seconds / _GPU_STEP, 5) for layer, seconds in layers.items()},
    }


def _speeds(recipe: Recipe, step_s: float, use: float | None) -> dict[str, float]:
    """use: share of the GPUs' peak FLOP/s that one example per second takes; None on CPUs, where it means little."""
    examples = recipe.optim.global_batch / step_s
    clips = len(clip_positions(np.arange(1), recipe.augment.mixup, recipe.augment.partner))
    mfu = {} if use is None else {"mfu": round(examples * use, 4)}
    return {"examples_per_s": round(examples, 2), "clips_per_s": round(examples * clips, 2), **mfu}


Pair = tuple[Measured, Measured]  # A way's turn, and the mean of the bare turns before and after it.


def _interleaved(ways: list[str], rounds: int, take: Callable[[str], Measured]) -> dict[str, list[Pair]]:
    pairs: dict[str, list[Pair]] = {way: [] for way in ways}
    before = take(_BARE)
    for number in range(rounds):
        for way in ways:
            own, after = take(way), take(_BARE)
            bare = Measured((before.step_s + after.step_s) / 2)
            pairs[way].append((own, bare))
            figures = f"{1000 * own.step_s:9.2f} ms a step, bare {1000 * bare.step_s:.2f}"
            console.print(f"round {number + 1} of {rounds}  {way:12} {figures}")
            before = after
    return pairs


def _layers(pairs: dict[str, list[Pair]], engine: str, launcher: str) -> dict[str, float]:
    """Seconds that each layer adds to a step: the difference between the ways with and without it."""
    beyond = {way: statistics.median(own.step_s - bare.step_s for own, bare in each) for way, each in pairs.items()}
    return {
        "loop": beyond["plain"],
        **{f"deepspeed_{stage}": beyond[f"deepspeed_{stage}"] - beyond["plain"] for stage in _STAGES},
        "loader": beyond["loader"] - beyond[engine],
        launcher: beyond["job"] - beyond["loader"],
        "all together": beyond["job"],
    }


def _engine_way(recipe: Recipe) -> str:
    return "plain" if recipe.run.engine == "torch" else f"deepspeed_{recipe.optim.zero_stage}"


def with_engine(recipe: Recipe, way: str) -> Recipe:
    """The recipe with the way's engine; ways without one use the recipe's."""
    if way == "plain":
        return changed(recipe, run={"engine": "torch"})
    if way.startswith("deepspeed_"):
        return changed(recipe, run={"engine": "deepspeed"}, optim={"zero_stage": int(way.removeprefix("deepspeed_"))})
    return recipe


class Groups:
    """The worker processes of all ways, started at a way's first turn."""

    def __init__(self, recipe: Recipe, scratch: str) -> None:
        self._recipe = recipe
        self._scratch = scratch
        self._number = 0  # of turns
        self._pipes: dict[str, list[Connection]] = {}
        self._processes: list[Any] = []

    def __enter__(self) -> "Groups":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def take(self, turn: Turn) -> Measured:
        """Let a way's workers run a turn, and wait for them."""
        self._number += 1
        name = f"turn-{self._number}"
        recipe = changed(turn.recipe, run={"dir": self._scratch, "name": name})
        turn = dataclasses.replace(turn, recipe=with_engine(recipe, turn.way))
        if turn.way == "job":
            return self._job(turn)
        if turn.way not in self._pipes:
            self._start(turn.way)
        pipes = self._pipes[turn.way]
        for pipe in pipes:
            pipe.send(turn)
        answers: dict[Any, Measured] = {}
        while len(answers) < len(pipes):  # A failed worker answers while the others wait for it.
            for ready in wait([pipe for pipe in pipes if pipe not in answers]):
                assert isinstance(ready, Connection)
                answers[ready] = _result(ready.recv())
        return answers[pipes[0]]

    def _start(self, way: str) -> None:
        # Forked from a server that has imported most modules, and was started with the current environment.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["jobs.bench.training"])
        self._pipes[way] = []
        for rank in range(self._recipe.run.max_workers):
            ours, theirs = context.Pipe()
            arguments = (rank, self._recipe.run.max_workers, self._recipe.run.device, f"{self._scratch}/{way}", theirs)
            process = context.Process(target=_worker, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes[way].append(ours)

    def _job(self, turn: Turn) -> Measured:
        path = Path(f"{turn.recipe.run_url}.pickle")
        path.write_bytes(pickle.dumps(turn))
        command = [sys.executable, "-m", "jobs.bench.training", str(path)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            console.print(done.stdout, markup=False)
            raise UserError(f"the job ended with exit code {done.returncode}; see its output above")
        return _result(pickle.loads(path.with_suffix(".measured").read_bytes()))


def _result(answer: Measured | UserError) -> Measured:
    if isinstance(answer, UserError):
        raise answer
    return answer


def _worker(rank: int, world_size: int, device: str, store: str, pipe: Connection) -> None:
    """A worker process of one way."""
    end_with_parent()
    os.dup2(
        sys.stderr.fileno(), sys.stdout.fileno()
    )  # Stdout is only for the command's result; DeepSpeed writes there.
    os.environ["LOCAL_RANK"] = str(rank)
    with process_group(pick_device(device, rank), rank, world_size, FileStore(store, world_size)) as workers:
        while True:
            turn: Turn = pipe.recv()
            try:
                pipe.send(measure(turn, workers))
            except UserError as error:
                pipe.send(error)


def run_job(path: Path) -> None:
    """The whole job: the workers are started by the recipe's launcher, as `erann pretrain` does."""
    turn: Turn = pickle.loads(path.read_bytes())
    windows: list[Window] = []
    answer: Measured | UserError
    try:
        spec = launch_spec(turn.recipe, _job_worker, {"turn": turn})
        launch(replace(spec, min_workers=None, run=None), lambda event: windows.extend(_windows(event)))
        answer = _measured(turn, windows)
    except UserError as error:
        answer = error
    if is_first_process():
        path.with_suffix(".measured").write_bytes(pickle.dumps(answer))


def _job_worker(config: dict[str, Any], workers: Workers, emit: Emit) -> None:
    _train(config["turn"], workers, emit, {})


def measure(turn: Turn, workers: Workers) -> Measured:
    """One turn of a way, on one of its workers."""
    try:
        return _measure_bare(turn, workers) if turn.way == _BARE else _measure_ours(turn, workers)
    finally:
        gc.collect()  # DeepSpeed's engine contains reference cycles.
        # The processes of the other ways need the memory.
        if workers.device.type == "cuda":
            torch.cuda.empty_cache()
        elif hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc's
            libc.malloc_trim(0)


def _measure_bare(turn: Turn, workers: Workers) -> Measured:
    return _measured(turn, _bare(turn, workers))


def _measure_ours(turn: Turn, workers: Workers) -> Measured:
    windows: list[Window] = []
    parts: dict[str, float] = defaultdict(float)

    def emit(event: Event) -> None:
        windows.extend(_windows(event))
        if windows and windows[-1].step == turn.warm_up:
            parts.clear()

    _train(turn, workers, emit, parts)
    return dataclasses.replace(_measured(turn, windows), parts_s={k: s / turn.steps for k, s in parts.items()})


def _windows(event: Event) -> list[Window]:
    return [Window(event.step, event.steps, event.seconds, event.data_wait)] if isinstance(event, Step) else []


def _measured(turn: Turn, windows: list[Window]) -> Measured:
    counted = [w for w in windows if turn.warm_up < w.step <= turn.warm_up + turn.steps]
    if not counted:  # Only the first worker has events.
        return Measured(0.0)
    seconds = sum(w.seconds for w in counted)
    return Measured(seconds / sum(w.steps for w in counted), sum(w.data_wait * w.seconds for w in counted) / seconds)


def _bare(turn: Turn, workers: Workers) -> list[Window]:
    """A hand-written loop: the same front end and augmentation, DDP, Adam, autocast, one-cycle schedule."""
    recipe = turn.recipe
    optim, mixing, device = recipe.optim, recipe.augment, workers.device
    torch.set_num_threads(recipe.run.threads)
    torch.manual_seed(recipe.run.seed)
    torch.backends.cudnn.allow_tf32 = optim.precision == "tf32"
    clips = load_sources(recipe.data.train)
    model: AudioModel = NullModel("null", clips.num_classes)
    if not turn.null:
        model = build_model(recipe.model.variant, clips.num_classes, recipe.model.initialisation)
    model.to(device)
    network: Any = model
    if workers.world_size > 1:
        network = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    if optim.compile:
        network.compile()
    adam = torch.optim.Adam(model.parameters(), optim.lr, optim.betas, weight_decay=optim.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, optim.lr, 10**6, cycle_momentum=False)
    scaler = GradScaler(device.type, enabled=optim.precision == "fp16")
    log_mel = (NullLogMel if turn.null else LogMel)(model.front_end).to(device)
    per_rank = micro_batches_per_rank(optim, workers.world_size)
    examples = np.arange(optim.micro_batch)
    count = len(clip_positions(examples, mixing.mixup, mixing.partner))
    pool = _pool(count, recipe.data.crop_samples, device.type == "cuda")
    targets = torch.from_numpy(clips.targets(np.arange(count) % len(clips)))
    bins, frames = model.front_end.mel_bins, model.front_end.frames(recipe.data.crop_samples)
    windows: list[Window] = []
    losses: list[Tensor] = []
    began = time.perf_counter()
    for step in range(turn.warm_up + turn.steps):
        for number in range(per_rank):
            pcm = pool[(step * per_rank + number) % len(pool)]
            params = draw_augment_params(examples + step * optim.global_batch, bins, frames, recipe.run.seed, mixing)
            batch = DeviceBatch(pcm, targets, params, 1.0, 0).map(lambda tensor: tensor.to(device, non_blocking=True))
            if turn.null:
                inputs = null_inputs(batch, log_mel, mixing)
            else:
                inputs = make_inputs(batch.pcm, batch.targets, batch.params, log_mel, mixing)
            with nullcontext() if workers.world_size == 1 or number == per_rank - 1 else network.no_sync():
                with autocast(device, optim.precision):
                    logits = network(inputs.log_mel, inputs.mask)
                share = example_losses(logits, inputs.targets, clips.info.task).sum()
                loss = share * (workers.world_size / optim.global_batch)  # DDP averages over the workers
                scaler.scale(loss).backward()
            losses.append(loss.detach())
        if optim.clip_norm:
            scaler.unscale_(adam)
            nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        scaler.step(adam)
        scaler.update()
        adam.zero_grad()
        schedule.step()
        if (step + 1) % recipe.run.log_every == 0:
            float(torch.stack(losses).sum())  # As for printing it; this waits for the device.
            windows.append(Window(step + 1, recipe.run.log_every, time.perf_counter() - began))
            losses.clear()
            began = time.perf_counter()
    return windows


class _EnoughError(Exception):
    """The turn's steps are done."""


def _train(turn: Turn, workers: Workers, emit: Emit, parts: dict[str, float]) -> None:
    """Our loop, ended by its loader after the turn's steps, as the end of a run is not measured."""
    with suppress(_EnoughError):
        train(turn.recipe, workers, emit, make_trainer=partial(_BenchTrainer, turn, parts))


class _BenchTrainer(Trainer):
    """The loop of a turn. parts: receives the seconds spent in parts of it, if the turn is timed."""

    def __init__(self, turn: Turn, parts: dict[str, float], run: Run, emit: Emit, resources: ExitStack) -> None:
        self._turn = turn
        super().__init__(run, emit, resources)
        if turn.null:
            self.front_end = NullLogMel(self.model.front_end)
        if turn.timed:
            for part, owner, name in (
                ("sampler", self.plan.sampler, "draw"),
                ("statistics", self.statistics, "add"),
                ("statistics", self.statistics, "update"),
                ("outcomes", self.results, "add"),
                ("outcomes", self.results, "drain"),
                ("watchdog", run.watchdog, "alive"),
                ("events", self.reporter, "emit"),
            ):
                setattr(owner, name, _timed(part, getattr(owner, name), parts))

    def make_model(self) -> AudioModel:
        if self._turn.null:
            return NullModel("null", self.run.clips.num_classes)
        model = super().make_model()
        if not self._turn.channels_last:
            for layer in model.modules():
                if isinstance(layer, ARB):
                    layer.memory_format = torch.contiguous_format
        return model

    def make_inputs(self, batch: DeviceBatch) -> Inputs:
        augment = self.run.recipe.augment
        return null_inputs(batch, self.front_end, augment) if self._turn.null else super().make_inputs(batch)

    def make_loader(self, crops: Iterator[MicroBatchCrops]) -> BatchSource:
        turn, pin_memory = self._turn, self.workers.device.type == "cuda"
        # One step more than is counted, as the loop may request batches ahead.
        batches = (turn.warm_up + turn.steps + 1) * self.micro_batches
        if turn.way not in ("loader", "job"):
            return _LimitedLoader(_SyntheticLoader(crops, pin_memory), batches)
        if turn.null:
            null = _NullLoader(
                self.run.clips, crops, threads=self.run.recipe.data.loader_threads, pin_memory=pin_memory
            )
            return _LimitedLoader(null, batches)
        return _LimitedLoader(super().make_loader(crops), batches)


class _NullLoader(Loader[MicroBatchCrops]):
    """Reads and decodes nothing."""

    def _decode_into(self, *_: object) -> None:
        pass


class _LimitedLoader:
    """A limited number of a loader's batches, after which the turn ends."""

    def __init__(self, loader: BatchSource, batches: int) -> None:
        self._loader, self._batches = loader, iter(loader)
        self._left = batches

    def __iter__(self) -> "_LimitedLoader":
        return self

    def __next__(self) -> Batch[MicroBatchCrops]:
        if not self._left:
            raise _EnoughError
        self._left -= 1
        return next(self._batches)

    def close(self) -> None:
        self._loader.close()


class _SyntheticLoader:
    """In place of Loader: the crops are drawn as usual, but their samples come from memory."""

    def __init__(self, crops: Iterator[MicroBatchCrops], pin_memory: bool) -> None:
        self._crops = enumerate(crops)
        self._pin_memory = pin_memory

    def __iter__(self) -> "_SyntheticLoader":
        return self

    def __next__(self) -> Batch[MicroBatchCrops]:
        number, crops = next(self._crops)
        return Batch(crops, _pool(len(crops.rows), crops.length, self._pin_memory)[number % _POOL])

    def close(self) -> None:
        pass


@lru_cache(2)
def _pool(count: int, length: int, pin_memory: bool) -> list[Tensor]:
    noise = np.random.default_rng(0).integers(-8192, 8192, (_POOL, count, length), np.int16)
    return [torch.from_numpy(each).pin_memory() if pin_memory else torch.from_numpy(each) for each in noise]


class NullModel(AudioModel):
    """Next to no computation in as many tensors as an ERANN has, with BatchNorms of ERANN-1-6's sizes."""

    def __init__(self, name: str, num_classes: int) -> None:
        super().__init__(name, num_classes, ERANN_MEL)
        with torch.device("meta"):
            real = ERANN(Variant(1, 6), num_classes)
        norms = [layer for layer in real.modules() if isinstance(layer, nn.BatchNorm2d)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(layer.num_features) for layer in norms)
        others = len(list(real.parameters())) - len(list(self.parameters()))
        self.others = nn.ParameterList(torch.zeros(16) for _ in range(others))
        self._all = list(self.parameters())

    def forward(self, log_mel: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.norms[0](log_mel[:, 0, :, :1, None]).mean(dim=(1, 2, 3))
        everything = torch.cat([p.flatten() for p in self._all]).mean()
        return (x + everything)[:, None].expand(-1, self.num_classes)


class NullLogMel(LogMel):
    """Zeros in place of a spectrogram."""

    def forward(self, waveform: Tensor) -> Tensor:
        return waveform.new_zeros(len(waveform), 1, self.config.mel_bins, self.config.frames(waveform.shape[-1]))


def null_inputs(batch: DeviceBatch, front_end: LogMel, augment: AugmentSection) -> Inputs:
    """Next to no computation in place of the front end and the mixup."""
    step = 2 if augment.mixup != "none" and augment.partner == "fresh" else 1
    spectrogram = front_end(batch.pcm[::step].float() / 32768)
    mask = spec_augment_mask(batch.params, *spectrogram.shape[-2:]) if augment.specaugment else None
    return Inputs(spectrogram, mask, batch.targets[::step])


def _timed(part: str, function: Callable[..., Any], parts: dict[str, float]) -> Callable[..., Any]:
    def run(*arguments: Any, **settings: Any) -> Any:
        began = time.perf_counter()
        answer = function(*arguments, **settings)
        parts[part] += time.perf_counter() - began
        return answer

    return run


def training_page(result: dict[str, Any]) -> None:
    """The facts, then the ways, then the layers."""
    facts_page(result)
    ways = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("", "examples/s", "clips/s", "FLOP utilisation", "ratio to bare", "of the rounds"):
        if title != "FLOP utilisation" or "bare_mfu" in result:
            ways.add_column(title, justify="left" if not title else "right")
    for name, figures in result["ways"].items():
        speeds = [f"{figures['examples_per_s']:.1f}", f"{figures['clips_per_s']:.1f}"]
        speeds += [f"{figures['mfu']:.1%}"] if "mfu" in figures else []
        ways.add_row(name, *speeds, f"{figures['ratio']:.3f}", _spread(figures["rounds"]))
    layers = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("with the null model", "µs a step", f"of a {1000 * _GPU_STEP:.0f} ms step"):
        layers.add_column(title, justify="left" if title.startswith("with") else "right")
    for name, microseconds in result["us_per_step"].items():
        layers.add_row(name, str(microseconds), f"{result['share_of_gpu_step'][name]:.2%}")
    out.print(ways)
    out.print(layers)


def _spread(ratios: list[float]) -> str:
    return f"{min(ratios):.3f} to {max(ratios):.3f}"


if __name__ == "__main__":
    # Imported under its real name, which workers in other processes import too.
    from jobs.bench.training import run_job

    run_job(Path(sys.argv[1]))
