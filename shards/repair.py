"""Rebuilding single shards of a set from its source, byte for byte."""

from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from erann_dist.data.manifest import MANIFEST, REPORT, SHARDS, SetInfo, read_manifest, read_table
from erann_dist.errors import UserError
from erann_dist.formats import strict_json
from erann_dist.storage.folder import Folder
from shards.build import Plan, ShardTask, versions
from shards.clip import OLDER, UNDECODED, Packing
from shards.sources.rows import Source


def repair_tasks(folder: Folder, source: Source, shards: Sequence[int]) -> list[ShardTask]:
    """The tasks that build these shards again. Raises UserError when they were packed from another source."""
    info, clips = read_manifest(folder, ["key", "shard"])
    listed = {shard["shard"]: shard for shard in read_table(folder, SHARDS).to_pylist()}
    plan = Plan(source, packing_of(folder, info), folder)

    def fitting(plan: Plan) -> list[ShardTask] | None:
        """The tasks of this plan, if the set can be of it."""
        tasks = [replace(plan.task(number), sha256=listed[number]["sha256"]) for number in shards]
        fits = info.name == source.name and len(listed) == plan.num_shards
        return tasks if fits and all(_holds(task, clips) for task in tasks) else None

    # A file that has disappeared or appeared since must not change which shard the others are in.
    tasks = fitting(plan)
    if tasks is None:
        tasks = fitting(replace(plan, assigned=_assigned(folder, clips["key"])))
    if tasks is not None:
        return [replace(task, rows=_as_packed(folder, task.rows)) for task in tasks]
    raise UserError(
        f"{folder}: was packed from another source: {listed[shards[0]]['name']} would contain other clips; "
        "give the list, the folders and the classes that it was packed with"
    )


def _holds(task: ShardTask, clips: pa.Table) -> bool:
    """Whether all clips of its shard are among the task's rows."""
    keys = clips.filter(pc.equal(clips["shard"], task.shard))["key"]
    return bool(pc.all(pc.is_in(keys, value_set=task.rows["key"].combine_chunks()), min_count=0).as_py())


def _assigned(folder: Folder, packed: pa.ChunkedArray) -> pa.Array:
    """The keys of the rows that had a file when the set was packed: of its clips, and of what could not be decoded."""
    report = read_table(folder, REPORT, ["key", "reason"])
    undecoded = report.filter(pc.is_in(report["reason"], value_set=pa.array(UNDECODED)))["key"]
    return pa.concat_arrays([*packed.chunks, *undecoded.chunks])


def _as_packed(folder: Folder, rows: pa.Table) -> pa.Table:
    """The rows, with the reasons of those that could not be decoded when the set was packed, and perhaps can be now."""
    report = read_table(folder, REPORT, ["key", "reason", "detail"])
    undecoded = report.filter(pc.is_in(report["reason"], value_set=pa.array(UNDECODED))).combine_chunks()
    place = pc.index_in(rows["key"], value_set=undecoded["key"].combine_chunks())
    is_new = pc.and_(pc.is_valid(place), pc.is_null(rows["reason"]))
    for name in ("reason", "detail"):
        column = pc.if_else(is_new, undecoded[name].take(place), rows[name])
        rows = rows.set_column(rows.column_names.index(name), rows.schema.field(name), column)
    return rows.combine_chunks()


def packing_of(folder: Folder, info: SetInfo) -> Packing:
    """The options that a set was packed with. Raises UserError when its manifest has none, or damaged ones."""
    if not info.packing:
        raise UserError(f"{folder}: was indexed, not packed; restore the tars concerned and index them again")
    where, advice = f"{folder}/{MANIFEST}: packing", "pack the set again"
    options = OLDER | info.packing
    packing = strict_json.read(Packing, strict_json.dumps(options).encode(), where, advice)
    if packing.clips_per_shard < 1 or (packing.sample_rate, packing.codec) != (info.sample_rate, info.codec):
        raise UserError(f"{where}: damaged (not the set's own rate and codec, or no clips in a shard); {advice}")
    return packing


def why_different(folder: Folder, task: ShardTask, outcomes: pa.Table) -> str:
    """Why a rebuilt shard differs from the one that was packed, as an error message."""
    info, clips = read_manifest(folder, ["key", "shard", "source"])
    before = {clip["key"]: clip["source"] for clip in clips.filter(pc.equal(clips["shard"], task.shard)).to_pylist()}
    name = f"{folder}/{task.name}: can't be rebuilt to the same bytes"
    for outcome in outcomes.to_pylist():
        if outcome["key"] in before and outcome["reason"]:
            reason = f"{outcome['reason']} ({outcome['detail']})"
            return f"{name}: {before[outcome['key']]} was packed then and is now {reason}; restore it and try again"
        if outcome["key"] not in before and not outcome["reason"]:
            return f"{name}: {outcome['source']} was not packed then and can be now; pack a new set to include it"
    return f"{name}: {_other_versions(info) or 'source files have changed since it was packed'}"


def _other_versions(info: SetInfo) -> str:
    """Empty when they are the same."""
    now = versions()
    other = [f"{name} {version}" for name, version in info.versions.items() if now.get(name) != version]
    if not other:
        return ""
    pins = " ".join(f"{name}=={version}" for name, version in info.versions.items())
    return f"it was packed with {', '.join(other)}; pip install {pins}, and try again"
