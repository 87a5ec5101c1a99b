"""Recordings of any length: windows in batches, events, tables; the commands tag and embed."""

import csv
import json
import tracemalloc
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from erann_dist.errors import UsageError, UserError
from erann_dist.models.log_mel import LogMel
from erann_dist.train.model_folder import find_model, load_model
from jobs.recordings import tag as recordings
from jobs.recordings.events import find_events
from jobs.recordings.scan import BATCH, Recording, find_recordings, scan
from jobs.recordings.tag import TagOptions, embed_recordings, tag_recordings
from tests.support.folded import a_model
from tests.support.sounds import chirp, encode, time_of

RATE = 44_100


def write_tones(path: Path, *tones: tuple[float, float], rate: int = RATE) -> Path:
    """A file of tones, each (Hz, seconds); 0 Hz is silence."""
    parts = [0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate) for hertz, seconds in tones]
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.concatenate(parts), rate)
    return path


def loudness(windows: Tensor) -> npt.NDArray[np.float32]:
    """(B, 2): the root mean square, and the number of zero crossings per sample."""
    crossings = (windows[:, 1:] * windows[:, :-1] < 0).float().mean(dim=1)
    return torch.stack([windows.square().mean(dim=1).sqrt(), crossings], dim=1).numpy()


def values(found: list[Recording]) -> list[list[list[float]]]:
    return [[value.tolist() for value in recording.values] for recording in found]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return a_model(tmp_path_factory.mktemp("models") / "model", labels=3)


def test_batches_span_recordings_and_change_nothing(tmp_path: Path) -> None:
    files = [write_tones(tmp_path / f"{i}.wav", (100.0 + i, 0.3 + 0.7 * i)) for i in range(8)]
    sizes: list[int] = []

    def compute(batch: Tensor) -> npt.NDArray[np.float32]:
        sizes.append(len(batch))
        return loudness(batch)

    together = list(scan(files, compute, RATE, 0.5, 0.25))
    assert max(sizes) == BATCH
    assert [each.file for each in together] == files
    alone = [next(scan([file], loudness, RATE, 0.5, 0.25)) for file in files]
    np.testing.assert_allclose(
        np.concatenate(list(chain(*values(together)))), np.concatenate(list(chain(*values(alone)))), 1e-6
    )
    assert [each.starts for each in together] == [each.starts for each in alone]
    assert together[3].starts == [*(i / 4 for i in range(8)), 1.9]
    assert together[3].ends[-1] == 2.4


def test_what_can_not_be_read_is_a_row_and_the_rest_goes_on(tmp_path: Path) -> None:
    good = write_tones(tmp_path / "a.wav", (200, 1))
    (tmp_path / "b.wav").write_bytes(b"RIFF and nothing else")
    write_tones(tmp_path / "c.wav", (200, 0))
    one = write_tones(tmp_path / "d.wav", (200, 1 / RATE))
    soundfile.write(tmp_path / "e.flac", np.zeros((4000, 8)), 16_000)
    found = list(scan(find_recordings([str(tmp_path)]), loudness, RATE, 0.5, 0.5))
    assert [bool(each.problem) for each in found] == [False, True, True, False, False]
    assert [len(each.values) for each in found] == [2, 0, 0, 1, 1]
    assert (found[0].file, found[3].file) == (good, one)


def test_windows_have_the_times_of_a_recording_with_a_gap(tmp_path: Path) -> None:
    """The gap is silence, and what follows it stays where it was."""
    rate = 16_000
    file = encode(tmp_path / "gap.mka", chirp(12, rate), "libopus", rate=rate, form="matroska", gap=(4.0, 7.0))
    heard: list[npt.NDArray[np.float32]] = []

    def compute(batch: Tensor) -> npt.NDArray[np.float32]:
        heard.extend(batch.numpy())
        return loudness(batch)

    (found,) = scan([file], compute, rate, 1.0, 1.0)
    assert found.starts[:12] == list(range(12))
    assert found.values[5][0] < 1e-4  # those at the gap's ends have a codec's tail in them
    for second in (1, 2, 8, 9, 10):
        middle = heard[second][round(0.35 * rate) : round(0.65 * rate)]
        assert time_of(middle, rate) == pytest.approx(second + 0.5, abs=0.1)


