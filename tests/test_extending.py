"""docs/extending/index.md, followed to the letter: its files are run, its entries made, and its claims checked."""

import re
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import erann_dist.log.sinks as sinks
import erann_dist.models.spec as spec
import erann_dist.train.augment as augment
import shards.sources.data_sets as data_sets
from erann_dist.data.manifest import load_manifest
from erann_dist.log.events import Step
from erann_dist.recipe import AugmentSection
from erann_dist.storage.folder import LocalFolder
from shards.statistics import statistics
from tests.conftest import pack_here, small_recipe
from tests.support.workers import of_kind, train_alone

PAGE = (Path(__file__).parents[1] / "docs" / "extending" / "index.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))


def follow(section: str, registry: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the section's file and make its entry; the names that the file defines."""
    file, entry = re.findall(r"```python\n(.*?)```", SECTIONS[section], re.S)
    (name,) = re.findall(r"^# in (\w+)$", entry, re.M)
    names = dict(vars(registry))
    exec(file, names)
    for key, value in eval(f"{{{entry}}}", names).items():
        monkeypatch.setitem(getattr(registry, name), key, value)
    return names


def test_each_entry_is_in_the_table() -> None:
    for name in ("DATA_SETS", "MODELS", "MIXES", "SINKS"):
        assert f"`{name}`" in PAGE.partition("## ")[0]


def test_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow("A data set", data_sets, monkeypatch)
    root = tmp_path / "birds"
    (root / "audio").mkdir(parents=True)
    lines = ["file,species,site"]
    for site in ("a", "b"):
        for species, hertz in (("wren", 3000), ("owl", 300)):
            file = f"{site}-{species}.wav"
            sound = 0.3 * np.sin(2 * np.pi * hertz * np.arange(22_050) / 44_100)
            soundfile.write(root / "audio" / file, sound.astype(np.float32), 44_100)
            lines.append(f"{file},{species},{site}")
    (root / "birds.csv").write_text("\n".join([*lines, "c-lost.wav,wren,a"]) + "\n")
    source = data_sets.read_source("birds", data_sets.Options(root=root))
    assert source.label_ids == ["owl", "wren"]
    assert source.rows["reason"].to_pylist() == [None] * 4 + ["missing"]
    pack_here(source, tmp_path / "set")
    clips = load_manifest(str(tmp_path / "set"))
    assert sorted(clips.folds.tolist()) == [1, 1, 2, 2]
    recordings = statistics(LocalFolder(str(tmp_path / "set")))["recordings"]
    assert (recordings["kind"], recordings["count"], recordings["shared"]) == ("site", 3, {})


def test_a_model(tone_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow("A model", spec, monkeypatch)
    recipe = small_recipe(tone_shards, tmp_path / "run", model={"variant": "POOLED"})
    assert of_kind(train_alone(recipe), Step)
    assert "A POOLED, trained by" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_a_mixup_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    splice = follow("A mixup rule", augment, monkeypatch)["splice"]
    one, two = torch.zeros(2, 8), torch.ones(2, 8)
    assert splice(one, two, torch.tensor([0.5, 0.25])).sum(dim=1).tolist() == [4.0, 6.0]
    section = AugmentSection(mixup_on="waveform").model_copy(update={"mixup": "splice"})
    examples, pcm = np.arange(4), torch.randint(-9, 9, (8, 22_050), dtype=torch.int16)
    params = augment.draw_augment_params(examples, 128, 64, 0, section)
    made = augment.make_inputs(pcm, torch.eye(8), params, augment.LogMel(), section)
    assert made.log_mel.shape == (4, 1, 128, 64)


def test_a_logger(tone_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow("A logger", sinks, monkeypatch)
    steps = of_kind(train_alone(small_recipe(tone_shards, tmp_path / "run")), Step)
    lines = (tmp_path / "run" / "loss.csv").read_text().splitlines()
    assert lines == [f"{step.step},{step.loss}" for step in steps]
