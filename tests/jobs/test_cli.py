"""The command as a user meets it: help, exit codes, and one clear line for everything that can be wrong."""

import csv
import errno
import fcntl
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import typer
import yaml
from matplotlib.image import imread

from erann_dist.data.manifest import MANIFEST
from erann_dist.log.run_log import read_log
from erann_dist.storage.folder import LocalFolder
from erann_dist.train import trainer
from jobs.cli.__main__ import app, main
from jobs.training import study
from shards.sources.audioset import read_audioset
from tests.conftest import copy_tree, pack_here, small_recipe, write_tone_set
from tests.shards.test_verify import foreign_tar, sound
from tests.support.folded import write_folded_set, write_protocol
from tests.support.run_logs import started, write_log

COMMANDS = [
    "pack",
    "inspect",
    "verify",
    "repair",
    "index",
    "stage",
    "stats",
    "bench augment",
    "bench pack",
    "bench plan",
    "bench loader",
    "bench sampler",
    "bench train",
    "bench kills",
    "cluster render aws",
    "cluster render kubernetes",
    "cluster render slurm",
    "plan",
    "pretrain",
    "preflight",
    "finetune",
    "study",
    "pipeline",
    "evaluate",
    "tag",
    "embed",
    "augment",
    "runs",
    "submit",
    "jobs list",
    "jobs status",
    "jobs logs",
    "jobs stop",
    "demo",
]


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        self.line = err.strip().splitlines()[-1] if err.strip() else ""


