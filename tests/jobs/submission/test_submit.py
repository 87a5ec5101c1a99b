"""What is sent to a cluster, and what is refused before anything is: nothing here reaches one."""

import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.submit.driver import what_differs
from cluster.submit.package import make_package, pins, versions
from cluster.submit.ray_jobs import Submission
from erann_dist.errors import UserError
from jobs.cli import __main__

DryRun = Callable[..., Any]
PLACES = ["data.train=s3://bucket/train", "data.eval=/shared/eval", "run.dir=s3://bucket/runs"]


@pytest.fixture
def dry_run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> DryRun:
    """`erann submit … --dry-run` in a folder: what would be sent, or all that it says of what is wrong."""

    def run(place: Path, *arguments: object, code: int = 0) -> Any:
        monkeypatch.chdir(place)
        monkeypatch.setattr(sys, "argv", ["erann", "submit", *map(str, arguments), "--dry-run", "--json"])
        capfd.readouterr()
        try:
            __main__.main()
            ended = 0
        except SystemExit as stop:
            ended = int(stop.code or 0)
        said = capfd.readouterr()
        assert ended == code, said.err
        return json.loads(said.out) if code == 0 else said.err

    return run


def test_the_source_and_the_recipe_go_along(tmp_path: Path, dry_run: DryRun) -> None:
    """Nothing else of the folder does, nor of the source's."""
    (tmp_path / "recipes").mkdir()
    recipe = {"model": {"variant": "ERANN-1-6"}, "data": {"train": "/s/t", "eval": "/s/e"}, "run": {"dir": "/s/runs"}}
    (tmp_path / "recipes" / "own.yaml").write_text(yaml.safe_dump(recipe | {"optim": {"epochs": 1}}))
    (tmp_path / ".env").write_text("AWS_SECRET_ACCESS_KEY=x")
    (tmp_path / "clips.tar").write_bytes(b"x")
    sent = dry_run(tmp_path, "pretrain", "recipes/own.yaml", "optim.epochs=2", "--resume", "must")
    assert sent["run"] == "/s/runs/own"
    assert (
        sent["entrypoint"] == "python -m cluster.submit.driver pretrain recipes/own.yaml optim.epochs=2 --resume must"
    )
    source = [name for name in sent["files"] if name != "recipes/own.yaml"]
    assert len(source) == len(sent["files"]) - 1
    assert {"jobs/cli/__main__.py", "cluster/submit/driver.py", "jobs/recipes/audioset.yaml"} < set(source)
    assert {name.partition("/")[0] for name in source} == {"erann_dist", "shards", "cluster", "jobs"}
    assert {Path(name).suffix for name in source} <= {".py", ".yaml", ".csv", ".sh", ".html", ".css", ".js"}


def test_a_recipe_elsewhere_and_odd_values(tmp_path: Path, dry_run: DryRun) -> None:
    """A recipe from outside the folder has a place in the package; values come to the command as they were typed."""
    (tmp_path / "here").mkdir()
    recipe = {"model": {"variant": "ERANN-1-6"}, "data": {"train": "/s/t", "eval": "/s/e"}, "optim": {"epochs": 1}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe))
    for path in ("../own.yaml", str(tmp_path / "own.yaml")):
        sent = dry_run(tmp_path / "here", "pretrain", path, "run.dir=/s/$(touch x) 'y'")
        assert "recipes/own.yaml" in sent["files"]
        assert sent["entrypoint"].startswith(
            "python -m cluster.submit.driver pretrain recipes/own.yaml 'run.dir=/s/$(touch x)"
        )


