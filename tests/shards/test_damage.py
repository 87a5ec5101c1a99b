"""Damaged sources: what can be decoded is packed, what is missing is counted, and segments keep their place."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile

from erann_dist.data.audio import Block, DecodeError, decode
from shards.clip import MIN_INTACT, PackedSound, Packing, Rejected, pack_clip
from shards.sources.rows import SourceRow
from tests.support.sounds import RATE, chirp, encode, time_of

SECONDS = 6.0


def packed(path: Path, start: float | None = None, end: float | None = None, **options: Any) -> tuple[Any, PackedSound]:
    """The clip's samples, and the facts about it."""
    file = io.BytesIO()
    facts = pack_clip(
        SourceRow("k", [0], os.fsencode(path), path.name, start=start, end=end), Packing(codec="wav", **options), file
    )
    return soundfile.read(io.BytesIO(file.getvalue()))[0], facts


def damage(path: Path, at: float, size: int = 60) -> Path:
    """Replace bytes at a share of the file by noise."""
    data = bytearray(path.read_bytes())
    place = int(len(data) * at)
    data[place : place + size] = np.random.default_rng(7).bytes(size)
    path.write_bytes(data)
    return path


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


KINDS: list[tuple[str, str, str | None, dict[str, str]]] = [
    ("x.aac", "aac", "adts", {}),
    ("x.m4a", "aac", "ipod", {"movflags": "faststart"}),
    ("x.mp4", "aac", None, {"movflags": "frag_keyframe+empty_moov", "frag_duration": "500000"}),
    ("x.ts", "aac", "mpegts", {}),
    ("x.flv", "aac", None, {}),
    ("x.wv", "wavpack", None, {}),
    ("x.tta", "tta", None, {}),
    ("alac.m4a", "alac", "ipod", {"movflags": "faststart"}),
    ("x.flac", "flac", None, {}),
    ("x.mka", "flac", "matroska", {}),
    ("x.mp3", "libmp3lame", None, {}),
]
HEADERS_STATE_THE_LENGTH = {"x.m4a", "x.flv", "x.wv", "x.tta", "alac.m4a", "x.flac"}


