"""The node's clip cache: clips, not shards, on a local disk, shared by all workers and jobs of the node.

    DIR/slab-00017            consecutive records: a header, then the clip's bytes
    DIR/index-<set>           for each clip of a set, in its manifest's order, 8 bytes: slab and offset, or 0

A record is written before its index entry, and is used only if its header names the requested clip and its checksum
matches. A process may therefore be killed, and a file truncated or damaged, at any moment: an incomplete record is a
miss. A slab is written by one process at a time, which holds its lock; the next process appends to it. There is no
eviction: with balanced sampling a tenth of the clips take most of the reads, and the clips that come first stay.
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
_ENTRY = struct.Struct("<Q")  # (slab + 1) << 40 | offset / 16
_ALIGN = 16
_SLAB_BYTES = 1 << 30


@dataclass(frozen=True)
class ClipId:
    """Identifies a clip in one form."""

    set_hash: str  # content_hash of its shard set
    row: int  # in that set's manifest
    form: CacheForm
    size: int  # bytes, in this form


class ClipCache:
    """A cache in a folder, for any number of threads. All processes that share it should use the same max_bytes.

    form: how ClipReader stores clips here; existing clips of the other form stay unused. The slabs together never
    exceed max_bytes. Raises UsageError when the folder can't be created.
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
        self._own: OpenFile | None = None  # the slab that this process appends to, and whose lock it holds
        self._slab = -1  # the number of that slab
        self._end = 0  # where its records end
        self._untried = 0  # the next slab to try
        self.keeping = True  # whether new clips are stored
        self.problem: str | None = None  # why some clips, or all further ones, are not stored

    def has(self, clip: ClipId) -> bool:
        """Whether the index lists the clip."""
        return self._entry(clip) != 0

    def get(self, clip: ClipId, into: memoryview) -> bool:
        """Fill `into`, of the clip's size, with the clip's bytes; False if they are missing or damaged."""
        header = bytearray(_HEADER.size)
        slab, position = divmod(self._entry(clip), 1 << 40)
        if not slab:
            return False
        try:
            file = self._file(f"slab-{slab - 1:05d}", 0)
            size = os.preadv(file.descriptor, [header, into], position * _ALIGN)
        except OSError:
            return False
        whole = size == len(header) + clip.size
        return whole and header == _header(clip, into)

    def put(self, clip: ClipId, data: bytes | memoryview) -> None:
        """Store the clip's bytes, of its size, if there is space."""
        record = [_header(clip, data), data]
        size = _HEADER.size + clip.size
        padded = -(-size // _ALIGN) * _ALIGN
        try:
            with self._lock:
                if not self.keeping:
                    return
                if padded > self._slab_bytes:
                    self.problem = f"{self._folder}: max_bytes is too small for a clip of {padded} bytes"
                    return
                if not self._find_space(padded):
                    self.keeping = False
                    self.problem = f"{self._folder}: the cache is full; further clips are read from their shards"
                    return
                slab, offset, file = self._slab, self._end, self._own  # its lock is held until the record is written
                self._end += padded
            assert file
            if os.pwritev(file.descriptor, record, offset) == size:
                entry = _ENTRY.pack((slab + 1) << 40 | offset // _ALIGN)
                index = self._file(_index_name(clip), os.O_CREAT)
                os.pwrite(index.descriptor, entry, clip.row * _ENTRY.size)
        except OSError as error:
            self.keeping = False
            self.problem = f"{self._folder}: no more clips are cached ({error.strerror})"

    def _entry(self, clip: ClipId) -> int:
        """The clip's index entry, or 0."""
        try:
            entry = os.pread(self._file(_index_name(clip), 0).descriptor, _ENTRY.size, clip.row * _ENTRY.size)
        except OSError:
            return 0
        return int(_ENTRY.unpack(entry)[0]) if len(entry) == _ENTRY.size else 0

    def close(self) -> None:
        with self._lock:
            self._own = None
            self._files.close()

    def _find_space(self, size: int) -> bool:
        """Make sure that the current slab has space for the record; if not, take another one or create one."""
        if self._slab >= 0 and self._end + size <= self._slab_bytes:
            return True
        while self._untried < self._slabs:
            number, self._untried = self._untried, self._untried + 1
            # Not from _files, which may close it: the lock must be kept.
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
    """The header of the clip's record. The number distinguishes its set and form from all others."""
    number = int(clip.set_hash[:16], 16) ^ isal_zlib.crc32(clip.form.encode())
    return _HEADER.pack(_MAGIC, number, clip.row, clip.size, isal_zlib.crc32(data))
