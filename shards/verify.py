"""Checks that a shard set matches its manifest. Every tar is read in full, every clip is decoded."""

import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from erann_dist.data.audio import DecodeError, measure
from erann_dist.data.manifest import MANIFEST, SHARDS, SetInfo, content_hash, read_manifest, read_table
from erann_dist.environment import usable_cpus
from erann_dist.errors import UserError
from erann_dist.formats import strict_json
from erann_dist.storage.folder import Folder

_MAX_TEXT_BYTES = 1_000_000  # of a clip's labels


@dataclass(frozen=True)
class Problem:
    """A mismatch between the tables and the tars."""

    text: str  # one line
    shard: int | None = None  # the shard whose rebuilding would fix it


def verify(folder: Folder, quick: bool = False) -> Iterator[tuple[int, list[Problem]]]:
    """Check the tables, then shard by shard: (clips checked, problems found).

    It checks the tars' sizes and checksums; the names, offsets, sizes and checksums of their members; that each clip is
    mono 16-bit sound of the manifest's length and rate; that every clip has a member and vice versa. With `quick` it
    checks only sizes and tables, and reads no tar. Raises UserError when there is no manifest to check against.
    """
    info, clips = read_manifest(folder)
    shards = read_table(folder, SHARDS).to_pylist()
    sizes = {name: size for name, size in folder.sizes().items() if name.endswith(".tar")}
    numbers = {shard["shard"] for shard in shards}
    extra = sizes.keys() - {shard["name"] for shard in shards}
    problems = [Problem(f"{folder}/{name}: extra, {SHARDS} does not list it") for name in sorted(extra)]
    if content_hash(clips) != info.content_hash:
        problems.append(Problem(f"{folder}/{MANIFEST}: its rows are not those that were packed (content hash)"))
    problems += [
        Problem(f"{folder}/{MANIFEST}: names shard {number}, which {SHARDS} does not list")
        for number in sorted(set(pc.unique(clips["shard"]).to_pylist()) - numbers)
    ]
    yield 0, problems
    clips = clips.sort_by("shard")
    numbers_of_clips = clips["shard"].to_numpy()

    def check(shard: dict[str, Any]) -> tuple[int, list[Problem]]:
        first, end = np.searchsorted(numbers_of_clips, [shard["shard"], shard["shard"] + 1])
        mine = clips.slice(first, end - first)
        lines = _table_problems(sizes.get(shard["name"]), shard, mine)
        if not quick and sizes.get(shard["name"]) == shard["size"]:
            try:
                with folder.stream(shard["name"]) as file:
                    lines += _tar_problems(file, shard, mine, info)
            except (OSError, UserError) as error:
                lines.append(f"can't be read ({error})")
        return len(mine), [Problem(f"{folder}/{shard['name']}: {line}", shard["shard"]) for line in lines]

    with ThreadPoolExecutor(usable_cpus()) as pool:
        yield from pool.map(check, shards)


def _table_problems(size: int | None, shard: dict[str, Any], clips: pa.Table) -> list[str]:
    """The problems that can be found without reading the tar."""
    if size is None:
        return ["missing"]
    if size != shard["size"]:
        problem = "truncated" if size < shard["size"] else "too long"
        return [f"{problem}, {size} bytes where {SHARDS} has {shard['size']}"]
    problems = []
    if len(clips) != shard["clips"]:
        problems.append(f"{len(clips)} clips in {MANIFEST}, {shard['clips']} in {SHARDS}")
    last = pc.subtract(pa.scalar(size, pa.int64()), pc.cast(clips["size"], pa.int64()))  # offset for this size
    negative = pc.less(pc.min_element_wise(clips["offset"], clips["size"]), 0)
    beyond = clips.filter(pc.or_(pc.greater(clips["offset"], last), negative))
    return problems + [f"{key} is beyond its end" for key in beyond["key"].to_pylist()]


class _Hashed(io.RawIOBase):
    """A file that computes the SHA-256 of what is read from it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._sha256.update(data)
        return data

    def sha256_to_the_end(self) -> str:
        while self.read(1 << 20):
            pass
        return self._sha256.hexdigest()


def _tar_problems(file: BinaryIO, shard: dict[str, Any], clips: pa.Table, info: SetInfo) -> list[str]:
    """The problems found in one pass over the tar. Raises OSError, UserError when it can't be read to its end."""
    hashed = _Hashed(file)
    problems = []
    wanted = {clip["offset"]: clip for clip in clips.to_pylist()}
    # The tars of an indexed set were made by another program, with any names and further members.
    ours = bool(info.packing)
    descriptions = {f"{clip['key']}.json": clip for clip in wanted.values()} if ours else {}
    try:
        with tarfile.open(fileobj=hashed, mode="r|") as tar:
            for member in tar:
                # A sparse file of a few bytes in the tar may yield terabytes.
                content = tar.extractfile(member) if member.isreg() and not member.issparse() else None
                if content and (clip := wanted.pop(member.offset_data, None)):
                    name = f"{clip['key']}.{info.codec}"
                    if ours and member.name != name:
                        problems.append(f"{member.name} is where {MANIFEST} has {name}")
                    problems += _clip_problems(member.name, content.read(), clip, info)
                elif content and member.name in descriptions:
                    labels = [info.label_ids[i] for i in descriptions.pop(member.name)["labels"]]
                    if member.size > _MAX_TEXT_BYTES or strict_json.loads(content.read())["labels"] != labels:
                        problems.append(f"{member.name} has different labels than {MANIFEST}")
                elif ours:
                    problems.append(f"{member.name} is not in {MANIFEST}, or occurs twice")
    except (tarfile.TarError, ValueError, KeyError, TypeError, IndexError) as error:
        problems.append(f"not a readable tar ({error})")
    missing = [f"{clip['key']}.{info.codec}" for clip in wanted.values()] + list(descriptions)
    changed = hashed.sha256_to_the_end() != shard["sha256"]
    return (
        ["its bytes have changed (sha256)"] * changed
        + problems
        + [f"{name} is in {MANIFEST} but not in the tar" for name in missing]
    )


def _clip_problems(name: str, data: bytes, clip: dict[str, Any], info: SetInfo) -> list[str]:
    found = {"size": len(data), "crc32": zlib.crc32(data)}
    problems = [
        f"{name} has {what} {value}, {MANIFEST} has {clip[what]}"
        for what, value in found.items()
        if value != clip[what]
    ]
    if problems:
        return problems
    try:
        samples, rate = measure(io.BytesIO(data))
    except DecodeError as error:
        return [f"{name} is not {info.codec.upper()} ({error})"]
    if (samples, rate) != (clip["samples"], info.sample_rate):
        listed = f"{clip['samples']} samples at {info.sample_rate} Hz"
        return [f"{name} has {samples} samples at {rate} Hz, {MANIFEST} has {listed}"]
    return []
