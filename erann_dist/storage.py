"""A clip's bytes by shard, offset and size, checked against its CRC; and small files that are whole or not there."""

import os
import threading
import zlib
from pathlib import Path

from erann_dist.errors import UserError
from erann_dist.manifest import Manifest


def write_text(path: Path, text: str) -> None:
    """Write a file that appears under its name, or replaces the one there, only when it is whole."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)


class ClipReader:
    """Reads clips out of the shards of a manifest, from any number of threads. Close it when done."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read(self, row: int) -> bytes:
        """The FLAC file of clip `row`. Raises UserError, naming shard and key, when it is not there whole."""
        m = self._manifest
        path = m.shard_paths[m.shards[row]]
        size = int(m.sizes[row])
        try:
            data = os.pread(self._file(path), size, int(m.offsets[row]))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror} (clip {m.keys[row]})") from error
        if len(data) != size or zlib.crc32(data) != m.crc32s[row]:
            problem = "is cut short" if len(data) != size else "is damaged"
            raise UserError(f"{path}: clip {m.keys[row]} {problem}; check the set with erann verify {path.parent}")
        return data

    def _file(self, path: Path) -> int:
        with self._lock:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._files[path]

    def close(self) -> None:
        with self._lock:
            for file in self._files.values():
                os.close(file)
            self._files.clear()
