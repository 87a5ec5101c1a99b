"""A run's part of a report."""

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

from erann_dist.log.run_log import seconds_run
from erann_dist.recipe import DataSource
from jobs.html import page
from jobs.html.page import percent
from jobs.report.classes import class_table, confusion_matrix, score
from jobs.report.clips import clips_section
from jobs.report.curves import run_curves
from jobs.report.reading import Run
from jobs.terminal.progress import duration
from jobs.terminal.show import not_in_set, other_labels

METRICS = {"mAP": "mAP", "mAUC": "mAUC", "d_prime": "d′", "accuracy": "accuracy"}


def run_part(run: Run, name: str) -> Markup:
    """Everything that is known about a run. name: unique among the page's parts."""
    return Markup("\n").join(
        [
            page.element("heading", run.name, _what(run)),
            notes(run.notes),
            page.figures(_figures(run)),
            page.section("Curves", _curves(run, name)),
            *_classes(run),
            clips_section([run]),
            page.section("Data", _data(run)),
            *_evaluations(run),
            page.section("Time and hardware", _machine(run), _incidents(run)),
            page.section("Recipe", recipe(run)),
        ]
    )


def brief_run_part(run: Run, name: str) -> Markup:
    """A run of a study, as a section that can be unfolded."""
    metric = main_metric(run)
    title = f"{METRICS[metric]} {score(run.metrics[metric])}" if run.metrics and metric else run.standing["state"]
    parts = [
        notes(run.notes),
        page.figures(_figures(run)),
        _curves(run, name),
        page.element("subheading", "Data"),
        _data(run),
        page.element("subheading", "Time and hardware"),
        _machine(run),
        _incidents(run),
        page.element("subheading", "Recipe"),
        recipe(run),
    ]
    return page.element("details", run.name, title, parts)


def main_metric(run: Run) -> str | None:
    """The first of the metrics that its evaluation has."""
    return next((key for key in METRICS if key in (run.metrics or {})), None)


def notes(lines: Sequence[str]) -> Markup:
    return Markup("\n").join(page.element("note", line) for line in lines)


def recipe(run: Run) -> Markup:
    return page.element("preformatted", run.recipe_text) if run.recipe_text else page.soft("Missing.")


def _what(run: Run) -> str:
    facts = [run.url]
    if run.recipe:
        facts.append(run.recipe.model.variant)
    if run.metrics:
        facts.append(f"{run.metrics['task']}, {len(run.metrics['per_class'])} classes")
    if starts := run.events("Started"):
        facts.append(f"started {_when(starts[0]['time'])}, ran {duration(seconds_run(run.lines))}")
    why = run.standing["why"]
    return " · ".join([*facts, run.standing["state"] + (f": {why}" if why else "")])


def _figures(run: Run) -> list[tuple[str, str]]:
    metrics, best, standing = run.metrics or {}, run.standing["best"], run.standing
    cards = []
    for key, name in METRICS.items():
        if metrics.get(key) is not None:
            chance = metrics.get(f"chance_{key}")
            what = f"{name} = √2·Φ⁻¹(mAUC), separation of positive and negative scores" if key == "d_prime" else name
            cards.append((score(metrics[key]), what if chance is None else f"{what}; by chance {score(chance)}"))
    metric = main_metric(run)
    if metric and run.averaged and run.averaged.get(metric) is not None:
        cards.append((score(run.averaged[metric]), f"{METRICS[metric]} of averaged weights"))
    if best and not (metric and metrics[metric] is not None and best["value"] <= metrics[metric]):
        cards.append(
            (
                score(best["value"]),
                f"best {best['metric']} during training, at step {best['step']:,}; selected on these clips",
            )
        )
    if metrics:
        cards.append((f"{metrics['clips']:,}", f"clips evaluated, {percent(metrics['coverage'])} of those listed"))
    if standing["steps"] is not None:
        done = standing["step"] == standing["steps"]
        cards.append((f"{standing['step']:,}", "steps" if done else f"of {standing['steps']:,} steps"))
    if standing["goodput"] is not None:
        cards.append((percent(standing["goodput"]), "goodput: share of the time spent on steps that count"))
    return cards


def _curves(run: Run, name: str) -> Markup:
    if not any(line["event"] in ("Step", "Evaluated") for line in run.lines):
        return page.soft("No steps are logged yet.")
    return run_curves(run.lines, name)


def _classes(run: Run) -> list[Markup]:
    if not run.metrics:
        return []
    per_class, confusion = run.metrics["per_class"], run.metrics.get("confusion")
    left_out = run.metrics.get("left_out")
    parts = [class_table(per_class, "accuracy" if confusion else "ap", confusion)]
    if left_out:
        parts.insert(0, page.paragraph(f"Left out of the means, as they have no positives: {'; '.join(left_out)}."))
    sections = [page.section("Classes", *parts)]
    if confusion:
        sections.append(page.section("Confusion matrix", confusion_matrix([c["name"] for c in per_class], confusion)))
    return sections


def _data(run: Run) -> Markup:
    facts: list[tuple[str, str | Markup]] = []
    if metrics := run.metrics:
        share = f"{metrics['clips']:,} of {metrics['listed']:,} listed clips ({percent(metrics['coverage'])})"
        facts += [("coverage", share), ("hash of the list", page.element("code", metrics["list_hash"]))]
    if run.recipe:
        facts.insert(0, ("evaluated on", "; ".join(map(_source, run.recipe.data.eval))))
        facts.append(("trained on", "; ".join(map(_source, run.recipe.data.train))))
    if starts := run.events("Started"):
        facts.append(("training clips", f"{starts[-1]['train_clips']:,}"))
    hint = page.soft("Two evaluations used the same clips if they show the same hash of the list.")
    return page.facts(facts) + (hint if run.metrics else Markup())


