"""The tars that a pattern names, on a disk or in S3, and reading their members.

A tar's location is bytes, as in the rows of a source: an absolute path, `s3://bucket/key`, or `ENDPOINT#s3://bucket/key`
for a server other than the environment's.
"""

import atexit
import functools
import glob
import gzip
import os
import re
import shutil
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import takewhile
from typing import IO, TYPE_CHECKING, BinaryIO

from erann_dist.errors import UsageError, UserError
from erann_dist.storage.folder import LocalFolder, open_folder
from erann_dist.storage.ranged_file import ranged_file
from shards.sources.containers import COMPRESSED_TARS

if TYPE_CHECKING:  # a decoder process starts in half the time without S3
    from erann_dist.storage.s3_ranges import S3Object

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_OTHER_SUFFIXES = tuple(suffix for suffix in COMPRESSED_TARS if suffix not in TAR_SUFFIXES)  # to be unpacked first
_MOST_TARS = 100_000  # of a brace pattern
_HEADER_BYTES = 1 << 18  # of a request for headers in S3; small files are read along with it
_RANGE = 16 << 20  # bytes of a request for sound
_COPIED = 1 << 20  # bytes copied at a time
_FREE_BYTES = 1 << 30  # left on the disk to which tars are unpacked
_S3 = "s3://"


@dataclass(frozen=True)
class FoundTar:
    """A tar that a pattern names."""

    url: str  # an absolute path, or s3://bucket/key
    name: str  # below the folder that contains all of the pattern's tars
    endpoint: str | None = None  # of the S3 server, if given

    def __str__(self) -> str:
        return self.url

    @property
    def location(self) -> bytes:
        return os.fsencode(f"{self.endpoint}#{self.url}" if self.endpoint and self.url.startswith(_S3) else self.url)

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return next(self.name[: -len(end)] for end in (*reversed(TAR_SUFFIXES), "") if self.name.endswith(end))


def find_tars(pattern: str, endpoint: str | None = None) -> list[FoundTar]:
    """The tars of a brace pattern, a glob or a folder, or a single one, each once; a folder's and a glob's are sorted.

    Raises UsageError when a part of the pattern names none.
    """
    urls: dict[str, None] = {}
    for part in expand_braces(pattern) if not os.path.exists(pattern) else [pattern]:
        found = _s3_urls(part, endpoint) if "://" in part else _paths(os.path.expanduser(part))
        if other := next((url for url in found if url.endswith(_OTHER_SUFFIXES)), None):
            raise UsageError(
                f"{other}: only {', '.join(TAR_SUFFIXES)} files can be read; unpack it first, or leave it out"
            )
        if not found:
            kinds = " or ".join(TAR_SUFFIXES)
            raise UsageError(
                f"--tars {pattern}: no {kinds} file at {part}" if part != pattern else f"{part}: no {kinds}"
            )
        urls |= dict.fromkeys(found)
    if len({url.startswith(_S3) for url in urls}) > 1:
        raise UsageError(f"--tars {pattern}: some of the tars are in S3 and others are not")
    first, last = (edge(url.split("/")[:-1] for url in urls) for edge in (min, max))
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    return [FoundTar(url, "/".join(url.split("/")[common:]), endpoint) for url in urls]


def expand_braces(pattern: str) -> list[str]:
    """The names that a shell makes of `{000..099}`, `{a,b}` and several of them, each once. Raises UsageError."""
    done: dict[str, None] = {}
    waiting = [pattern]
    while waiting:
        text = waiting.pop()
        for brace in re.finditer(r"\{([^{}]*)\}", text):
            if (choices := _choices(pattern, brace[1])) is not None:
                waiting += (text[: brace.start()] + choice + text[brace.end() :] for choice in reversed(choices))
                break
        else:
            done[text] = None
        if len(waiting) + len(done) > _MOST_TARS:
            raise UsageError(f"--tars {pattern}: names more than {_MOST_TARS:,} tars")
    return list(done)


def _choices(pattern: str, text: str) -> list[str] | None:
    """What a brace stands for; None if it is no pattern."""
    if "," in text:
        return text.split(",")
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)(?:\.\.(\d+))?", text)
    if not numbers:
        return None
    first, last, step = int(numbers[1]), int(numbers[2]), int(numbers[3] or 1) or 1
    if abs(last - first) // step >= _MOST_TARS:
        raise UsageError(f"--tars {pattern}: names more than {_MOST_TARS:,} tars")
    padded = any(len(number) > 1 and number[0] == "0" for number in numbers.group(1, 2))
    width = max(map(len, numbers.group(1, 2))) if padded else 0
    up = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    return [f"{number:0{width}d}" for number in up]


