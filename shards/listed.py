"""The tables of the shard set that packing a whole segment list would give, for plans and benchmarks."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from erann_dist import SAMPLE_RATE
from erann_dist.data.manifest import (
    CLIP_SCHEMA,
    REPORT_SCHEMA,
    SHARD_SCHEMA,
    SetInfo,
    content_hash,
    write_shard_set_tables,
)
from erann_dist.errors import UserError
from erann_dist.storage.folder import LocalFolder
from shards.sources.audioset import read_audioset

CLIP_SECONDS = 10
CLIP_BYTES = 406_000  # FLAC, the mean of AudioSet's
CLIPS_PER_SHARD = 2500


def write_listed_set(segments: Path, folder: Path) -> None:
    """A shard set without its tars: a clip of 10 s for each segment. Raises UserError as read_audioset does."""
    empty = folder / "no-audio"  # except for a file that belongs to no segment
    empty.mkdir(parents=True)
    (empty / "none.wav").touch()
    source = read_audioset(segments, empty)
    rows = source.rows.filter(pc.equal(source.rows["reason"], "missing"))  # not the mislabelled or duplicate segments
    count = len(rows)
    if not count:
        raise UserError(
            f"{segments}: none of its {len(source.rows):,} segments has labels that are all in the class list"
        )
    numbers = np.arange(count)
    columns = {
        "key": rows["key"],
        "labels": rows["labels"],
        "split": rows["split"],
        "fold": pa.nulls(count, pa.int8()),
        "shard": numbers // CLIPS_PER_SHARD,
        "offset": numbers % CLIPS_PER_SHARD * (CLIP_BYTES + 10_000),
        "size": np.full(count, CLIP_BYTES),
        "samples": np.full(count, CLIP_SECONDS * SAMPLE_RATE),
        "peak": np.full(count, 0.5),
        "crc32": numbers,
        "source": rows["source"],
        "format": pa.array(["pcm 44100 Hz mono"] * count),
        "lost": pa.nulls(count),
        "channel_peak": pa.nulls(count),
    }
    clips = pa.table(columns).select(CLIP_SCHEMA.names).cast(CLIP_SCHEMA)
    sizes = np.bincount(numbers // CLIPS_PER_SHARD)
    tars = [
        {"shard": i, "name": f"audioset-{i:06d}.tar", "size": int(n) * (CLIP_BYTES + 10_000), "clips": int(n)}
        for i, n in enumerate(sizes)
    ]
    info = SetInfo(
        "audioset",
        "tagging",
        source.label_ids,
        source.label_names,
        SAMPLE_RATE,
        "flac",
        resampler={},
        versions={},
        packing={},
        source_hash="",
        content_hash=content_hash(clips),
    )
    shards = pa.Table.from_pylist(tars, SHARD_SCHEMA)
    write_shard_set_tables(LocalFolder(str(folder)), info, clips, shards, REPORT_SCHEMA.empty_table())
