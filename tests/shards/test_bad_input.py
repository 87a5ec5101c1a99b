"""Files as they should not be: each costs at most itself, and is named with its reason."""

import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import soundfile

from erann_dist.data.audio import DecodeError, decode
from erann_dist.data.manifest import MANIFEST, REPORT
from erann_dist.errors import UserError
from shards import packer
from shards.clip import REASONS, Packing, Rejected, pack_clip
from shards.packer import RowsToPack, end_tar, pack_rows
from shards.sources.folder import read_folder, read_listed_folder
from shards.sources.rows import SourceRow
from tests.conftest import pack_here

RATE = 44_100


def good(path: Path, seconds: float = 1.0, rate: int = RATE, channels: int = 1, **options: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sound = 0.3 * np.sin(np.arange(round(rate * seconds)) / 20)
    soundfile.write(path, np.repeat(sound[:, None], channels, 1), rate, **options)
    return path


def outcomes(folder: Path) -> tuple[dict[str, float], dict[str, tuple[str, str]]]:
    """Seconds of the clips, reason and detail of the others, by source."""
    clips = {clip["source"]: clip["samples"] / RATE for clip in pq.read_table(folder / MANIFEST).to_pylist()}
    report = {r["source"]: (r["reason"], r["detail"]) for r in pq.read_table(folder / REPORT).to_pylist()}
    return clips, report


def test_a_folder_of_horrors(tmp_path: Path) -> None:
    horrors = tmp_path / "set" / "horrors"
    good(tmp_path / "set" / "fine" / "ok.wav")
    good(horrors / "wide.wav", rate=96_000, channels=8)
    good(horrors / "short.wav", seconds=0.01)
    good(horrors / "twin.wav"), good(horrors / "twin.flac"), good(horrors / "twin.ogg")
    (horrors / "zero.wav").touch()
    (horrors / "one.mp3").write_bytes(b"\xff")
    (horrors / "folder.wav").mkdir()
    (horrors / "text.flac").write_text("not found\n" * 99)
    (horrors / "dangling.wav").symlink_to(horrors / "nowhere")
    os.mkfifo(horrors / "pipe.wav")
    (horrors / "script.wav").write_text(f"ffconcat version 1.0\nfile '{tmp_path}/set/fine/ok.wav'\n")
    (horrors / "playlist.mp3").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1,\n{tmp_path}/set/fine/ok.wav\n"
    )
    soundfile.write(horrors / "nan.wav", np.array([0.1, np.nan] * RATE), RATE, subtype="FLOAT")
    soundfile.write(horrors / "inf.wav", np.array([0.1, np.inf] * RATE), RATE, subtype="FLOAT")
    latin = os.fsencode(horrors) + b"/caf\xe9.wav"
    os.rename(good(horrors / "cafe.wav"), latin)
    huge = bytearray(good(horrors / "huge.flac").read_bytes())
    huge[21] |= 0x0F
    huge[22:26] = b"\xff\xff\xff\xff"  # 2^36 - 1 samples, the most that a FLAC can claim
    (horrors / "huge.flac").write_bytes(huge)
    rf64 = b"RF64\xff\xff\xff\xffWAVEds64" + (28).to_bytes(4, "little") + (1 << 42).to_bytes(8, "little")
    rf64 += (1 << 41).to_bytes(8, "little") + (1 << 40).to_bytes(8, "little") + bytes(4)
    wav = io.BytesIO()
    soundfile.write(wav, np.zeros(RATE) + 0.1, RATE, format="WAV")
    (horrors / "claims.wav").write_bytes(rf64 + wav.getvalue()[12:40] + b"\xff\xff\xff\xff" + wav.getvalue()[44:])

    clips, report = outcomes(pack_here(read_folder(tmp_path / "set"), tmp_path / "shards"))
    assert clips == {
        f"{name}": pytest.approx(1.0, abs=1e-3)
        for name in (
            "fine/ok.wav",
            "horrors/wide.wav",
            "horrors/twin.flac",
            "horrors/caf\\xe9.wav",
            "horrors/huge.flac",
            "horrors/claims.wav",
        )
    }
    assert {name.removeprefix("horrors/"): reason for name, (reason, _) in report.items()} == {
        "short.wav": "too short",
        "twin.wav": "duplicate",
        "twin.ogg": "duplicate",
        "zero.wav": "empty",
        "one.mp3": "unreadable",
        "folder.wav": "unreadable",
        "text.flac": "unreadable",
        "dangling.wav": "missing",
        "pipe.wav": "unreadable",
        "script.wav": "unreadable",
        "playlist.mp3": "unreadable",
        "nan.wav": "unreadable",
        "inf.wav": "unreadable",
    }
    assert report["horrors/folder.wav"][1] == "a folder"
    assert report["horrors/pipe.wav"][1] == "not a regular file"
    assert report["horrors/zero.wav"][1] == "0 bytes"
    assert all(detail and "\n" not in detail for _, detail in report.values())


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    good(tmp_path / "c" / "a.wav").chmod(0)
    good(tmp_path / "c" / "b.wav")
    # Even root can't read a process's memory where nothing is; as no file has size 0 here, it is a member of a "tar".
    nobody = SourceRow("m", [0], b"/proc/self/mem", "mem", offset=0, size=100)
    with (tmp_path / "x").open("w+b") as file, pytest.raises(Rejected, match="unreadable"):
        pack_clip(nobody, Packing(), file)
    if os.geteuid():
        _, report = outcomes(pack_here(read_folder(tmp_path), tmp_path / "shards"))
        assert report == {"c/a.wav": ("unreadable", "Permission denied")}


