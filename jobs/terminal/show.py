"""Results on stdout: as a readable page, or as one JSON object."""

import json
import os
import shlex
import sys
from collections.abc import Callable
from typing import Any, Literal, TextIO

from rich.table import Table

from erann_dist.words import count
from jobs.terminal.progress import PlainConsole, duration

# In a pipe or a file, tables are not cut to a terminal's width.
_width = None if sys.stdout.isatty() else 10_000
console = PlainConsole(width=_width, highlight=False, soft_wrap=True, markup=False)


def console_on(file: TextIO) -> PlainConsole:
    """The same console for a file, such as the real stdout while libraries' output to stdout is redirected."""
    return PlainConsole(file=file, width=_width, highlight=False, soft_wrap=True, markup=False)


def show(result: Any, as_json: bool, page: Callable[[Any], None]) -> None:
    """Print a command's result on stdout, as a page or as JSON."""
    if as_json:
        print(json.dumps(result))
    else:
        page(result)


def size(value: float) -> str:
    """Bytes in MB, GB or TB."""
    power, unit = next((p, u) for p, u in ((12, "TB"), (9, "GB"), (6, "MB")) if value >= 10**p or p == 6)
    return f"{value / 10**power:,.1f} {unit}"


def facts_page(result: dict[str, Any]) -> None:
    """The result's scalar values, one line each."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in result.items():
        if not isinstance(value, list | dict):
            table.add_row(name.replace("_", " "), f"{value:.4f}" if isinstance(value, float) else str(value))
    console.print(table)


def run_result_page(result: dict[str, Any]) -> None:
    """The result of a run, and what to do with it next."""
    facts_page(result)
    console.print(f"for curves, classes and clips on one page: erann report {shlex.quote(result['run'])}")


def packed_page(result: dict[str, Any]) -> None:
    reasons = ", ".join(f"{count} {reason}" for reason, count in result["not_packed"].items())
    if result["missing_share"]:
        reasons += f" ({result['missing_share']:.1%} of the listed clips)"
    console.print(
        f"{result['shards']}: {count(result['clips'], 'clip')}, {result['hours']:.2f} h, in "
        f"{count(result['tars'], 'tar')} of "
        f"{result['bytes'] / 1e6:.1f} MB in total; not packed: {reasons or 'none'}"
    )
    if warning := low_rate_warning(result["low_rate"]):
        console.print(f"warning: {warning}")
    for line in condition_lines(result):
        console.print(line)


def low_rate_warning(low: dict[str, Any] | None) -> str:
    """One line on the clips from sources with a low sample rate; empty if there are none."""
    if not low or not low["clips"]:
        return ""
    rates = ", ".join(f"{each['clips']:,} at {each['rate']:,} Hz" for each in low["rates"][:3])
    return (
        f"{count(low['clips'], 'clip')} ({low['share']:.1%}) from sources below {low['least_rate']:,} Hz "
        f"({rates}{', …' * (len(low['rates']) > 3)}): their mel bins above half that rate stay empty, up to ERANN's "
        f"{low['least_rate'] // 2:,} Hz; use originals with a higher rate if there are any"
    )


def condition_lines(found: dict[str, Any]) -> list[str]:
    """What is wrong with packed clips' sources, a line for each kind (shards.statistics.condition)."""
    lines = []
    if found.get("damaged"):
        lines.append(
            f"{count(found['damaged'], 'clip')} with a damaged source: {found['seconds_lost']:,.2f} s are missing "
            "(the manifest's column lost)"
        )
    if found.get("opposite_phase"):
        lines.append(
            f"{count(found['opposite_phase'], 'clip')} nearly silent, as the source's channels are in opposite phase "
            "(column channel_peak); pack with --channels loudest to keep one of them"
        )
    return lines


def verified_page(result: dict[str, Any]) -> None:
    what = "sizes and tables match" if result["quick"] else "every tar and every clip matches the manifest"
    found = f"{count(result['clips'], 'clip')} in {count(result['tars'], 'tar')}"
    console.print(f"{result['shards']}: {found}, {what}")


def repaired_page(result: dict[str, Any]) -> None:
    names = ", ".join(result["rebuilt"])
    console.print(f"{result['shards']}: " + (f"rebuilt {names}" if names else "nothing to repair"))