@pytest.fixture
def erann(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Run a command in this process."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["erann", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return Outcome(int(stop.value.code or 0), *capfd.readouterr())

    return run


def assert_refused(outcome: Outcome, code: int, message: str) -> None:
    assert re.search(message, outcome.line), outcome.err
    assert outcome.line.startswith("erann: ")
    assert outcome.code == code
    assert "Traceback" not in outcome.err
    assert outcome.out == ""


@pytest.fixture
def recipe(tone_shards: Path, tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(
        yaml.safe_dump(small_recipe(tone_shards, tmp_path / "runs" / "mine", optim={"examples": 32}).model_dump())
    )
    return path


@pytest.fixture(scope="session")
def trained(tone_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on the tones."""
    from tests.support.workers import train_alone

    folder = tmp_path_factory.mktemp("trained") / "run"
    train_alone(small_recipe(tone_shards, folder, optim={"examples": 32}))
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_arguments_are_understood(erann, command: str) -> None:
    """The words behind "Example:" parse as a command line: names of options, numbers, how many arguments."""
    text = erann(*command.split(), "--help").out
    shown = text.split("Example:")[1].split("╭")[0]
    assert all(len(line.rstrip()) <= 78 for line in shown.splitlines())  # a terminal of 80 columns breaks none of them
    examples = " ".join(re.sub(r" \\ *\n", " ", shown).split()).split("erann ")[1:]
    assert examples
    for example in examples:
        words = example.split()
        node, context = typer.main.get_command(app), None
        while hasattr(node, "commands"):
            context = typer.Context(node, info_name=words[0], parent=context)
            node = node.commands[words.pop(0)]
        assert node.make_context(command, words, parent=context).params


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_of_itself(erann, command: str) -> None:
    outcome = erann(*command.split(), "--help")
    assert outcome.code == 0
    assert re.search(rf"Example:\s+erann {command}", outcome.out)
    assert "--json" in outcome.out or command == "jobs logs"  # what it prints is the job's


def test_help_shows_the_commands(erann) -> None:
    outcome = erann("--help")
    assert all(re.search(rf"│ {command}\s", outcome.out) for command in {c.split()[0] for c in COMMANDS})


@pytest.mark.parametrize("arguments", [["pakc"], ["verify"], ["pretrain", "--resum"], ["tag", "--top", "x", "m", "f"]])
def test_wrong_usage_exits_with_2(erann, arguments: list[str]) -> None:
    outcome = erann(*arguments)
    assert outcome.code == 2
    assert "Usage: erann" in outcome.err


def test_verify(erann, tone_shards: Path, tmp_path: Path) -> None:
    outcome = erann("verify", tone_shards, "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out) == {"shards": str(tone_shards), "clips": 40, "tars": 5, "quick": False}

    cut = copy_tree(tone_shards, tmp_path / "cut")
    tar = cut / "audioset-000003.tar"
    tar.write_bytes(tar.read_bytes()[:100_000])
    outcome = erann("verify", cut)
    assert_refused(outcome, 1, "cut: 1 problem")
    assert f"{tar}: truncated, 100000 bytes" in outcome.err

    other = copy_tree(tone_shards, tmp_path / "other")
    table = pq.read_table(other / MANIFEST)
    pq.write_table(table.slice(0, 39), other / MANIFEST)
    outcome = erann("verify", other)
    assert_refused(outcome, 1, "other: 4 problems")
    assert "content hash" in outcome.err

    assert_refused(erann("verify", tmp_path / "nothing"), 2, "nothing: no such folder")
    assert_refused(erann("verify", tmp_path), 1, "no shard set here")


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("optim.learning_rat=1", 2, r"mine.yaml: optim.learning_rat: no such key"),
        ("optim.epoch=1", 2, r"did you mean optim.epochs\?"),
        ("optim.lr=fast", 2, "optim.lr: input should be a valid number"),
        ("data.train=nowhere", 2, "nowhere: no such folder"),
        (
            "data.train={url: SHARDS, fold: [7]}",
            2,
            r"no clip has split None and fold \[7\]; the splits are \['tone'\]",
        ),
        ("run.workers=3", 2, "run.launcher none runs 1 worker, not 3"),
        ("run.dir=/proc/runs", 1, "erann: /proc/runs"),  # nothing can be written there
    ],
)
def test_a_wrong_recipe_is_one_line_and_leaves_nothing(
    erann, recipe: Path, tmp_path: Path, tone_shards: Path, override: str, code: int, message: str
) -> None:
    outcome = erann("pretrain", recipe, override.replace("SHARDS", str(tone_shards)))
    assert_refused(outcome, code, message)
    assert not (tmp_path / "runs").exists()


def test_a_run_is_not_run_again_nor_with_another_recipe(erann, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    assert_refused(erann("pretrain", recipe, "--resume", "must"), 2, "mine: no checkpoint to resume from")
    first = erann("pretrain", recipe, "--json")
    assert first.code == 0
    result = json.loads(first.out)
    assert result["model"] == str(run / "model")
    assert {"mAP", "mAUC", "d_prime", "chance_mAP"} <= set(result)
    assert {p.name for p in run.iterdir()} == {
        "checkpoints",
        "metrics.jsonl",
        "model",
        "predictions.parquet",
        "recipe.yaml",
        "starts",
        "tensorboard",
        ".lock",
        ".step",
    }
    before = (run / "model" / "model.safetensors").stat().st_mtime_ns
    again = erann("pretrain", recipe, "--json")
    assert json.loads(again.out) == result
    assert (run / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert_refused(
        erann("pretrain", recipe, "optim.lr=0.01", "run.seed=4"),
        2,
        r"mine: started with a different recipe \(optim.lr: 0.001 -> 0.01; run.seed: 0 -> 4\)",
    )
    assert_refused(erann("pretrain", recipe, "--resume", "never"), 2, "this run exists")
    assert erann("pretrain", recipe, "run.threads=2", "checkpoint.every=7").code == 0


def test_what_ended_a_run_is_in_its_log(erann, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "mine"
    arguments = ("pretrain", recipe, "optim.examples=64", "checkpoint.every=1")
    launched = time.time()

    def ended() -> list[dict[str, Any]]:
        return [line for line in read_log(LocalFolder(str(run))) if line["event"] == "Ended"]

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "example_losses", lambda logits, *_: logits.sum(dim=1) * float("nan"))
        assert_refused(erann(*arguments), 1, "step 1: the loss is nan")
    (why,) = ended()
    assert why["text"].startswith("step 1: the loss is nan")
    assert (why["step"], why["told"]) == (0, False)
    assert launched <= why["launched"] <= why["time"] <= time.time()

    compute = trainer.Trainer.train_step

    def interrupted(self: Any, step: int) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        compute(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", interrupted)
        assert_refused(erann(*arguments), 143, "stop requested by SIGTERM: stopped at step 2 of")
    assert [(line["step"], line["told"]) for line in ended()] == [(0, False), (2, True)]
    shown = erann("runs", tmp_path / "runs", "mine").out
    assert "stopped, step 2/" in shown
    assert "stop requested by SIGTERM: stopped at step 2" in shown

    assert erann(*arguments).code == 0
    found = [
        (line["kind"], line["steps_lost"]) for line in read_log(LocalFolder(str(run))) if line["event"] == "Incident"
    ]
    assert found == [("failure", 0), ("stop", 0)]


def test_a_damaged_recipe_of_a_run_is_one_line(erann, recipe: Path, tmp_path: Path) -> None:
    assert erann("pretrain", recipe).code == 0
    kept = tmp_path / "runs" / "mine" / "recipe.yaml"
    kept.write_text("model: {")
    assert_refused(erann("pretrain", recipe), 1, "mine/recipe.yaml: damaged, so the run's recipe is unknown")
    kept.unlink()
    assert_refused(erann("pretrain", recipe), 1, "mine/recipe.yaml: missing, so the run's recipe is unknown")


def test_a_run_that_began_on_gpus_does_not_go_on_without(erann, recipe: Path, tmp_path: Path) -> None:
    write_log(LocalFolder(str(tmp_path / "runs" / "mine")), (1.0, started(device="cuda:0", launched=0.0)))
    assert_refused(erann("pretrain", recipe), 2, "run.device is cuda, but this host has 0 GPUs for 1 workers")


def test_one_run_is_trained_by_one_command_at_a_time(
    erann, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    with (run / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert_refused(erann("pretrain", recipe), 1, "mine: is being trained by another process; stop that")
    assert [path.name for path in run.iterdir()] == [".lock"]

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    locks = SimpleNamespace(flock=no_locks, LOCK_EX=fcntl.LOCK_EX, LOCK_NB=fcntl.LOCK_NB)
    monkeypatch.setattr("jobs.outputs.fcntl", locks)
    assert erann("pretrain", recipe).code == 0


def test_evaluate_and_tag(erann, trained: Path, tone_shards: Path, tmp_path: Path) -> None:
    model = trained / "model"
    outcome = erann("evaluate", model, tone_shards, "--out", tmp_path / "e", "--json")
    assert outcome.code == 0
    result = json.loads(outcome.out)
    written = json.loads((model / "metrics.json").read_text())
    assert result["mAP"] == written["mAP"]
    assert result["list_hash"] == written["list_hash"]
    assert pq.read_table(tmp_path / "e" / "predictions.parquet").equals(pq.read_table(trained / "predictions.parquet"))
    outcome = erann("evaluate", model, tone_shards, "--out", tmp_path / "e")
    assert "Tone, 1" in outcome.out

    _, audio, _ = write_tone_set(tmp_path / "tones", 3)
    clip = sorted(audio.iterdir())[0]
    tags = json.loads(erann("tag", model, clip, "--json").out)[str(clip)]
    assert len(tags) == 3
    assert sorted(t["name"] for t in tags) == ["Tone, 0", "Tone, 1", "Tone, 2"]
    assert tags == sorted(tags, key=lambda t: -t["score"])
    assert "Tone, " in erann("tag", model, clip, "--top", "1").out

    # A little over ten seconds is one window, not one and a sliver that counts as much.
    t = np.arange(round(10.03 * 44_100)) / 44_100
    soundfile.write(tmp_path / "long.wav", 0.3 * np.sin(2 * np.pi * 600 * t), 44_100)
    soundfile.write(tmp_path / "whole.wav", 0.3 * np.sin(2 * np.pi * 600 * t[:441_000]), 44_100)
    both = json.loads(erann("tag", model, tmp_path / "long.wav", tmp_path / "whole.wav", "--json").out)
    long, whole = ({t["name"]: t["score"] for t in tags} for tags in both.values())
    assert all(long[name] == pytest.approx(whole[name], abs=0.05) for name in whole)

    (tmp_path / "text.wav").write_text("no sound")
    assert_refused(erann("tag", model, tmp_path / "text.wav"), 1, "text.wav: could not be decoded")
    assert_refused(erann("tag", model, tmp_path / "gone.wav"), 2, "gone.wav: no such file")
    assert_refused(erann("tag", tmp_path, clip), 2, "no model here")


def test_augment(erann, tmp_path: Path) -> None:
    """A picture of what was drawn by the seed, with a partner or the clip itself backwards."""
    time = np.arange(44_100) / 44_100
    soundfile.write(tmp_path / "tone.wav", 0.3 * np.sin(2 * np.pi * 500 * time), 44_100)
    soundfile.write(tmp_path / "noise.flac", 0.1 * np.random.default_rng(0).standard_normal(8000), 16_000)
    command = ["augment", tmp_path / "tone.wav", "--crop-s", 0.5, "--out"]
    facts = json.loads(erann(*command, tmp_path / "a.png", "--json").out)
    assert facts["partner"] is None
    assert 0 < facts["mixup_share"] < 1
    assert all(0 <= start <= 0.5 for start in facts["crop_starts_s"])
    other = ["--with", tmp_path / "noise.flac"]
    again = json.loads(erann(*command, tmp_path / "b.png", *other, "--json").out)
    assert {key for key in facts if facts[key] != again[key]} == {"partner", "out", "crop_starts_s"}
    assert erann(*command, tmp_path / "c.png", "--seed", 1).code == 0
    images = [imread(tmp_path / f"{name}.png") for name in "abc"]
    assert all(image.shape[0] > 1500 < image.shape[1] * 2 and image.std() > 0.1 for image in images)
    assert not np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])
    assert_refused(erann(*command, tmp_path / "a.foo"), 2, "a.foo: not an image format; give FILE.png")
    assert_refused(erann(*command, tmp_path / "no" / "a.png"), 1, "no/a.png: No such file or directory")
    (tmp_path / "text.wav").write_text("no sound")
    other = ["--with", tmp_path / "text.wav"]
    assert_refused(erann(*command, tmp_path / "d.png", *other), 1, "text.wav: could not be decoded")
    assert_refused(erann("augment", tmp_path / "gone.wav", "--out", tmp_path / "d.png"), 2, "gone.wav: no such file")
    assert not (tmp_path / "d.png").exists()


def test_tag_a_shard_set(erann, trained: Path, tone_shards: Path, tmp_path: Path) -> None:
    model, out = trained / "model", tmp_path / "deep" / "tags.parquet"
    result = json.loads(erann("tag", model, tone_shards, "--out", out, "--json").out)
    assert result == {"model": str(model), "shards": str(tone_shards), "clips": 40, "out": str(out)}
    tags, predictions = pq.read_table(out), pq.read_table(trained / "predictions.parquet")
    assert tags.column_names == ["key", "scores"]
    assert tags.schema.metadata == predictions.schema.metadata
    assert tags["key"].equals(predictions["key"])
    np.testing.assert_allclose(tags["scores"].to_pylist(), predictions["scores"].to_pylist(), atol=1e-5)
    assert f"40 clips tagged, written to {out}" in erann("tag", model, tone_shards, "--out", out).out

    # The set's own labels are of no interest.
    other = changed_model(trained, tmp_path / "other", label_ids=["x", "y", "z"], task="classification")
    assert erann("tag", other, tone_shards, "--out", out).code == 0
    assert pq.read_schema(out).metadata == {b"labels": b"x\ny\nz"}
    np.testing.assert_allclose(np.sum(pq.read_table(out)["scores"].to_pylist(), axis=1), 1, atol=1e-5)


def test_recordings_are_tagged_and_embedded(erann, trained: Path, tmp_path: Path) -> None:
    for number in range(2):
        soundfile.write(tmp_path / f"{number}.wav", np.zeros(66_150), 44_100)
    (tmp_path / "2.wav").write_text("no sound")
    out, events = tmp_path / "tags.csv", tmp_path / "tags.events.csv"
    shown = erann("tag", trained, tmp_path, "--window", 1, "--hop", 0.5, "--out", out).out
    assert f"3 recordings: 4 windows written to {out}" in shown
    assert "1 could not be read" in shown
    assert [len(path.read_text().splitlines()) > 1 for path in (out, events)] == [True, True]
    result = json.loads(erann("embed", trained, tmp_path / "0.wav", "--out", tmp_path / "e.jsonl", "--json").out)
    assert (result["windows"], result["size"]) == (1, 128)
    (line,) = (tmp_path / "e.jsonl").read_text().splitlines()
    assert len(json.loads(line)["vector"]) == 128


def test_tagging_what_one_can_not(erann, trained: Path, tone_shards: Path, tmp_path: Path) -> None:
    model, clip, out = trained / "model", tmp_path / "a.wav", ["--out", tmp_path / "tags.parquet"]
    soundfile.write(clip, np.zeros(4410), 44_100)
    for option in (["--workers", 1], ["--launcher", "none"]):
        assert_refused(erann("tag", model, clip, *option), 2, "a.wav: --workers and --launcher are for shard sets")
    for place, *option in ([clip, "--device", "cpu"], [clip, "--audacity", "x"], [clip.parent]):
        assert_refused(erann("tag", model, place, *option), 2, "folders, --device and --audacity need --out FILE")
    assert_refused(erann("tag", model, clip, "--top", 3, *out), 2, "--top: with --out all labels are written")
    for sounds in ([clip, tone_shards], [tone_shards, tone_shards], [clip, "s3://bucket/set"]):
        assert_refused(erann("tag", model, *sounds, *out), 2, "one command tags a single shard set")
    assert_refused(erann("tag", model, tone_shards), 2, f"{tone_shards}: .* needs --out FILE.parquet")
    assert_refused(erann("tag", model, tone_shards, "--top", 3, *out), 2, "takes no --top")
    assert_refused(erann("tag", model, "gs://bucket/set", *out), 2, "a folder is a path or s3://bucket/prefix")
    (tmp_path / "empty").mkdir()
    assert_refused(erann("tag", model, tmp_path / "empty", *out), 2, "empty: no sound file in it or below it")
    assert_refused(erann("tag", model, tone_shards, "--out", tmp_path), 2, f"{tmp_path}: is a folder")
    assert_refused(erann("tag", model, tone_shards, "--workers", 2, "--launcher", "none", *out), 2, "runs 1 worker")
    slow = changed_model(trained, tmp_path / "rate", sample_rate=32_000)
    assert_refused(erann("tag", slow, tone_shards, *out), 1, "is at 44100 Hz, the model .* needs 32000 Hz")
    damaged = copy_tree(tone_shards, tmp_path / "damaged")
    tar = damaged / "audioset-000002.tar"
    tar.write_bytes(tar.read_bytes()[:100_000])
    assert_refused(erann("tag", model, damaged, *out), 1, "audioset-000002.tar: clip .* is damaged or missing; check")
    assert not (tmp_path / "tags.parquet").exists()


def changed_model(trained: Path, folder: Path, **changes: object) -> Path:
    model = copy_tree(trained / "model", folder)
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps(config))
    return model


def test_models_and_shards_that_do_not_fit(erann, trained: Path, tone_shards: Path, tmp_path: Path) -> None:
    def changed(name: str, **changes: object) -> Path:
        return changed_model(trained, tmp_path / name, **changes)

    cases = [
        (
            changed("labels", label_ids=["/m/000", "/m/x", "/m/002"]),
            "labels that are not the 3 of .*label 1 is /m/001",
        ),
        (changed("rate", sample_rate=32_000), "is at 44100 Hz, the model .* needs 32000 Hz"),
        (
            changed("task", task="classification"),
            "is for tagging, the model .* for classification",
        ),
        (
            changed("shape", variant="ERANN-3-2"),
            r"fc1.bias is \(128,\) in the file, \(256,\) in the model",
        ),
        (changed("variant", variant="CNN15"), "config.json: not a model's configuration .*CNN15"),
        (
            changed("front_end", variant="CNN14"),
            "config.json: made for another front end than that of this program's CNN14",
        ),
    ]
    for model, message in cases:
        assert_refused(erann("evaluate", model, tone_shards, "--out", tmp_path / "out"), 1, message)
    cut = copy_tree(trained / "model", tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:1000])
    assert_refused(
        erann("evaluate", cut, tone_shards, "--out", tmp_path / "out"), 1, "model.safetensors: can't be read"
    )
    assert not (tmp_path / "out").exists()


def test_packing_what_is_not_there(erann, tmp_path: Path) -> None:
    segments, audio, classes = write_tone_set(tmp_path / "set", 3)
    out = tmp_path / "out"

    def pack(**changes: object) -> Outcome:
        options = {"segments": segments, "audio": audio, "classes": classes, "out": out} | changes
        return erann("pack", "audioset", *(word for k, v in options.items() for word in (f"--{k}", v)))

    (tmp_path / "empty").mkdir()
    malformed = tmp_path / "malformed.csv"
    malformed.write_text(segments.read_text() + "abc, 1.0\n")
    assert_refused(pack(audio=tmp_path / "nowhere"), 2, "nowhere: no such audio folder")
    assert_refused(pack(audio=tmp_path / "empty"), 1, "empty: no sound file in it or below it")
    assert_refused(pack(segments=malformed), 1, "malformed.csv:5: not a segment")
    assert_refused(pack(segments=tmp_path / "gone.csv"), 2, "gone.csv: no such file")
    assert_refused(erann("pack", "audioset", "--out", out), 2, "audioset needs --segments and --audio")
    assert_refused(erann("pack", "ravdess", "--out", out), 2, "ravdess needs --root")
    assert_refused(pack(out="gs://bucket/x"), 2, "gs://bucket/x: a folder is a path or s3://bucket/prefix")
    assert_refused(pack(out="s3:///x"), 2, "the bucket is missing")
    assert_refused(pack(out=""), 2, "the path is empty")
    assert_refused(pack(out=audio / "shards"), 2, "is inside .*audio, the source of the clips")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert_refused(pack(out=tmp_path / "full"), 1, "full: exists and is not a shard set")
    assert not out.exists()


def test_inspecting_a_download_and_packing_ones_own_list(erann, tmp_path: Path) -> None:
    _, audio, _ = write_tone_set(tmp_path / "set", 3)
    outcome = erann("inspect", audio, "--json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert (result["files"], result["kinds"][0]["suffix"]) == (3, ".wav")
    assert_refused(erann("inspect", tmp_path / "nowhere"), 2, "nowhere: no such folder")
    listed, out = tmp_path / "mine.csv", ("--out", tmp_path / "out")
    listed.write_text("fname,tags\na,b\n")
    pack = ("pack", "folder", "--root", audio, "--labels", listed, *out)
    assert_refused(erann(*pack), 1, "mine.csv:1: no column path")
    assert_refused(erann(*pack, "--columns", "path=fname"), 2, "--columns path=fname: path is needed, and either")
    assert_refused(erann(*pack, "--columns", "path=fname,labels=tags", "--classes", listed), 1, "0 of 1 row could be")
    (tmp_path / "latin.csv").write_bytes("path,labels\na.wav,caf\u00e9\n".encode("latin-1"))
    pack = ("pack", "folder", "--root", audio, "--labels", tmp_path / "latin.csv", *out)
    assert_refused(erann(*pack), 1, "latin.csv:2: not a text file in UTF-8")
    assert not (tmp_path / "out").exists()


def test_a_set_of_another_rate_is_refused(erann, trained: Path, recipe: Path, tmp_path: Path) -> None:
    slow = pack_here(read_audioset(*write_tone_set(tmp_path / "set", 8)), tmp_path / "slow", sample_rate=32_000)
    refusal = "is at 32000 Hz, ERANN needs 44100 Hz; pack it again"
    assert_refused(erann("pretrain", recipe, f"data.train={slow}"), 1, f"slow: {refusal}")
    assert_refused(erann("evaluate", trained / "model", slow), 1, f"slow: {refusal}")


def test_index_by_the_command(erann, tone_shards: Path, tmp_path: Path) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    for path in tone_shards.glob("*.tar"):
        (tars / path.name).write_bytes(path.read_bytes())
    indexed = json.loads(erann("index", tars, "--json").out)
    assert (indexed["clips"], indexed["tars"], indexed["not_packed"]) == (40, 5, {})
    assert erann("verify", tars).code == 0
    assert "indexed" in erann("stats", tars).out
    assert_refused(erann("index", tars), 1, "tars: has a manifest already")
    assert_refused(erann("repair", tars, "--root", tmp_path), 1, "its tars were not made by erann pack")
    assert_refused(erann("index", tmp_path / "nowhere"), 1, "no tar in it")


def test_tars_of_others_by_the_command(erann, tmp_path: Path) -> None:
    members = {"1.flac": sound(0.1), "1.json": b'{"tag": ["dog"]}', "2.flac": sound(0.1), "2.json": b'{"text": "x"}'}
    foreign_tar(tmp_path / "tars" / "0.tar", members)
    pack = ["pack", "webdataset", "--tars", tmp_path / "tars"]
    assert_refused(erann("pack", "webdataset", "--out", tmp_path / "out"), 2, "webdataset needs --tars")
    assert_refused(erann(*pack, "--out", tmp_path / "tars" / "out"), 2, "is inside .*tars, the source of the clips")
    assert_refused(erann(*pack, "--out", tmp_path / "out"), 1, r"no clip has a label \(1\.flac: .*its keys are tag\)")
    assert_refused(erann(*pack, "--labels", "tag", "--out", tmp_path / "out"), 1, r"no tag next to it")
    assert_refused(
        erann(*pack, "--labels", "json", "--out", tmp_path / "out"), 2, "--labels json: .*expected: json:KEY"
    )
    assert not (tmp_path / "out").exists()
    assert_refused(erann("index", tmp_path / "tars", "--labels", "x:y"), 2, "--labels x:y: .*expected: json:KEY")
    indexed = json.loads(erann("index", tmp_path / "tars", "--labels", "json:tag", "--json").out)
    assert (indexed["clips"], indexed["not_packed"]) == (1, {"wrong label": 1})


def test_stage_by_the_command(erann, tone_shards: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    result = json.loads(erann("stage", tone_shards, target, "--json").out)
    size = sum(path.stat().st_size for path in tone_shards.glob("*.tar"))
    assert result.pop("mb_per_s") > 0
    assert result == {
        "shards": str(target),
        "source": str(tone_shards),
        "clips": 40,
        "tars": 5,
        "copied_tars": 5,
        "copied_bytes": size,
    }
    assert erann("verify", target).code == 0
    again = erann("stage", tone_shards, target)
    assert again.code == 0
    assert again.line == f"{target}: already complete"
    assert re.search(r"copied tars +0 *\n", again.out)
    (target / "audioset-000001.tar").unlink()
    outcome = erann("stage", tone_shards, target)
    assert f"{target}: resuming, 4 of 5 tars are complete" in outcome.err
    assert re.search(r"copied tars +1 *\n", outcome.out)


def test_staging_what_or_where_one_can_not(erann, tone_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    target = tmp_path / "copy"
    assert_refused(erann("stage", tone_shards, "s3://bucket/x"), 2, "a set is copied to a local folder, not to S3")
    assert_refused(erann("stage", tone_shards, ""), 2, "the path is empty")
    assert_refused(erann("stage", tone_shards, tone_shards), 2, "is inside .*, which is to be copied")
    assert_refused(erann("stage", tmp_path / "nowhere", target), 2, "nowhere: no such folder")
    assert_refused(erann("stage", tmp_path / "empty", target), 1, "no shard set here")
    assert_refused(erann("stage", "gs://bucket/x", target), 2, "a folder is a path or s3://bucket/prefix")
    assert not target.exists()
    target.mkdir()
    (target / "mine").write_text("mine")
    assert_refused(erann("stage", tone_shards, target), 2, "copy: exists and is not a shard set; choose another folder")
    assert_refused(erann("stage", tone_shards, target / "mine"), 1, "mine: File exists")
    assert [path.name for path in target.iterdir()] == ["mine"]


def test_stats_by_the_command(erann, tone_shards: Path, tmp_path: Path) -> None:
    result = json.loads(erann("stats", tone_shards, "--json", "--html", tmp_path / "page.html").out)
    assert result["clips"] == 40
    assert "<svg" in (tmp_path / "page.html").read_text()
    assert_refused(erann("stats", tmp_path / "nowhere"), 2, "nowhere: no such folder")


def test_finetune(erann, tmp_path: Path) -> None:
    path = write_protocol(tmp_path / "t.yaml", write_folded_set(tmp_path / "tones", [1, 2]))
    arguments = ["finetune", path, "--from", "none", "optim.examples=16"]
    page = erann(*arguments)
    assert page.code == 0, page.err
    assert "ERANN-3-1 on tones, from scratch" in page.out
    assert "chosen on the fold that it is measured on" in page.out
    result = json.loads(erann(*arguments, "--json").out)
    assert f"{result['mean']:.4f}" in page.out
    assert_refused(erann("finetune", tmp_path / "gone.yaml"), 2, "no such recipe")
    assert_refused(erann("finetune", "esc10.yaml"), 2, "it has no section protocol")
    assert_refused(erann(*arguments, "run.launcher=torchrun"), 2, "torchrun trains one run")


def test_study(erann, tmp_path: Path, tone_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "_SPEED_S", 0)  # speeds of two passes: seconds of them take longer than the runs
    recipe = small_recipe(tone_shards, tmp_path / "runs" / "grid", optim={"examples": 16})
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    arguments = ["study", "hyperparameters", path, "--variant", "ERANN-3-1", "--variant", "ERANN-2-1", "--seed", 0]
    result = json.loads(erann(*arguments, "--seed", 1, "--json").out)
    assert [(row["variant"], row["seeds"], row["paper"]) for row in result["rows"]] == [
        ("ERANN-3-1", 2, None),
        ("ERANN-2-1", 2, None),
    ]
    first = result["rows"][0]
    scores = [
        json.loads((tmp_path / f"runs/grid/ERANN-3-1-seed{seed}/model/metrics.json").read_text())["mAP"]
        for seed in (0, 1)
    ]
    assert first["mAP"] == pytest.approx(sum(scores) / 2)
    assert first["std"] == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)
    assert first["clips_per_s_1"] > 0
    with (tmp_path / "runs/grid/table.csv").open() as file:
        assert [row["variant"] for row in csv.DictReader(file)] == ["ERANN-3-1", "ERANN-2-1"]
    assert_refused(erann("study", "transfer", path), 2, "study transfer needs recipes of erann finetune, and --from")
    assert_refused(erann("study", "augmentation", path, path), 2, "takes one recipe")


def test_pipeline(erann, tmp_path: Path, tone_shards: Path) -> None:
    own = small_recipe(tone_shards, tmp_path / "elsewhere" / "base", optim={"examples": 16})
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(own.model_dump(mode="json", exclude_none=True)))
    follow_on = write_protocol(tmp_path / "tones.yaml", write_folded_set(tmp_path / "tones", [1, 2]))
    tree = {
        "pretrain": {"recipe": str(tmp_path / "base.yaml"), "set": {"run": {"name": "first"}}},
        "finetune": [{"recipe": str(follow_on), "set": {"optim": {"examples": 16}}}],
        "run": {"dir": str(tmp_path / "runs")},
    }
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(tree))
    done = erann("pipeline", tmp_path / "whole.yaml", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["pretrained"]["model"] == f"{tmp_path}/runs/whole/first/model"
    (finetuned,) = result["finetuned"]
    assert finetuned["init"] == result["pretrained"]["model"]
    assert len(finetuned["folds"]) == 2
    page = Path(result["report"]).read_text()
    assert f"{finetuned['mean']:.4f}" in page
    assert json.loads(erann("pipeline", tmp_path / "whole.yaml", "--json").out) == result
    refused = erann("pipeline", tmp_path / "whole.yaml", "finetune.0.set.optim.lrr=1")
    assert_refused(refused, 2, "optim.lrr: no such key")
