"""The whole path by the real command on an embedded Ray cluster, with DeepSpeed over gloo, and what stops it."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.torch import load_file

from erann_dist.log.run_log import read_log
from erann_dist.storage.folder import LocalFolder
from erann_dist.train import checkpoint
from tests.conftest import small_recipe, small_steps, write_tone_set
from tests.support.commands import Running, erann


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a packed set of tones, by the command."""
    place = tmp_path_factory.mktemp("place")
    segments, audio, classes = write_tone_set(place / "set", 40)
    options = ["--segments", segments, "--audio", audio, "--classes", classes, "--out", "shards"]
    packed = erann(place, "pack", "audioset", *options, "--clips-per-shard", 8)
    assert (packed["clips"], packed["tars"], packed["not_packed"]) == (40, 5, {})
    return place


STEPS = 48  # so many that a run whose early checkpoint was seen is still far from its end


def write_recipe(place: Path, name: str, steps: int = STEPS, **run: object) -> Path:
    settings = {"launcher": "ray", "engine": "deepspeed", "workers": 2, **run}
    recipe = small_recipe(
        Path("shards"), Path("runs") / name, run=settings, optim=small_steps(steps), checkpoint={"every": 2}
    )
    (place / f"{name}.yaml").write_text(yaml.safe_dump(recipe.model_dump()))
    return place / f"{name}.yaml"


