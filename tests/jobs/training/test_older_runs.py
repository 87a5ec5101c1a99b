"""A shard set, a run, its checkpoints and its model folder, as version 0.2.0 of the first layout wrote them.

Its weights are zeros but for the last bias and the running statistics, so that the files are small.
"""

import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from erann_dist.data.manifest import load_manifest
from erann_dist.data.sources import load_source
from erann_dist.log.run_log import read_log
from erann_dist.recipe import DataSource, Recipe, load_recipe
from erann_dist.storage.folder import LocalFolder
from erann_dist.train import checkpoint
from erann_dist.train.distributed import single_worker
from erann_dist.train.evaluation import read_detail, score, summarise
from erann_dist.train.model_folder import load_model
from jobs.report.report import report
from jobs.shard_sets.maintenance import verify
from jobs.training.pretrain import pretrain
from tests.support.workers import CPU

MADE = Path(__file__).parents[2] / "fixtures" / "made-by-0.2.0.tar.xz"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(MADE) as tar:
        tar.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def recipe(place: Path) -> Recipe:
    return load_recipe(place / "runs" / "run" / "recipe.yaml", [], print)


def test_the_shard_set_is_whole(place: Path) -> None:
    verify(LocalFolder("shards"))  # raises for any problem
    assert len(load_manifest("shards")) == 8


def test_the_log_and_the_report(place: Path) -> None:
    lines = read_log(LocalFolder("runs/run"))
    assert [line["step"] for line in lines if line["event"] == "Step"] == list(range(1, 9))
    assert [line["event"] for line in lines].count("Evaluated") == 2
    report(["runs/run"], Path("page.html"), None)
    assert "ERANN-3-1" in Path("page.html").read_text()


def test_the_model_scores_as_it_did(place: Path) -> None:
    model, info = load_model(LocalFolder("runs/run/model"))
    clips = load_source(DataSource(url="shards"))
    with single_worker(CPU) as workers:
        predictions = score(model, clips, workers, loader_threads=1)
    assert predictions is not None
    then = read_detail(Path("runs/run/model/metrics.json").read_bytes())
    assert summarise(predictions, info.task)["accuracy"] == then["accuracy"]


def test_a_finished_run_stays_as_it_is(place: Path, recipe: Recipe) -> None:
    before = Path("runs/run/model/model.safetensors").read_bytes()
    assert pretrain(recipe, "auto", None, lambda event: None)["accuracy"] == 0.5
    assert Path("runs/run/model/model.safetensors").read_bytes() == before


def test_a_run_resumes_from_its_checkpoint(place: Path, recipe: Recipe) -> None:
    """As if it had been killed in its second half: the weights come out as they did then."""
    run = Path("runs/run")
    then = load_file(run / "model" / "model.safetensors")
    for gone in ("model", "checkpoints/step-00000008-0001"):
        shutil.rmtree(run / gone)
    (run / "predictions.parquet").unlink()
    assert checkpoint.committed(LocalFolder("runs/run")) == ["checkpoints/step-00000004-0001"]
    pretrain(recipe, "must", None, lambda event: None)
    now = load_file(run / "model" / "model.safetensors")
    assert then["fc2.bias"].abs().sum() > 0
    for name, value in then.items():
        torch.testing.assert_close(now[name], value, rtol=1e-6, atol=1e-7)