def folds_page(result: dict[str, Any]) -> None:
    """The folds, their mean next to the paper's, then the classes with the lowest accuracy."""
    how = "from scratch" if result["init"] == "none" else f"from {result['init']}"
    console.print(f"{result['variant']} on {result['data_set']}, {how}")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("fold", "accuracy", "best step's *", "clips", "trained on", "took"):
        table.add_column(title, justify="left" if title == "fold" else "right")
    for fold in result["folds"]:
        is_logged = fold["seconds"] is not None and fold["best_step"] is not None  # Otherwise its log is lost.
        best = f"{fold['best_accuracy']:.4f} at {fold['best_step']:,}" if is_logged else "–"
        trained_on, took = (f"{fold['train_clips']:,}", duration(fold["seconds"])) if is_logged else ("–", "–")
        table.add_row(str(fold["fold"]), f"{fold['accuracy']:.4f}", best, f"{fold['clips']:,}", trained_on, took)
    if result["folds"]:
        deviation = f" ± {result['std']:.4f}" if result["std"] is not None else ""
        best_mean = f"{result['best_mean']:.4f}" if result["best_mean"] is not None else "–"
        table.add_row("mean", f"{result['mean']:.4f}{deviation}", best_mean)
    if result["paper"]:
        table.add_row("paper", f"{result['paper']['accuracy']:.3f}", "", "", "", result["paper"]["what"])
    console.print(table)
    console.print("* chosen on the fold that it is measured on; the accuracy is the last step's")
    if result["why_not_comparable"]:
        console.print(f"not comparable with the paper's: {result['why_not_comparable']}")
    if result["missing_clips"]:
        console.print(f"{result['missing_clips']} of the data set's clips are not in the shard set")
    for each in result["failed"]:
        console.print(f"fold {each['fold']} failed: {each['why']}")
    worst = sorted((c for c in result["per_class"] if c["accuracy"] is not None), key=lambda c: c["accuracy"])[:5]
    if worst:
        console.print("hardest: " + ", ".join(f"{c['name']} {c['accuracy']:.2f}" for c in worst))


