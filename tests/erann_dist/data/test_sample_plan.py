"""What a run will see, from its recipe to the clips of each worker's micro-batches: a pure function, dealt once."""

from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from erann_dist.data.manifest import Manifest, SetInfo, Tar
from erann_dist.data.sampling import Sampler
from erann_dist.data.sources import load_sources
from erann_dist.recipe import DataSource, OptimSection, Recipe
from erann_dist.storage.folder import LocalFolder
from erann_dist.train.augment import clip_positions
from erann_dist.train.work_plan import assign_micro_batches, make_sampler

Mode = Literal["balanced", "uniform", "sequential"]
MODES: list[Mode] = ["balanced", "uniform", "sequential"]
CLASSES = 6


def clips_of(labels: list[set[int]]) -> Manifest:
    """Clips of one second with these labels."""
    count = len(labels)
    names = [str(c) for c in range(CLASSES)]
    zeros = np.zeros(count, np.int64)
    return Manifest(
        info=SetInfo("made", "tagging", names, names, 44_100, "flac", {}, {}, {}, "", "0" * 64),
        tars=[Tar(LocalFolder("made"), "made.tar", 0, "0" * 64)],
        keys=pa.chunked_array([[f"clip{i}" for i in range(count)]], pa.string()),
        label_values=np.array([c for each in labels for c in sorted(each)], np.int16),
        label_offsets=np.cumsum([0, *map(len, labels)]).astype(np.int32),
        splits=pa.chunked_array([[None] * count], pa.string()),
        folds=np.full(count, -1, np.int8),
        shards=zeros.astype(np.int32),
        rows=np.arange(count, dtype=np.int32),
        offsets=zeros,
        sizes=zeros.astype(np.int32),
        samples=zeros + 44_100,
        crc32s=zeros.astype(np.uint32),
    )


def recipe_of(mode: Mode, seed: int, optim: OptimSection | None = None, **augment: str) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"variant": "ERANN-3-1"},
            "data": {"train": "x", "eval": "x", "sampling": mode},
            "optim": (optim.model_dump() if optim else {"examples": 1}) | {"small_micro_batch": True},
            "augment": augment,
            "run": {"name": "x", "seed": seed, "launcher": "none"},
        }
    )


def worker_steps(recipe: Recipe, sampler: Sampler, steps: range, world_size: int) -> list[list[list[np.ndarray]]]:
    """The clips that each rank takes for each of its micro-batches that count, by step and rank."""
    augment = recipe.augment
    return [
        [
            [
                sampler.draw(clip_positions(mb.examples, augment.mixup, augment.partner))
                for mb in assign_micro_batches(step, recipe.optim, rank, world_size)
                if mb.weight == 1
            ]
            for rank in range(world_size)
        ]
        for step in steps
    ]


def stream(steps: list[list[list[np.ndarray]]]) -> np.ndarray:
    return np.concatenate([clips for ranks in steps for dealt in ranks for clips in dealt])


LABELS = st.lists(st.sets(st.integers(0, CLASSES - 1), min_size=1, max_size=4), min_size=1, max_size=40)


@given(
    labels=LABELS,
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 2**63 - 1),
    micro_batch=st.integers(1, 4).map(lambda half: 2 * half),
    micro_batches=st.integers(1, 8),
    workers=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    stop=st.integers(0, 6),
    start=st.sampled_from([0, 10**9]),
    mixing=st.sampled_from([("none", "fresh"), ("modified", "fresh"), ("modified", "in_batch")]),
)
@settings(max_examples=150, deadline=None)
def test_workers_take_the_plans_clips_once_and_resume_where_they_were(
    labels: list[set[int]],
    mode: Mode,
    seed: int,
    micro_batch: int,
    micro_batches: int,
    workers: tuple[int, int],
    stop: int,
    start: int,
    mixing: tuple[str, str],
) -> None:
    """Also with more workers and larger batches than there are clips, and with classes of none or one of them."""
    assume(max(workers) <= micro_batches)
    optim = OptimSection(global_batch=micro_batch * micro_batches, micro_batch=micro_batch, examples=1)
    recipe = recipe_of(mode, seed, optim, mixup=mixing[0], partner=mixing[1])
    clips = clips_of(labels)
    sampler = make_sampler(recipe, clips)
    before = worker_steps(recipe, sampler, range(start, start + stop), workers[0])
    # Another process goes on, with its own sampler.
    behind = worker_steps(recipe, make_sampler(recipe, clips), range(start + stop, start + 6), workers[1])
    for ranks in before + behind:
        assert sum(len(dealt) for dealt in ranks) == micro_batches
        assert all(ranks)
    examples = np.arange(start * optim.global_batch, (start + 6) * optim.global_batch)
    plan = sampler.draw(clip_positions(examples, recipe.augment.mixup, recipe.augment.partner))
    assert np.array_equal(stream(before + behind), plan)
    assert plan.min() >= 0
    assert plan.max() < len(labels)


