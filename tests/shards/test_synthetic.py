import csv
import re
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from shards.synthetic import SOUNDS, Sound, SyntheticAudioSet, mix, write_synthetic_audioset

REAL_CLASSES = Path(__file__).parents[2] / "../shared/data/audioset/class_labels_indices.csv"
TRAIN, EVAL, SECONDS = 48, 24, 1.0


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SyntheticAudioSet:
    return write_synthetic_audioset(tmp_path_factory.mktemp("synthetic"), TRAIN, EVAL, SECONDS)


def rows(segments: Path) -> list[list[str]]:
    """The fields of a list's rows: YTID, start, end, "mid,mid"."""
    with segments.open(newline="") as file:
        return list(csv.reader((line for line in file if not line.startswith("#")), skipinitialspace=True))


def positives(segments: Path) -> Counter[str]:
    return Counter(mid for row in rows(segments) for mid in row[3].split(","))


def clip_file(dataset: SyntheticAudioSet, row: list[str]) -> Path | None:
    """The clip's file under any of the names in use; ids are long enough for no two clips to meet."""
    found = [path for path in dataset.audio.iterdir() if re.match(rf"Y?{re.escape(row[0])}[._]", path.name)]
    assert len(found) <= 1
    return found[0] if found else None


def seconds(path: Path) -> float:
    """How long the sound is that FFmpeg decodes from a file: 0 where it finds none."""
    try:
        with av.open(path) as container:
            return sum(frame.samples / frame.sample_rate for frame in container.decode(audio=0))
    except av.error.FFmpegError:
        return 0.0


def test_classes_are_audiosets_in_its_order(dataset: SyntheticAudioSet) -> None:
    if not REAL_CLASSES.exists():
        pytest.skip("AudioSet's class_labels_indices.csv is not at hand")
    with REAL_CLASSES.open(newline="") as file:
        real = [(row["mid"], row["display_name"]) for row in csv.DictReader(file)]
    with dataset.classes.open(newline="") as file:
        ours = list(csv.DictReader(file))
    assert [row["index"] for row in ours] == [str(i) for i in range(len(SOUNDS))]
    assert [(row["mid"], row["display_name"]) for row in ours] == [
        name for name in real if name[0] in {sound.mid for sound in SOUNDS}
    ]


@pytest.mark.parametrize(("split", "count"), [("train", TRAIN), ("eval", EVAL)])
def test_lists_have_audiosets_format(dataset: SyntheticAudioSet, split: str, count: int) -> None:
    segments = {"train": dataset.train_segments, "eval": dataset.eval_segments}[split]
    header = segments.read_text().splitlines()[:3]
    labels = positives(segments)
    assert all(line.startswith("# ") for line in header)
    clips, kinds = f"num_ytids={count}, num_segs={count}", f"num_unique_labels={len(labels)}"
    assert header[1] == f"# {clips}, {kinds}, num_positive_labels={labels.total()}"
    assert header[2] == "# YTID, start_seconds, end_seconds, positive_labels"
    listed = rows(segments)
    ytids = [row[0] for row in listed]
    assert len(set(ytids)) == count
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{11}", ytid) for ytid in ytids)
    assert any(ytid.startswith("-") for ytid in ytids)
    assert all(float(end) - float(start) == SECONDS for _, start, end, _ in listed)
    assert len({start for _, start, _, _ in listed}) > 5


def test_one_training_clip_is_missing_and_one_is_corrupt(dataset: SyntheticAudioSet) -> None:
    trouble = []
    for row in rows(dataset.train_segments) + rows(dataset.eval_segments):
        path = clip_file(dataset, row)
        if path is None:
            trouble.append(("missing", row))
        elif (length := seconds(path)) == 0:
            trouble.append(("corrupt", row))
        else:
            # AAC fills its last frame and may keep its first: 1024 samples each, at 32 kHz or more.
            assert SECONDS <= length + 1e-6 < SECONDS + 2 * 1024 / 32000 + 1e-3
    assert sorted(kind for kind, _ in trouble) == ["corrupt", "missing"]
    assert all(row in rows(dataset.train_segments) for _, row in trouble)
    # Only the commonest class loses clips to it.
    assert {row[3] for _, row in trouble} == {positives(dataset.train_segments).most_common(1)[0][0]}


