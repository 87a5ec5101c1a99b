"""A shard set copied from S3 to a disk, through faults and stops: the same files, fit to train from."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from erann_dist.data.manifest import load_manifest
from erann_dist.errors import UserError
from erann_dist.storage import s3
from erann_dist.storage.folder import LocalFolder, open_folder
from shards.sources.audioset import read_audioset
from shards.stage import copy, staging
from tests.cluster.test_storage_s3 import samples
from tests.conftest import pack_here, write_tone_set
from tests.shards.test_stage import contents
from tests.support.commands import Running, erann
from tests.support.s3 import (
    DENIED,
    DROP,
    FLIP_ANSWER,
    INTERNAL_ERROR,
    SHORT,
    SLOW_DOWN,
    TRUNCATE,
    Fault,
    Request,
    Server,
    put_set,
    s3_server,
    slow,
)

LAST = "audioset-000004.tar"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tones")
    return pack_here(read_audioset(*write_tone_set(root, 40)), root / "shards")


@pytest.fixture
def server(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """S3 with the shard set in it."""
    monkeypatch.setattr(s3, "PAUSE_S", 0.005)
    monkeypatch.setattr(s3, "RANGE", 100_000)  # several in a tar
    with s3_server() as server:
        put_set(server, shards)
        yield server


def run(server: Server, target: Path) -> list[int]:
    """What was told on the way."""
    told: list[int] = []
    with staging(open_folder(f"{server.bucket_url}/set", server.endpoint), LocalFolder(str(target))) as plan:
        copy(plan, told.append)
    return told


@pytest.mark.parametrize(
    "fault", [DROP, TRUNCATE, SHORT, FLIP_ANSWER, INTERNAL_ERROR, SLOW_DOWN], ids=lambda f: f.kind + f.code
)
def test_copied_through_faults(server: Server, shards: Path, tmp_path: Path, fault: Fault) -> None:
    spoiled: set[str] = set()

    def now_and_then(request: Request) -> Fault | None:
        if request.operation != "GetObject" or request.nth % 4:
            return None
        if fault == FLIP_ANSWER and request.path in spoiled:  # a whole file is fetched again: once is enough
            return None
        spoiled.add(request.path)
        return fault

    server.faults = now_and_then
    told = run(server, tmp_path / "copy")
    assert spoiled
    assert told[-1] == sum(path.stat().st_size for path in shards.glob("*.tar"))
    assert contents(tmp_path / "copy") == contents(shards)
    assert erann(tmp_path, "verify", "copy")["clips"] == 40
    assert torch.equal(samples(load_manifest(tmp_path / "copy")), samples(load_manifest(shards)))


def test_a_fault_that_lasts_is_one_line_and_what_came_is_kept(server: Server, shards: Path, tmp_path: Path) -> None:
    server.faults = lambda request: DENIED if request.path.endswith(LAST) else None
    with pytest.raises(UserError, match=rf"s3://sounds/set/{LAST} could not be read: access denied"):
        run(server, tmp_path / "copy")
    assert not [name for name in contents(tmp_path / "copy") if LAST in name or name.endswith(".part")]
    there = set(contents(tmp_path / "copy"))
    server.faults = lambda request: None
    server.requests.clear()
    run(server, tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(shards)
    fetched = {request.path.rpartition("/")[2] for request in server.requests if request.path.endswith(".tar")}
    assert LAST in fetched
    assert not fetched & there


def test_an_object_that_is_not_what_was_packed(server: Server, tmp_path: Path) -> None:
    """Whole for S3, and of the same size."""
    data = bytearray(server.stored(f"set/{LAST}") or b"")
    data[5000] ^= 1
    server.client.put_object(Bucket=server.bucket, Key=f"set/{LAST}", Body=bytes(data))
    with pytest.raises(UserError, match=rf"set/{LAST}: its bytes are not those that were packed"):
        run(server, tmp_path / "copy")
    assert LAST not in contents(tmp_path / "copy")
    assert "manifest.parquet" not in contents(tmp_path / "copy")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopped_and_run_again(server: Server, shards: Path, tmp_path: Path, how: signal.Signals) -> None:
    command = ["stage", f"{server.bucket_url}/set", "copy", "--endpoint", server.endpoint]
    server.faults = lambda request: slow(3) if request.path.endswith(LAST) else None
    running = Running(tmp_path, *command)
    running.wait_for(tmp_path / "copy" / "audioset-000000.tar")
    code = running.end(how)
    left = [name for name in contents(tmp_path / "copy") if name.endswith(".part")]
    assert not (tmp_path / "copy" / "manifest.parquet").exists()
    if how == signal.SIGINT:
        assert code == 130
        assert "stopped; run the same command again to resume" in running.text()
        assert "Traceback" not in running.text()
        assert left == []
    else:
        assert left != []
    running.log.close()
    server.faults = lambda request: None
    result = erann(tmp_path, *command)
    assert result["copied_tars"] < result["tars"] == 5
    assert contents(tmp_path / "copy") == contents(shards)
    assert erann(tmp_path, "verify", "copy")["clips"] == 40
    assert erann(tmp_path, *command)["copied_tars"] == 0