@given(labels=LABELS, mode=st.sampled_from(MODES), seed=st.integers(0, 2**63 - 1), start=st.sampled_from([0, 10**9]))
@settings(max_examples=100, deadline=None)
def test_every_mode_keeps_its_promise(labels: list[set[int]], mode: Mode, seed: int, start: int) -> None:
    """Balanced: each class with clips once a round, and a class's clips equally often, but for one, at any time.
    Uniform and sequential: each clip once an epoch."""
    clips = clips_of(labels)
    sampler = make_sampler(recipe_of(mode, seed), clips)
    if mode != "balanced":
        epochs = sampler.draw(start * len(labels) + np.arange(4 * len(labels))).reshape(4, -1)
        assert (np.sort(epochs, axis=1) == np.arange(len(labels))).all()
        if mode == "sequential":
            assert (np.diff(epochs, axis=1) == 1).all()
        return
    active = sorted(set().union(*labels))
    own = {c: {i for i, each in enumerate(labels) if c in each} for c in active}
    largest = max(map(len, own.values()))
    rounds = sampler.draw(start * len(active) + np.arange(2 * largest * len(active))).reshape(-1, len(active))
    # A clip of several labels does not tell for which it was drawn; but together the classes must add up, and a clip
    # of one label is its class's. Whoever has one clip gives it in every round.
    for drawn in rounds:
        assert _assignable([own[c] for c in active], drawn.tolist())
    for c in active:
        if len(own[c]) == 1:
            assert (rounds == next(iter(own[c]))).any(axis=1).all()
        alone = [i for i in own[c] if labels[i] == {c}]
        begun = -start % len(own[c])  # rounds until the class's next pass begins
        for first in range(begun, len(rounds) - len(own[c]) + 1, len(own[c])):
            block = rounds[first : first + len(own[c])]
            assert all((block == i).sum() == 1 for i in alone)


def _assignable(choices: list[set[int]], drawn: list[int]) -> bool:
    """Whether the clips can be given to the classes one to one, each of its class (Kuhn's matching)."""
    taken: dict[int, int] = {}  # place in drawn -> class

    def give(c: int, seen: set[int]) -> bool:
        for place, clip in enumerate(drawn):
            if clip in choices[c] and place not in seen:
                seen.add(place)
                if place not in taken or give(taken[place], seen):
                    taken[place] = c
                    return True
        return False

    return all(give(c, set()) for c in range(len(choices)))


def samplers(tone_shards: Path, tmp_path: Path) -> dict[str, Sampler]:
    """Each mode over a whole set, parts of it, and several sets."""
    url = str(tone_shards)
    keys = load_sources([DataSource(url=url)]).keys.to_pylist()
    (tmp_path / "some").write_text("\n".join(keys[::3]))
    some = str(tmp_path / "some")
    choices = {
        "whole": [DataSource(url=url)],
        "split": [DataSource(url=url, split="tone")],
        "keys": [DataSource(url=url, keys=some)],
        "without": [DataSource(url=url, without=some)],
        "several": [DataSource(url=url, keys=some), DataSource(url=url), DataSource(url=url, without=some)],
    }
    found = {}
    for name, sources in choices.items():
        clips = load_sources(sources)
        found |= {f"{name} {mode}": make_sampler(recipe_of(mode, 11), clips) for mode in MODES}
    return found


@pytest.mark.parametrize("start", [0, 10**9 - 100, 10**12])
def test_draws_are_the_same_alone_in_blocks_and_in_any_order(tone_shards: Path, tmp_path: Path, start: int) -> None:
    first, second = samplers(tone_shards, tmp_path), samplers(tone_shards, tmp_path)
    positions = start + np.arange(300)
    order = np.random.default_rng(0).permutation(300)
    for name, sampler in first.items():
        drawn = sampler.draw(positions)
        assert np.array_equal(sampler.draw(positions[order]), drawn[order]), name
        assert [int(second[name].draw(np.array([p]))[0]) for p in positions[::7]] == drawn[::7].tolist(), name
        blocks = [second[name].draw(block) for block in np.split(positions, [1, 3, 50, 51, 200])]
        assert np.array_equal(np.concatenate(blocks), drawn), name


def test_several_sets_are_sampled_as_one(tone_shards: Path, tmp_path: Path) -> None:
    """Each clip of each source once an epoch, and the lists of the classes are the sources' together."""
    url = str(tone_shards)
    clips = load_sources([DataSource(url=url), DataSource(url=url)])
    assert len(clips) == 80
    uniform = make_sampler(recipe_of("uniform", 0), clips)
    assert np.array_equal(np.sort(uniform.draw(np.arange(80))), np.arange(80))
    balanced = make_sampler(recipe_of("balanced", 0), clips)
    rounds = int((clips.targets(np.arange(80)).sum(axis=0)).max())
    assert set(balanced.draw(np.arange(3 * rounds)).tolist()) == set(range(80))