def run_steps(place: Path, name: str) -> dict[int, dict[str, Any]]:
    lines = [json.loads(line) for line in (place / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if line["event"] == "Step"}


def weights(place: Path, name: str) -> dict[str, Any]:
    return load_file(place / "runs" / name / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> str:
    """A run with two DeepSpeed workers under Ray, not disturbed."""
    erann(place, "pretrain", write_recipe(place, "undisturbed"))
    return "undisturbed"


def test_pretrain_on_ray(place: Path, undisturbed: str) -> None:
    run = place / "runs" / undisturbed
    steps = run_steps(place, undisturbed)
    assert sorted(steps) == list(range(1, STEPS + 1))
    assert {"loss", "lr", "examples_per_s", "clips_per_s", "data_wait"} <= set(steps[1])
    assert steps[4]["clips_per_s"] == pytest.approx(2 * steps[4]["examples_per_s"])
    assert (run / "model" / "README.md").read_text().startswith("# ERANN-3-1 for tagging, 3 classes")
    assert any(p.name.startswith("events.out.tfevents") for p in (run / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("launcher", "workers"), [("none", 1), ("torchrun", 2), pytest.param("torchrun", 3, marks=pytest.mark.slow)]
)
def test_the_same_run_without_ray(place: Path, undisturbed: str, launcher: str, workers: int) -> None:
    name = f"{launcher}-{workers}"
    erann(place, "pretrain", write_recipe(place, name, workers=workers), "--launcher", launcher)
    expected, found = run_steps(place, undisturbed), run_steps(place, name)
    exact = workers == 2
    for step in range(1, STEPS + 1 if exact else 5):
        assert found[step]["loss"] == pytest.approx(expected[step]["loss"], rel=0 if exact else 1e-3)
        assert found[step]["lr"] == expected[step]["lr"]
    if exact:
        assert all(np.array_equal(v, weights(place, undisturbed)[k]) for k, v in weights(place, name).items())


SLOW = [pytest.param(each, marks=pytest.mark.slow) for each in (signal.SIGKILL, signal.SIGINT, signal.SIGHUP)]


@pytest.mark.parametrize("how", [signal.SIGTERM, *SLOW])
def test_stopped_and_run_again(
    place: Path,
    undisturbed: str,
    killed: list[Running],
    how: signal.Signals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing survives the command, and the next one ends with the weights of the undisturbed run.

    All signals but SIGKILL go to its whole process group, as `timeout` and batch systems send them.
    """
    name = f"stopped-{how.name}"
    recipe = write_recipe(place, name)
    temporary = tmp_path / "t"
    temporary.mkdir()
    with monkeypatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        running = Running(place, "pretrain", recipe)
    running.wait_for(place / "runs" / name / "checkpoints" / "step-00000004-0001" / "COMMITTED")
    if how == signal.SIGKILL:
        running.end(how)
    else:
        os.killpg(running.process.pid, how)
        assert running.process.wait(120) == 128 + how, running.text()
        assert f"erann: stop requested by {how.name}: stopped at step" in running.text().splitlines()[-1]
        run = LocalFolder(str(place / "runs" / name))
        (ended,) = [line for line in read_log(run) if line["event"] == "Ended"]
        assert checkpoint.step_of(checkpoint.committed(run)[-1]) == ended["step"]
    assert running.survivors(agents=how != signal.SIGKILL) == []
    if how != signal.SIGKILL:
        assert [path for path in temporary.rglob("*") if not path.is_dir()] == []  # torch makes a folder for its cache
    killed.append(running)
    assert "Traceback" not in running.text()
    assert not (place / "runs" / name / "model").exists()
    erann(place, "pretrain", recipe, "--resume", "must")
    expected, found = run_steps(place, undisturbed), run_steps(place, name)
    assert {k: v["loss"] for k, v in found.items()} == {k: v["loss"] for k, v in expected.items()}
    assert all(np.array_equal(v, weights(place, undisturbed)[k]) for k, v in weights(place, name).items())


@pytest.mark.slow
def test_resumed_on_another_number_of_workers(place: Path, undisturbed: str) -> None:
    recipe = write_recipe(place, "fewer")
    running = Running(place, "pretrain", recipe)
    running.wait_for(place / "runs" / "fewer" / "checkpoints" / "step-00000002-0001" / "COMMITTED")
    running.end(signal.SIGTERM)
    assert running.survivors() == []
    erann(place, "pretrain", recipe, "run.workers=3")
    expected, found = run_steps(place, undisturbed), run_steps(place, "fewer")
    assert sorted(found) == list(range(1, STEPS + 1))
    for step in range(1, 6):
        assert found[step]["loss"] == pytest.approx(expected[step]["loss"], rel=1e-3)
        assert found[step]["lr"] == expected[step]["lr"]


def test_interrupted_before_the_first_step(place: Path) -> None:
    recipe = write_recipe(place, "early")
    running = Running(place, "pretrain", recipe)
    running.wait_for(place / "runs" / "early" / "recipe.yaml")
    time.sleep(2)
    running._watch()
    assert running.end(signal.SIGINT) == 130
    assert running.survivors() == []
    assert "Traceback" not in running.text()


def test_evaluate_on_one_two_and_three_workers(place: Path, undisturbed: str) -> None:
    model = place / "runs" / undisturbed / "model"
    results = []
    for workers, launcher in enumerate(["none", "ray", "torchrun"], 1):
        options = ["--workers", workers, "--launcher", launcher, "--out", place / f"evaluation-{workers}"]
        result = erann(place, "evaluate", model, "shards", *options)
        results.append({k: v for k, v in result.items() if k != "out"})
    assert results[0] == results[1] == results[2]
    assert results[0]["mAP"] == json.loads((model / "metrics.json").read_text())["mAP"]


@pytest.mark.parametrize(
    ("launcher", "workers"), [("none", 1), pytest.param("torchrun", 2, marks=pytest.mark.slow), ("ray", 2)]
)
def test_tag_a_shard_set_under_every_launcher(place: Path, undisturbed: str, launcher: str, workers: int) -> None:
    out = f"tags-{launcher}.parquet"
    arguments = ["--out", out, "--workers", workers, "--launcher", launcher]
    result = erann(place, "tag", f"runs/{undisturbed}/model", "shards", *arguments)
    assert result == {"model": f"runs/{undisturbed}/model", "shards": "shards", "clips": 40, "out": out}
    tags = pq.read_table(place / out)
    expected = pq.read_table(place / "runs" / undisturbed / "predictions.parquet")
    assert tags["key"].equals(expected["key"])
    np.testing.assert_allclose(tags["scores"].to_pylist(), expected["scores"].to_pylist(), atol=1e-5)


def test_a_workers_error_is_one_line(place: Path) -> None:
    """A shard that is damaged behind a manifest that is sound: found by a worker, said by the command."""
    recipe = write_recipe(place, "damaged")
    subprocess.run(["cp", "-r", "shards", "broken"], cwd=place, check=True)
    for tar in (place / "broken").glob("*.tar"):
        data = bytearray(tar.read_bytes())
        data[3000::2000] = bytes(x ^ 1 for x in data[3000::2000])
        tar.write_bytes(data)
    line = erann(place, "pretrain", recipe, "data.train=broken", code=1)
    assert line.startswith("erann: broken/audioset-")
    assert "is damaged; check the set with erann verify" in line


def test_an_embedded_cluster_under_a_long_temporary_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As schedulers give one to each job: too long for the paths of Ray's sockets."""
    folder = place / "a-temporary-folder-of-some-scheduler"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    erann(place, "pretrain", write_recipe(place, "long", steps=1, workers=1, engine="torch"))


def test_no_cluster_at_the_address(place: Path) -> None:
    recipe = write_recipe(place, "nowhere")
    line = erann(place, "pretrain", recipe, "--address", "127.0.0.1:1", code=1)
    assert line.startswith("erann: no Ray cluster at 127.0.0.1:1")
    for dashboard in ("http://127.0.0.1:8265", "ray://127.0.0.1:10001"):
        line = erann(place, "pretrain", recipe, "--address", dashboard, code=2)
        assert line.startswith(f"erann: {dashboard}: is for erann submit")
