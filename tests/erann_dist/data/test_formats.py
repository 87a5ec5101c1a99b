"""What each of the two decoders reads is what docs/reference/formats.md says."""

import re
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile

from erann_dist.data.audio import SUFFIXES, DecodeError, _ffmpeg_blocks, _libsndfile_blocks
from tests.support.sounds import RATE, chirp, encode

PAGE = Path(__file__).parents[3] / "docs/reference/formats.md"
SECONDS = 2.0

Make = Callable[[Path], object]


def pyav(codec: str, form: str | None = None, rate: int = RATE) -> Make:
    return lambda path: encode(path, chirp(SECONDS, rate), codec, rate=rate, form=form)


def sndfile(form: str, subtype: str | None = None, endian: str | None = None, rate: int = RATE) -> Make:
    sound = chirp(SECONDS, rate)
    return lambda path: soundfile.write(path, sound, rate, format=form, subtype=subtype, endian=endian)


def dsf(path: Path) -> None:
    """Silence in DSD64 (Sony's DSF specification 1.01): blocks of 4,096 bytes, a bit a sample."""
    blocks = round(SECONDS * 2_822_400 / 8 / 4096)
    size = blocks * 4096
    head = b"DSD " + struct.pack("<QQQ", 28, 28 + 52 + 12 + size, 0)
    head += b"fmt " + struct.pack("<QIIIIIIQII", 52, 1, 0, 1, 1, 2_822_400, 1, size * 8, 4096, 0)
    path.write_bytes(head + b"data" + struct.pack("<Q", 12 + size) + b"\x69" * size)


# By the page's first column: the file's name and how it is made.
MADE: dict[str, tuple[str, Make]] = {
    "WAV, PCM 8 to 32 bit": ("x.wav", sndfile("WAV", "PCM_24")),
    "WAV, 32-bit float": ("x.wav", sndfile("WAV", "FLOAT")),
    "WAV, 64-bit float": ("x.wav", sndfile("WAV", "DOUBLE")),
    "WAV, ADPCM": ("x.wav", sndfile("WAV", "MS_ADPCM")),
    "WAV, µ-law": ("x.wav", sndfile("WAV", "ULAW")),
    "WAV, big endian (RIFX)": ("x.wav", sndfile("WAV", "PCM_16", "BIG")),
    "RF64": ("x.wav", sndfile("RF64", "PCM_16")),
    "Wave64": ("x.w64", sndfile("W64", "PCM_16")),
    "AIFF, AIFF-C": ("x.aiff", sndfile("AIFF", "PCM_16")),
    "AU": ("x.au", sndfile("AU", "PCM_16")),
    "CAF, PCM": ("x.caf", sndfile("CAF", "PCM_16")),
    "VOC": ("x.voc", sndfile("VOC", "PCM_16")),
    "NIST SPHERE": ("x.sph", sndfile("NIST", "PCM_16")),
    "FLAC": ("x.flac", sndfile("FLAC", "PCM_24")),
    "ALAC in M4A": ("x.m4a", pyav("alac", "ipod")),
    "WavPack": ("x.wv", pyav("wavpack")),
    "TTA": ("x.tta", pyav("tta")),
    "DSF (DSD)": ("x.dsf", dsf),
    "MP3": ("x.mp3", pyav("libmp3lame")),
    "MP2": ("x.mp2", pyav("mp2")),
    "AAC (ADTS)": ("x.aac", pyav("aac", "adts")),
    "AAC in M4A, MP4": ("x.m4a", pyav("aac", "ipod")),
    "AAC in 3GP": ("x.3gp", pyav("aac", "3gp")),
    "AC-3": ("x.ac3", pyav("ac3")),
    "E-AC-3": ("x.eac3", pyav("eac3", "eac3")),
    "Vorbis in Ogg": ("x.ogg", sndfile("OGG", "VORBIS")),
    "Opus in Ogg": ("x.opus", pyav("libopus", "ogg", 48_000)),
    "Opus in WebM": ("x.webm", pyav("libopus", None, 48_000)),
    "FLAC in Matroska": ("x.mka", pyav("flac", "matroska")),
    "MP3 in AVI": ("x.avi", pyav("libmp3lame")),
    "AAC in FLV": ("x.flv", pyav("aac")),
    "AAC in MPEG-TS": ("x.ts", pyav("aac", "mpegts")),
    "MP2 in MPEG-PS": ("x.mpg", pyav("mp2", "mpeg")),
    "MP2 in VOB": ("x.vob", pyav("mp2", "vob")),
    "PCM in QuickTime": ("x.mov", pyav("pcm_s16le")),
}


def table(heading: str) -> dict[str, tuple[str, ...]]:
    """A table of the page, by its first column."""
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line]
    return {row[0]: tuple(row[1:]) for row in rows[2:]}


def reads(decoder: Callable[..., object], path: Path, seconds: float | None = None) -> bool:
    """Whether a decoder gives the whole sound, and no damage."""
    try:
        blocks = list(decoder(path))  # type: ignore[call-overload]
    except DecodeError:
        return False
    length = sum(block.seconds for block in blocks)
    return not any(block.lost for block in blocks) and (seconds is None or abs(length - seconds) < 0.1)


def test_the_page_has_every_format_that_is_tried() -> None:
    assert list(table("What each decoder reads")) == list(MADE)
    named = set(re.findall(r"\.[a-z0-9]+\b", table("What each decoder reads").__str__()))
    assert named <= SUFFIXES


@pytest.mark.parametrize("kind", MADE)
def test_what_each_decoder_reads(tmp_path: Path, kind: str) -> None:
    name, make = MADE[kind]
    make(tmp_path / name)
    assert Path(name).suffix in SUFFIXES
    found = tuple("yes" if reads(d, tmp_path / name, SECONDS) else "–" for d in (_ffmpeg_blocks, _libsndfile_blocks))
    assert found == table("What each decoder reads")[kind][1:]
    assert "yes" in found


def test_what_each_decoder_reads_of_real_files(real_data: Path) -> None:
    counts: dict[str, np.ndarray] = {}
    for path in sorted((real_data / "formats").rglob("*.*")):
        if path.suffix in SUFFIXES and path.is_file():
            group = f"{path.suffix}, faulty" if path.parent.name == "faulty" else path.suffix
            found = [1, *(reads(partial(d), path) for d in (_ffmpeg_blocks, _libsndfile_blocks))]
            counts[group] = counts.get(group, np.zeros(3, int)) + np.array(found)
    assert {group: tuple(map(str, row)) for group, row in counts.items()} == table("Real files")
