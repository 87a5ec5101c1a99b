"""Is a shard set what its manifest says? Every tar is read from end to end."""

import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from erann_dist.manifest import CLIP_SCHEMA, MANIFEST, SHARDS, content_hash, load_manifest


def verify(folder: Path) -> Iterator[tuple[int, list[str]]]:
    """Check shard by shard: (clips checked, problems found, a line each). The first item is the manifest's own.

    Checked are the tars' sizes and checksums, the names, offsets, sizes and checksums of their members, and that clips
    and members are the same ones. Raises UserError when there is no manifest to check against.
    """
    info = load_manifest(folder).info
    clips = pq.read_table(folder / MANIFEST, columns=CLIP_SCHEMA.names)
    shards = pq.read_table(folder / SHARDS).to_pylist()
    problems = []
    if content_hash(clips.replace_schema_metadata()) != info.content_hash:
        problems.append(f"{folder / MANIFEST}: its rows are not those that were packed (content hash)")
    by_shard: dict[int, list[dict[str, Any]]] = {shard["shard"]: [] for shard in shards}
    for clip in clips.to_pylist():
        by_shard.setdefault(clip["shard"], []).append(clip)
    unknown = sorted(by_shard.keys() - {shard["shard"] for shard in shards})
    problems += [f"{folder / MANIFEST}: names shard {number}, which {SHARDS} does not list" for number in unknown]
    yield 0, problems
    for shard in shards:
        yield (
            len(by_shard[shard["shard"]]),
            _shard_problems(folder / shard["name"], shard, by_shard[shard["shard"]], info.label_ids),
        )


def _shard_problems(path: Path, shard: dict[str, Any], clips: list[dict[str, Any]], label_ids: list[str]) -> list[str]:
    if not path.exists():
        return [f"{path}: missing"]
    size = path.stat().st_size
    if size != shard["size"]:
        verb = "cut short" if size < shard["size"] else "too long"
        return [f"{path}: {verb}, {size} bytes where {SHARDS} says {shard['size']}"]
    problems = []
    if len(clips) != shard["clips"]:
        problems.append(f"{path}: {len(clips)} clips in {MANIFEST}, {shard['clips']} in {SHARDS}")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
            problems.append(f"{path}: its bytes have changed (sha256)")
    wanted = {f"{clip['key']}.flac": clip for clip in clips}
    descriptions = {f"{clip['key']}.json": clip for clip in clips}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                data = tar.extractfile(member)
                content = data.read() if data else b""
                if member.name in wanted:
                    problems += _clip_problems(path, member, content, wanted.pop(member.name))
                elif member.name in descriptions:
                    clip = descriptions.pop(member.name)
                    labels = [label_ids[i] for i in clip["labels"]]
                    if json.loads(content)["labels"] != labels:
                        problems.append(f"{path}: {member.name} has other labels than {MANIFEST}")
                else:
                    problems.append(f"{path}: {member.name} is not in {MANIFEST}, or is there twice")
    except (tarfile.TarError, OSError, ValueError, KeyError, TypeError, IndexError) as error:
        problems.append(f"{path}: not a readable tar ({error})")
    problems += [f"{path}: {name} is in {MANIFEST} and not in the tar" for name in (*wanted, *descriptions)]
    return problems


def _clip_problems(path: Path, member: tarfile.TarInfo, content: bytes, clip: dict[str, Any]) -> list[str]:
    found = {"offset": member.offset_data, "size": member.size, "crc32": zlib.crc32(content)}
    return [
        f"{path}: {member.name} has {name} {value}, {MANIFEST} says {clip[name]}"
        for name, value in found.items()
        if value != clip[name]
    ]
