"""From rows to a shard set: a plan, a pure task for each shard, and the tables at the end.

While a set is being packed, its folder contains `.pack/`: the plan's hash and the finished shards' rows. An interrupted
packing therefore resumes where it stopped, and a folder with a manifest is a finished set.
"""

import hashlib
import importlib.metadata
import io
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from erann_dist.data.audio import RESAMPLER
from erann_dist.data.manifest import (
    CLIP_SCHEMA,
    FILE_COUNTS,
    MANIFEST,
    REPORT_SCHEMA,
    SHARD_SCHEMA,
    SetInfo,
    content_hash,
    read_info,
    require_printable,
    write_shard_set_tables,
)
from erann_dist.data.permutations import SHARD_DEAL, keyed_hash, permute
from erann_dist.errors import UserError
from erann_dist.formats import strict_json, strict_parquet
from erann_dist.storage.folder import Folder
from erann_dist.words import count
from shards.clip import OLDER, Packing
from shards.packer import RowsToPack, end_tar, pack_rows
from shards.sources.rows import Source, SourceRow

_SHUFFLE_SEED = 0
_STATE = ".pack/"
# Where the files are now, which may change without changing the set.
_PLACE_COLUMNS = ["path", "offset", "size", "shared", "candidates"]
# A row's outcome: a clip or, with a reason, a row of the report.
OUTCOME_SCHEMA = pa.schema([*CLIP_SCHEMA, REPORT_SCHEMA.field("reason"), REPORT_SCHEMA.field("detail")])
_REQUESTS = 16  # concurrent reads or deletions of the state's small files


@dataclass(frozen=True)
class ShardTask:
    """Everything that building one shard needs."""

    folder: Folder
    name: str  # of the tar
    shard: int
    rows: pa.Table  # ROW_SCHEMA
    label_ids: list[str]
    packing: Packing
    state: str  # where the folder records this plan's finished shards
    sha256: str | None = None  # the tar's required hash; None: any


@dataclass(frozen=True)
class Progress:
    """How much of a shard is done."""

    rows: int = 0
    bytes: int = 0
    rejected: int = 0


@dataclass(frozen=True)
class ShardResult:
    """The result of a shard: an outcome for each of its rows and for each further file that failed (OUTCOME_SCHEMA),
    and the tar's row in shards.parquet."""

    outcomes: pa.Table
    shard: dict[str, Any]


class _ShardRow(strict_json.Record):
    """A row of shards.parquet, as `keep` records it."""

    shard: strict_json.Count
    name: strict_json.Name
    clips: strict_json.Count
    size: strict_json.Count
    sha256: strict_json.Sha256


class Differs(Exception):
    """A shard was not written because its bytes differ from the expected ones. Argument: its outcomes."""


