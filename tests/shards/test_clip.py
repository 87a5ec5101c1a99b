"""What becomes of one clip: channels, rates, overload, segments, and the reason when there is none."""

import io
import os
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from erann_dist.data.audio import decode, load, resample
from shards.clip import PackedSound, Packing, Rejected, cut_segment, pack_clip
from shards.sources.rows import SourceRow

RATE = 44_100


def packed(
    path: Path, start: float | None = None, end: float | None = None, **options: object
) -> tuple[np.ndarray, PackedSound]:
    """The clip as int16, and what is noted of it."""
    packing = Packing(**options)
    scratch = path.parent / "packed.bin"
    with scratch.open("w+b", buffering=0) as file:
        noted = pack_clip(SourceRow("k", [0], os.fsencode(path), path.name, start=start, end=end), packing, file)
    with soundfile.SoundFile(scratch) as file:
        assert (file.samplerate, file.channels, file.subtype) == (packing.sample_rate, 1, "PCM_16")
        assert file.format == packing.codec.upper()
        pcm = file.read(dtype="int16")
    assert noted.samples == len(pcm)
    return pcm, noted


def test_channels_are_averaged_and_overload_is_clipped(tmp_path: Path) -> None:
    left, right = np.full(RATE, 0.5), np.full(RATE, 0.1)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], 1), RATE, subtype="FLOAT")
    pcm, noted = packed(tmp_path / "stereo.wav")
    assert np.abs(pcm - 0.3 * 32768).max() <= 1
    assert (noted.peak, noted.format) == (pytest.approx(0.3), "wav float 44100 Hz stereo")
    soundfile.write(tmp_path / "loud.wav", np.array([1.7, -1.7, 1.0, -1.0] * 300), RATE, subtype="FLOAT")
    pcm, noted = packed(tmp_path / "loud.wav")
    assert pcm[:4].tolist() == [32767, -32768, 32767, -32768]
    assert noted.peak == pytest.approx(1.7)


@pytest.mark.parametrize("channels", [1, 2, 3, 6, 8])
@pytest.mark.parametrize("kind", ["wav", "flac", "ogg"])
def test_any_number_of_channels_in_any_container(tmp_path: Path, channels: int, kind: str) -> None:
    t = np.arange(2 * RATE) / RATE
    sound = np.stack([(c + 1) / 20 * np.sin(2 * np.pi * 440 * t) for c in range(channels)], 1)
    soundfile.write(tmp_path / f"x.{kind}", sound, RATE)
    pcm, _ = packed(tmp_path / f"x.{kind}")
    decoded, _ = soundfile.read(tmp_path / f"x.{kind}", always_2d=True)  # by the other decoder, for Vorbis is lossy
    shorter = min(len(pcm), len(decoded))
    assert max(len(pcm), len(decoded)) - shorter <= 128  # of Vorbis's last block FFmpeg cuts off a little more
    np.testing.assert_allclose(pcm[:shorter] / 32768, decoded.mean(axis=1)[:shorter], atol=1e-4)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_both_decoders_scale_alike(tmp_path: Path, subtype: str) -> None:
    from erann_dist.data.audio import _ffmpeg_blocks, _libsndfile_blocks

    path = tmp_path / "x.wav"
    soundfile.write(path, np.sin(np.arange(5000)) * 0.7, RATE, subtype=subtype)
    (ours,), (theirs,) = list(_ffmpeg_blocks(path)), list(_libsndfile_blocks(path))
    np.testing.assert_allclose(ours.samples, theirs.samples, atol=1e-6)
    expected, _ = soundfile.read(path, dtype="float32")
    np.testing.assert_allclose(ours.samples, expected, atol=1e-6)


@pytest.mark.parametrize("rate", [16_000, 22_050, 32_000, 48_000])
def test_resampling_keeps_pitch_length_and_level(tmp_path: Path, rate: int) -> None:
    t = np.arange(2 * rate) / rate
    soundfile.write(tmp_path / "tone.wav", 0.5 * np.sin(2 * np.pi * 1000 * t), rate, subtype="FLOAT")
    pcm, _ = packed(tmp_path / "tone.wav")
    assert len(pcm) == 2 * RATE
    expected = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(2 * RATE) / RATE)
    np.testing.assert_allclose(pcm[2000:-2000] / 32768, expected[2000:-2000], atol=1e-3)