def test_memory_is_that_of_a_batch(tmp_path: Path) -> None:
    long = write_tones(tmp_path / "long.wav", (0, 600), rate=8000)  # as samples at 8 kHz 19 MB, at 44.1 kHz 106 MB
    tracemalloc.start()
    (found,) = scan([long], loudness, 8000, 1, 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.values) == 600
    assert peak < 30e6


def test_files_folders_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("x/b.wav", "x/y/a.ogg", "x/notes.txt", "x/.hidden.wav", "c[1].wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x" / "loop").symlink_to(tmp_path / "x")
    assert find_recordings(["x"]) == [Path("x/b.wav"), Path("x/y/a.ogg")]
    assert find_recordings(["c[1].wav", "x/*.wav", "x"]) == [Path("c[1].wav"), Path("x/b.wav"), Path("x/y/a.ogg")]
    for place, message in (("no", "no: no such file"), ("*.mp3", "no such file"), ("empty", "no sound file")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UsageError, match=message):
            find_recordings([place])


@given(data=st.data(), count=st.integers(1, 12), size=st.integers(1, 6), step=st.integers(1, 6))
@settings(deadline=None, max_examples=60)
def test_events_are_those_of_a_plain_search(data: st.DataObject, count: int, size: int, step: int) -> None:
    """In steps of half a unit: each belongs to the window whose middle is nearest, the earlier one of two."""
    step = min(step, size)
    starts = np.arange(count, dtype=float) * step
    ends = starts + size
    scores = np.array(data.draw(st.lists(st.sampled_from([0.1, 0.5, 0.9]), min_size=count, max_size=count)), np.float32)
    grid = np.arange(0.25, ends[-1], 0.5)
    nearest = [int(np.argmin(np.abs((starts + ends) / 2 - t))) for t in grid]
    is_on = scores[nearest] >= 0.5
    found = list(find_events(starts, ends, scores[:, None], 0.5))
    heard = np.zeros(len(grid), bool)
    for event in found:
        inside = (grid > event.start) & (grid < event.end)
        assert not (heard & inside).any()
        heard |= inside
        part = scores[sorted({nearest[i] for i in np.flatnonzero(inside)})]
        assert (event.mean, event.peak) == (pytest.approx(part.mean()), pytest.approx(part.max()))
    np.testing.assert_array_equal(heard, is_on)
    for before, after in pairwise(found):
        assert before.end < after.start or step == size


