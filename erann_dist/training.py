"""One training loop, under Ray Train, under torchrun or in a bare process.

The global batch B and the micro-batch M are the recipe's. Micro-batch m of step s holds the examples
[s·B + m·M, s·B + (m + 1)·M); the gradient is the sum of the examples' losses over B. So any number of workers up to
B / M computes the same function, up to the order of summation.
"""

import fcntl
import importlib.metadata
import math
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from erann_dist import checkpoint, evaluation, loader
from erann_dist.augment import clip_positions, make_inputs
from erann_dist.batchnorm import RunningStatistics
from erann_dist.cache import ClipCache
from erann_dist.data import count_reported, load_sources
from erann_dist.distributed import Workers
from erann_dist.engine import Engine, make_engine
from erann_dist.errors import UsageError, UserError
from erann_dist.events import (
    CheckpointSaved,
    Emit,
    Evaluated,
    EvaluationProgress,
    Event,
    Finished,
    Incident,
    MetricsFile,
    Started,
    Step,
    TensorBoard,
)
from erann_dist.features import LogMel
from erann_dist.keyed import SUBSTITUTE, keyed_integer
from erann_dist.manifest import Manifest, Task, require_same_labels
from erann_dist.model import ERANN
from erann_dist.model_folder import ModelInfo, model_card, save_model
from erann_dist.recipe import OptimSection, Recipe
from erann_dist.sampling import BalancedSampler, Sampler, SequentialSampler, UniformSampler, class_lists
from erann_dist.shared_clips import shared_clips

_DRAW_AHEAD = 16  # micro-batches
SUBSTITUTE_POSITIONS = 2**40  # where substitutes for bad clips are drawn from


@dataclass(frozen=True)
class MicroBatch:
    """A rank's piece of a step's work."""

    examples: npt.NDArray[np.int64]  # (M,) positions of the examples in the run
    weight: float  # 1, or 0 for the repetition that keeps a rank in step with the others


def deal(step: int, optim: OptimSection, rank: int, world_size: int) -> list[MicroBatch]:
    """The micro-batches of a step that are this rank's: a contiguous run, as many on every rank.

    A rank that is one short repeats its last with weight 0, for the engines want equal counts.
    """
    count = optim.global_batch // optim.micro_batch
    mine = np.array_split(np.arange(count), world_size)[rank]
    starts = step * optim.global_batch + mine * optim.micro_batch
    dealt = [MicroBatch(np.arange(s, s + optim.micro_batch), 1.0) for s in starts]
    missing = micro_batches_per_rank(optim, world_size) - len(dealt)
    return dealt + [MicroBatch(dealt[-1].examples, 0.0)] * missing


