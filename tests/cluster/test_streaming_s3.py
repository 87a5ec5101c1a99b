"""Clips streamed from S3, through faults, by the project and by webdataset itself: right, or one clear line."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import webdataset

from erann_dist.data.manifest import Manifest, load_manifest
from erann_dist.data.streaming import register_s3_opener, stream_clips
from erann_dist.errors import UserError
from erann_dist.models.spec import build_model
from erann_dist.storage import s3
from erann_dist.storage.folder import Folder, open_folder
from erann_dist.train.model_folder import ModelInfo, save_model
from jobs.training.evaluate import tag_set
from shards.sources.audioset import read_audioset
from shards.verify import verify
from tests.conftest import pack_here, write_tone_set
from tests.support.s3 import (
    DENIED,
    DROP,
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

RANGE = 30_000
DATA = bytes(i * i % 251 for i in range(400_000))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tones")
    return pack_here(read_audioset(*write_tone_set(root, 20, seconds=0.4)), root / "shards")


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def server(running: Server, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """S3 with the shard set in it, many ranges in a tar, short waits."""
    monkeypatch.setattr(s3, "STREAM_RANGE", RANGE)
    monkeypatch.setattr(s3, "PATIENT_ATTEMPTS", 3)
    monkeypatch.setattr(s3, "PAUSE_S", 0.001)
    monkeypatch.setattr(s3, "SILENCE_S", 0.3)
    running.empty()
    put_set(running, shards)
    yield running
    running.empty()


def remote(server: Server) -> Manifest:
    return load_manifest(f"{server.bucket_url}/set", server.endpoint)


def streamed(manifest: Manifest, workers: int = 1) -> list[tuple[str, bytes]]:
    return [
        (manifest.keys[clip.row].as_py(), clip.data)
        for rank in range(workers)
        for clip in stream_clips(manifest, rank, workers)
    ]


def failure(manifest: Manifest) -> str:
    with pytest.raises(UserError) as error:
        streamed(manifest)
    line = str(error.value)
    assert "\n" not in line
    assert "object at" not in line
    assert " @ " not in line
    return line


def part_of_tar(request: Request) -> bool:
    return request.operation == "GetObject" and request.path.endswith(".tar")


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_the_same_clips_as_from_disk(server: Server, shards: Path, workers: int) -> None:
    assert streamed(remote(server), workers) == streamed(load_manifest(shards))
    parts = [request for request in server.requests if part_of_tar(request)]
    assert all("if-match" in request.headers and "range" in request.headers for request in parts)


def test_a_selection(server: Server, shards: Path) -> None:
    some = np.random.default_rng(3).random(20) < 0.4
    assert streamed(remote(server).select(some), 2) == streamed(load_manifest(shards).select(some))


@pytest.mark.parametrize(
    "fault", [DROP, TRUNCATE, SHORT, INTERNAL_ERROR, SLOW_DOWN, slow(1)], ids=lambda f: f.kind + f.code
)
def test_faults_are_outlasted(server: Server, shards: Path, fault: Fault) -> None:
    manifest = remote(server)
    seen: set[str] = set()

    def first_time(request: Request) -> Fault | None:
        what = f"{request.path} {request.headers.get('range')}"
        if not part_of_tar(request) or what in seen or len(seen) > 8:
            return None
        seen.add(what)
        return fault

    server.faults = first_time
    assert streamed(manifest) == streamed(load_manifest(shards))
    assert len(seen) > 8


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (INTERNAL_ERROR, r"S3 can't do it now: try again later \(InternalError, 3 times in a row\)"),
        (DENIED, "access denied"),
        (SHORT, "no answer, or one cut short"),
        (TRUNCATE, "no answer, or one cut short"),
        (DROP, "no answer, or one cut short"),
    ],
    ids=lambda x: x.kind + x.code if isinstance(x, Fault) else "",
)
@pytest.mark.parametrize("after", [0, RANGE * 2])
def test_what_lasts_is_one_line(server: Server, fault: Fault, reason: str, after: int) -> None:
    manifest = remote(server)

    def later(request: Request) -> Fault | None:
        begin = int(request.headers.get("range", "bytes=0-").split("=")[1].split("-")[0])
        return fault if part_of_tar(request) and begin >= after else None

    server.faults = later
    line = failure(manifest)
    assert line.startswith("s3://sounds/set/audioset-000000.tar could not be read: ")
    assert re.search(reason, line)


def test_a_tar_that_changes_in_between(server: Server) -> None:
    manifest = remote(server)
    tar = str(manifest.tars[1]).removeprefix("s3://sounds/")
    clips = stream_clips(manifest)
    came = [next(clips) for _ in range(9)]
    assert len({manifest.shards[clip.row] for clip in came}) == 2
    server.client.put_object(Bucket=server.bucket, Key=tar, Body=(server.stored(tar) or b"") + bytes(512))
    with pytest.raises(UserError, match=r"audioset-000001.tar could not be read: it was changed meanwhile; run the"):
        list(clips)


def test_a_tar_that_is_cut_or_gone(server: Server) -> None:
    manifest = remote(server)
    key = "set/audioset-000001.tar"
    server.client.put_object(Bucket=server.bucket, Key=key, Body=(server.stored(key) or b"")[:60_000])
    assert "audioset-000001.tar: clip " in failure(manifest)
    server.client.delete_object(Bucket=server.bucket, Key=key)
    assert "audioset-000001.tar: No such file or directory (clip " in failure(manifest)


@pytest.fixture
def folder(server: Server) -> Folder:
    folder = open_folder(f"{server.bucket_url}/other", server.endpoint)
    folder.write("x", DATA)
    server.requests.clear()
    return folder


@pytest.mark.parametrize(
    ("start", "end"), [(0, None), (5, 17), (0, 0), (3, 10**9), (10**9, None), (30_000, 60_000), (29_999, 90_001)]
)
def test_a_stream_is_the_part_of_the_object(folder: Folder, start: int, end: int | None) -> None:
    with folder.stream("x", start, end) as file:
        assert not file.seekable()
        first = file.read(7)
        assert first + file.read() == DATA[start:end]
        assert file.read(1) == b""


def test_a_few_ranges_are_asked_for_ahead(server: Server, folder: Folder) -> None:
    with folder.stream("x") as file:
        assert server.count("GetObject") == 0
        file.read(1)
        assert 1 <= server.count("GetObject") <= s3.PARALLEL
        file.read(RANGE * 3)
        assert server.count("GetObject") <= 4 + s3.PARALLEL


def test_a_stream_that_failed_goes_on_failing(server: Server, folder: Folder) -> None:
    server.faults = lambda request: INTERNAL_ERROR if "bytes=60000-" in request.headers.get("range", "") else None
    with folder.stream("x") as file:
        assert file.read(50_000) == DATA[:50_000]
        for _ in range(3):
            with pytest.raises(UserError, match="s3://sounds/other/x could not be read: S3 can't do it now"):
                file.read(100_000)


def test_no_stream_of_what_is_not_there(folder: Folder) -> None:
    with pytest.raises(FileNotFoundError, match="s3://sounds/other/y"):
        folder.stream("y")


@pytest.fixture
def opener(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(webdataset.gopen_schemes, "s3", None)  # to be as it was afterwards
    register_s3_opener(server.endpoint)


@pytest.mark.usefixtures("opener")
def test_webdataset_reads_s3(server: Server, shards: Path) -> None:
    names = [Path(str(tar)).name for tar in load_manifest(shards).tars]
    remote_tars, local_tars = [f"s3://sounds/set/{name}" for name in names], [str(shards / name) for name in names]
    samples = [
        {sample["__key__"]: sample["flac"] for sample in webdataset.WebDataset(tars, shardshuffle=False)}
        for tars in (remote_tars, local_tars)
    ]
    assert samples[0] == samples[1]
    assert len(samples[0]) == 20


@pytest.mark.usefixtures("opener")
@pytest.mark.parametrize("fault", [TRUNCATE, SHORT, DROP], ids=lambda f: f.kind)
def test_webdataset_does_not_take_a_cut_for_the_end(server: Server, fault: Fault) -> None:
    dataset = webdataset.WebDataset("s3://sounds/set/audioset-000000.tar", shardshuffle=False)
    server.faults = lambda request: fault if "bytes=60000-" in request.headers.get("range", "") else None
    with pytest.raises(UserError, match="audioset-000000.tar could not be read: no answer, or one cut short"):
        list(dataset)


def test_verify_reads_each_tar_once(server: Server) -> None:
    folder = open_folder(f"{server.bucket_url}/set", server.endpoint)
    tars = [name for name in folder.sizes() if name.endswith(".tar")]
    sizes = {name: size for name, size in folder.sizes().items() if name in tars}
    ranges = sum(-(-size // RANGE) for size in sizes.values())
    assert [problem.text for _, found in verify(folder) for problem in found] == []
    assert sum(part_of_tar(request) for request in server.requests) == ranges

    damaged = bytearray(folder.read(tars[1]))
    damaged[len(damaged) // 2] ^= 1
    folder.write(tars[1], bytes(damaged))
    lines = [problem.text for _, found in verify(folder) for problem in found]
    assert f"s3://sounds/set/{tars[1]}: its bytes have changed (sha256)" in lines
    assert all(tars[1] in line for line in lines)

    server.faults = lambda request: DENIED if part_of_tar(request) and tars[0] in request.path else None
    lines = [problem.text for _, found in verify(folder) for problem in found]
    assert any(f"{tars[0]}: can't be read (s3://sounds/set/{tars[0]} could not be read: access" in p for p in lines)


def test_tag_a_set_in_s3(server: Server, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    ids = [f"/m/{c:03d}" for c in range(3)]
    torch.manual_seed(0)
    info = ModelInfo("ERANN-2-1", "tagging", ids, ids, 44_100)
    save_model(open_folder(str(tmp_path / "m")), build_model("ERANN-2-1", 3), info, {}, "")
    tables = []
    for url, name in (("s3://sounds/set", "there"), (str(shards), "here")):
        result = tag_set(str(tmp_path / "m"), url, tmp_path / name, "none", 1, "cpu", lambda event: None)
        assert (result["clips"], result["shards"]) == (20, url)
        tables.append(pq.read_table(tmp_path / name))
    assert tables[0].equals(tables[1])
