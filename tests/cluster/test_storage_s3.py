"""Clips read from S3, through faults, and through the node's cache: right, or one clear line."""

import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from erann_dist.data import loader
from erann_dist.data.cache import ClipCache
from erann_dist.data.clip_reader import ReadStats
from erann_dist.data.loader import BadClips, Crops, Loader, random_crops
from erann_dist.data.manifest import Manifest, load_manifest
from erann_dist.data.sampling import BalancedSampler, class_lists
from erann_dist.errors import UserError
from erann_dist.log.run_log import read_log
from erann_dist.recipe import Recipe
from erann_dist.storage import s3, s3_ranges, slow_reads
from erann_dist.storage.folder import LocalFolder
from erann_dist.storage.s3 import S3Folder
from erann_dist.storage.s3_ranges import S3_REQUESTS
from shards.sources.audioset import read_audioset
from tests.conftest import pack_here, small_recipe, write_tone_set
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
    always,
    put_set,
    s3_server,
    slow,
)
from tests.support.workers import train_alone

CROP = 22_050


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tones")
    return pack_here(read_audioset(*write_tone_set(root, 40)), root / "shards")


@pytest.fixture
def server(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """S3 with the shard set in it."""
    monkeypatch.setattr(s3, "PAUSE_S", 0.005)
    monkeypatch.setattr(s3_ranges, "REQUEST_S", 2.0)
    with s3_server() as server:
        put_set(server, shards)
        yield server


def remote(server: Server) -> Manifest:
    return load_manifest(f"{server.bucket_url}/set", server.endpoint)


def crops_of(manifest: Manifest, steps: int = 6) -> list[Crops]:
    sampler = BalancedSampler(class_lists(manifest.label_values, manifest.label_offsets, 3), 5)
    blocks = np.arange(16 * steps).reshape(steps, 16)
    return [random_crops(manifest, sampler.draw(positions), positions, 5, CROP) for positions in blocks]


def samples(manifest: Manifest, cache: ClipCache | None = None, **options: object) -> torch.Tensor:
    batches = Loader(manifest, crops_of(manifest), threads=2, cache=cache, **options)
    return torch.stack([batch.pcm for batch in batches])


def test_the_same_samples_as_from_disk(server: Server, shards: Path) -> None:
    assert torch.equal(samples(remote(server)), samples(load_manifest(shards)))
    clips = [request for request in server.requests if request.path.endswith(".tar") and request.method == "GET"]
    assert len(clips) == 96
    assert all("aws-sdk-cpp" in request.headers["user-agent"] for request in clips)  # the faster one of the clients


@pytest.mark.parametrize(
    "fault", [DROP, TRUNCATE, SHORT, FLIP_ANSWER, INTERNAL_ERROR, SLOW_DOWN], ids=lambda f: f.kind + f.code
)
def test_every_third_request_fails(server: Server, shards: Path, fault: Fault) -> None:
    manifest = remote(server)

    # A flipped bit is asked for once more, with If-Match; the others several times.
    def faults(request: Request) -> Fault | None:
        last_try = fault == FLIP_ANSWER and "if-match" in request.headers
        return fault if request.method == "GET" and request.nth % 3 == 0 and not last_try else None

    server.faults = faults
    assert torch.equal(samples(manifest), samples(load_manifest(shards)))


def test_an_outage_is_waited_for(server: Server, shards: Path) -> None:
    manifest = remote(server)
    over = threading.Event()
    threading.Timer(0.5, over.set).start()
    server.faults = lambda request: None if over.is_set() else INTERNAL_ERROR
    assert torch.equal(samples(manifest), samples(load_manifest(shards)))


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (INTERNAL_ERROR, r"audioset-00000\d.tar could not be read: S3 can't do it now: .*9 times in a row"),
        (DENIED, r"audioset-00000\d.tar could not be read: access denied"),
        (SHORT, r"audioset-00000\d.tar could not be read: no answer, or one cut short"),
    ],
    ids=lambda x: x.kind + x.code if isinstance(x, Fault) else "",
)
def test_what_lasts_is_one_line(server: Server, fault: Fault, line: str) -> None:
    manifest = remote(server)
    samples(manifest)  # every tar is open

    def faults(request: Request) -> Fault | None:
        return fault if request.path.endswith(".tar") and request.method == "GET" else None

    server.faults = faults
    with pytest.raises(UserError, match=line):
        samples(manifest)


