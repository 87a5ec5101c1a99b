"""Reads a clip's sound by its row, from the node's cache or from its tar on a disk or in S3; both are checked."""

import os
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from isal import isal_zlib

from erann_dist.data.audio import DecodeError, clip_buffer
from erann_dist.data.cache import ClipCache, ClipId
from erann_dist.data.manifest import Manifest, Tar
from erann_dist.errors import UserError, naming
from erann_dist.storage.folder import LocalFolder
from erann_dist.storage.open_files import OpenFile, OpenFiles
from erann_dist.storage.s3_ranges import S3Object
from erann_dist.storage.slow_reads import SlowReads


class BadClip(UserError):
    """A clip that is damaged at its origin, or does not decode."""

    def __init__(self, key: str, text: str, fix: str) -> None:
        super().__init__(text, fix)
        self.key = key
        self.args = (key, text, fix)  # so that it can be pickled


class _DamagedError(Exception):
    """The bytes of a clip are not those that were packed. Argument: the problem."""


def bad_clip(manifest: Manifest, row: int, problem: str) -> BadClip:
    """The error for a clip. problem: such as "is damaged" or "does not decode"."""
    tar, key = manifest.tars[manifest.shards[row]], manifest.keys[row].as_py()
    return BadClip(key, f"{tar}: clip {key} {problem}", f"check the set with erann verify {tar.folder}")


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: it appears under its name, or replaces the existing one, only once it is complete."""
    part = path.with_name(f"{path.name}.part")
    with naming(path):
        part.write_text(text)
        part.replace(path)


@dataclass
class ReadStats:
    """Counts what was read, by any number of threads."""

    counts: Counter[str] = field(default_factory=Counter)  # clips_cache, clips_origin, bytes_cache, bytes_origin
    slow: SlowReads = field(default_factory=SlowReads)


class ClipReader:
    """Reads clips of a manifest, from any number of threads. Close it when done. stats: updated with each read."""

    def __init__(
        self,
        manifest: Manifest,
        cache: ClipCache | None = None,
        stats: ReadStats | None = None,
    ) -> None:
        self._manifest = manifest
        self._cache = cache
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._s3_tars: dict[int, _S3Tar] = {}
        self._files = OpenFiles[int]()  # of tars on a disk, by number
        self._stats = stats or ReadStats()

    def must_fetch(self, row: int) -> bool:
        """Whether the clip is in S3 and apparently not in the cache."""
        m = self._manifest
        if isinstance(m.tars[m.shards[row]].folder, LocalFolder):
            return False
        return not (self._cache and self._cache.has(self._clip_id(row)))

    def fetch(self, row: int, careful: bool = False) -> bytes:
        """A clip as it is in S3, unchecked. Raises UserError when its tar is missing or does not match the manifest."""
        m = self._manifest
        with self._named(row):
            return self._s3_tar(row).read(int(m.offsets[row]), int(m.sizes[row]), careful)

    def crop(self, row: int, start: int, out: npt.NDArray[np.int16], fetched: Future[bytes] | None = None) -> None:
        """Write samples start .. start + count of clip `row` to out, (count,).

        fetched: the future of fetch(row), if that was submitted.

        Raises BadClip, which names key and tar, for a clip that is damaged or does not decode even when it is read
        again from its tar; UserError when its tar is missing or does not match the manifest.
        """
        if self._cache and fetched is None and self._cached(self._cache, row, start, out):
            return
        for careful in (False, True):
            try:
                self._read_origin(row, careful, None if careful else fetched)
                clip_buffer().crop(start, len(out), out)
                # A clip that was requested twice before it arrived is stored once; a damaged record must be replaced.
                if self._cache and self._cache.keeping and not (fetched and self._cache.has(self._clip_id(row))):
                    self._keep(self._cache, row)
                return
            except _DamagedError as error:
                problem = str(error)
            except DecodeError as error:
                problem = f"does not decode: {error}"
        raise bad_clip(self._manifest, row, problem)

    def stop(self) -> None:
        """From now on, do not retry failed reads from S3: nobody is waiting for them any more."""
        self._stop.set()

    def close(self) -> None:
        self._files.close()
        with self._lock:
            for tar in self._s3_tars.values():
                tar.close()
            self._s3_tars.clear()

    def _cached(self, cache: ClipCache, row: int, start: int, out: npt.NDArray[np.int16]) -> bool:
        """Whether the crop could be read from the cache."""
        clip = self._clip_id(row)
        data = clip_buffer().room(clip.size)
        if not cache.get(clip, data):
            return False
        if clip.form == "pcm":
            out[:] = np.frombuffer(data, "<i2")[start : start + len(out)]
        else:
            try:
                clip_buffer().crop(start, len(out), out)
            except DecodeError:
                return False
        self._count("cache", clip.size)
        return True

    def _keep(self, cache: ClipCache, row: int) -> None:
        """Cache the clip that is in the thread's buffer."""
        m = self._manifest
        if cache.form == "pcm":
            pcm = np.empty(m.samples[row], np.int16)
            clip_buffer().crop(0, len(pcm), pcm)
            cache.put(self._clip_id(row), pcm.astype("<i2").tobytes())
        else:
            cache.put(self._clip_id(row), clip_buffer().held())

    def _read_origin(self, row: int, careful: bool, fetched: Future[bytes] | None) -> None:
        """Read the clip as it is in its tar into the thread's buffer.

        Raises UserError, and _DamagedError when it is not what was packed.
        """
        m = self._manifest
        data = clip_buffer().room(int(m.sizes[row]))
        tar = m.tars[m.shards[row]]
        if isinstance(tar.folder, LocalFolder):
            with self._named(row):
                file = self._files.get(int(m.shards[row]), lambda: _opened(tar))
                size = os.preadv(file.descriptor, [data], int(m.offsets[row]))
            if size != len(data):
                raise _DamagedError("is truncated")
        else:
            data[:] = fetched.result() if fetched else self.fetch(row, careful)
        self._count("origin", len(data))
        if isal_zlib.crc32(data) != m.crc32s[row]:
            raise _DamagedError("is damaged")

    @contextmanager
    def _named(self, row: int) -> Iterator[None]:
        """Turn an error of the disk, or a missing object, into a UserError that names the tar and the clip."""
        m = self._manifest
        try:
            yield
        except OSError as error:
            raise UserError(f"{m.tars[m.shards[row]]}: {error.strerror} (clip {m.keys[row]})") from error

    def _s3_tar(self, row: int) -> "_S3Tar":
        number = int(self._manifest.shards[row])
        with self._lock:
            if number not in self._s3_tars:
                self._s3_tars[number] = _S3Tar(self._manifest.tars[number], self._stop, self._stats.slow)
            return self._s3_tars[number]

    def _clip_id(self, row: int) -> ClipId:
        m = self._manifest
        form = self._cache.form if self._cache else "flac"
        size = m.sizes[row] if form == "flac" else 2 * m.samples[row]
        return ClipId(m.tars[m.shards[row]].set_hash, int(m.rows[row]), form, int(size))

    def _count(self, source: str, size: int) -> None:
        with self._lock:
            self._stats.counts[f"clips_{source}"] += 1
            self._stats.counts[f"bytes_{source}"] += size


def _opened(tar: Tar) -> OpenFile:
    """A tar on a disk. Raises OSError, and UserError when its size is not that in the set's tables."""
    file = OpenFile(str(tar), os.O_RDONLY)
    size = os.fstat(file.descriptor).st_size
    if size != tar.size:
        raise _wrong_size(tar, size)
    return file


class _S3Tar:
    def __init__(self, tar: Tar, stop: threading.Event, slow: SlowReads) -> None:
        assert not isinstance(tar.folder, LocalFolder)
        self._tar = tar
        self._object = S3Object(tar.folder, tar.name, stop, slow)

    def read(self, start: int, size: int, careful: bool) -> bytes:
        if self._object.size != self._tar.size:
            raise _wrong_size(self._tar, self._object.size)
        return self._object.read_carefully(start, size) if careful else self._object.read(start, size)

    def close(self) -> None:
        self._object.close()


def _wrong_size(tar: Tar, size: int) -> UserError:
    return UserError(
        f"{tar}: has {size} bytes, not the {tar.size} of the set's tables: it was truncated or replaced; "
        f"check the set with erann verify {tar.folder}"
    )