def test_file_names_formats_and_rates_are_mixed(dataset: SyntheticAudioSet) -> None:
    names = [path.name for path in dataset.audio.iterdir()]
    assert {name.rsplit(".")[-1] for name in names} == {"wav", "flac", "ogg", "mp3", "opus", "m4a"}
    ytid = r"[A-Za-z0-9_-]{11}"
    for naming in (rf"{ytid}", rf"Y{ytid}", rf"{ytid}_\d+", rf"{ytid}_\d+_\d+"):
        assert any(re.fullmatch(naming, name.rsplit(".")[0]) for name in names), naming
    streams = []
    for path in filter(seconds, dataset.audio.glob("*.flac")):
        with av.open(path) as container:
            streams.append((container.streams.audio[0].rate, container.streams.audio[0].channels))
    assert {rate for rate, _ in streams} == {16000, 32000, 48000}
    assert {channels for _, channels in streams} == {1, 2}


def test_training_list_is_unbalanced_and_evaluation_list_is_not(tmp_path: Path) -> None:
    # The counts at full size don't depend on how long the clips are.
    full = write_synthetic_audioset(tmp_path, duration=0.5)
    train, held_out = positives(full.train_segments), positives(full.eval_segments)
    assert set(train) == set(held_out) == {sound.mid for sound in SOUNDS}
    assert min(train.values()) >= 6
    assert 20 <= max(train.values()) / min(train.values()) <= 30
    assert min(held_out.values()) >= 8
    assert max(held_out.values()) / min(held_out.values()) < 1.2
    sizes = Counter(len(row[3].split(",")) for row in rows(full.train_segments))
    assert set(sizes) == {1, 2, 3}
    assert 0.5 * sizes.total() <= sizes[1] <= 0.7 * sizes.total()
    assert sizes[2] > sizes[3] >= 0.08 * sizes.total()


def test_a_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    folders = {"first": 5, "second": 5, "other": 6}
    sets = [write_synthetic_audioset(tmp_path / name, 40, 12, 0.5, seed) for name, seed in folders.items()]

    def contents(dataset: SyntheticAudioSet) -> dict[str, bytes]:
        # Ogg files carry a random serial number, so only the uncompressed ones are compared.
        paths = [*dataset.audio.glob("*.wav"), dataset.train_segments, dataset.eval_segments]
        return {path.name: path.read_bytes() for path in paths}

    first, second, other = (contents(dataset) for dataset in sets)
    assert len(first) > 10
    assert first == second
    assert not set(first.values()) & set(other.values())


@pytest.mark.parametrize("sound", SOUNDS, ids=lambda sound: sound.display_name)
def test_a_sound_fills_its_clip_and_varies(sound: Sound) -> None:
    one, another = (mix(np.random.default_rng(seed), [sound], 4 * 16000, 16000, 1)[:, 0] for seed in (0, 1))
    for audio in (one, another):
        assert np.isfinite(audio).all()
        assert 0.1 < np.abs(audio).max() <= 1
        # A crop of two seconds anywhere holds about as much of it as any other.
        rms = [np.sqrt(np.mean(audio[start : start + 32000] ** 2)) for start in range(0, 32001, 4000)]
        assert min(rms) > 0.5 * max(rms) > 0
    assert np.abs(np.corrcoef(one, another)[0, 1]) < 0.5


def test_every_sound_of_a_mix_is_audible() -> None:
    # In the band where it is alone a tone must stand out of noise, whichever levels are drawn.
    tone, noise = (next(s for s in SOUNDS if s.display_name == name) for name in ("Sine wave", "Pink noise"))
    for seed in range(5):
        audio = mix(np.random.default_rng(seed), [tone, noise], 2 * 16000, 16000, 2).mean(axis=1)
        power = np.abs(np.fft.rfft(audio)) ** 2
        band, beside = power[2 * 300 : 2 * 1000], power[2 * 1100 : 2 * 2000]
        assert band.max() > 20 * beside.mean()
        assert beside.mean() > 1e-6 * band.max()