def test_a_listed_path_that_leads_nowhere(tmp_path: Path) -> None:
    good(tmp_path / "a.wav")
    (tmp_path / "labels.csv").write_text("path,labels\na.wav,x\ngone.wav,x\n")
    clips, report = outcomes(pack_here(read_listed_folder(tmp_path, tmp_path / "labels.csv"), tmp_path / "shards"))
    assert (list(clips), report) == (["a.wav"], {"gone.wav": ("missing", "no such file")})


def packing_processes() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "shards.packer" in " ".join(of_living(p.cmdline))]


def of_living(facts: Callable[[], list[Any]]) -> list[Any]:
    """What psutil tells of a process that may end meanwhile."""
    try:
        return facts()
    except psutil.Error:
        return []


def interrupted(tmp_path: Path, times: int, interrupt: Callable[[psutil.Process], None]) -> list[dict[str, Any]]:
    """What becomes of four clips, when the process is disturbed so many times in the second one, which is long."""
    ok, long = good(tmp_path / "ok.wav"), good(tmp_path / "long.wav", seconds=3600, rate=8000)
    names = [("a", ok), ("b", long), ("c", ok), ("d", ok)]
    rows = [SourceRow(key, [0], os.fsencode(path), path.name) for key, path in names]
    seen: set[int] = set()
    done = threading.Event()

    def disturb() -> None:
        while len(seen) < times and not done.is_set():
            for process in packing_processes():
                if process.pid not in seen and str(long) in [file.path for file in of_living(process.open_files)]:
                    seen.add(process.pid)
                    with suppress(psutil.Error):
                        interrupt(process)
            time.sleep(0.01)

    watcher = threading.Thread(target=disturb)
    with (tmp_path / "x.tar").open("w+b") as file:
        watcher.start()
        outcomes = list(pack_rows(file, RowsToPack(rows, ["label"], Packing())))
        end_tar(file)
    done.set()
    watcher.join()
    assert len(seen) == times
    assert not packing_processes()
    with tarfile.open(tmp_path / "x.tar") as tar:
        members = {member.name: (member.offset_data, member.size) for member in tar}
    packed = {f"{o['key']}.flac": (o["offset"], o["size"]) for o in outcomes if "size" in o}
    assert {name: place for name, place in members.items() if name.endswith("flac")} == packed
    return outcomes


