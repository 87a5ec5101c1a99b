"""A run's plan on the terminal."""

from datetime import timedelta
from typing import Any

from rich.table import Table

from jobs.terminal.show import console, size


def plan_page(result: dict[str, Any]) -> None:
    """The run, its progress over time, its classes, other numbers of GPUs, and advice."""
    classes = [_classes(result["classes"])] if result["classes"] else []
    for part in [_facts(result), _over_time(result["over_time"]), *classes, _scaling(result)]:
        console.print(part)
        console.print()
    limits = ", ".join(f"{limit} from {number}" for limit, number in result["limits_from"].items())
    console.print(f"bottleneck by number of GPUs: {limits}")
    for line in result["advice"]:
        console.print(f"- {line}")


def _facts(result: dict[str, Any]) -> Table:
    cluster, node, reduce, limits = result["cluster"], result["node"], result["all_reduce"], result["step_ms"]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row(
        "run",
        f"{result['recipe']}: {result['steps']:,} steps, {result['examples']:,} examples, "
        f"{result['epochs']:.2f} epochs, "
        f"{result['clips_drawn']:,} draws of {result['train_clips']:,} clips",
    )
    table.add_row(
        "cluster",
        f"{cluster['nodes']} × {cluster['gpus_per_node']} GPUs, {result['workers']} used; per node "
        f"{cluster['cores_per_node']} cores, {cluster['network_gbit_s']:g} Gbit/s, "
        f"a disk of {cluster['disk_mb_s']:g} MB/s",
    )
    table.add_row(
        "assumed",
        f"{cluster['gpu_examples_per_s']:g} examples/s per GPU, "
        f"{cluster['core_clips_per_s']:g} clips/s decoded per core",
    )
    table.add_row("time", f"{_duration(result['hours'])}, {result['gpu_hours']:,.1f} GPU-hours, without evaluations")
    table.add_row("a step at the end", ", ".join(f"{name} {ms:.1f} ms" for name, ms in limits.items()))
    table.add_row(
        "all-reduce",
        f"{reduce['mb']:.0f} MB of gradients, {reduce['ms']:.1f} ms between nodes ({reduce['share']:.0%} of a step)",
    )
    table.add_row(
        "a node needs",
        f"{node['clips_per_s']:,.0f} clips/s: {node['origin_mb_per_s']:,.0f} MB/s from the shards, "
        f"{node['cache_mb_per_s']:,.0f} MB/s from its cache, {node['decoding_cores']:.0f} cores",
    )
    table.add_row(
        "a node reads",
        f"{size(node['origin_bytes'])} from the shards; its distinct clips are {size(node['distinct_bytes'])}",
    )
    if result["s3_requests"]:
        price = f"{cluster['usd_per_million_requests']:g} USD a million"
        table.add_row("S3", f"{result['s3_requests']:,} requests, {result['s3_usd']:,.2f} USD at {price}")
    return table


def _over_time(rows: list[dict[str, Any]]) -> Table:
    names = ("step", "epoch", "time", "clips seen", "cache hits", "MB/s from shards", "examples/s", "limit")
    table = _table(*names)
    for row in rows:
        table.add_row(
            f"{row['step']:,}",
            f"{row['epoch']:.2f}",
            _duration(row["hours"]),
            f"{row['unique_clips']:,}",
            f"{row['cache_hits']:.1%}",
            f"{row['origin_mb_per_s']:,.0f}",
            f"{row['examples_per_s']:,.0f}",
            row["limit"],
        )
    return table


def _classes(classes: dict[str, dict[str, Any]]) -> Table:
    table = _table("draws of a clip", "class", "its clips", "of them seen", "draws of each")
    for name, row in classes.items():
        table.add_row(name, row["class"], f"{row['clips']:,}", f"{row['seen']:,}", f"{row['repeats']:,.1f}")
    return table


def _scaling(result: dict[str, Any]) -> Table:
    table = _table("GPUs", "examples/s", "at first", "efficiency", "limit")
    for row in result["scaling"]:
        here = " (this cluster)" if row["gpus"] == result["workers"] else ""
        table.add_row(
            str(row["gpus"]),
            f"{row['examples_per_s']:,.0f}",
            f"{row['at_first']:,.0f}",
            f"{row['efficiency']:.0%}",
            row["limit"] + here,
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in ("class", "limit", "draws of a clip") else "right")
    return table


def _duration(hours: float) -> str:
    return str(timedelta(seconds=round(3600 * hours)))
