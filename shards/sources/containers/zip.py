"""Zip archives of sound files, stored or deflated, with zip64.

A member is found by its local header, whose place the archive's directory gives, and is read on its own: the directory
is read once, for planning. The format is described in PKWARE's APPNOTE.TXT, 4.3.7 and 4.3.9.
"""

import os
import struct
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from erann_dist.data.audio import DecodeError
from shards.sources.containers.members import Damaged, Member, is_sound, note_archives, opened, section

# Local header: signature, flags, method, CRC, lengths of name and extra field.
_HEADER = struct.Struct("<4s2xHH4xI8xHH")
_SIGNATURE, _DESCRIPTOR = b"PK\x03\x04", b"PK\x07\x08"
_ENCRYPTED, _CRC_FOLLOWS = 1 << 0, 1 << 3
_METHODS = {9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "XZ"}
_CHUNK = 1 << 18
_IN_MEMORY_BYTES = 64 << 20  # a larger clip is unpacked to a temporary file
_MAX_BYTES = 4 << 30  # of a deflated clip: 6 hours of 16-bit stereo; more is treated as an attack


def members(path: bytes, notes: list[str]) -> Iterator[Member]:
    """The sound files in a zip: offset of the local header and size of the sound, in bytes. Raises Damaged, OSError."""
    encrypted, methods, archives = 0, Counter[str](), Counter[str]()
    try:
        with zipfile.ZipFile(os.fsdecode(path)) as archive:
            for info in archive.infolist():
                name = info.filename.replace("\\", "/")  # which some programs for Windows write
                if info.is_dir() or not is_sound(name, archives):
                    continue
                if info.flag_bits & _ENCRYPTED:
                    encrypted += 1
                elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    methods[_METHODS.get(info.compress_type, f"method {info.compress_type}")] += 1
                else:
                    yield Member(os.fsencode(name), info.header_offset, info.file_size)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        first_part = os.path.splitext(path)[0] + b".z01"
        if os.path.exists(first_part):
            stem = os.path.basename(os.path.splitext(path)[0]).decode(errors="replace")
            raise Damaged(
                f"the last part of a split archive; join the parts: zip -s 0 {stem}.zip --out {stem}-joined.zip"
            ) from error
        raise Damaged(f"damaged ({error}); fetch it again") from error
    if encrypted:
        notes.append(f"{encrypted:,} sound files are encrypted and can't be used; unpack it with its password")
    for method, count in methods.items():
        notes.append(
            f"{count:,} sound files are compressed by {method} and can't be used, only stored and deflated "
            "ones can; unpack it"
        )
    note_archives(archives, notes)


@contextmanager
def open_member(path: bytes, offset: int, size: int | None) -> Iterator[IO[bytes]]:
    """A member as a file; a deflated one is unpacked, and checked by its CRC. Raises DecodeError; OSError when a
    temporary file can't be written."""
    size = size or 0
    with opened(path) as file:
        file.seek(offset)
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_SIGNATURE):
            raise DecodeError("the archive has no file where its directory says")
        _, flags, method, crc, name, extra = _HEADER.unpack(header)
        if flags & _ENCRYPTED:
            raise DecodeError("encrypted")
        start = offset + _HEADER.size + name + extra
        if method == zipfile.ZIP_STORED:
            yield section(file, start, size)
        elif method == zipfile.ZIP_DEFLATED:
            if size > _MAX_BYTES:
                raise DecodeError(f"unpacks to {size:,} bytes, more than {_MAX_BYTES:,}; unpack the archive yourself")
            file.seek(start)
            with tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES) as unpacked:
                _inflate(file, unpacked, size, None if flags & _CRC_FOLLOWS else crc)
                unpacked.seek(0)
                yield unpacked
        else:
            raise DecodeError(
                f"compressed by {_METHODS.get(method, method)}; only stored and deflated files can be read"
            )


def _inflate(file: IO[bytes], unpacked: IO[bytes], size: int, crc: int | None) -> None:
    """Unpack `size` bytes. crc: None when it follows the data. Raises DecodeError."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    count = found = 0
    try:
        while not inflater.eof:
            data = inflater.unconsumed_tail or file.read(_CHUNK)
            if not data:
                raise DecodeError("the archive ends before the clip does")
            part = inflater.decompress(data, _CHUNK)
            count, found = count + len(part), zlib.crc32(part, found)
            if count > size:
                break
            unpacked.write(part)
    except zlib.error as error:
        raise DecodeError(f"damaged in the archive ({error})") from error
    if crc is None:
        descriptor = (inflater.unused_data + file.read(8)).removeprefix(_DESCRIPTOR)
        crc = int.from_bytes(descriptor[:4], "little")
    if (count, found) != (size, crc):
        raise DecodeError("damaged in the archive: not the size, or not the checksum, that it should have")
