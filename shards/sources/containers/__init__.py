"""Archives whose clips are packed without unpacking them. To add a kind, add a file here and an entry in CONTAINERS."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import IO

from erann_dist.data.audio import Block
from shards.sources.containers import hdf5, parquet, tar, zip
from shards.sources.containers.members import ARCHIVE_SUFFIXES, Damaged, Member

__all__ = ["COMPRESSED_TARS", "CONTAINERS", "Container", "Damaged", "Member", "container_of"]

# These have no random access: reaching the last clip means unpacking all of the others.
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")


@dataclass(frozen=True)
class Container:
    """One kind of archive."""

    # The clips that it contains, without reading their sound. Appends to `notes` what the user should know; raises
    # Damaged, also after some members, and OSError.
    members: Callable[[bytes, list[str]], Iterator[Member]]  # path, notes
    # A member's sound, either as a file to decode or as samples. Raises DecodeError.
    open: Callable[[bytes, int, int | None], AbstractContextManager[IO[bytes] | Block]]  # path, offset, size


_HDF5 = Container(hdf5.members, hdf5.open_member)
# By suffix, in lower case.
CONTAINERS = {
    ".tar": Container(tar.members, tar.open_member),
    ".zip": Container(zip.members, zip.open_member),
    ".parquet": Container(parquet.members, parquet.open_member),
    ".h5": _HDF5,
    ".hdf5": _HDF5,
    ".hdf": _HDF5,
}
assert tuple(CONTAINERS) == ARCHIVE_SUFFIXES


def container_of(path: bytes) -> Container | None:
    """What reads the file, by its suffix."""
    return CONTAINERS.get(os.path.splitext(path)[1].lower().decode(errors="replace"))
