"""Simulates what the nodes of a cluster read in a run, by drawing every clip of the run's sample plan."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from erann_dist.data.manifest import Manifest
from erann_dist.recipe import Recipe
from erann_dist.train.augment import clip_positions
from erann_dist.train.work_plan import MicroBatch, assign_micro_batches, make_sampler

_BLOCK = 1 << 17  # Number of examples drawn at once.


@dataclass
class NodeReads:
    """What a node reads in a part of the run."""

    clips: int = 0
    hits: int = 0  # clips read from the node's cache
    kept: int = 0  # clips added to the cache
    origin_bytes: int = 0  # read from S3 or the disk of the shard set
    cache_bytes: int = 0  # read from the cache
    kept_bytes: int = 0  # written to the cache
    seen_bytes: int = 0  # size in a cache of the distinct clips read since the run began


@dataclass(frozen=True)
class Stretch:
    """A part of the run."""

    steps: int
    nodes: list[NodeReads]
    unique_clips: int  # distinct clips that the run has seen by the end of this part


@dataclass
class Simulation:
    """A run on these workers, node by node."""

    recipe: Recipe
    clips: Manifest
    workers_of_nodes: list[list[int]]  # ranks
    counts: npt.NDArray[np.int64]  # how often each clip was drawn

    def stretches(self, ends: list[int]) -> Iterator[Stretch]:
        """The parts of the run that end at these steps; the first begins at step 0."""
        nodes = [_Node(self._micro_batches(ranks), self.recipe, self.clips) for ranks in self.workers_of_nodes]
        sampler = make_sampler(self.recipe, self.clips)
        optim, augment = self.recipe.optim, self.recipe.augment
        done = 0
        for end in ends:
            reads = [NodeReads() for _ in nodes]
            first = done
            while done < end:
                steps = np.arange(done, min(end, done + max(1, _BLOCK // optim.global_batch)))
                for node, read in zip(nodes, reads, strict=True):
                    examples = (steps[:, None] * optim.global_batch + node.examples).reshape(-1)
                    rows = sampler.draw(clip_positions(examples, augment.mixup, augment.partner))
                    node.read(rows, read)
                    drawn = rows.reshape(len(steps), len(node.examples), -1)[:, node.drawn].reshape(-1)
                    self.counts += np.bincount(drawn, minlength=len(self.clips))
                done = int(steps[-1]) + 1
            yield Stretch(end - first, reads, int(np.count_nonzero(self.counts)))

    def _micro_batches(self, ranks: list[int]) -> list[MicroBatch]:
        """The micro-batches of step 0 that are assigned to these workers."""
        world_size = sum(map(len, self.workers_of_nodes))
        return [each for rank in ranks for each in assign_micro_batches(0, self.recipe.optim, rank, world_size)]


class _Node:
    """A node and its cache, which adds every clip read until one does not fit, and evicts nothing."""

    def __init__(self, micro_batches: list[MicroBatch], recipe: Recipe, clips: Manifest) -> None:
        self.examples = np.concatenate([each.examples for each in micro_batches])  # of each step
        # A repeated micro-batch that keeps a worker in step is read, but is not a draw.
        self.drawn = np.repeat([each.weight > 0 for each in micro_batches], recipe.optim.micro_batch)
        cache = recipe.data.cache
        self._sizes = clips.sizes.astype(np.int64)
        self._cached_sizes = 2 * clips.samples if cache and cache.format == "pcm" else self._sizes
        self._free = int(cache.max_bytes) if cache else 0
        self._cached = np.zeros(len(clips), dtype=np.bool_)
        self._seen = np.zeros(len(clips), dtype=np.bool_)

    def read(self, rows: npt.NDArray[np.int64], read: NodeReads) -> None:
        """Read these clips in order."""
        distinct, first = np.unique(rows, return_index=True)
        new = distinct[~self._cached[distinct]]
        new = new[np.argsort(first[~self._cached[distinct]])]  # in the order in which they are read
        ends = np.cumsum(self._cached_sizes[new])
        kept = new[: np.searchsorted(ends, self._free, side="right")]
        if len(kept):
            self._free -= int(ends[len(kept) - 1])
        if len(kept) < len(new):
            self._free = 0
        self._cached[kept] = True
        self._seen[distinct] = True
        hit = self._cached[rows]
        read.clips += len(rows)
        read.hits += int(hit.sum()) - len(kept)  # The first read of each filled the cache.
        read.kept += len(kept)
        read.kept_bytes += int(self._cached_sizes[kept].sum())
        read.cache_bytes += int(self._cached_sizes[rows[hit]].sum() - self._cached_sizes[kept].sum())
        read.origin_bytes += int(self._sizes[rows[~hit]].sum() + self._sizes[kept].sum())
        read.seen_bytes = int(self._cached_sizes[self._seen].sum())