def test_a_flipped_bit_that_lasts_is_a_bad_clip(server: Server) -> None:
    manifest = remote(server)
    server.faults = always(FLIP_ANSWER, "GetObject")
    with pytest.raises(UserError, match=r"audioset-00000\d.tar: clip \w+ is damaged"):
        samples(manifest)


def test_a_tar_of_another_size_and_a_missing_one(server: Server) -> None:
    manifest = remote(server)
    folder = manifest.tars[2].folder
    folder.write("audioset-000002.tar", folder.read("audioset-000002.tar") + b"more")
    with pytest.raises(UserError, match="audioset-000002.tar: .* it was truncated or replaced"):
        samples(manifest)
    folder.delete("audioset-000002.tar")
    with pytest.raises(UserError, match="audioset-000002.tar: No such file"):
        samples(manifest)


@pytest.mark.parametrize("longer", [0, 1000])
def test_a_tar_that_is_replaced_in_mid_run(server: Server, longer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another object of the same size or of another: never data."""
    monkeypatch.setattr(loader, "FETCH_AHEAD_BYTES", 1)  # else all clips are there already
    manifest = remote(server)
    batches = Loader(manifest, crops_of(manifest, 40), threads=2, ahead_bytes=1)
    next(batches)
    for number in range(5):
        name = f"audioset-{number:06d}.tar"
        data = manifest.tars[0].folder.read(name)
        manifest.tars[0].folder.write(name, bytes(byte ^ 1 for byte in data) + bytes(longer))
    with pytest.raises(UserError, match=r"tar could not be read: it is no longer the object that this run began with"):
        list(batches)


def test_a_tar_that_is_another_of_the_same_size_is_never_data(server: Server) -> None:
    manifest = remote(server)
    for tar in manifest.tars:
        tar.folder.write(tar.name, bytes(tar.size))
    with pytest.raises(UserError, match=r"^s3://sounds/set/audioset-00000\d.tar: clip \w+ is damaged; check .* verify"):
        samples(manifest)


@pytest.mark.parametrize("form", ["flac", "pcm"])
def test_the_cache_takes_the_place_of_s3(server: Server, shards: Path, tmp_path: Path, form: str) -> None:
    manifest, expected = remote(server), samples(load_manifest(shards))
    read = ReadStats()
    cache = ClipCache(tmp_path / "cache", 64 << 20, form)
    assert torch.equal(samples(manifest, cache, stats=read), expected)
    assert read.counts["clips_origin"] >= 40 > 0
    assert read.counts["clips_origin"] + read.counts["clips_cache"] == 96
    server.faults = always(DENIED)
    again = ReadStats()
    assert torch.equal(samples(manifest, ClipCache(tmp_path / "cache", 64 << 20, form), stats=again), expected)
    assert again.counts["clips_cache"] == 96
    assert again.counts["clips_origin"] == 0
    # A cache that is spoiled is filled again from S3.
    server.faults = lambda request: None
    for path in (tmp_path / "cache").glob("slab-*"):
        path.write_bytes(bytes(byte ^ 255 for byte in path.read_bytes()))
    third = ReadStats()
    assert torch.equal(samples(manifest, ClipCache(tmp_path / "cache", 64 << 20, form), stats=third), expected)
    assert third.counts["clips_origin"] >= 40
    shutil.rmtree(tmp_path / "cache")


def test_a_cache_without_room_is_no_harm(server: Server, shards: Path, tmp_path: Path) -> None:
    cache = ClipCache(tmp_path / "cache", 600_000)
    assert torch.equal(samples(remote(server), cache, bad_clips=BadClips()), samples(load_manifest(shards)))
    assert cache.problem is not None


@pytest.fixture
def run(server: Server, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A training run from S3; the same from disk has ended in `local`."""
    train_alone(small_recipe(shards, tmp_path / "local"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    return small_recipe(Path("set"), tmp_path / "remote", data=dict.fromkeys(("train", "eval"), "s3://sounds/set"))


def assert_ended_as_local(run: Recipe) -> None:
    expected, found = (
        load_file(Path(run.run_url).parent / name / "model/model.safetensors") for name in ("local", "remote")
    )
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_training_waits_for_an_outage_to_end_and_ends_as_from_disk(server: Server, run: Recipe) -> None:
    asked = []

    def faults(request: Request) -> Fault | None:
        """After twenty ranges have been read, S3 can't do anything for the next thirty requests."""
        asked.append(request)
        reads = [each for each in asked if each.path.endswith(".tar") and each.method == "GET"]
        return INTERNAL_ERROR if 20 < len(reads) <= 50 else None

    server.faults = faults
    train_alone(run)
    assert len([each for each in asked if each.path.endswith(".tar") and each.method == "GET"]) > 50
    assert_ended_as_local(run)


def test_training_ends_in_a_line_when_the_outage_lasts_and_goes_on_afterwards(
    server: Server, run: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PATIENT_ATTEMPTS", 3)
    server.faults = lambda request: INTERNAL_ERROR if request.path.endswith(".tar") else None
    with pytest.raises(UserError) as error:
        train_alone(run)
    assert re.fullmatch(
        r"s3://sounds/set/audioset-00000\d.tar could not be read: "
        r"S3 can't do it now: try again later \((InternalError|500), 3 times in a row\)",
        str(error.value),
    )
    server.faults = lambda request: None
    train_alone(run)
    assert_ended_as_local(run)


def test_that_s3_is_read_the_slow_way_is_told_once(
    server: Server, run: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slow_reads, "_SLOW_AT_LEAST", 10)
    server.faults = lambda request: DENIED if "aws-sdk-cpp" in request.headers["user-agent"] else None
    train_alone(run)
    incidents = [line for line in read_log(LocalFolder(run.run_url)) if line["event"] == "Incident"]
    assert [line["kind"] for line in incidents] == ["storage"]
    assert_ended_as_local(run)


def test_what_is_asked_for_twice_before_it_comes_is_kept_once(server: Server, tmp_path: Path) -> None:
    manifest = remote(server)
    rows = np.repeat(np.arange(8), 4)
    with closing(ClipCache(tmp_path, 1 << 30)) as cache:
        for _ in range(2):
            list(Loader(manifest, [random_crops(manifest, rows, rows, 0, CROP)], threads=2, cache=cache))
    kept = sum(path.stat().st_size for path in tmp_path.glob("slab-*"))
    assert kept <= int(manifest.sizes[:8].sum()) * 2  # one record each, and one more if both threads were at it at once


def test_closing_in_an_outage_does_not_wait_for_its_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PAUSE_S", 60.0)
    monkeypatch.setattr(s3, "LONGEST_PAUSE_S", 60.0)
    monkeypatch.setattr(s3, "PATIENT_S", 90.0)
    manifest = remote(server)
    batches = Loader(manifest, crops_of(manifest, 40), threads=2, ahead_bytes=1)
    next(batches)
    server.faults = lambda request: INTERNAL_ERROR if request.path.endswith(".tar") else None
    time.sleep(0.5)  # till requests have failed
    deadline = time.monotonic() + 25  # the first pause is 30 s at the least
    batches.close()
    assert time.monotonic() < deadline


def test_a_size_that_can_not_be_had_is_asked_for_by_one_thread(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others that wait for the same tar do not each begin anew."""
    manifest = remote(server)
    asked = []

    def refuse(self: S3Folder, name: str, stop: object) -> tuple[int, str]:
        asked.append(name)
        raise UserError(f"{name} could not be read")

    monkeypatch.setattr(S3Folder, "size_and_version", refuse)
    with pytest.raises(UserError, match="could not be read"):
        list(Loader(manifest, crops_of(manifest), threads=2))
    assert len(asked) == len(set(asked))


def test_many_requests_run_at_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_ranges, "REQUEST_S", 60.0)
    manifest = remote(server)
    came: list[float] = []

    def answer_late(request: Request) -> Fault | None:
        if "range" not in request.headers:
            return None
        came.append(time.monotonic())
        return slow(5.0)

    server.faults = answer_late
    list(Loader(manifest, crops_of(manifest, 2), threads=2))
    assert sum(moment < came[0] + 5 for moment in came) > S3_REQUESTS // 2  # before the first answer