def micro_batches_per_rank(optim: OptimSection, world_size: int) -> int:
    return -(-optim.global_batch // optim.micro_batch // world_size)


def learning_rate(step: int, steps: int, optim: OptimSection) -> float:
    """The rate of step 0..steps−1: constant, or torch's OneCycleLR(max_lr, total_steps=steps) with its defaults."""
    if optim.schedule == "constant":
        return optim.lr
    rise_end = 0.3 * steps - 1
    start, peak, end = optim.lr / 25, optim.lr, optim.lr / 25 / 1e4
    if step <= rise_end:
        return _cosine(start, peak, step / rise_end)
    return _cosine(peak, end, (step - rise_end) / (steps - 1 - rise_end))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def example_losses(logits: Tensor, targets: Tensor, task: Task) -> Tensor:
    """Each example's loss (M,): binary cross-entropy averaged over the classes, or cross-entropy. targets: (M, N)."""
    if task == "tagging":
        return F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none").mean(dim=1)
    return F.cross_entropy(logits.float(), targets, reduction="none")


def make_sampler(recipe: Recipe, clips: Manifest) -> Sampler:
    if recipe.data.sampling == "uniform":
        return UniformSampler(len(clips), recipe.run.seed)
    if recipe.data.sampling == "sequential":
        return SequentialSampler(len(clips))
    if not len(clips.label_values):
        raise UserError(f"{recipe.data.train[0].url}: no clip has a label, which data.sampling=balanced needs")
    lists = class_lists(clips.label_values, clips.label_offsets, clips.num_classes)
    return BalancedSampler(lists, recipe.run.seed)


def train(recipe: Recipe, run_dir: Path, workers: Workers, emit: Emit) -> None:
    """Train, evaluate and write the model folder; go on from the run's last checkpoint if it has one.

    All workers call it. The first one's events go to `emit`, metrics.jsonl and TensorBoard. Raises UserError.
    """
    if workers.world_size > (most := recipe.optim.global_batch // recipe.optim.micro_batch):
        raise UsageError(f"{workers.world_size} workers for {most} micro-batches a step; start at most {most}")
    with _lock(run_dir) if workers.is_first else nullcontext(), shared_clips(recipe.data.train) as clips:
        eval_clips = load_sources(recipe.data.eval)
        require_same_labels(clips.info, eval_clips.info, recipe.data.train[0].url, recipe.data.eval[0].url)
        _train(recipe, run_dir, workers, emit, clips, eval_clips)


def _train(recipe: Recipe, run_dir: Path, workers: Workers, emit: Emit, clips: Manifest, eval_clips: Manifest) -> None:
    began = time.perf_counter()
    optim, seed = recipe.optim, recipe.run.seed
    torch.set_num_threads(recipe.run.threads)
    steps = recipe.steps(len(clips))

    torch.manual_seed(seed)  # the initial weights; no other random choice is torch's
    model = ERANN.from_name(recipe.model.variant, clips.num_classes).to(workers.device)
    per_rank = micro_batches_per_rank(optim, workers.world_size)
    engine = make_engine(recipe.run.engine, model, optim, per_rank, workers)
    resumed_from = checkpoint.latest(run_dir / "checkpoints")
    bad_clips = loader.BadClips(recipe.data.max_bad_clips)
    first_step = 0
    if resumed_from:
        facts = _resume(resumed_from, recipe, clips, engine)
        first_step = facts.step
        bad_clips.unite([dict.fromkeys(facts.bad_clips, "")])
    statistics = RunningStatistics(model)
    log_mel = LogMel().to(workers.device)
    sampler = make_sampler(recipe, clips)
    clips_per_example = len(clip_positions(np.arange(1), recipe.augment.mixup, recipe.augment.partner))

    hosts = workers.gather_all(socket.gethostname())
    say = _announcer(run_dir, first_step, emit) if workers.is_first else _silent
    say(
        Started(
            step=first_step,
            steps=steps,
            workers=workers.world_size,
            device=str(workers.device),
            train_clips=len(clips),
            eval_clips=len(eval_clips),
            resumed_from=str(resumed_from) if resumed_from else None,
            launched=workers.launched,
            hosts=hosts,
        )
    )

    def crops_ahead() -> Iterator[loader.Crops]:
        """This rank's crops to the end of the run, a batch for each micro-batch; drawn in blocks, which is faster."""
        dealt = (mb for s in range(first_step, steps) for mb in deal(s, optim, workers.rank, workers.world_size))
        while block := list(islice(dealt, _DRAW_AHEAD)):
            needed = [clip_positions(mb.examples, recipe.augment.mixup, recipe.augment.partner) for mb in block]
            drawn = np.split(sampler.draw(np.concatenate(needed)), np.cumsum([len(each) for each in needed])[:-1])
            for positions, rows in zip(needed, drawn, strict=True):
                yield loader.random_crops(clips, rows, positions, seed, recipe.data.crop_samples)

    def evaluate(step: int) -> evaluation.Predictions | None:
        predictions = evaluation.score(
            model,
            eval_clips,
            workers,
            loader_threads=recipe.data.loader_threads,
            progress=lambda done, total: say(EvaluationProgress(step, done, total)),
        )
        if predictions:
            say(Evaluated(step, len(eval_clips), evaluation.summarise(predictions, eval_clips.info.task)))
        return predictions

    def substitute(position: int, attempt: int) -> loader.Crops:
        """Another draw for a position whose clip is bad: the same on whatever worker it falls."""
        positions = np.array([position])
        drawn = sampler.draw(keyed_integer(0, SUBSTITUTE_POSITIONS, seed, SUBSTITUTE, attempt, positions))
        return loader.random_crops(clips, drawn, positions, seed, recipe.data.crop_samples)

    cache = ClipCache(Path(recipe.data.cache.dir), recipe.data.cache.max_bytes) if recipe.data.cache else None
    told = set(bad_clips.found)
    cache_problems = set[str]()

    def tell_incidents(step: int) -> None:
        """Each bad clip once, and each reason why a cache takes no more."""
        if cache and cache.problem:
            cache_problems.add(cache.problem)
        known = bad_clips.found | {problem: problem for problem in cache_problems}
        for key in sorted(known.keys() - told):
            say(Incident(step, "cache" if key in cache_problems else "bad_clip", known[key]))
            told.add(key)

    def save(step: int) -> None:
        saving = time.perf_counter()
        bad_clips.unite(workers.gather_all(bad_clips.found))
        cache_problems.update(*workers.gather_all(cache_problems))
        tell_incidents(step)
        state = engine.state()
        if workers.is_first:
            facts = _facts(step, recipe, clips, told & bad_clips.found.keys())
            path = checkpoint.save(run_dir / "checkpoints", facts, state, recipe.checkpoint.keep_last)
            say(CheckpointSaved(step, str(path), time.perf_counter() - saving, time.perf_counter() - saving))
        workers.wait_for_all()

    read = Counter[str]()
    batches = loader.load(
        clips,
        crops_ahead(),
        threads=recipe.data.loader_threads,
        cache=cache,
        cache_form=recipe.data.cache.format if recipe.data.cache else "flac",
        bad_clips=bad_clips,
        substitute=substitute,
        read=read,
        pin_memory=workers.device.type == "cuda",
    )
    model.train()
    with closing(cache) if cache else nullcontext(), closing(batches):  # the loader's threads use the cache
        window = _Window(read, cache is not None)
        for step in range(first_step, steps):
            lr = learning_rate(step, steps, optim)
            step_loss = torch.zeros((), device=workers.device)
            for micro_batch in deal(step, optim, workers.rank, workers.world_size):
                waiting = time.perf_counter()
                batch = next(batches)
                window.waited += time.perf_counter() - waiting
                inputs = make_inputs(
                    batch.pcm.to(workers.device, non_blocking=True),
                    torch.from_numpy(clips.targets(batch.crops.rows)).to(workers.device),
                    micro_batch.examples,
                    log_mel,
                    mixup=recipe.augment.mixup,
                    partner=recipe.augment.partner,
                    spec_augment=recipe.augment.specaugment,
                    seed=seed,
                )
                logits = engine.forward(inputs.log_mel, inputs.mask)
                losses = example_losses(logits, inputs.targets, clips.info.task)
                loss = losses.sum() * (micro_batch.weight / optim.global_batch)
                engine.backward(loss)
                statistics.add(micro_batch.weight)
                step_loss += loss.detach()
            engine.step(lr)
            window.losses.append(statistics.update(optim.global_batch // optim.micro_batch, step_loss, workers))

            done = step + 1
            tell_incidents(done)
            if done % recipe.run.log_every == 0 or done == steps:
                say(window.report(done, lr, optim.global_batch, clips_per_example, len(bad_clips.found)))
                window = _Window(read, cache is not None)
            paused = time.perf_counter()
            if recipe.evaluate.every and done % recipe.evaluate.every == 0 and done < steps:
                evaluate(done)
            # Behind the evaluation, so that what a killed run repeats is what its files do not have.
            if done % recipe.checkpoint.every == 0 or done == steps:
                save(done)
            window.began += time.perf_counter() - paused

    predictions = evaluate(steps)
    if predictions:
        info = clips.info
        listed = len(eval_clips) + sum(count_reported(source) for source in recipe.data.eval)
        metrics = evaluation.detail(predictions, eval_clips, listed)
        model_info = ModelInfo(recipe.model.variant, info.task, info.label_ids, info.label_names, info.sample_rate)
        evaluation.write_predictions(run_dir / "predictions.parquet", predictions, eval_clips)
        save_model(run_dir / "model", model, model_info, metrics, model_card(model_info, metrics, recipe))
        outcome = evaluation.summarise(predictions, info.task) | {"model": str(run_dir / "model")}
        say(Finished(steps, time.perf_counter() - began, 1.0, outcome))
    workers.wait_for_all()


class _Window:
    """What happened since the last Step event."""

    def __init__(self, read: Counter[str], with_cache: bool) -> None:
        self._read = read  # goes on counting
        self._with_cache = with_cache
        self._read_before = read.copy()
        self.began = time.perf_counter()
        self.waited = 0.0  # seconds, for data
        self.losses: list[Tensor] = []

    def report(
        self,
        step: int,
        lr: float,
        examples_per_step: int,
        clips_per_example: int,
        bad_clips: int,
    ) -> Step:
        # Reading the losses waits for the device, so that the clock is read when the work is done.
        loss = float(torch.stack(self.losses).mean())
        seconds = time.perf_counter() - self.began
        examples = len(self.losses) * examples_per_step / seconds
        read = self._read.copy()
        read.subtract(self._read_before)
        clips = read["clips_cache"] + read["clips_origin"]
        return Step(
            step=step,
            loss=loss,
            lr=lr,
            examples_per_s=examples,
            clips_per_s=examples * clips_per_example,
            data_wait=self.waited / seconds,
            steps=len(self.losses),
            seconds=seconds,
            grad_norm=0.0,
            read_mb_per_s=(read["bytes_cache"] + read["bytes_origin"]) / 1e6 / seconds,
            cache_hits=read["clips_cache"] / clips if self._with_cache and clips else None,
            bad_clips=bad_clips,
        )


def _resume(path: Path, recipe: Recipe, clips: Manifest, engine: Engine) -> checkpoint.Facts:
    """Take over a checkpoint's state; what it says of itself."""
    facts = checkpoint.load_facts(path)
    if facts.train_hash != clips.info.content_hash:
        raise UserError(f"{path}: made with other training clips than {recipe.data.train[0].url} now holds")
    if facts.recipe_hash != recipe.hash():
        raise UserError(f"{path}: made by another recipe; give this one another run.name")
    engine.load_state(
        checkpoint.load_state(path, {f"model.{k}": v for k, v in engine.model.state_dict().items()}),
        facts.step,
    )
    return facts


def _facts(step: int, recipe: Recipe, clips: Manifest, bad_clips: set[str]) -> checkpoint.Facts:
    return checkpoint.Facts(
        step=step,
        recipe_hash=recipe.hash(),
        train_hash=clips.info.content_hash,
        variant=recipe.model.variant,
        threads=recipe.run.threads,
        bad_clips=sorted(bad_clips),
        versions={name: importlib.metadata.version(name) for name in ("torch", "deepspeed")},
    )


def _lock(run_dir: Path) -> IO[str]:
    """Hold the run's folder for this process: two trainings of one run would spoil each other's files."""
    run_dir.mkdir(parents=True, exist_ok=True)
    file = (run_dir / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(f"{run_dir}: this run is being trained by another process; stop that first") from error
    return file


def _announcer(run_dir: Path, first_step: int, emit: Emit) -> Emit:
    readers: list[Emit] = [
        MetricsFile(run_dir / "metrics.jsonl", first_step),
        TensorBoard(run_dir / "tensorboard", first_step),
        emit,
    ]

    def say(event: Event) -> None:
        for reader in readers:
            reader(event)

    return say


def _silent(event: Event) -> None:
    pass