@pytest.mark.parametrize("how", [signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT])
def test_a_decoder_that_dies_costs_that_clip_only(tmp_path: Path, how: signal.Signals) -> None:
    """The process is ended from outside in the middle of a clip, twice, by the signals that a crash would send."""
    outcomes = interrupted(tmp_path, 2, lambda process: process.send_signal(how))
    assert [(o["key"], o.get("reason"), o.get("detail")) for o in outcomes] == [
        ("a", None, None),
        ("b", "unreadable", f"the file ended the decoder: {how.name}"),
        ("c", None, None),
        ("d", None, None),
    ]


def test_a_process_that_is_killed_once_costs_no_clip(tmp_path: Path) -> None:
    outcomes = interrupted(tmp_path, 1, psutil.Process.kill)
    assert [(o["key"], o.get("reason")) for o in outcomes] == [(key, None) for key in "abcd"]


def test_a_decoder_that_stands_still_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.packer._PATIENCE_SECONDS", 1.0)
    outcomes = interrupted(tmp_path, 2, psutil.Process.suspend)
    assert [o.get("detail") for o in outcomes] == [None, "the decoder made no progress for 1 s", None, None]


def test_a_full_disk_ends_the_shard_and_blames_no_clip(tmp_path: Path) -> None:
    ok = good(tmp_path / "ok.wav", seconds=5)
    with open("/dev/full", "r+b", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        list(pack_rows(file, RowsToPack([SourceRow("a", [0], os.fsencode(ok), "ok")], ["label"], Packing())))
    assert not packing_processes()


def test_a_full_scratch_disk_is_not_the_clips_fault(tmp_path: Path) -> None:
    for seconds in (5, 60):  # one block, and several
        ok = good(tmp_path / "ok.wav", seconds)
        with open("/dev/full", "r+b", buffering=0) as full, pytest.raises(OSError, match="No space left"):
            pack_clip(SourceRow("a", [0], os.fsencode(ok), "ok"), Packing(), NoTruncate(full))


class NoTruncate:
    """/dev/full can't be truncated, as a file on a full disk can."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def truncate(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def test_a_folder_that_is_gone_ends_the_shard(tmp_path: Path) -> None:
    row = SourceRow("a", [0], os.fsencode(tmp_path / "unmounted" / "a.wav"), "a.wav")
    with (tmp_path / "x").open("w+b") as file, pytest.raises(FileNotFoundError, match="is its disk mounted"):
        list(pack_rows(file, RowsToPack([row], ["label"], Packing())))


def test_a_wav_in_a_tar_that_can_not_be_read_to_its_end(tmp_path: Path) -> None:
    """libsndfile takes an error of the file below it for the end."""
    data = good(tmp_path / "x.wav", seconds=10).read_bytes()

    class Failing(io.BytesIO):
        def readinto(self, buffer: Any) -> int:
            if self.tell() > 300_000:
                raise OSError(5, "Input/output error")
            return super().readinto(buffer)

        def read(self, size: int = -1) -> bytes:
            if self.tell() > 300_000:
                raise OSError(5, "Input/output error")
            return super().read(size)

    with pytest.raises(DecodeError, match="libsndfile: .*Input/output error; FFmpeg: "):
        decode(Failing(data), list)


def test_stopping_early_leaves_no_process(tmp_path: Path) -> None:
    long = good(tmp_path / "long.wav", seconds=3600, rate=8000)
    rows = [SourceRow(str(i), [0], os.fsencode(path), "x") for i, path in enumerate((good(tmp_path / "ok.wav"), long))]
    with (tmp_path / "x.tar").open("w+b") as file:
        outcomes = pack_rows(file, RowsToPack(rows, ["label"], Packing()))
        next(outcomes)
        assert packing_processes()
        outcomes.close()
        assert not packing_processes()


@pytest.mark.slow
def test_three_hours_take_no_more_memory_than_a_minute(tmp_path: Path) -> None:
    def peak_memory(name: str, minutes: float) -> float:
        seconds = round(60 * minutes)
        noise = (np.random.default_rng(0).standard_normal(8000) * 3000).astype(np.int16)
        with soundfile.SoundFile(tmp_path / name, "w", 8000, 1, format="WAV", subtype="PCM_U8") as file:
            for _ in range(seconds):
                file.write(noise)
        script = f"""
import os, resource, sys, tempfile
from shards.clip import Packing, pack_clip
from shards.sources.rows import SourceRow
with tempfile.TemporaryFile(buffering=0) as file:
    packed = pack_clip(SourceRow("k", [0], {os.fsencode(tmp_path / name)!r}, "x"), Packing(), file)
print(packed.samples, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
        done = subprocess.run(
            [sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]
        )
        samples, megabytes = done.stdout.split()
        assert int(samples) == seconds * RATE
        return float(megabytes)

    # As int16 three hours at 44.1 kHz are 950 MB, as float 1.9 GB.
    assert peak_memory("long.wav", 180) < peak_memory("short.wav", 1) + 100


def mutations(data: bytes, count: int, seed: int) -> list[bytes]:
    """Bit flips, most of them in the first kilobyte, truncations, stretches of zeros, a stretch twice."""
    rng = np.random.default_rng(seed)
    mutants = []
    for i in range(count):
        mutant = bytearray(data)
        kind = i % 4
        if kind in (0, 1):
            for _ in range(int(rng.integers(1, 20))):
                place = int(rng.integers(min(len(data), 1024) if kind == 0 else len(data)))
                mutant[place] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            mutant = mutant[: int(rng.integers(len(data)))]
        else:
            place, length = int(rng.integers(len(data))), int(rng.integers(1, 4096))
            mutant[place : place + length] = bytes(length) if i % 8 == 3 else mutant[place : place + length] * 2
        mutants.append(bytes(mutant))
    return mutants


def test_mutated_files_are_packed_or_reported(real_data: Path, tmp_path: Path) -> None:
    originals = [
        "pydub/test/data/test5.webm",
        "pydub/test/data/tessst.mp3",
        "pydub/test/data/bach.ogg",
        "pydub/test/data/format_test.m4a",
        "lhotse/test/fixtures/stereo.opus",
        "lhotse/test/fixtures/stereo.wav",
        "lhotse/test/fixtures/stereo.sph",
        "flac-test-files/subset/60 - mono audio.flac",
        "flac-test-files/subset/38 - 3 channels (3.0).flac",
        "torchcodec/test/resources/nasa_13013.mp4.audio.mp3",
    ]
    count = 0
    for name in originals:
        path = real_data / "formats" / name
        for i, data in enumerate(mutations(path.read_bytes(), 32, seed=len(name))):
            (tmp_path / "set" / "m").mkdir(parents=True, exist_ok=True)
            (tmp_path / "set" / "m" / f"{path.stem}-{i:02d}{path.suffix}").write_bytes(data)
            count += 1
    good(tmp_path / "set" / "m" / "witness.wav")
    assert count >= 300
    folder = pack_here(read_folder(tmp_path / "set"), tmp_path / "shards", clips_per_shard=400)
    clips, report = outcomes(folder)
    assert len(clips) + len(report) == count + 1
    assert clips["m/witness.wav"] == 1.0
    assert {reason for reason, _ in report.values()} <= set(REASONS)
    assert len(report) > 20  # the mutations do harm
    assert len(clips) > 100  # and not everywhere
    assert not packing_processes()


@pytest.mark.parametrize("fault", [TypeError("no such argument"), AttributeError("gone"), ImportError("no av")])
def test_a_fault_of_the_program_is_not_a_clips(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: Exception
) -> None:
    """Such as a library's new version that takes other arguments: all clips would be filed as unreadable."""

    def fail(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr(packer, "pack_clip", fail)
    row = SourceRow(key="a", labels=[0], path=b"a.wav", source="a.wav")
    work = packer.RowsToPack([row], ["c"], Packing())
    with (tmp_path / "x.tar").open("w+b") as file, pytest.raises(UserError, match="bug in the program") as refused:
        packer._pack_row(row, work, file, Pipe()[0])
    assert f"a.wav: {type(fault).__name__}: {fault}, in test_bad_input.py:" in str(refused.value)