@pytest.mark.parametrize(("name", "codec", "form", "options"), KINDS, ids=[kind[0] for kind in KINDS])
def test_bytes_that_can_not_be_decoded_cost_no_more_than_themselves(
    tmp_path: Path, name: str, codec: str, form: str | None, options: dict[str, str]
) -> None:
    noise = 0.02 * np.random.default_rng(0).standard_normal(round(SECONDS * RATE))
    path = encode(tmp_path / name, chirp(SECONDS) + noise, codec, form=form, options=options)
    whole, facts = packed(path)
    assert facts.lost is None
    _, facts = packed(damage(path, 0.45))
    assert facts.samples + (facts.lost or 0) * RATE == pytest.approx(len(whole), abs=0.06 * RATE)
    assert facts.samples > len(whole) - 1.2 * RATE  # TTA's packets have a second
    part, facts = packed(path, 4.0, 4.5)
    assert (len(part), facts.lost) == (RATE // 2, None)
    assert time_of(part) == pytest.approx(4.25, abs=0.1)
    path = encode(tmp_path / name, chirp(SECONDS) + noise, codec, form=form, options=options)
    part, facts = packed(cut(path, 0.7))
    assert 2.5 * RATE < len(part) < 5 * RATE
    if name in HEADERS_STATE_THE_LENGTH:
        assert facts.samples + (facts.lost or 0) * RATE == pytest.approx(len(whole), abs=0.06 * RATE)


def test_a_tag_behind_wavpack_and_an_incomplete_last_packet(tmp_path: Path) -> None:
    path = encode(tmp_path / "x.wv", chirp(2), "wavpack")
    path.write_bytes(path.read_bytes() + b"TAG" + bytes(125))
    sound, facts = packed(path)
    assert (len(sound), facts.lost) == (2 * RATE, None)
    path = encode(tmp_path / "x.aac", chirp(2), "aac", form="adts")
    path.write_bytes(path.read_bytes()[:-50])
    sound, facts = packed(path)
    assert len(sound) > 1.9 * RATE
    assert facts.lost == pytest.approx(1024 / RATE)


def test_garbage_inside_an_mp3(tmp_path: Path) -> None:
    path = encode(tmp_path / "x.mp3", chirp(SECONDS), "libmp3lame")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + np.random.default_rng(0).bytes(3000) + data[len(data) // 2 :])
    sound, _ = packed(path)
    assert len(sound) > (SECONDS - 0.2) * RATE


def test_a_wav_that_was_cut_short_lacks_what_its_header_states(tmp_path: Path) -> None:
    for name, options in (("x.wav", {}), ("x.aiff", {}), ("adpcm.wav", {"subtype": "MS_ADPCM"})):
        soundfile.write(tmp_path / name, chirp(4), RATE, **options)
        assert packed(tmp_path / name)[1].lost is None
        sound, facts = packed(cut(tmp_path / name, 0.6))
        assert len(sound) / RATE == pytest.approx(2.4, abs=0.05)
        assert facts.lost == pytest.approx(1.6, abs=0.05)


def test_a_clip_is_rejected_when_too_little_is_left(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.wav", chirp(4), RATE)
    cut(tmp_path / "x.wav", MIN_INTACT - 0.05)
    with pytest.raises(Rejected) as rejection:
        packed(tmp_path / "x.wav")
    assert rejection.value.args == ("unreadable", "damaged: 0.80 of 4.00 s are left")
    assert packed(tmp_path / "x.wav", min_intact=0.0)[1].lost == pytest.approx(3.2, abs=0.01)


@pytest.mark.parametrize(
    ("name", "codec", "form", "rate"),
    [
        ("x.webm", "libopus", None, 48_000),
        ("x.opus", "libopus", "ogg", 48_000),
        ("x.m4a", "aac", "ipod", 44_100),
        ("x.ts", "aac", "mpegts", 44_100),
        ("x.flv", "aac", None, 44_100),
        ("x.mka", "flac", "matroska", 44_100),
    ],
)
def test_segments_are_cut_by_timestamps(tmp_path: Path, name: str, codec: str, form: str | None, rate: int) -> None:
    path = encode(tmp_path / name, chirp(24, rate), codec, rate=rate, form=form, gap=(5.0, 8.0))
    sound, facts = packed(path, 12.0, 14.0)
    assert (len(sound), facts.lost) == (2 * RATE, None)
    assert time_of(sound) == pytest.approx(13.0, abs=0.1)
    sound, facts = packed(path, 6.0, 10.0)
    assert facts.lost == pytest.approx(2, abs=0.1)
    assert time_of(sound) == pytest.approx(9.0, abs=0.1)
    whole, facts = packed(path)
    assert facts.lost == pytest.approx(3, abs=0.1)
    assert len(whole) / RATE == pytest.approx(21, abs=0.1)  # nothing is put in its place


def test_a_clock_that_starts_again_in_a_broadcast_is_no_gap(tmp_path: Path) -> None:
    one = encode(tmp_path / "1.ts", chirp(6), "aac", form="mpegts").read_bytes()
    (tmp_path / "twice.ts").write_bytes(one + one)
    sound, facts = packed(tmp_path / "twice.ts", 8.0, 9.0)
    assert (len(sound), facts.lost) == (RATE, None)
    assert time_of(sound) == pytest.approx(2.5, abs=0.1)


def test_a_time_that_the_file_does_not_have_is_no_gap(tmp_path: Path) -> None:
    """The time of a Matroska cluster in the middle, 5 s, is damaged: it is a minute later."""
    path = encode(tmp_path / "x.mka", chirp(12), "flac", form="matroska")
    data = bytearray(path.read_bytes())
    second = data.index(b"\x1f\x43\xb6\x75", data.index(b"\x1f\x43\xb6\x75") + 1)
    place = data.index(b"\xe7\x82", second) + 2  # two bytes of milliseconds
    data[place] = 0xFF
    path.write_bytes(data)
    sound, facts = packed(path)
    assert (len(sound), facts.lost) == (12 * RATE, None)
    assert time_of(packed(path, 7.0, 8.0)[0]) == pytest.approx(7.5, abs=0.1)


def test_a_whole_recording_that_ends_before_the_segment(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.wav", chirp(12.4), RATE)
    with pytest.raises(Rejected) as rejection:
        packed(tmp_path / "x.wav", 30.0, 40.0)
    assert rejection.value.args == ("empty", "ends after 12.40 s, before the segment from 30 to 40 s")


def ogg(path: Path, rate: int = RATE, channels: int = 1, codec: str = "VORBIS") -> bytes:
    """Three seconds, encoded by libsndfile."""
    sound = np.tile(chirp(3, rate)[:, None], channels)
    soundfile.write(path, sound, rate, format="OGG", subtype=codec)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"rate": 22_050}),
        ({"channels": 2}, {}),
        ({"rate": 48_000, "codec": "OPUS", "channels": 2}, {"rate": 48_000, "codec": "OPUS"}),
        ({"rate": 48_000, "codec": "OPUS"}, {}),
    ],
)
def test_every_link_of_a_chained_ogg(tmp_path: Path, first: dict[str, Any], second: dict[str, Any]) -> None:
    links = ogg(tmp_path / "1.ogg", **first), ogg(tmp_path / "2.ogg", **second), ogg(tmp_path / "1.ogg", **first)
    (tmp_path / "x.ogg").write_bytes(b"".join(links))
    sound, facts = packed(tmp_path / "x.ogg")
    assert len(sound) / RATE == pytest.approx(9, abs=0.05)
    assert facts.format.count(" + ") == 1
    assert time_of(sound[round(4 * RATE) : round(4.5 * RATE)]) == pytest.approx(1.25, abs=0.1)