def _source(source: DataSource) -> str:
    parts = [f"split {source.split}"] if source.split else []
    parts += [f"fold{'s' * (len(source.fold) > 1)} {', '.join(map(str, source.fold))}"] if source.fold else []
    parts += [f"the keys in {source.keys}"] if source.keys else []
    parts += [f"without the keys in {source.without}"] if source.without else []
    return ", ".join([source.url, *parts])


def _evaluations(run: Run) -> list[Markup]:
    """What erann evaluate measured on other sets and selections, and in comparison with other evaluations."""
    rows, lines = [], []
    for name, metrics in run.evaluations:
        metric = "mAP" if metrics["task"] == "tagging" else "accuracy"
        selection, common = metrics.get("selection"), metrics.get("common")
        what = _source(_as_source(selection)) if selection else name
        rows.append(_evaluation(name, what, metric, metrics, metrics[metric], None))
        lines += [not_in_set(absent) for absent in (selection or {}).get("not_in_set", [])]
        if common:
            what = f"clips in common with {common['file']}"
            ours, theirs = common["ours"].get(metric), common["theirs"].get(metric)
            rows.append(_evaluation(name, what, metric, common, ours, theirs))
            lines += filter(None, [other_labels(common)])
    if not rows:
        return []
    head = ["evaluation", "clips of", "clips:n", "metric", "result:n", "the other's:n", "hash of the list"]
    return [page.section("Other evaluations", page.table(head, rows), *map(page.soft, lines))]


def _evaluation(
    name: str, what: str, metric: str, on: dict[str, Any], ours: float | None, theirs: float | None
) -> list[Markup]:
    """A row of the table. on: the result whose number of clips and hash of the list are shown."""
    return [
        page.text(name),
        page.text(what),
        page.number(f"{on['clips']:,}"),
        page.text(METRICS[metric]),
        page.number(score(ours)),
        page.number(score(theirs) if theirs is not None else ""),
        page.text(page.element("code", on["list_hash"])),
    ]


def _as_source(selection: dict[str, Any]) -> DataSource:
    parts = {name: selection.get(name) for name in ("split", "fold", "keys", "without")}
    return DataSource.model_construct(url=selection["shards"], **parts)


def hardware(run: Run) -> str:
    """The hardware of its workers at its last start."""
    last = run.events("Started")[-1]
    names: Counter[str] = Counter(last.get("hardware", []))
    return ", ".join(f"{count} × {name}" for name, count in names.items()) or f"{last['device']}, name not logged"


def average(run: Run, key: str) -> float:
    """The mean of a value of the Step lines, weighted by the time of the steps."""
    steps = run.events("Step")
    seconds = sum(line["seconds"] for line in steps)
    return sum(line[key] * line["seconds"] for line in steps) / seconds if seconds else 0.0


def _machine(run: Run) -> Markup:
    starts, steps = run.events("Started"), run.events("Step")
    facts: list[tuple[str, str | Markup]] = []
    if starts:
        last = starts[-1]
        hosts = list(dict.fromkeys(last["hosts"]))
        versions = ", ".join(f"{name} {version}" for name, version in last.get("versions", {}).items())
        facts += [
            ("hardware", hardware(run)),
            ("workers", f"{last['workers']} on {len(hosts)} host{'s' * (len(hosts) > 1)}: {', '.join(hosts)}"),
            ("versions", versions or "not logged"),
            ("started", f"{_when(starts[0]['time'])}" + (f", {len(starts)} times in total" if len(starts) > 1 else "")),
        ]
    if steps:
        examples, clips, waiting = (average(run, key) for key in ("examples_per_s", "clips_per_s", "data_wait"))
        speed = f"{examples:,.1f} examples/s, {clips:,.1f} clips/s decoded, {percent(waiting)} waiting for data"
        facts += [("throughput", speed), ("time in steps", duration(sum(line["seconds"] for line in steps)))]
    if run.standing["goodput"] is not None:
        incidents = run.events("Incident")
        lost = (
            sum(line.get("steps_lost", 0) for line in incidents),
            sum(line.get("seconds_lost", 0.0) for line in incidents),
        )
        losses = f"; lost: {lost[0]:,} steps, {duration(lost[1])}" if any(lost) else ""
        facts.append(("goodput", f"{percent(run.standing['goodput'])} of the time spent on steps that count{losses}"))
    return page.facts(facts)


def _incidents(run: Run) -> Markup:
    incidents = run.events("Incident")
    if not incidents:
        return page.soft("No incidents.")
    rows = [
        [
            page.text(_when(line["time"])),
            page.number(f"{line['step']:,}"),
            page.text(line["kind"].replace("_", " ")),
            page.text(line["text"]),
            page.number(str(line.get("steps_lost") or "")),
            page.number(duration(seconds) if (seconds := line.get("seconds_lost", 0.0)) >= 0.5 else ""),
        ]
        for line in incidents
    ]
    head = ["time", "step:n", "incident", "", "steps lost:n", "time lost:n"]
    return page.table(head, rows, css="long" if len(rows) > 20 else "")


def _when(time: float) -> str:
    return f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M} UTC"