def test_rate_and_codec_are_options(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.flac", np.sin(np.arange(RATE)) * 0.5, RATE)
    pcm, noted = packed(tmp_path / "x.flac", sample_rate=16_000, codec="wav")
    assert len(pcm) == 16_000
    assert noted.format == "flac 44100 Hz mono"


def test_a_long_file_is_the_same_in_blocks(tmp_path: Path) -> None:
    """Longer than one block, at a rate that needs resampling: as if resampled in one go."""
    import soxr

    sound = np.random.default_rng(0).standard_normal(70 * 48_000).astype(np.float32) * 0.1
    soundfile.write(tmp_path / "long.wav", sound, 48_000, subtype="FLOAT")
    assert len(decode(tmp_path / "long.wav", list)) > 3
    np.testing.assert_array_equal(load(tmp_path / "long.wav", RATE).samples, soxr.resample(sound, 48_000, RATE, "HQ"))


def test_a_rate_that_changes_on_the_way(real_data: Path) -> None:
    path = real_data / "formats/flac-test-files/uncommon/01 - changing samplerate.flac"
    blocks = decode(path, list)
    assert [block.rate for block in blocks] == [32_000, 24_000, 16_000, 48_000]
    seconds = sum(block.seconds for block in blocks)
    assert sum(len(part) for part in resample(blocks, RATE)) == pytest.approx(seconds * RATE, abs=4)


def test_segments_are_cut_from_whole_recordings_only(tmp_path: Path) -> None:
    ramp = np.linspace(-0.9, 0.9, 60 * RATE)
    soundfile.write(tmp_path / "whole.wav", ramp, RATE)
    for start in (0.0, 5.0, 43.21):
        pcm, _ = packed(tmp_path / "whole.wav", start, start + 10)
        assert len(pcm) == 10 * RATE
        first = round(start * RATE)
        np.testing.assert_allclose(pcm / 32768, ramp[first : first + 10 * RATE], atol=1e-4)
    assert len(packed(tmp_path / "whole.wav", 55.0, 65.0)[0]) == 5 * RATE  # never padded
    soundfile.write(tmp_path / "clip.wav", ramp[: int(10.03 * RATE)], RATE)
    np.testing.assert_allclose(packed(tmp_path / "clip.wav", 5, 15)[0] / 32768, ramp[: 10 * RATE], atol=1e-4)
    soundfile.write(tmp_path / "short.wav", ramp[: 4 * RATE], RATE)
    assert len(packed(tmp_path / "short.wav", 5, 15)[0]) == 4 * RATE
    with pytest.raises(Rejected, match="empty") as rejection:
        packed(tmp_path / "whole.wav", 70.0, 80.0)
    assert rejection.value.args == ("empty", "ends after 60.00 s, before the segment from 70 to 80 s")


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(0, 200), st.integers(1, 100), st.integers(0, 20))
def test_cutting_is_a_slice_whatever_the_blocks(sizes: list[int], first: int, length: int, slack: int) -> None:
    sound = np.arange(sum(sizes), dtype=np.float32)
    parts = np.split(sound, np.cumsum(sizes)[:-1]) if sizes else []
    cut = np.concatenate([np.zeros(0), *cut_segment(parts, first, length, slack)])
    begin = first if len(sound) > length + slack else 0
    np.testing.assert_array_equal(cut, sound[begin : begin + length])


def test_reading_stops_behind_the_segment(tmp_path: Path) -> None:
    """A film is not decoded to its end: what is damaged behind the segment does no harm."""
    soundfile.write(tmp_path / "film.flac", np.sin(np.arange(200 * RATE)) * 0.5, RATE)
    data = (tmp_path / "film.flac").read_bytes()
    (tmp_path / "film.flac").write_bytes(data[: len(data) * 3 // 4] + b"\0" * 1000)
    assert len(packed(tmp_path / "film.flac", 60, 70)[0]) == 10 * RATE


@pytest.mark.parametrize(
    ("sound", "options", "reason"),
    [
        (np.sin(np.arange(440)), {}, "too short: 0.0100 s, less than 0.02 s"),
        (np.sin(np.arange(4410)), {"min_seconds": 0.5}, "too short: 0.1000 s, less than 0.5 s"),
        (np.full(RATE, 5e-5), {"skip_silent": True}, "silent: peak 5.0e-05 of full scale"),
        (np.full(RATE, np.nan), {}, "unreadable: non-finite samples"),
        (np.where(np.arange(RATE) == 777, np.inf, 0.1), {}, "unreadable: non-finite samples"),
        (np.zeros(0), {}, "empty: libsndfile: no samples; FFmpeg: no samples"),
    ],
)
def test_rejections(tmp_path: Path, sound: np.ndarray, options: dict[str, object], reason: str) -> None:
    soundfile.write(tmp_path / "x.wav", sound, RATE, subtype="FLOAT")
    with pytest.raises(Rejected) as rejection:
        packed(tmp_path / "x.wav", **options)
    assert ": ".join(rejection.value.args) == reason


def test_silence_is_packed_unless_asked(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.wav", np.zeros(RATE), RATE)
    assert packed(tmp_path / "x.wav")[1].peak == 0


def test_headers_are_not_believed(tmp_path: Path) -> None:
    """A WAV that claims 4 GiB, a FLAC that claims 2^36 - 1 samples, a rate of 1 Hz that makes hours of a second."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(np.full(RATE, 1000, "<i2").tobytes())
    wav = bytearray(buffer.getvalue())
    wav[4:8] = wav[40:44] = b"\xff\xff\xff\xff"
    (tmp_path / "x.wav").write_bytes(wav)
    assert len(packed(tmp_path / "x.wav")[0]) == RATE
    soundfile.write(tmp_path / "x.flac", np.sin(np.arange(RATE)) * 0.3, RATE)
    flac = bytearray((tmp_path / "x.flac").read_bytes())
    flac[21] |= 0x0F  # the total number of samples: 36 bits from the middle of byte 21
    flac[22:26] = b"\xff\xff\xff\xff"
    (tmp_path / "x.flac").write_bytes(flac)
    assert len(packed(tmp_path / "x.flac")[0]) == RATE
    wav[24:28] = (1).to_bytes(4, "little")
    (tmp_path / "slow.wav").write_bytes(wav)
    with pytest.raises(Rejected, match="unreadable") as rejection:
        packed(tmp_path / "slow.wav")
    assert "a sample rate of 1 Hz" in rejection.value.args[1]
