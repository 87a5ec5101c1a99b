"""Packing by the real command on a real Ray cluster: to a disk and to S3, disturbed in every way."""

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from erann_dist.storage.folder import open_folder
from shards.build import Plan
from shards.clip import Packing
from shards.sources.audioset import read_audioset
from tests.conftest import pack_here, write_tone_set
from tests.support.commands import ERANN, Running, erann
from tests.support.s3 import (
    DROP,
    EXPIRED,
    FLIP_STORED,
    INTERNAL_ERROR,
    SLOW_DOWN,
    TRUNCATE,
    Fault,
    Request,
    Server,
    s3_server,
    slow,
)

SOURCE = ["--segments", "set/tone_segments.csv", "--audio", "set/audio", "--classes", "set/classes.csv"]
CLIPS = 160  # long enough to be stopped on the way
PACK = ["pack", "audioset", *SOURCE, "--clips-per-shard", 8]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 160 tones, and `expected`: what packing makes of them in one process, undisturbed."""
    place = tmp_path_factory.mktemp("place")
    pack_here(read_audioset(*write_tone_set(place / "set", CLIPS)), place / "expected")
    return place


def digest(place: Path) -> str:
    """Under which the finished shards of PACK are noted."""
    root = place / "set"
    source = read_audioset(root / "tone_segments.csv", root / "audio", root / "classes.csv")
    return Plan(source, Packing(clips_per_shard=8), open_folder("any")).digest[:16]


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_packed_by_ray_as_by_one_process(place: Path) -> None:
    packed = erann(place, *PACK, "--out", "by-ray")
    assert (packed["clips"], packed["tars"], packed["not_packed"], packed["missing_share"]) == (CLIPS, 20, {}, 0)
    assert digests(place / "by-ray") == digests(place / "expected")
    before = {p.name: p.stat().st_mtime_ns for p in (place / "by-ray").iterdir()}
    assert erann(place, *PACK, "--out", "by-ray") == packed
    assert {p.name: p.stat().st_mtime_ns for p in (place / "by-ray").iterdir()} == before


def test_packed_on_a_cluster_of_several_nodes(place: Path) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        cluster.add_node(num_cpus=1)
        erann(place, *PACK, "--out", "by-nodes", "--address", cluster.address)
    finally:
        cluster.shutdown()
    assert digests(place / "by-nodes") == digests(place / "expected")


@pytest.mark.parametrize("how", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL])
def test_stopped_and_run_again(place: Path, killed: list[Running], how: signal.Signals) -> None:
    out = f"stopped-{how.name}"
    running = Running(place, *PACK, "--out", out)
    running.wait_for(place / out / ".pack" / digest(place) / "000000.parquet")
    code = running.end(how)
    assert running.survivors(agents=how != signal.SIGKILL) == []
    killed.append(running)
    assert not (place / out / "manifest.parquet").exists()
    if how == signal.SIGINT:
        assert code == 130
        assert "run the same command again to resume" in running.text()
        assert "Traceback" not in running.text()
    erann(place, *PACK, "--out", out)
    assert digests(place / out) == digests(place / "expected")


def test_a_worker_that_is_killed_is_started_again(place: Path) -> None:
    running = Running(place, *PACK, "--out", "worker-killed")
    running.wait_for(place / "worker-killed" / ".pack" / "plan")
    killed = None
    while killed is None and running.process.poll() is None:
        for process in psutil.Process(running.process.pid).children(recursive=True):
            with suppress(psutil.Error):  # one that has just ended
                if "ray::_build" in " ".join(process.cmdline()):
                    process.kill()
                    killed = process.pid
                    break
        time.sleep(0.01)
    assert killed
    assert running.process.wait(timeout=120) == 0, running.text()
    assert digests(place / "worker-killed") == digests(place / "expected")


def test_missing_clips_and_the_share_that_is_allowed(place: Path, tmp_path: Path) -> None:
    segments, audio, classes = write_tone_set(tmp_path / "set", 20)
    for clip in sorted(audio.iterdir())[:5]:
        clip.unlink()
    (audio / "00000000007.wav").write_text("no sound")
    pack = ["pack", "audioset", "--segments", segments, "--audio", audio, "--classes", classes, "--out", "out"]
    packed = erann(tmp_path, *pack, "--max-missing", 0.3)
    assert (packed["clips"], packed["not_packed"], packed["missing_share"]) == (
        14,
        {"missing": 5, "unreadable": 1},
        0.3,
    )
    done = subprocess.run(
        [*ERANN, *map(str, pack), "--max-missing", "0.29", "--json"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert json.loads(done.stdout) == packed
    assert done.stderr.strip().splitlines()[-1].startswith("erann: out: 30.0% of the listed clips are not in it")
    page = subprocess.run([*ERANN, *map(str, pack)], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "not packed: 5 missing, 1 unreadable (30.0% of the listed clips)" in page


def test_repair_by_the_command(place: Path) -> None:
    subprocess.run(["cp", "-r", "expected", "damaged"], cwd=place, check=True)
    tar = place / "damaged" / "audioset-000003.tar"
    tar.write_bytes(tar.read_bytes()[:-5000])
    line = erann(place, "verify", "damaged", code=1)
    assert line == "erann: damaged: 1 problem; erann repair rebuilds the affected shards"
    assert erann(place, "repair", "damaged", *SOURCE) == {"shards": "damaged", "rebuilt": ["audioset-000003.tar"]}
    assert digests(place / "damaged") == digests(place / "expected")
    assert erann(place, "verify", "damaged")["clips"] == CLIPS
    (next((place / "set" / "audio").iterdir())).touch()
    tar.unlink()
    clip = json.loads(
        subprocess.run(
            ["tar", "xOf", place / "expected" / tar.name, "--wildcards", "*.json"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.partition("}")[0]
        + "}"
    )
    sound = place / "set" / "audio" / clip["source"]
    kept = sound.read_bytes()
    try:
        sound.write_bytes(b"gone bad")
        line = erann(place, "repair", "damaged", *SOURCE, code=1)
    finally:
        sound.write_bytes(kept)
    assert line == "erann: damaged: 1 shards and 0 other problems could not be repaired"
    assert not tar.exists()


# S3: the bucket is on a server of its own behind a proxy that injects faults (tests/support/s3.py).


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_server() as server:
        yield server


def stored(server: Server, prefix: str) -> dict[str, str]:
    folder = open_folder(f"{server.bucket_url}/{prefix}", server.endpoint)
    return {name: hashlib.sha256(folder.read(name)).hexdigest() for name in folder.sizes()}


def to_s3(server: Server, prefix: str) -> list[Any]:
    return [*PACK, "--out", f"{server.bucket_url}/{prefix}", "--endpoint", server.endpoint]


def now_and_then(*faults: Fault) -> Callable[[Request], Fault | None]:
    """Each fault in turn meets every fourth request, whatever it is."""

    def decide(request: Request) -> Fault | None:
        return faults[request.nth // 4 % len(faults)] if request.nth % 4 == 3 else None

    return decide


def test_packed_into_s3_through_faults(place: Path, server: Server) -> None:
    server.empty()
    server.faults = now_and_then(INTERNAL_ERROR, SLOW_DOWN, DROP, TRUNCATE, slow(1.0), FLIP_STORED)
    packed = erann(place, *to_s3(server, "through"))
    assert packed["clips"] == CLIPS
    server.faults = lambda request: None
    assert stored(server, "through") == digests(place / "expected")
    assert server.unfinished() == []
    url = f"{server.bucket_url}/through"
    assert erann(place, "verify", url, "--endpoint", server.endpoint)["clips"] == CLIPS
    puts = server.count("PutObject")
    assert erann(place, *to_s3(server, "through")) == packed
    assert server.count("PutObject") == puts  # a finished set is left as it is
    assert erann(place, "stats", url, "--endpoint", server.endpoint)["clips"] == CLIPS


@pytest.mark.slow
def test_credentials_that_expire_on_the_way(place: Path, server: Server) -> None:
    server.empty()
    tars: list[str] = []

    def expire_after_two_tars(request: Request) -> Fault | None:
        if request.operation == "PutObject" and request.path.endswith(".tar"):
            tars.append(request.path)
        return EXPIRED if len(tars) > 2 else None

    server.faults = expire_after_two_tars
    line = erann(place, *to_s3(server, "expired"), code=1)
    assert line.startswith(f"erann: {server.bucket_url}/expired/")
    assert "the credentials have expired: renew them and run the same command again" in line
    there = [name for name in stored_names(server, "expired") if name.endswith(".tar")]
    assert 1 <= len(there) <= 2
    assert "manifest.parquet" not in stored_names(server, "expired")
    server.faults = lambda request: None
    server.requests.clear()
    erann(place, *to_s3(server, "expired"))
    assert stored(server, "expired") == digests(place / "expected")
    written_again = {request.path.rpartition("/")[2] for request in server.requests if request.operation == "PutObject"}
    assert len(written_again & set(there)) <= 1  # at most one whose note was not written any more


def stored_names(server: Server, prefix: str) -> list[str]:
    answer = server.client.list_objects_v2(Bucket=server.bucket, Prefix=f"{prefix}/")
    return [each["Key"].removeprefix(f"{prefix}/") for each in answer.get("Contents", ())]


def test_killed_in_an_upload_of_many_parts(server: Server, killed: list[Running], tmp_path: Path) -> None:
    """The incomplete upload is aborted by the next run, which ends with the same bytes."""
    segments, audio, classes = write_tone_set(tmp_path / "set", 48, seconds=10.0)
    pack = ["pack", "audioset", "--segments", segments, "--audio", audio, "--classes", classes, "--codec", "wav"]
    erann(tmp_path, *pack, "--out", "local")
    server.empty()
    server.faults = lambda request: slow(20.0) if request.operation == "UploadPart" else None
    out = ["--out", f"{server.bucket_url}/parts", "--endpoint", server.endpoint]
    running = Running(tmp_path, *pack, *out)
    deadline = time.monotonic() + 120
    while not server.count("UploadPart"):
        assert time.monotonic() < deadline, running.text()
        running._watch()
        time.sleep(0.1)
    running.end(signal.SIGKILL)
    assert running.survivors(agents=False) == []
    killed.append(running)
    assert server.unfinished() == ["parts/audioset-000000.tar"]
    server.faults = lambda request: None
    erann(tmp_path, *pack, *out)
    assert server.unfinished() == []
    assert stored(server, "parts") == digests(tmp_path / "local")
    assert server.count("AbortMultipartUpload") >= 1


def test_no_secret_in_what_is_written(place: Path, server: Server) -> None:
    secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    for each in server.client.list_objects_v2(Bucket=server.bucket).get("Contents", ()):
        assert secret not in (server.stored(each["Key"]) or b"")


@pytest.mark.slow
def test_the_benchmarks_run(place: Path) -> None:
    packed = erann(place, "bench", "pack", "--audio", "set/audio", "--clips", 16, "--clips-per-shard", 4, "--rounds", 1)
    assert packed["ratio_to_bare"] == packed["ratios"][0] > 0
    text = (place / "set" / "tone_segments.csv").read_text().replace("/m/000", "/m/09x0r").replace("/m/001", "/m/09x0r")
    (place / "list_segments.csv").write_text(text.replace("/m/002", "/m/05zppz"))
    planned = erann(place, "bench", "plan", "list_segments.csv", "--missing", 0.01)
    assert (planned["rows"], planned["files"], planned["clips"]) == (CLIPS, CLIPS - 10, CLIPS - 10)