def study_page(result: dict[str, Any]) -> None:
    """The table, with the paper's figure next to ours."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in result["columns"]:
        justify: Literal["left", "right"] = "left" if column in ("data_set", "variant", "init") else "right"
        table.add_column(column.replace("_", " "), justify=justify, overflow="fold")
    for row in result["rows"]:
        table.add_row(*(_cell(row[column]) for column in result["columns"]))
    console.print(table)
    for each in result["failed"]:
        console.print(f"{each['run']} failed: {each['why']}")
    for note in result["notes"]:
        console.print(note)
    console.print(f"clips/s measured on {result['measured_on']}")
    console.print(f"written to {result['folder']}/table.csv")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def pipeline_page(result: dict[str, Any]) -> None:
    facts_page(result["pretrained"])
    for each in result["finetuned"]:
        console.print()
        folds_page(each)
    console.print(f"\nreport: {result['report']}")


def tags_page(result: dict[str, list[dict[str, Any]]]) -> None:
    for file, tags in result.items():
        console.print(file)
        for tag in tags:
            console.print(f"  {tag['score']:.3f}  {tag['name']}")


def tagged_page(result: dict[str, Any]) -> None:
    console.print(f"{result['shards']}: {count(result['clips'], 'clip')} tagged, written to {result['out']}")


def recordings_page(result: dict[str, Any]) -> None:
    """Of tags over time, and of embeddings."""
    events = f", {count(result['events'], 'event')} to {result['events_out']}" if "events" in result else ""
    unreadable = f"; {result['unreadable']} could not be read (column problem)" if result["unreadable"] else ""
    console.print(
        f"{count(result['recordings'], 'recording')}: {count(result['windows'], 'window')} written to {result['out']}"
        f"{events}{unreadable}"
    )


def evaluation_page(metrics: dict[str, Any]) -> None:
    """The metrics, then the best and worst classes, those left out, and the hash of the list."""
    facts_page({name: value for name, value in metrics.items() if name != "list_hash"} | _selected(metrics))
    column = "ap" if metrics["task"] == "tagging" else "accuracy"
    ranked = sorted((c for c in metrics["per_class"] if c[column] is not None), key=lambda c: -c[column])
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("class" if len(ranked) <= 12 else "class (best 6, worst 6)")
    table.add_column(column, justify="right")
    table.add_column("positives", justify="right")
    for c in ranked if len(ranked) <= 12 else [*ranked[:6], *ranked[-6:]]:
        table.add_row(c["name"], f"{c[column]:.3f}", str(c["positives"]))
    console.print(table)
    if metrics.get("left_out"):
        console.print(f"left out of the means, as they have no positives: {', '.join(metrics['left_out'])}")
    if "list_hash" in metrics:
        console.print(f"hash of the list of clips: {metrics['list_hash']}")
    for absent in metrics.get("selection", {}).get("not_in_set", []):
        console.print(not_in_set(absent))
    if "common" in metrics:
        _common_page(metrics["common"])


def _selected(metrics: dict[str, Any]) -> dict[str, str]:
    """What of the set was evaluated, in words."""
    chosen = {k: v for k, v in metrics.get("selection", {}).items() if k in ("split", "fold", "keys", "without")}
    words = [f"{k} {', '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in chosen.items()]
    return {"selection": "; ".join(words)} if words else {}


def not_in_set(absent: dict[str, Any]) -> str:
    """One line on the keys of a list that are not in the set, with examples."""
    more = ", …" if absent["count"] > len(absent["examples"]) else ""
    number = count(absent["count"], "key")
    return f"{absent['file']}: {number} not in the set: {', '.join(absent['examples'])}{more}"


def other_labels(common: dict[str, Any]) -> str:
    """One line on the shared clips whose labels differ, with an example; empty if there are none."""
    first = common.get("labels_example")
    if not first:
        return ""
    ours, theirs = (", ".join(first[whose]) or "no label" for whose in ("ours", "theirs"))
    return (
        f"{count(common['labels_differ'], 'clip')} with other labels there, such as {first['key']}: {ours} here, "
        f"{theirs} there; both evaluations are measured against the labels here"
    )


def _common_page(common: dict[str, Any]) -> None:
    """Both evaluations on the clips that they share."""
    console.print(
        f"\n{count(common['clips'], 'clip')} in common with {common['file']} "
        f"({common['only_ours']:,} only here, {common['only_theirs']:,} only there)"
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("in common", "ours", "theirs"):
        table.add_column(title, justify="left" if title == "in common" else "right")
    for name, value in common["ours"].items():
        table.add_row(name, *("–" if v is None else f"{v:.4f}" for v in (value, common["theirs"][name])))
    console.print(table)
    if differ := other_labels(common):
        console.print(differ)
    console.print(f"hash of the list of clips in common: {common['list_hash']}")


def report_page(result: dict[str, Any]) -> None:
    for note in result["notes"]:
        console.print(note)
    console.print(f"{result['report']}: {size(result['bytes'])}")


def demo_page(result: dict[str, Any]) -> None:
    """The demo's result: what was done, where it is, what to run next."""
    folder, erann = result["folder"], os.path.relpath(sys.argv[0])
    for packed in result["packed"].values():
        packed_page(packed)
    console.print(
        f"mAP {result['mAP']:.3f} on {result['clips']} held-out clips (chance: {result['chance_mAP']:.3f}), "
        f"mAUC {result['mAUC']:.3f}"
    )
    console.print(f"\ntags of a clip labelled {' + '.join(result['clip_labels'])}:")
    tags_page({result["clip"]: result["tags"]})
    console.print(
        f"""
took {result["minutes"]:.1f} minutes; everything is in {folder}/
  {folder}/audioset        clips and segment lists, in AudioSet's layout
  {folder}/shards          the shard sets: tars, manifest.parquet, report.parquet
  {result["run"]}       recipe, checkpoints, metrics.jsonl, TensorBoard, predictions.parquet
  {result["model"]} the model: weights, config, metrics, card

on real data:
  {erann} pack audioset --segments balanced_train_segments.csv --audio AUDIO --out shard-sets/audioset/balanced_train
  {erann} pack audioset --segments eval_segments.csv --audio AUDIO --out shard-sets/audioset/eval
  {erann} pretrain audioset.yaml data.train=shard-sets/audioset/balanced_train run.workers=1
  {erann} tag {result["model"]} YOUR.wav"""
    )