def _paths(part: str) -> list[str]:
    if os.path.isdir(part):
        names = LocalFolder(part).sizes()
        return [os.path.abspath(os.path.join(part, name)) for name in names if _is_tar(name)]
    if os.path.isfile(part):
        return [os.path.abspath(part)]
    found = glob.glob(part, recursive=True)
    return [os.path.abspath(path) for path in sorted(found) if os.path.isfile(path)]


def _s3_urls(part: str, endpoint: str | None) -> list[str]:
    open_folder(part.rstrip("/"), endpoint)  # fails for other schemes, and for credentials in a URL
    if not re.search(r"[*?[]", part):
        if part.endswith(TAR_SUFFIXES + _OTHER_SUFFIXES):
            return [part]  # reading it shows whether it is there
        folder = part.rstrip("/")
        return [f"{folder}/{name}" for name in open_folder(folder, endpoint).sizes() if _is_tar(name)]
    parts = part.split("/")
    fixed = next(i for i, each in enumerate(parts) if re.search(r"[*?[]", each))
    folder, wanted = "/".join(parts[:fixed]), parts[fixed:]
    start = re.split(r"[*?[]", wanted[0])[0]
    found = open_folder(folder, endpoint).sizes(start)
    fits = (name.split("/") for name in found)
    names = [each for each in fits if len(each) == len(wanted) and all(map(fnmatchcase, each, wanted))]
    return [f"{folder}/{'/'.join(name)}" for name in names]


def _is_tar(name: str) -> bool:
    return name.endswith(TAR_SUFFIXES + _OTHER_SUFFIXES) and not any(part.startswith(".") for part in name.split("/"))


def open_tar(tar: FoundTar) -> tuple[BinaryIO, bytes]:
    """A tar, open for reading its headers, and the location of its members.

    A gzipped one is unpacked to the temporary folder, where it stays until this process ends, as its members can't be
    read from the middle of it. Raises UsageError when there is no such file; UserError when S3 or the temporary folder
    fail.
    """
    try:
        if is_remote(tar.location):
            # Reading a tar of small members requests nearly all of it, range by range.
            opened = _s3_object(tar.location)
            file = ranged_file(opened.read, opened.size, _HEADER_BYTES)
        else:
            file = open(tar.url, "rb")  # noqa: SIM115  # the caller closes it
    except FileNotFoundError as error:
        raise UsageError(f"{tar}: no such file") from error
    except OSError as error:
        raise UsageError(f"{tar}: {error.strerror or error}") from error
    if file.read(2) == b"\x1f\x8b":
        with file:
            path = _unpack(file, tar)
        return open(path, "rb"), os.fsencode(path)
    file.seek(0)
    return file, tar.location


def is_remote(location: bytes) -> bool:
    """Whether the location is in S3."""
    return not location.startswith(b"/") and _S3.encode() in location


def copy_member(location: bytes, offset: int, size: int, into: IO[bytes]) -> None:
    """Copy a member of a tar in S3 to an open file. Raises UserError, FileNotFoundError."""
    tar = _kept_s3_object(location)
    for start in range(offset, offset + size, _RANGE):
        into.write(tar.read(start, min(_RANGE, offset + size - start)))


def _s3_object(location: bytes) -> "S3Object":
    from erann_dist.storage.s3 import S3Folder
    from erann_dist.storage.s3_ranges import S3Object

    text = os.fsdecode(location)
    endpoint, url = ("", text) if text.startswith(_S3) else text.split("#", 1)
    folder, _, name = url.rpartition("/")
    opened = open_folder(folder, endpoint or None)
    assert isinstance(opened, S3Folder)
    return S3Object(opened, name, threading.Event())


# One per tar in a process that packs a shard: the tar's size and version are asked for once.
_kept_s3_object = functools.lru_cache(maxsize=4096)(_s3_object)


@functools.cache
def _unpacked_folder() -> str:
    folder = tempfile.mkdtemp(prefix="erann-tars-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _unpack(file: BinaryIO, tar: FoundTar) -> str:
    """The path of the unpacked tar. A damaged one is unpacked as far as it goes; its reader finds its end missing."""
    file.seek(0)
    descriptor, path = tempfile.mkstemp(".tar", dir=_unpacked_folder())
    with open(descriptor, "wb") as unpacked, gzip.GzipFile(fileobj=file) as packed:
        for data in _pieces(packed.read):
            if shutil.disk_usage(path).free < _FREE_BYTES + len(data):
                raise UserError(
                    f"{tar}: not enough space to unpack it to {_unpacked_folder()}",
                    "set TMPDIR to a folder on a larger disk, or unpack the tars with gunzip",
                )
            unpacked.write(data)
    return path


def _pieces(read: Callable[[int], bytes]) -> Iterator[bytes]:
    try:
        while data := read(_COPIED):
            yield data
    except (EOFError, gzip.BadGzipFile, zlib.error):
        return