@dataclass(frozen=True)
class Plan:
    """Which rows go into which shard. They are assigned before any decoding, so any shard can be built on its own."""

    source: Source
    packing: Packing
    folder: Folder
    # The keys that were assigned when the set was packed; without them those of the rows that have a file now.
    assigned: pa.Array | None = None

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.packing.clips_per_shard)

    @property
    def num_rows(self) -> int:
        """How many rows are assigned to shards."""
        return len(self._order)

    @cached_property
    def digest(self) -> str:
        """A hash of what decides the set's content, apart from the files' bytes and the versions."""
        return self._digest(asdict(self.packing))

    def is_of(self, info: SetInfo) -> bool:
        """Whether a finished set is of this plan: of its source and options, but for those that older sets lack."""
        options = {
            name: value
            for name, value in asdict(self.packing).items()
            if name in info.packing or name not in OLDER or (name == "channels" and value != OLDER[name])
        }
        return info.source_hash == self._digest(options)

    def _digest(self, packing: dict[str, Any]) -> str:
        facts = [self.source.name, self.source.task, self.source.label_ids, packing]
        return hashlib.sha256(json.dumps([*facts, self._rows_hash]).encode()).hexdigest()

    @cached_property
    def _rows_hash(self) -> str:
        rows = self.source.rows.drop_columns(_PLACE_COLUMNS)
        return content_hash(rows if self._is_grouped else rows.drop_columns("group"))

    @property
    def _is_grouped(self) -> bool:
        """Whether some rows are read together, so that they are in the same shard: those of a Parquet row group."""
        group = self.source.rows["group"]
        return group.null_count < len(group)

    @cached_property
    def _order(self) -> npt.NDArray[np.int64]:
        """The assigned rows, shuffled with a fixed key, so that each shard is a representative sample, or in order.

        Rows that are read together are shuffled as one, and stay in the order in which they are read.
        """
        table = self.source.rows
        rows = np.arange(len(table))
        if self.packing.assign == "present" and self.assigned is None:
            rows = rows[pc.is_null(table["reason"]).to_numpy()]
        elif self.packing.assign == "present":
            first = pc.not_equal(table["reason"].fill_null(""), "duplicate")
            rows = rows[pc.and_(first, pc.is_in(table["key"], value_set=self.assigned)).to_numpy()]
        if self.packing.order == "source" or not len(rows):
            return rows
        if not self._is_grouped:
            return rows[permute(np.arange(len(rows)), len(rows), keyed_hash(_SHUFFLE_SEED, SHARD_DEAL))]
        unit, units = _read_together(table.select(["path", "group"]).take(pa.array(rows)))
        place = np.empty(units, np.int64)  # of each unit in the shuffled order
        place[permute(np.arange(units), units, keyed_hash(_SHUFFLE_SEED, SHARD_DEAL))] = np.arange(units)
        offset = table["offset"].take(pa.array(rows)).fill_null(0).to_numpy()
        return rows[np.lexsort((offset, place[unit]))]

    def left_out(self, outcomes: pa.Table) -> pa.Table:
        """The rows that are assigned to no shard (OUTCOME_SCHEMA), with their reasons.

        outcomes: of the shards. A duplicate whose file was tried in another row's place is among them.
        """
        if self.packing.assign == "all":
            return OUTCOME_SCHEMA.empty_table()
        rows = self.source.rows.filter(pc.is_valid(self.source.rows["reason"]))
        own = self.source.rows.filter(pc.is_valid(self.source.rows["candidates"]))
        source = own["source"].take(pc.index_in(outcomes["key"], value_set=own["key"].combine_chunks()))
        tried = outcomes.filter(pc.not_equal(outcomes["source"], source))
        if len(tried):
            names = (pc.binary_join_element_wise(t["key"], t["source"], "\n") for t in (rows, tried))
            rows = rows.filter(pc.invert(pc.is_in(next(names), value_set=next(names).combine_chunks())))
        about = ("key", "labels", "split", "fold", "source", "reason", "detail")
        columns = [
            rows[field.name].cast(field.type) if field.name in about else pa.nulls(len(rows), field.type)
            for field in OUTCOME_SCHEMA
        ]
        return pa.table(columns, OUTCOME_SCHEMA)

    def task(self, shard: int) -> ShardTask:
        begin = shard * self.packing.clips_per_shard
        rows = self.source.rows.take(pa.array(self._order[begin : begin + self.packing.clips_per_shard]))
        return ShardTask(
            folder=self.folder,
            name=self.tar_name(shard),
            shard=shard,
            rows=rows.combine_chunks(),
            label_ids=self.source.label_ids,
            packing=self.packing,
            state=self.state,
        )

    def tar_name(self, shard: int) -> str:
        return f"{self.source.name}-{shard:06d}.tar"

    @property
    def state(self) -> str:
        # Named by the digest: a task of another plan whose driver was killed may still be running and write here.
        return f"{_STATE}{self.digest[:16]}/"