def test_a_fallback_never_gives_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def blocks(seconds: int, error: bool) -> Callable[..., Any]:
        def decoder(file: object, channel: int | None) -> Any:
            yield Block(np.zeros(seconds * 10, np.float32), 10, "x")
            if error:
                raise DecodeError("no more")

        return decoder

    (tmp_path / "x").write_bytes(b"data")
    monkeypatch.setattr("erann_dist.data.audio._ffmpeg_blocks", blocks(3, error=True))
    monkeypatch.setattr("erann_dist.data.audio._libsndfile_blocks", blocks(2, error=False))
    with pytest.raises(DecodeError, match=r"FFmpeg: no more; libsndfile: ends after 2\.00 s, the other after 3\.00 s"):
        decode(tmp_path / "x", list)
    monkeypatch.setattr("erann_dist.data.audio._libsndfile_blocks", blocks(4, error=False))
    assert len(decode(tmp_path / "x", list)[0].samples) == 40


def test_the_stream_that_is_the_default_is_taken(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "x.mkv"), "w") as container:
        streams = [container.add_stream("flac", rate=RATE, layout="mono") for _ in range(2)]
        streams[0].disposition = av.stream.Disposition(0)
        streams[1].disposition = av.stream.Disposition.default
        for stream, level in zip(streams, (8000, 16000), strict=True):
            frame = av.AudioFrame.from_ndarray(np.full((1, 4096), level, np.int16), "s16", "mono")
            frame.sample_rate = RATE
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    assert np.median(packed(tmp_path / "x.mkv")[0]) == pytest.approx(0.488, abs=0.01)


def test_an_unknown_codec_is_named_and_the_other_decoder_is_tried(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.wav", chirp(1), RATE)
    data = bytearray((tmp_path / "x.wav").read_bytes())
    data[20:22] = b"\x34\x12"
    (tmp_path / "x.wav").write_bytes(data)
    with pytest.raises(Rejected) as rejection:
        packed(tmp_path / "x.wav")
    assert rejection.value.args[0] == "unreadable"
    assert "FFmpeg: a codec that FFmpeg does not know" in rejection.value.args[1]
    assert "libsndfile: " in rejection.value.args[1]


def test_channels_in_opposite_phase(tmp_path: Path) -> None:
    sound = chirp(3)
    soundfile.write(tmp_path / "x.wav", np.stack([sound, -0.98 * sound], 1), RATE)
    mean, facts = packed(tmp_path / "x.wav")
    assert np.abs(mean).max() < 0.01
    assert facts.channel_peak == pytest.approx(0.5, abs=0.01)
    left, facts = packed(tmp_path / "x.wav", channels="left")
    assert (facts.channel_peak, np.abs(left).max()) == (None, pytest.approx(0.5, abs=0.01))
    soundfile.write(tmp_path / "x.wav", np.stack([0.01 * sound, 0.3 * sound, 0.6 * sound], 1), RATE)
    loudest, facts = packed(tmp_path / "x.wav", 1.0, 1.5, channels="loudest")
    assert np.abs(loudest).max() == pytest.approx(0.3, abs=0.01)
    assert facts.channel_peak is None
    for usual in (np.stack([sound, sound], 1), np.stack([sound, 0 * sound], 1), np.zeros((RATE, 2))):
        soundfile.write(tmp_path / "x.wav", usual, RATE)
        assert packed(tmp_path / "x.wav")[1].channel_peak is None
