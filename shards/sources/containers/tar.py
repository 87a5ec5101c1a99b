"""Tars of sound files."""

import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from shards.sources.containers.members import Damaged, Member, is_sound, note_archives, opened, section


def members(path: bytes, notes: list[str]) -> Iterator[Member]:
    """The sound files in a tar: offset and size in bytes. Raises Damaged, OSError."""
    count = links = 0
    archives: Counter[str] = Counter()
    try:
        with tarfile.open(os.fsdecode(path), "r:") as tar:
            for member in tar:
                if is_sound(member.name, archives):
                    if member.isreg():
                        count += 1
                        yield Member(os.fsencode(member.name), member.offset_data, member.size)
                    elif not member.isdir():
                        links += 1
                tar.members.clear()  # type: ignore[attr-defined]  # otherwise tarfile keeps every header
            require_end(tar)
    except (tarfile.TarError, OSError) as error:
        raise Damaged(f"damaged after its {count} readable clips ({error}); fetch it again") from error
    finally:
        if links:
            notes.append(f"skipped {links} links to sound files; only the files themselves are used")
        note_archives(archives, notes)


def require_end(tar: tarfile.TarFile) -> None:
    """Raise tarfile.ReadError unless the members that were read are followed by a tar's end.

    tarfile itself treats a damaged header, or a file truncated before one, as the end.
    """
    assert tar.fileobj
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("truncated, or a damaged header")


@contextmanager
def open_member(path: bytes, offset: int, size: int | None) -> Iterator[IO[bytes]]:
    """A member as a file, without scanning the tar. Raises DecodeError."""
    with opened(path) as file:
        yield section(file, offset, size or 0)
