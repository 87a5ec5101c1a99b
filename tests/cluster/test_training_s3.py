"""A training whose run folder lies in S3: its checkpoints and model there, exact resume, a store that fails."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from torch import Tensor

from erann_dist.errors import UserError
from erann_dist.log.events import CheckpointSaved, Event, Finished, Incident, Phase, Started, Step
from erann_dist.log.run_log import read_log
from erann_dist.recipe import Recipe
from erann_dist.storage import s3
from erann_dist.storage.folder import Folder, open_folder
from erann_dist.train import checkpoint, trainer
from jobs.training.pretrain import pretrain
from tests.conftest import small_recipe
from tests.support.s3 import DENIED, FLIP_STORED, INTERNAL_ERROR, Fault, Request, Server, s3_server
from tests.support.workers import of_kind, train_alone

PARTS = ("checkpoints/step-00000002", "checkpoints/step-00000003")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(s3, "ATTEMPTS", 3)
    monkeypatch.setattr(s3, "PAUSE_S", 0.001)
    with s3_server() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        yield server


def recipe_in(server: Server, shards: Path, name: str, **sections: dict[str, object]) -> Recipe:
    place = {"dir": f"{server.bucket_url}/runs", "name": name}
    return small_recipe(shards, Path("unused"), run=place, **{"checkpoint": {"every": 1, "keep_last": 9}} | sections)


def weights(run: Folder) -> dict[str, Tensor]:
    return safetensors.torch.load(run.read("model/model.safetensors"))


def test_a_run_in_s3_is_the_run_on_a_disk(server: Server, tone_shards: Path, tmp_path: Path) -> None:
    local = small_recipe(tone_shards, tmp_path / "run", checkpoint={"every": 1, "keep_last": 9})
    train_alone(local)
    recipe = recipe_in(server, tone_shards, "run")
    told: list[Event] = []
    result = pretrain(recipe, "auto", None, told.append)
    assert result["model"] == "s3://sounds/runs/run/model"
    run, disk = open_folder(recipe.run_url), open_folder(local.run_url)
    assert checkpoint.committed(run) == checkpoint.committed(disk)
    for name in checkpoint.committed(run):
        for file in ("state.safetensors", "state.json", "COMMITTED"):
            assert run.read(f"{name}/{file}") == disk.read(f"{name}/{file}")
    for file in ("model/model.safetensors", "model/config.json"):
        assert run.read(file) == disk.read(file)
    assert pq.read_table(io.BytesIO(run.read("predictions.parquet"))).num_rows == 40
    assert len(of_kind(told, Finished)) == 1
    assert [line["step"] for line in read_log(run) if line["event"] == "Step"] == [1, 2, 3, 4]
    again: list[Event] = []
    assert pretrain(recipe, "auto", None, again.append) == result  # a finished run is not run again
    assert [type(event) for event in again] == [Phase]  # which says that it is finished
    with pytest.raises(UserError, match=r"s3://sounds/runs/run: started with a different recipe \(optim.lr"):
        pretrain(recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"lr": 1e-5})}), "auto", None, print)


def lose_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The process is lost in a step, as seen from the run's folder."""
    compute = trainer.Trainer.train_step

    def lost(self: trainer.Trainer, number: int) -> None:
        if number == step:
            raise ConnectionResetError("the process is gone")
        compute(self, number)

    monkeypatch.setattr(trainer.Trainer, "train_step", lost)


def test_resumed_from_s3_with_a_spoiled_checkpoint(
    server: Server, tone_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, recipe = (recipe_in(server, tone_shards, name) for name in ("whole", "run"))
    train_alone(whole)
    with monkeypatch.context() as patch:
        lose_at(patch, 3)
        with pytest.raises(ConnectionResetError):
            train_alone(recipe)
    run = open_folder(recipe.run_url)
    newest = checkpoint.committed(run)[-1]
    data = bytearray(run.read(f"{newest}/state.safetensors"))
    data[-1] ^= 1
    run.write(f"{newest}/state.safetensors", bytes(data))
    events = train_alone(recipe)
    (started,) = of_kind(events, Started)
    assert started.step == 2
    problem, restart = of_kind(events, Incident)
    assert problem.text.startswith(f"{run}/{newest}: its state.safetensors does not match its COMMITTED")
    assert (restart.kind, restart.steps_lost) == ("failure", 1)
    expected = weights(open_folder(whole.run_url))
    assert all(torch.equal(value, expected[name]) for name, value in weights(run).items())


@pytest.mark.parametrize("fault", [INTERNAL_ERROR, FLIP_STORED])
def test_uploads_that_fail_are_told_and_training_goes_on(server: Server, tone_shards: Path, fault: Fault) -> None:
    """Two in a row within the budget; what they left is no checkpoint."""

    def fail(request: Request) -> Fault | None:
        wanted = request.operation == "PutObject" and any(part in request.path for part in PARTS)
        return fault if wanted and request.path.endswith("safetensors") else None

    server.faults = fail
    recipe = recipe_in(server, tone_shards, "run")
    events = train_alone(recipe)
    incidents = of_kind(events, Incident)
    assert [(each.step, each.kind) for each in incidents] == [(2, "checkpoint"), (3, "checkpoint")]
    assert "s3://sounds/runs/run" in incidents[0].text
    assert [event.step for event in of_kind(events, CheckpointSaved)] == [1, 4]
    names = checkpoint.committed(open_folder(recipe.run_url))
    assert [int(name.split("-")[1]) for name in names] == [1, 4]
    assert len(of_kind(events, Step)) == 4


def test_one_too_many_ends_the_run_with_one_line(server: Server, tone_shards: Path) -> None:
    server.faults = lambda request: INTERNAL_ERROR if "/step-" in request.path and request.method == "PUT" else None
    recipe = recipe_in(server, tone_shards, "run", checkpoint={"every": 1, "max_failed": 1})
    with pytest.raises(
        UserError, match=r"s3://sounds/runs/run: the checkpoint of step \d could not be written .*; 2 in a"
    ):
        train_alone(recipe)


def test_a_store_that_can_not_be_written_is_found_before_the_first_step(server: Server, tone_shards: Path) -> None:
    server.faults = lambda request: DENIED if request.method == "PUT" else None
    told: list[Event] = []
    with pytest.raises(UserError, match="s3://sounds/runs/run.*denied"):
        pretrain(recipe_in(server, tone_shards, "run"), "auto", None, told.append)
    assert [event for event in told if not isinstance(event, Phase)] == []


def test_checkpoints_hold_no_secret(server: Server, tone_shards: Path) -> None:
    recipe = recipe_in(server, tone_shards, "run")
    train_alone(recipe)
    run = open_folder(recipe.run_url)
    for name in run.sizes():
        data = run.read(name)
        assert b"secret-access-key" not in data
        assert server.endpoint.encode() not in data
    json.loads(run.read(f"{checkpoint.committed(run)[0]}/state.json"))
