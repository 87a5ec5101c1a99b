"""What each step of a run computes: a pure function of the recipe, the training clips and the step.

The global batch B and the micro-batch M come from the recipe. Micro-batch m of step s contains the examples
[s·B + m·M, s·B + (m + 1)·M), whichever worker computes it.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import numpy.typing as npt

from erann_dist.data import loader
from erann_dist.data.manifest import Manifest
from erann_dist.data.permutations import SUBSTITUTE, keyed_integer
from erann_dist.data.sampling import BalancedSampler, Sampler, SequentialSampler, UniformSampler, class_lists
from erann_dist.errors import UserError
from erann_dist.recipe import OptimSection, Recipe
from erann_dist.train.augment import clip_positions

_DRAW_AHEAD = 16  # micro-batches
SUBSTITUTE_POSITIONS = 2**40  # the range from which substitutes for bad clips are drawn


@dataclass(frozen=True)
class MicroBatch:
    """One of the equal parts of a step's examples, as assigned to a rank."""

    examples: npt.NDArray[np.int64]  # (M,) positions of the examples in the run
    weight: float  # 1, or 0 for the repetition that keeps a rank in step with the others


@dataclass(frozen=True)
class MicroBatchCrops(loader.Crops):
    """The crops of a micro-batch."""

    micro_batch: MicroBatch


def assign_micro_batches(step: int, optim: OptimSection, rank: int, world_size: int) -> list[MicroBatch]:
    """This rank's micro-batches of a step: a contiguous range, of the same length on every rank.

    A rank with one fewer repeats its last micro-batch with weight 0, because the engines need equal counts.
    """
    count = optim.global_batch // optim.micro_batch
    mine = np.array_split(np.arange(count), world_size)[rank]
    starts = step * optim.global_batch + mine * optim.micro_batch
    assigned = [MicroBatch(np.arange(s, s + optim.micro_batch), 1.0) for s in starts]
    missing = micro_batches_per_rank(optim, world_size) - len(assigned)
    return assigned + [MicroBatch(assigned[-1].examples, 0.0)] * missing


def micro_batches_per_rank(optim: OptimSection, world_size: int) -> int:
    return -(-optim.global_batch // optim.micro_batch // world_size)


def learning_rate(step: int, steps: int, optim: OptimSection) -> float:
    """The learning rate of step 0..steps−1: constant, or that of torch's OneCycleLR(max_lr, total_steps=steps, …)."""
    if optim.schedule == "constant":
        return optim.lr
    rise_end = optim.pct_start * steps - 1
    start, peak = optim.lr / optim.div_factor, optim.lr
    end = start / optim.final_div_factor
    if step < rise_end:
        return _cosine(start, peak, step / rise_end)
    return _cosine(peak, end, (step - rise_end) / (steps - 1 - rise_end))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def make_sampler(recipe: Recipe, clips: Manifest) -> Sampler:
    if recipe.data.sampling == "uniform":
        return UniformSampler(len(clips), recipe.run.seed)
    if recipe.data.sampling == "sequential":
        return SequentialSampler(len(clips))
    if not len(clips.label_values):
        raise UserError(f"{recipe.data.train[0].url}: no clip has a label, which data.sampling=balanced needs")
    lists = class_lists(clips.label_values, clips.label_offsets, clips.num_classes)
    return BalancedSampler(lists, recipe.run.seed)


class SamplePlan:
    """Which crops of which clips make up the examples of a run."""

    def __init__(self, recipe: Recipe, clips: Manifest) -> None:
        self._recipe = recipe
        self._clips = clips
        self.sampler = make_sampler(recipe, clips)

    def _positions(self, examples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return clip_positions(examples, self._recipe.augment.mixup, self._recipe.augment.partner)

    @property
    def clips_per_example(self) -> int:
        return len(self._positions(np.arange(1)))

    def crops(self, steps: Iterable[int], rank: int, world_size: int) -> Iterator[MicroBatchCrops]:
        """The crops of this rank's micro-batches in the steps; drawn in blocks, which is faster."""
        optim = self._recipe.optim
        assigned = chain.from_iterable(assign_micro_batches(step, optim, rank, world_size) for step in steps)
        while block := list(islice(assigned, _DRAW_AHEAD)):
            needed = [self._positions(micro_batch.examples) for micro_batch in block]
            drawn = np.split(self.sampler.draw(np.concatenate(needed)), np.cumsum([len(each) for each in needed])[:-1])
            for micro_batch, positions, rows in zip(block, needed, drawn, strict=True):
                crops = self._crop(rows, positions)
                yield MicroBatchCrops(crops.rows, crops.starts, crops.counts, crops.length, positions, micro_batch)

    def substitute(self, position: int, attempt: int) -> loader.Crops:
        """Another draw for a position whose clip is bad; the same on every worker."""
        seed, positions = self._recipe.run.seed, np.array([position])
        others = keyed_integer(0, SUBSTITUTE_POSITIONS, seed, SUBSTITUTE, attempt, positions)
        return self._crop(self.sampler.draw(others), positions)

    def keys(self, step: int) -> list[str]:
        """The keys of a step's clips, as they were drawn."""
        batch = self._recipe.optim.global_batch
        rows = self.sampler.draw(self._positions(np.arange(step * batch, (step + 1) * batch)))
        keys: list[str] = self._clips.keys.take(np.unique(rows)).to_pylist()
        return keys

    def _crop(self, rows: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> loader.Crops:
        data = self._recipe.data
        return loader.random_crops(self._clips, rows, positions, self._recipe.run.seed, data.crop_samples)