def test_the_environment_is_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dry_run: DryRun) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://s3.example.org")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("MY_TOKEN", "hidden")
    sent = dry_run(tmp_path, "pretrain", "audioset.yaml", *PLACES)
    assert sent["runtime_env"]["env_vars"]["AWS_ENDPOINT_URL"] == "https://s3.example.org"
    assert "hidden" not in json.dumps(sent)
    assert "AWS_SECRET_ACCESS_KEY" in sent["not_sent"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://user:hidden@s3.example.org")
    line = dry_run(tmp_path, "pretrain", "audioset.yaml", *PLACES, code=1)
    assert line.startswith("erann: AWS_ENDPOINT_URL: contains a user or a password")
    assert "hidden" not in line


def test_dependencies_by_pip_are_pinned(tmp_path: Path, dry_run: DryRun) -> None:
    sent = dry_run(tmp_path, "pretrain", "audioset.yaml", *PLACES, "--dependencies", "pip")
    packages = sent["runtime_env"]["pip"]["packages"]
    assert packages == pins()
    assert {each.partition("==")[0] for each in packages} > {"torch", "torchaudio", "deepspeed", "webdataset", "s3fs"}
    assert all("==" in each and "+" not in each for each in packages)
    assert not any(each.startswith(("ray==", "pytest==", "h5py==")) for each in packages)


def test_which_run_it_is(tmp_path: Path, dry_run: DryRun) -> None:
    """By its folder: two submissions of it are one."""
    shards = "protocol.shards=s3://bucket/esc50"
    finetune = dry_run(tmp_path, "finetune", "esc50.yaml", "--from", "none", shards, "run.dir=/s/runs")
    assert finetune["run"] == "/s/runs/esc50"
    transfer = ["study", "transfer", "esc50.yaml", "ravdess.yaml", "--variant", "ERANN-2-5", "--from", "/s/pretrained"]
    assert dry_run(tmp_path, *transfer, shards, "run.dir=/s/runs")["run"] == "/s/runs/transfer"
    assert dry_run(tmp_path, *transfer, shards, "run.dir=/s/runs", "run.name=t2")["run"] == "/s/runs/t2"
    assert dry_run(tmp_path, "study", "augmentation", "audioset.yaml", *PLACES)["run"] == "s3://bucket/runs/audioset"

    preflight = dry_run(tmp_path, "preflight", "audioset.yaml", *PLACES)
    assert preflight["run"] == "preflight of s3://bucket/runs/audioset"  # in the way of no training


def test_a_pipeline_takes_its_recipes_along(tmp_path: Path, dry_run: DryRun) -> None:
    (tmp_path / "own").mkdir()
    fold = {"protocol": {"shards": "/s/esc50", "lr": {"scratch": 1e-3, "finetune": 1e-3}}, "optim": {"epochs": 1}}
    (tmp_path / "own" / "fold.yaml").write_text(yaml.safe_dump(fold))
    pretrain = {"recipe": "audioset.yaml", "set": {"data": {"train": "/s/t", "eval": "/s/e"}}}
    tree = {"pretrain": pretrain, "finetune": [{"recipe": "own/fold.yaml"}], "run": {"dir": "/s/runs"}}
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(tree))
    sent = dry_run(tmp_path, "pipeline", "all.yaml")
    assert sent["run"] == "/s/runs/all"
    assert {"all.yaml", "own/fold.yaml"} < set(sent["files"])
    for setting, refusal in (
        ("pretrain.set.run.launcher=none", "audioset.yaml: run.launcher none: runs on a cluster are launched by ray"),
        ("finetune.0.set.run={launcher: none}", "own/fold.yaml: run.launcher none: runs on a cluster are launched by"),
        ("pretrain.set.run.wrkers=8", "run.wrkers"),
        ("pretrain.set.model={init: runs/one}", "model.init: runs/one is a relative path"),
    ):
        assert refusal in dry_run(tmp_path, "pipeline", "all.yaml", setting, code=2)
    tree["finetune"] = [{"recipe": str(tmp_path / "own" / "fold.yaml")}]
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(tree))
    assert "is sent only from below the current folder" in dry_run(tmp_path, "pipeline", "all.yaml", code=2)


