"""What the nodes of a cluster will read in a run: each clip that the run's plan draws, drawn beforehand."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from erann_dist.augment import clip_positions
from erann_dist.manifest import Manifest
from erann_dist.recipe import Recipe
from erann_dist.training import deal, make_sampler

_BLOCK = 1 << 17  # examples that are drawn at once


@dataclass(frozen=True)
class Stretch:
    """A part of the run. The reads are those of the node that reads most of its clips from where they lie."""

    steps: int
    clips_read: int
    cache_hits: int
    origin_bytes: int  # from S3 or the disk of the shard set
    cache_bytes: int  # from the node's cache
    requests: int  # by all nodes, of clips that were not in a cache
    unique_clips: int  # that the run has seen at its end
    seen_bytes: int  # of the distinct clips that this node has read by then


@dataclass
class Simulation:
    """A run on so many workers, node by node."""

    recipe: Recipe
    clips: Manifest
    workers_of_nodes: list[list[int]]  # ranks
    counts: npt.NDArray[np.int64]  # how often each clip was drawn

    def stretches(self, ends: list[int]) -> Iterator[Stretch]:
        """The run from each of these steps to the next one, the first from 0."""
        nodes = [_Node(self._examples_of(ranks), self.recipe, self.clips) for ranks in self.workers_of_nodes]
        sampler = make_sampler(self.recipe, self.clips)
        optim, augment = self.recipe.optim, self.recipe.augment
        done = 0
        for end in ends:
            reads = [_Reads() for _ in nodes]
            first = done
            while done < end:
                steps = np.arange(done, min(end, done + max(1, _BLOCK // optim.global_batch)))
                for node, read in zip(nodes, reads, strict=True):
                    examples = (steps[:, None] * optim.global_batch + node.examples).reshape(-1)
                    rows = sampler.draw(clip_positions(examples, augment.mixup, augment.partner))
                    self.counts += np.bincount(rows, minlength=len(self.clips))
                    node.read(rows, read)
                done = int(steps[-1]) + 1
            busiest = max(range(len(nodes)), key=lambda number: reads[number].origin_bytes)
            most = reads[busiest]
            yield Stretch(
                steps=end - first,
                clips_read=most.clips,
                cache_hits=most.hits,
                origin_bytes=most.origin_bytes,
                cache_bytes=most.cache_bytes,
                requests=sum(read.clips - read.hits for read in reads),
                unique_clips=int(np.count_nonzero(self.counts)),
                seen_bytes=nodes[busiest].seen_bytes(),
            )

    def _examples_of(self, ranks: list[int]) -> npt.NDArray[np.int64]:
        """The examples of step 0 that these workers have."""
        world_size = sum(map(len, self.workers_of_nodes))
        dealt = [mb for rank in ranks for mb in deal(0, self.recipe.optim, rank, world_size) if mb.weight]
        return np.concatenate([mb.examples for mb in dealt])


@dataclass
class _Reads:
    clips: int = 0
    hits: int = 0
    origin_bytes: int = 0
    cache_bytes: int = 0


class _Node:
    """A node and its cache, which takes in what is read until a clip finds no room, and throws nothing out."""

    def __init__(self, examples: npt.NDArray[np.int64], recipe: Recipe, clips: Manifest) -> None:
        self.examples = examples  # of each step
        cache = recipe.data.cache
        self._sizes = clips.sizes.astype(np.int64)
        self._cached_sizes = 2 * clips.samples if cache and cache.format == "pcm" else self._sizes
        self._room = int(cache.max_bytes) if cache else 0
        self._cached = np.zeros(len(clips), dtype=np.bool_)
        self._seen = np.zeros(len(clips), dtype=np.bool_)

    def seen_bytes(self) -> int:
        """What a cache takes that holds every clip read so far."""
        return int(self._cached_sizes[self._seen].sum())

    def read(self, rows: npt.NDArray[np.int64], read: _Reads) -> None:
        """Read these clips in order."""
        distinct, first = np.unique(rows, return_index=True)
        new = distinct[~self._cached[distinct]]
        new = new[np.argsort(first[~self._cached[distinct]])]  # in the order in which they come
        ends = np.cumsum(self._cached_sizes[new])
        kept = new[: np.searchsorted(ends, self._room, side="right")]
        if len(kept):
            self._room -= int(ends[len(kept) - 1])
        if len(kept) < len(new):
            self._room = 0
        self._cached[kept] = True
        self._seen[distinct] = True
        hit = self._cached[rows]
        read.clips += len(rows)
        read.hits += int(hit.sum()) - len(kept)  # the first read of each filled the cache
        read.cache_bytes += int(self._cached_sizes[rows[hit]].sum() - self._cached_sizes[kept].sum())
        read.origin_bytes += int(self._sizes[rows[~hit]].sum() + self._sizes[kept].sum())
