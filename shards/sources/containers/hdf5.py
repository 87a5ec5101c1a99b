"""HDF5 packs of AudioSet: PANNs' waveforms, and the MP3 files of PaSST and EfficientAT.

Both have audio_name, such as Y--1yEIfaOVA.wav. PANNs' have waveform, (clips, samples) int16, and the attribute
sample_rate: utils/dataset.py of github.com/qiuqiangkong/audioset_tagging_cnn. The others have mp3, a file's bytes for
each clip: audioset/prepare_scripts of github.com/kkoutini/PaSST.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np

from erann_dist.data.audio import Block, DecodeError, NoSamples
from erann_dist.errors import UserError
from shards.sources.containers.members import Damaged, Member
from shards.sources.rows import printable

_CHUNK = 65_536  # names at a time
_ERRORS = (OSError, KeyError, ValueError, RuntimeError)  # of h5py, for a damaged file


def members(path: bytes, notes: list[str]) -> Iterator[Member]:
    """The clips of a pack: their rows. Raises Damaged, also for another HDF5 file; UserError without h5py."""
    with _open(path) as pack:
        if "audio_name" not in pack or ("waveform" not in pack and "mp3" not in pack):
            raise Damaged("not a pack of PANNs or PaSST, which contains audio_name, and waveform or mp3")
        names, sound = pack["audio_name"], pack["mp3" if "mp3" in pack else "waveform"]
        if len(names) != len(sound):
            raise Damaged(f"{len(names):,} names for {len(sound):,} clips; fetch it again")
        if "mp3" not in pack:
            if sound.dtype != np.int16 and sound.dtype.kind != "f":
                raise Damaged(f"its waveform is {sound.dtype}, where int16 or float32 is needed")
            if "sample_rate" not in pack.attrs:
                raise Damaged("has no attribute sample_rate, so that the rate of its waveform is unknown")
        for begin in range(0, len(names), _CHUNK):
            for row, name in enumerate(names[begin : begin + _CHUNK], begin):
                if not isinstance(name, bytes):
                    raise Damaged(f"its audio_name is {names.dtype}, where text is needed")
                yield Member(bytes(name), row)


@contextmanager
def open_member(path: bytes, row: int, size: int | None) -> Iterator[IO[bytes] | Block]:
    """A row's sound: of PANNs' packs the samples, full scale is 32768 for int16 and 1 for floats; of others the file.
    Raises DecodeError."""
    try:
        with _open(path) as pack:
            if "mp3" in pack:
                sound: IO[bytes] | Block = io.BytesIO(np.asarray(pack["mp3"][row], np.uint8).tobytes())
            else:
                samples, rate = pack["waveform"][row], int(pack.attrs["sample_rate"])
                scale = 32768 if samples.dtype == np.int16 else 1
                sound = Block(
                    samples.astype(np.float32) / np.float32(scale), rate, f"hdf5 {samples.dtype} {rate} Hz mono"
                )
    except Damaged as error:
        raise DecodeError(str(error)) from error
    except _ERRORS as error:
        raise DecodeError(str(error).partition("\n")[0]) from error
    if isinstance(sound, io.BytesIO) and not sound.getbuffer().nbytes:
        raise NoSamples("0 bytes")
    yield sound


@contextmanager
def _open(path: bytes):  # type: ignore[no-untyped-def]  # h5py is optional
    """An HDF5 file, open for reading. Raises Damaged when it is not HDF5, UserError when h5py is not installed."""
    try:
        import h5py
    except ImportError as error:
        raise UserError(f"{printable(path)}: reading HDF5 needs h5py: pip install 'erann-dist[hdf5]'") from error
    try:
        pack = h5py.File(os.fsdecode(path), "r")
    except OSError as error:
        raise Damaged(f"not an HDF5 file, or a damaged one ({error})") from error
    with pack:
        yield pack
