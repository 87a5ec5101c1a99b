"""The node's clip cache: clips, not shards, on a local disk, shared by all workers and jobs of the node.

    DIR/slab-00017            records, one behind the other: a header, then the clip's bytes
    DIR/index-<set>           for each clip of a set, in its manifest's order, 8 bytes: slab and place, or 0

A record is written before its place in the index, and is believed only if its header names the clip that was asked for
and its checksum holds. So a process may be killed and a file be cut or spoiled at any moment: what is not whole is a
miss. A slab is written by one process at a time, which holds its lock, and is adopted by the next one. Nothing is ever
thrown out: with balanced draws a tenth of the clips takes most of the reads, whichever come first stay.
"""

import fcntl
import os
import struct
import threading
from dataclasses import dataclass
from pathlib import Path

from isal import isal_zlib

from erann_dist.errors import UsageError
from erann_dist.recipe import CacheForm
from erann_dist.storage.open_files import OpenFile, OpenFiles

_HEADER = struct.Struct("<4s4xQQII")  # magic, set, row, bytes, CRC-32 of the bytes
_MAGIC = b"ERC1"
_ENTRY = struct.Struct("<Q")  # (slab + 1) << 40 | place / 16
_ALIGN = 16
_SLAB_BYTES = 1 << 30


@dataclass(frozen=True)
class ClipId:
    """Which clip, in which form."""

    set_hash: str  # content_hash of its shard set
    row: int  # in that set's manifest
    form: CacheForm
    size: int  # bytes, in this form


class ClipCache:
    """A cache in a folder, for any number of threads. All who share the folder should give the same max_bytes.

    form: in which ClipReader keeps clips here; those of the other form that are there stay unused. The slabs together
    are never larger than max_bytes. Raises UsageError when there is no folder to be had.
    """

    def __init__(self, folder: Path, max_bytes: int, form: CacheForm = "flac") -> None:
        self.form: CacheForm = form
        self._folder = folder
        self._slab_bytes = min(_SLAB_BYTES, max_bytes // 16)
        self._slabs = max_bytes // max(1, self._slab_bytes)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{folder}: no cache can be kept here ({error.strerror})") from error
        self._lock = threading.Lock()
        self._files = OpenFiles[str]()
        self._own: OpenFile | None = None  # the slab that this process appends to, which it holds the lock of
        self._slab = -1  # that this process appends to
        self._end = 0  # of the records in it
        self._untried = 0  # the next slab to ask for
        self.keeping = True  # what comes
        self.problem: str | None = None  # why some clips, or all that come now, are not kept

    def has(self, clip: ClipId) -> bool:
        """Whether it seems to be there."""
        return self._entry(clip) != 0

    def get(self, clip: ClipId, into: memoryview) -> bool:
        """Fill `into`, of the clip's size, with its bytes, if they are there and whole."""
        header = bytearray(_HEADER.size)
        slab, place = divmod(self._entry(clip), 1 << 40)
        if not slab:
            return False
        try:
            file = self._file(f"slab-{slab - 1:05d}", 0)
            size = os.preadv(file.descriptor, [header, into], place * _ALIGN)
        except OSError:
            return False
        whole = size == len(header) + clip.size
        return whole and header == _header(clip, into)

    def put(self, clip: ClipId, data: bytes | memoryview) -> None:
        """Keep the clip's bytes, of its size, if there is room."""
        record = [_header(clip, data), data]
        size = _HEADER.size + clip.size
        room = -(-size // _ALIGN) * _ALIGN
        try:
            with self._lock:
                if not self.keeping:
                    return
                if room > self._slab_bytes:
                    self.problem = f"{self._folder}: max_bytes is too small for a clip of {room} bytes"
                    return
                if not self._make_room(room):
                    self.keeping = False
                    self.problem = f"{self._folder}: the cache is full; other clips are read from their shards"
                    return
                slab, place, file = self._slab, self._end, self._own  # its lock is held until the record is written
                self._end += room
            assert file
            if os.pwritev(file.descriptor, record, place) == size:
                entry = _ENTRY.pack((slab + 1) << 40 | place // _ALIGN)
                index = self._file(_index_name(clip), os.O_CREAT)
                os.pwrite(index.descriptor, entry, clip.row * _ENTRY.size)
        except OSError as error:
            self.keeping = False
            self.problem = f"{self._folder}: nothing more is kept in the cache ({error.strerror})"

    def _entry(self, clip: ClipId) -> int:
        """Its place in the slabs by the index, or 0."""
        try:
            entry = os.pread(self._file(_index_name(clip), 0).descriptor, _ENTRY.size, clip.row * _ENTRY.size)
        except OSError:
            return 0
        return int(_ENTRY.unpack(entry)[0]) if len(entry) == _ENTRY.size else 0

    def close(self) -> None:
        with self._lock:
            self._own = None
            self._files.close()

    def _make_room(self, size: int) -> bool:
        """See that the own slab has room; take another, or a new one, if not."""
        if self._slab >= 0 and self._end + size <= self._slab_bytes:
            return True
        while self._untried < self._slabs:
            number, self._untried = self._untried, self._untried + 1
            # Not one of _files, which may be closed: its lock is to stay.
            file = OpenFile(self._folder / f"slab-{number:05d}", os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(file.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed
            except BlockingIOError:  # another process holds it
                continue
            end = -(-os.fstat(file.descriptor).st_size // _ALIGN) * _ALIGN
            if end + size <= self._slab_bytes:
                self._slab, self._end, self._own = number, end, file
                return True
        return False

    def _file(self, name: str, create: int) -> OpenFile:
        return self._files.get(name, lambda: OpenFile(self._folder / name, os.O_RDWR | create))


def _index_name(clip: ClipId) -> str:
    return f"index-{clip.set_hash[:16]}-{clip.form}"


def _header(clip: ClipId, data: bytes | memoryview) -> bytes:
    """Of its record. The number of set and form tells it apart from the clips of all others."""
    number = int(clip.set_hash[:16], 16) ^ isal_zlib.crc32(clip.form.encode())
    return _HEADER.pack(_MAGIC, number, clip.row, clip.size, isal_zlib.crc32(data))