def _read_together(rows: pa.Table) -> tuple[npt.NDArray[np.int64], int]:
    """A number for each row, the same for those of one path and group, in the order of occurrence; and how many."""
    group = rows["group"]
    path = rows["path"].combine_chunks().dictionary_encode().indices.fill_null(0).to_numpy().astype(np.int64)
    keys = np.stack([path, group.fill_null(-1).to_numpy()], 1)
    alone = pc.is_null(group).to_numpy()
    keys[alone] = np.stack([np.full(alone.sum(), -1), np.flatnonzero(alone)], 1)
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse.reshape(-1)], len(first)


def build_shard(task: ShardTask, on_progress: Callable[[Progress], None] = lambda progress: None) -> ShardResult:
    """Decode, encode and write one shard. It appears under its name once it is complete. Same rows give the same bytes.

    Memory use grows neither with the shard nor with a clip's length. Raises Differs; UserError when the folder can't be
    written.
    """
    outcomes: list[dict[str, Any]] = []
    progress = Progress()
    rows = [SourceRow(**fields) for fields in task.rows.to_pylist()]
    with task.folder.writing(task.name) as file:
        for outcome in pack_rows(file, RowsToPack(rows, task.label_ids, task.packing)):
            others = outcome.pop("others", [])
            packed = "size" in outcome
            outcomes += [outcome | ({"shard": task.shard} if packed else {}), *others]
            size = progress.bytes + outcome.get("size", 0)
            progress = Progress(progress.rows + 1, size, progress.rejected + (not packed))
            on_progress(progress)
        end_tar(file)
        clips = progress.rows - progress.rejected
        shard = {"shard": task.shard, "name": task.name, "clips": clips, "size": file.tell(), "sha256": sha256(file)}
        table = pa.Table.from_pylist(outcomes, OUTCOME_SCHEMA)
        if task.sha256 not in (None, shard["sha256"]):
            raise Differs(table)
    return ShardResult(table, shard)


def sha256(file: BinaryIO) -> str:
    """The SHA-256 of a whole file, in hexadecimal."""
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def start(plan: Plan) -> bool:
    """Prepare the folder for the plan; False when the plan's set is already there, finished.

    Raises UserError when the folder contains another set, finished or not, or anything else, and for labels that a
    manifest can't contain.
    """
    folder = plan.folder
    require_printable(f"the {plan.source.name} source", [*plan.source.label_ids, *plan.source.label_names])
    if folder.exists(MANIFEST):
        if not plan.is_of(read_info(folder)):
            raise UserError(
                f"{folder}: contains another shard set (other rows, other files found, or other options); "
                "choose another --out or remove it"
            )
        _remove_state(folder)
        _clear_up(folder)
        return False
    if folder.exists(f"{_STATE}plan"):
        if folder.read(f"{_STATE}plan") != plan.digest.encode():
            raise UserError(f"{folder}: contains another, unfinished shard set; choose another --out or remove it")
        _clear_up(folder)
    elif not folder.is_empty():
        raise UserError(f"{folder}: exists and is not a shard set; choose another --out")
    else:
        folder.write(f"{_STATE}plan", plan.digest.encode())
    return True


def finished(plan: Plan) -> set[int]:
    """The shards that an interrupted packing finished."""
    there = plan.folder.sizes(plan.state)
    return {shard for shard in range(plan.num_shards) if _state_file(plan.state, shard) in there}


def keep(task: ShardTask, result: ShardResult) -> None:
    """Record a finished shard."""
    buffer = io.BytesIO()
    facts = {"shard": json.dumps(result.shard), "versions": json.dumps(versions())}
    pq.write_table(result.outcomes.replace_schema_metadata(facts), buffer)
    task.folder.write(_state_file(task.state, task.shard), buffer.getvalue())


def kept(plan: Plan, shards: Iterable[int]) -> list[ShardResult]:
    """What `keep` recorded of these shards. Raises UserError when one was built with other library versions."""
    with ThreadPoolExecutor(_REQUESTS) as pool:
        return list(pool.map(lambda shard: _kept(plan, shard), shards))


