"""A small data set with folds, tones of one class each; a recipe for it, and a model to begin with."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import yaml

from erann_dist.models.spec import build_model
from erann_dist.storage.folder import open_folder
from erann_dist.train.model_folder import ModelInfo, save_model
from shards.sources.rows import Source, SourceRow, rows_table
from tests.conftest import pack_here

LABELS = ["low", "middle", "high"]


def write_folded_set(
    root: Path,
    folds: list[int],
    name: str = "tones",
    labels: list[str] = LABELS,
    without: tuple[str, int] | None = None,
    **options: Any,
) -> Path:
    """Six tones of 0.05 to 1 s in each fold, two of each class; the shard set.

    folds: -1 for clips without one. without: a class that is in this fold, and among the clips without one, only.
    options: of packing.
    """
    rng = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    rows = []
    for fold in folds:
        for number in range(6):
            label = number % 3
            if without and labels[label] == without[0] and fold not in (-1, without[1]):
                continue
            key = f"{fold}-{number}"
            t = np.arange(round(44_100 * (0.05 if number == 0 else rng.uniform(0.5, 1.0)))) / 44_100
            tone = 0.3 * np.sin(2 * np.pi * 300 * 3**label * rng.uniform(0.95, 1.05) * t)
            soundfile.write(root / f"{key}.wav", tone + 0.01 * rng.standard_normal(len(t)), 44_100)
            rows.append(
                SourceRow(key, [label], os.fsencode(root / f"{key}.wav"), key, fold=fold if fold >= 0 else None)
            )
    ids = [label.lower() + str(i) for i, label in enumerate(labels)]
    return pack_here(Source(name, "classification", ids, labels, rows_table(rows), []), root / "shards", **options)


def write_protocol(path: Path, shards: Path, **sections: dict[str, Any]) -> Path:
    """A recipe of a cross-validation with the smallest variant and few steps; sections override keys."""
    tree: dict[str, dict[str, Any]] = {
        "protocol": {"shards": str(shards), "lr": {"scratch": 2.0e-4, "finetune": 1.0e-4}},
        "model": {"variant": "ERANN-3-1"},
        "data": {"crop_s": 0.5, "sampling": "uniform"},
        "optim": {"global_batch": 16, "micro_batch": 8, "examples": 48, "schedule": "constant"},
        "evaluate": {"every": 1, "pad_s": 1},
        "checkpoint": {"every": 1},
        "run": {"dir": str(path.parent / "runs"), "launcher": "none", "engine": "torch", "log_every": 1},
    }
    for name, keys in sections.items():
        tree.setdefault(name, {}).update(keys)
    path.write_text(yaml.safe_dump(tree))
    return path


def a_model(folder: Path, variant: str = "ERANN-3-1", labels: int = 5, seed: int = 1) -> str:
    """A model folder with weights of its own."""
    torch.manual_seed(seed)
    names = [f"l{i}" for i in range(labels)]
    info = ModelInfo(variant, "tagging", names, names, 44_100)
    save_model(open_folder(str(folder)), build_model(variant, labels), info, {}, "")
    return str(folder)