def test_spliced_sounds_are_found_at_their_times(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a model that knows silence, a low and a high tone from the number of zero crossings."""
    file = write_tones(tmp_path / "splice.wav", (0, 7), (300, 9), (6000, 12), (0, 4))

    def compute(batch: Tensor) -> npt.NDArray[np.float32]:
        middle = batch[:, 3 * batch.shape[1] // 8 : 5 * batch.shape[1] // 8]
        level, crossings = loudness(middle).T
        return np.stack([level < 0.1, (level > 0.1) & (crossings < 0.1), (level > 0.1) & (crossings > 0.1)], 1).astype(
            np.float32
        )

    monkeypatch.setattr(recordings, "_computation", lambda *_: compute)
    out = tmp_path / "tags.jsonl"
    result = tag_recordings(model, [str(file)], out, TagOptions(2.0, 0.5, audacity=tmp_path / "labels"))
    events = [json.loads(line) for line in Path(result["events_out"]).read_text().splitlines()]
    by_time = sorted((event["start"], event["end"], event["label"]) for event in events)
    assert [label for *_, label in by_time] == ["l0", "l1", "l2", "l0"]
    for (start, end, _), expected in zip(by_time, ((0, 7), (7, 16), (16, 28), (28, 32)), strict=True):
        assert abs(start - expected[0]) <= 0.75  # half a hop, and where in a window a sound prevails
        assert abs(end - expected[1]) <= 0.75
    (track,) = (tmp_path / "labels").iterdir()
    assert [line.split("\t")[2] for line in track.read_text().splitlines()] == ["l0", "l0", "l1", "l2"]


def test_the_three_formats_hold_the_same(tmp_path: Path, model: str, real_data: Path) -> None:
    clips = sorted((real_data / "esc10" / "audio").iterdir())[:2]
    places = [*map(str, clips), str(tmp_path / "bad.mp3")]
    (tmp_path / "bad.mp3").write_bytes(b"no sound")
    options = TagOptions(1.0, 1.0, threshold=0.0)
    for suffix in ("parquet", "csv", "jsonl"):
        result = tag_recordings(model, places, tmp_path / f"tags.{suffix}", options)
        assert (result["recordings"], result["windows"], result["unreadable"]) == (3, 10, 1)
    parquet = pq.read_table(tmp_path / "tags.parquet")
    assert parquet.schema.metadata[b"labels"] == b"l0\nl1\nl2"
    rows = parquet.to_pylist()
    assert rows == [json.loads(line) for line in (tmp_path / "tags.jsonl").read_text().splitlines()]
    with (tmp_path / "tags.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["file"] for line in lines] == [row["file"] for row in rows]
    assert [[float(line[f"l{i}"]) for i in range(3)] for line in lines[:-1]] == [row["scores"] for row in rows[:-1]]
    assert rows[-1]["scores"] is None
    assert rows[-1]["problem"]
    assert lines[-1]["l0"] == ""
    assert len(pq.read_table(tmp_path / "tags.events.parquet")) == 2 * 3  # every label, all the time

    loaded, info = load_model(find_model(model))
    sound, _ = soundfile.read(clips[0], dtype="float32", frames=RATE)
    with torch.inference_mode():
        expected = loaded(LogMel()(torch.from_numpy(sound)[None])).sigmoid()[0]
        features = loaded.embed(LogMel()(torch.from_numpy(sound)[None]))[0]
    np.testing.assert_allclose(rows[0]["scores"], expected, atol=1e-5)
    result = embed_recordings(model, [str(clips[0])], tmp_path / "e.parquet", 1.0, 1.0, "cpu")
    assert (result["windows"], result["size"]) == (5, 128)
    vector = pq.read_table(tmp_path / "e.parquet")["vector"][0].as_py()
    np.testing.assert_allclose(vector, features, rtol=1e-4, atol=1e-4 * float(features.abs().max()))
    assert info.label_ids == ["l0", "l1", "l2"]


def test_an_interrupted_command_keeps_what_is_finished(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(4):
        write_tones(tmp_path / "in" / f"{i}.wav", (200, 20))

    def compute(batch: Tensor) -> npt.NDArray[np.float32]:
        calls.append(len(batch))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return np.full((len(batch), 3), 0.25, np.float32)

    monkeypatch.setattr(recordings, "_computation", lambda *_: compute)
    for suffix in ("parquet", "csv"):
        calls: list[int] = []
        out = tmp_path / f"tags.{suffix}"
        with pytest.raises(KeyboardInterrupt):
            tag_recordings(model, [str(tmp_path / "in")], out, TagOptions(1.0, 1.0))
        found = pq.read_table(out).to_pylist() if suffix == "parquet" else list(csv.DictReader(out.open()))
        assert sorted({Path(row["file"]).name for row in found}) == ["0.wav", "1.wav"]
        assert len(found) == 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": "tags.txt"}, r"tags.txt: its suffix has to be .csv, .jsonl or .parquet"),
        ({"out": "file.wav/tags.csv"}, "can't be written"),
        ({"options": TagOptions(threshold=1.5)}, "--threshold 1.5: is not between 0 and 1"),
        ({"options": TagOptions(window=2, hop=3)}, "--hop 3: .* at most --window 2"),
        ({"options": TagOptions(window=2, hop=0)}, "--hop 0"),
        ({"options": TagOptions(window=0.01, hop=0.01)}, "--window 0.01: has to be at least 0.05 s"),
        ({"places": ["nothing.wav"]}, "nothing.wav: no such file"),
        ({"model": "no-model"}, "no-model: no model here"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_read(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tones(tmp_path / "file.wav", (200, 1))
    monkeypatch.setattr(recordings, "scan", lambda *_: pytest.fail("it was read"))
    given = {"model": model, "places": ["file.wav"], "out": "tags.csv", "options": TagOptions()} | changes
    with pytest.raises((UsageError, UserError), match=message):
        tag_recordings(given["model"], given["places"], Path(given["out"]), given["options"])
    assert not Path("tags.csv").exists()
