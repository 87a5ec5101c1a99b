"""The whole path on a small synthetic AudioSet, with the same steps as for real data."""

import time
from pathlib import Path
from typing import Any

from cluster.embedded import opening, ray_cluster
from erann_dist.data.manifest import REPORT
from erann_dist.errors import UserError
from erann_dist.recipe import load_recipe, setting
from erann_dist.storage.folder import open_folder
from jobs.recipes import find_recipe
from jobs.shard_sets.maintenance import verify
from jobs.shard_sets.pack import pack
from jobs.terminal.progress import RunView, bar, console
from jobs.training.evaluate import tag
from jobs.training.pretrain import pretrain
from shards.clip import Packing
from shards.sources.audioset import read_audioset
from shards.synthetic import SyntheticAudioSet, write_synthetic_audioset

_PACKING = Packing(clips_per_shard=50)
_TRAIN_CLIPS, _EVAL_CLIPS = 400, 160


def demo(folder: Path) -> dict[str, Any]:
    """Synthesise, pack, verify, pretrain, evaluate, tag. When run again, it resumes where it was stopped."""
    began = time.monotonic()
    places = {"data.train": folder / "shards/train", "data.eval": folder / "shards/eval", "run.dir": folder / "runs"}
    recipe = load_recipe(find_recipe(Path("demo.yaml")), [setting(k, str(v)) for k, v in places.items()])
    _title("1 of 5  synthesise a small AudioSet")
    synthetic = SyntheticAudioSet.at(folder / "audioset")
    complete = folder / "audioset" / ".complete"
    if not complete.exists():
        with bar("write sound files", _TRAIN_CLIPS + _EVAL_CLIPS) as progress:
            write_synthetic_audioset(folder / "audioset", _TRAIN_CLIPS, _EVAL_CLIPS, on_progress=progress.update)
        complete.touch()
    packed = {}
    console.print(opening(None), markup=False)
    with ray_cluster(cpus=recipe.run.max_workers):
        _title("2 of 5  pack it into tar shards, and verify them")
        lists = (synthetic.train_segments, synthetic.eval_segments)
        for source, segments in zip(recipe.data.train + recipe.data.eval, lists, strict=True):
            rows = read_audioset(segments, synthetic.audio, synthetic.classes)
            packed[source.url] = pack(rows, open_folder(source.url), _PACKING)
            _require_all_but_planted(packed[source.url])
            verify(open_folder(source.url))
        workers = f"{recipe.run.max_workers} DeepSpeed workers on an embedded Ray cluster"
        _title(f"3 of 5  pretrain {recipe.model.variant}: {workers}")
        with RunView() as view:
            result = pretrain(recipe, "auto", None, view.event)
    _title("4 of 5  evaluated on the held-out list; model folder written")
    _title("5 of 5  tag a clip of the held-out list")
    held_out = read_audioset(synthetic.eval_segments, synthetic.audio, synthetic.classes)
    row = next(row for row in held_out.rows.to_pylist() if row["path"] and len(row["labels"]) == 2)
    clip = synthetic.audio / row["source"]
    return {
        "folder": str(folder),
        "packed": packed,
        **result,
        "clip": str(clip),
        "clip_labels": [held_out.label_names[i] for i in row["labels"]],
        "tags": tag(result["model"], [clip], top=5)[str(clip)],
        "minutes": (time.monotonic() - began) / 60,
    }


def _require_all_but_planted(packed: dict[str, Any]) -> None:
    """Raise UserError if clips were lost besides the one missing and the one corrupt clip that are there on purpose."""
    planted = {"missing": 1, "unreadable": 1}
    if lost := {reason: number for reason, number in packed["not_packed"].items() if number > planted.get(reason, 0)}:
        reasons = ", ".join(f"{number} {reason}" for reason, number in lost.items())
        raise UserError(
            f"{packed['shards']}: {reasons}, although all clips but two can be packed; see {packed['shards']}/{REPORT} "
            "for each reason, and please report this with the output of erann --version"
        )


def _title(text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]")