def _kept(plan: Plan, shard: int) -> ShardResult:
    folder = plan.folder
    name = _state_file(plan.state, shard)
    where, advice = f"{folder}/{name}", "remove it to pack its shard again"
    with folder.reading(name) as file:
        table = strict_parquet.read(file, where, OUTCOME_SCHEMA, ("key", "labels"), advice)
    facts = table.schema.metadata or {}
    there = strict_json.read(dict[strict_json.Word, strict_json.Word], facts.get(b"versions", b""), where, advice)
    row = strict_json.read(_ShardRow, facts.get(b"shard", b""), where, advice).model_dump()
    if there != versions():
        pins = " ".join(f"{name}=={version}" for name, version in there.items())
        raise UserError(
            f"{folder}/{plan.tar_name(shard)}: was packed with other library versions than these; resume with those on "
            f"every machine (pip install {pins}), or remove {folder} and start from scratch"
        )
    return ShardResult(table.replace_schema_metadata(), row)


def progress_of(result: ShardResult) -> Progress:
    """A finished shard's totals."""
    sizes = result.outcomes["size"]
    return Progress(len(sizes), pc.sum(sizes).as_py() or 0, sizes.null_count)


def _state_file(state: str, shard: int) -> str:
    return f"{state}{shard:06d}.parquet"


def _clear_up(folder: Folder) -> None:
    """Remove what killed processes left. Packing also works without the permission to do so."""
    with suppress(UserError, PermissionError):
        folder.discard_unfinished()


def finish(plan: Plan) -> SetInfo:
    """Write the tables: the folder is a shard set. Raises UserError, and clears the folder, when no clip was packed."""
    source, folder = plan.source, plan.folder
    results = kept(plan, range(plan.num_shards))
    outcomes = pa.concat_tables([result.outcomes for result in results] or [OUTCOME_SCHEMA.empty_table()])
    outcomes = pa.concat_tables([outcomes, plan.left_out(outcomes)])
    packed = pc.is_null(outcomes["reason"])
    clips = outcomes.filter(packed).select(CLIP_SCHEMA.names).replace_schema_metadata()
    report = outcomes.filter(pc.invert(packed)).select(REPORT_SCHEMA.names).replace_schema_metadata()
    if not len(clips):
        for shard in range(plan.num_shards):
            folder.delete(plan.tar_name(shard))
        _remove_state(folder)
        rows = report.slice(0, 1000).to_pylist()
        reasons = sorted({f"{row['reason']} ({row['detail']})" for row in rows})
        raise UserError(
            f"{folder}: 0 of {count(len(report), 'row')} could be packed: {'; '.join(reasons[:3])}; the first "
            f"is {rows[0]['source'] or rows[0]['key']}"
        )
    info = SetInfo(
        name=source.name,
        task=source.task,
        label_ids=source.label_ids,
        label_names=source.label_names,
        sample_rate=plan.packing.sample_rate,
        codec=plan.packing.codec,
        resampler=RESAMPLER,
        versions=versions(),
        packing=asdict(plan.packing),
        source_hash=plan.digest,
        content_hash=content_hash(clips),
    )
    shards = pa.Table.from_pylist([result.shard for result in results], SHARD_SCHEMA)
    if source.files:
        report = report.replace_schema_metadata({FILE_COUNTS: json.dumps(asdict(source.files))})
    write_shard_set_tables(folder, info, clips, shards, report)
    _remove_state(folder)
    return info


def versions() -> dict[str, str]:
    """Versions of the libraries that decide a packed clip's bytes."""
    return {name: importlib.metadata.version(name) for name in ("av", "soundfile", "soxr")}


def _remove_state(folder: Folder) -> None:
    with ThreadPoolExecutor(_REQUESTS) as pool:
        list(pool.map(folder.delete, folder.sizes(_STATE)))