def test_lists_of_keys_go_along(tmp_path: Path, dry_run: DryRun) -> None:
    (tmp_path / "some.txt").write_text("a\nb\n")
    settings = ["data.train={url: /s/t, keys: some.txt}", *PLACES[1:]]
    assert "some.txt" in dry_run(tmp_path, "pretrain", "audioset.yaml", *settings)["files"]
    settings[0] = "data.train={url: /s/t, without: absent.txt}"
    assert dry_run(tmp_path, "pretrain", "audioset.yaml", *settings, code=2) == "erann: absent.txt: no such file\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "x"], "evaluate: can't be submitted; these can: pretrain,"),
        (["pretrain", "audioset.yaml", *PLACES[1:]], "data.train: shard-sets/audioset/unbalanced_train is a relative"),
        (["pretrain", "audioset.yaml", *PLACES[:2]], "run.dir: runs is a relative path"),
        (["finetune", "esc50.yaml", "run.dir=/s", "protocol.shards=/s/e", "--from", "runs/a"], "--from: runs/a is a"),
        (["pipeline", "pipeline.yaml"], "run.dir: runs is a relative path"),
        (["pretrain", "absent.yaml"], "absent.yaml: no such recipe"),
        (["pretrain", "audioset.yaml", *PLACES, "run.wrkers=2"], "run.wrkers: no such key; did you mean run.workers?"),
        (["pretrain", "audioset.yaml", *PLACES, "--launcher", "torchrun"], "runs on a cluster are launched by ray"),
        (["pretrain", "audioset.yaml", *PLACES, "run.launcher=none"], "runs on a cluster are launched by ray"),
    ],
)
def test_refused(arguments: list[str], words: str, tmp_path: Path, dry_run: DryRun) -> None:
    assert words in dry_run(tmp_path, *arguments, code=2)


def test_options_of_the_command_are_checked_here(tmp_path: Path, dry_run: DryRun) -> None:
    said = dry_run(tmp_path, "pretrain", "audioset.yaml", *PLACES, "--lanucher", "ray", code=2)
    assert "No such option: --lanucher" in said


def test_a_package_that_is_too_large(tmp_path: Path, dry_run: DryRun) -> None:
    """The offenders are named. Of nothing but size is the file that is refused."""
    with (tmp_path / "keys.txt").open("wb") as file:
        file.truncate(101 * 2**20)
    with pytest.raises(
        UserError, match=r"the package is 102 MiB, but Ray's limit is 100; largest files: keys.txt \(101 MiB\)"
    ):
        make_package({"keys.txt": tmp_path / "keys.txt"})
    settings = ["data.train={url: /s/t, keys: keys.txt}", *PLACES[1:]]
    assert "largest files: keys.txt (101 MiB)" in dry_run(tmp_path, "pretrain", "audioset.yaml", *settings, code=1)


def test_the_package_is_what_is_written(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: 1")
    package = make_package({"recipes/a.yaml": tmp_path / "a.yaml"})
    package.write(tmp_path / "out")
    written = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert written == set(package.files)
    assert (tmp_path / "out" / "recipes" / "a.yaml").read_text() == "a: 1"
    assert Submission(["pretrain", "a b.yaml"], "/runs/a", True, package, "image").entrypoint.endswith(
        "pretrain 'a b.yaml'"
    )


def test_versions_that_differ() -> None:
    here = {"python": "3.11", "torch": "2.11.0", "deepspeed": "none"}
    assert what_differs(dict(here), here) is None
    line = what_differs({"python": "3.11", "torch": "2.9.0", "deepspeed": "0.19.8"}, here)
    assert line is not None
    assert "torch 2.11.0 here, 2.9.0 there; deepspeed none here, 0.19.8 there (here is the cluster)" in line
    assert line.endswith("install the same versions, or submit with --dependencies pip")
    line = what_differs(here | {"python": "3.12"}, here)
    assert line is not None
    assert line.endswith("install the same versions")  # pip brings no Python


def test_a_library_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "deepspeed":
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.60.3+local"

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = versions()
    assert found["deepspeed"] == "none"
    assert (found["ray"], found["torch"]) == ("2.60", "2.60.3")
