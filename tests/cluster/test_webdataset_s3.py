"""WebDataset tars of others in S3: found, read by ranges, packed as from a disk, through faults."""

import gzip
from collections.abc import Iterator
from pathlib import Path

import pytest

from erann_dist.data.manifest import load_manifest
from erann_dist.errors import UsageError, UserError
from erann_dist.storage import s3
from shards.sources.tars import find_tars
from shards.sources.webdataset import read_webdataset
from tests.conftest import pack_here
from tests.shards.test_verify import foreign_tar, problems, sound
from tests.shards.test_webdataset import TAGS, about
from tests.support.commands import erann
from tests.support.s3 import DENIED, DROP, SLOW_DOWN, Server, always, once, s3_server


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tars of four clips: 2.6 MB a tar, as WAV."""
    folder = tmp_path_factory.mktemp("theirs")
    for tar in range(3):
        members: dict[str, bytes] = {}
        for i in range(4):
            tag = about(f"class {i % 2}")
            members |= {f"{tar}-{i}.wav": sound(7 + i / 10, 48_000, "WAV"), f"{tar}-{i}.json": tag}
        foreign_tar(folder / f"part{tar // 2}" / f"{tar:02d}.tar", members)
    return folder


@pytest.fixture
def server(audio: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(s3, "PAUSE_S", 0.005)
    with s3_server() as server:
        for path in audio.rglob("*.tar"):
            name = path.relative_to(audio).as_posix()
            server.client.put_object(Bucket=server.bucket, Key=f"theirs/{name}", Body=path.read_bytes())
        server.client.put_object(Bucket=server.bucket, Key="theirs/README.md", Body=b"hello")
        yield server


def test_patterns_name_the_same_tars_as_on_a_disk(audio: Path, server: Server) -> None:
    url = f"{server.bucket_url}/theirs"
    for pattern in ("", "/part*/*.tar", "/part{0,1}/*", "/part0/{00..01}.tar", "/part[1]/0?.tar", "/part1/02.tar"):
        found = find_tars(f"{url}{pattern}", server.endpoint)
        assert [tar.name for tar in found] == [tar.name for tar in find_tars(f"{audio}{pattern}")], pattern
        assert all(tar.url.startswith(f"{url}/part") for tar in found)
    for pattern in ("/nowhere/", "/part*.tar"):
        with pytest.raises(UsageError, match="no .tar"):
            find_tars(f"{url}{pattern}", server.endpoint)
    with pytest.raises(UsageError, match=r"s3://sounds/theirs/part0/05\.tar: no such file"):
        read_webdataset(f"{url}/part0/{{00,05}}.tar", TAGS, endpoint=server.endpoint)


def test_packed_as_from_a_disk(audio: Path, server: Server, tmp_path: Path) -> None:
    expected = pack_here(read_webdataset(str(audio), TAGS), tmp_path / "expected")
    server.requests.clear()
    source = read_webdataset(f"{server.bucket_url}/theirs", TAGS, endpoint=server.endpoint)
    ranges = [request.headers["range"].removeprefix("bytes=").split("-") for request in server.requests
              if request.operation == "GetObject"]  # fmt: skip
    read = sum(int(end) - int(start) + 1 for start, end in ranges)
    assert read < 0.6 * sum(path.stat().st_size for path in audio.rglob("*.tar"))  # headers and what is next to them
    server.faults = once(DROP, "GetObject")
    packed = pack_here(source, tmp_path / "packed")
    assert problems(packed) == []
    for path in expected.iterdir():
        assert (packed / path.name).read_bytes() == path.read_bytes(), path.name


def test_gzipped(audio: Path, server: Server, tmp_path: Path) -> None:
    data = gzip.compress((audio / "part0" / "00.tar").read_bytes(), 1)
    server.client.put_object(Bucket=server.bucket, Key="theirs/z.tar.gz", Body=data)
    source = read_webdataset(f"{server.bucket_url}/theirs/z.tar.gz", TAGS, endpoint=server.endpoint)
    keys = load_manifest(pack_here(source, tmp_path / "packed")).keys.to_pylist()
    assert sorted(keys) == [f"0-{i}" for i in range(4)]


def test_an_error_of_s3_is_no_clips_fault(server: Server, tmp_path: Path) -> None:
    source = read_webdataset(f"{server.bucket_url}/theirs", TAGS, endpoint=server.endpoint)
    server.faults = always(DENIED)
    with pytest.raises(UserError, match=r"s3://sounds/theirs/part\d/\d\d\.tar"):
        pack_here(source, tmp_path / "packed")
    with pytest.raises(UserError, match="s3://sounds/theirs"):
        read_webdataset(f"{server.bucket_url}/theirs", TAGS, endpoint=server.endpoint)


def test_tars_that_are_gone_are_reported(server: Server, tmp_path: Path) -> None:
    source = read_webdataset(f"{server.bucket_url}/theirs", TAGS, endpoint=server.endpoint)
    server.client.delete_object(Bucket=server.bucket, Key="theirs/part1/02.tar")
    manifest = load_manifest(pack_here(source, tmp_path / "packed"))
    assert sorted(manifest.keys.to_pylist()) == [f"{tar}-{i}" for tar in (0, 1) for i in range(4)]


def test_by_the_command(audio: Path, server: Server, tmp_path: Path) -> None:
    server.faults = once(SLOW_DOWN, "GetObject")
    pattern = f"{server.bucket_url}/theirs/part{{0,1}}/*.tar"
    common = ["pack", "webdataset", "--labels", "json:tag", "--clips-per-shard", 5]
    packed = erann(tmp_path, *common, "--tars", pattern, "--endpoint", server.endpoint, "--out", "packed")
    assert (packed["clips"], packed["tars"], packed["not_packed"]) == (12, 3, {})
    # From a disk it is the same set.
    assert erann(tmp_path, *common, "--tars", audio, "--out", "packed") == packed
    (tmp_path / "packed" / "webdataset-000001.tar").unlink()
    fixed = erann(tmp_path, "repair", "packed", "--tars", audio, "--labels", "json:tag")
    assert fixed["rebuilt"] == ["webdataset-000001.tar"]
