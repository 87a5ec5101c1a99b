"""A study's part of a report: the folds of a cross-validation or the runs of a grid, with each run in brief."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from jobs.html import page
from jobs.html.page import percent
from jobs.report.classes import class_table, confusion_matrix, score
from jobs.report.clips import clips_section
from jobs.report.curves import curves_of_several
from jobs.report.reading import Run, Study
from jobs.report.run_part import average, brief_run_part, hardware, notes, recipe
from jobs.terminal.progress import duration


def study_part(study: Study, name: str) -> Markup:
    """Everything that is known about a study. name: unique among the page's parts."""
    sections = _folds(study) if study.result["kind"] == "folds" else _grid(study)
    logged = [(run.name, run.lines) for run in study.runs if run.events("Step")]
    curves = [page.section("Curves", curves_of_several(logged, name))] if logged else []
    briefs = [brief_run_part(run, f"{name}-{i}") for i, run in enumerate(study.runs)]
    head, *others = sections
    return Markup("\n").join(
        [
            page.element("heading", study.name, _what(study)),
            notes([*_failures(study.result), *study.result.get("notes", []), *study.notes]),
            head,
            *curves,
            *others,
            page.section("The runs", *briefs) if briefs else Markup(),
        ]
    )


def _what(study: Study) -> str:
    result = study.result
    if result["kind"] == "study":
        return f"{study.url} · study {result['name']}, {len(study.runs)} runs"
    init = "from scratch" if result["init"] == "none" else f"fine-tuned from {result['init']}"
    return f"{study.url} · {result['variant']} on {result['data_set']}, {init}, folds: {result['folds_asked']}"


def _failures(result: dict[str, Any]) -> list[str]:
    of = "fold" if result["kind"] == "folds" else "run"
    return [f"The {of} {each[of]} failed: {each['why']}" for each in result["failed"]]


def _folds(study: Study) -> list[Markup]:
    result, names = study.result, study.result["labels"]
    sections = [_accuracies(result)]
    if result["per_class"]:
        sections.append(page.section("Classes", class_table(result["per_class"], "accuracy", result["confusion"])))
    if result["confusion"]:
        matrix = confusion_matrix(names, result["confusion"])
        sections.append(page.section("Confusion matrix of all folds", matrix))
    sections += [clips_section(study.runs), *_data(study.runs), *_machines(study.runs)]
    if study.runs:
        which = f"The recipe of {study.runs[0].name}; the others differ only in their folds."
        sections.append(page.section("Recipe", page.soft(which), recipe(study.runs[0])))
    return sections


def _accuracies(result: dict[str, Any]) -> Markup:
    """The result, then that of each fold, and separately that of the best step."""
    folds, paper = result["folds"], result["paper"]
    cards = [
        (_with_deviation(result["mean"], result["std"]), f"accuracy, mean ± standard deviation of {len(folds)} folds")
    ]
    if paper:
        cards.append((f"{paper['accuracy']:.3f}", f"in the paper: {paper['what']}"))
    clips, seconds = (sum(fold[key] or 0 for fold in folds) for key in ("clips", "seconds"))
    cards += [(f"{clips:,}", "clips evaluated"), (duration(seconds), "total time of all folds")]
    rows = [
        [
            page.text(fold["fold"]),
            page.bar_cell(fold["accuracy"] or 0.0),
            page.number(score(fold["accuracy"])),
            page.number(_whole(fold["clips"])),
            page.number(_whole(fold["train_clips"])),
            page.number("–" if fold["seconds"] is None else duration(fold["seconds"])),
        ]
        for fold in folds
    ]
    foot = [_foot("mean ± deviation", result["mean"], _with_deviation(result["mean"], result["std"]))]
    if paper:
        foot.append(_foot(f"paper, {paper['what']}", paper["accuracy"], f"{paper['accuracy']:.3f}"))
    parts = [
        page.figures(cards),
        page.table(["fold", "", "accuracy:n", "clips:n", "training clips:n", "time:n"], rows, foot=foot),
        page.soft("Accuracy is the last step's. A fold is trained on the other folds and evaluated on its own."),
    ]
    if not result["comparable"]:
        why = result["why_not_comparable"] or "not the paper's protocol"
        parts.insert(0, notes([f"Not comparable with the paper's figures: {why}"]))
    if missing := result.get("missing_clips"):
        parts.append(page.soft(f"{missing:,} of the data set's clips are not in the shard set."))
    return page.section("Result", *parts, *_best_steps(result))


def _foot(name: str, accuracy: float | None, figure: str) -> list[Markup]:
    return [page.text(name), page.bar_cell(accuracy or 0.0), page.number(figure), *[page.number("")] * 3]


def _best_steps(result: dict[str, Any]) -> list[Markup]:
    folds = [fold for fold in result["folds"] if fold["best_accuracy"] is not None]
    if not folds:
        return []
    rows = [
        [page.text(fold["fold"]), page.number(score(fold["best_accuracy"])), page.number(_whole(fold["best_step"]))]
        for fold in folds
    ]
    foot = [[page.text("mean"), page.number(score(result["best_mean"])), page.number("")]]
    return [
        page.element("subheading", "Not the result: the best step, selected on the test fold"),
        page.soft(
            "The step was selected by the accuracy on the same clips that it is reported on, so these figures are too "
            "high. They allow comparison with results that are reported this way, and show whether training was too "
            "long."
        ),
        page.table(["fold", "best accuracy:n", "at step:n"], rows, foot=foot, css="narrow apart"),
    ]


def _data(runs: Sequence[Run]) -> list[Markup]:
    rows = [
        [
            page.text(run.name),
            page.bar_cell(run.metrics["coverage"]),
            page.number(f"{run.metrics['clips']:,}"),
            page.number(f"{run.metrics['listed']:,}"),
            page.number(percent(run.metrics["coverage"])),
            page.text(page.element("code", f"{run.metrics['list_hash'][:16]}…")),
        ]
        for run in runs
        if run.metrics
    ]
    head = ["run", "", "clips:n", "listed:n", "share:n", "hash of the list"]
    hint = page.soft("Two evaluations used the same clips if they show the same hash of the list.")
    return [page.section("Data", page.table(head, rows), hint)] if rows else []


def _machines(runs: Sequence[Run]) -> list[Markup]:
    rows = [
        [
            page.text(run.name),
            page.text(hardware(run)),
            page.number(f"{average(run, 'clips_per_s'):,.1f}"),
            page.number(percent(average(run, "data_wait"))),
            page.number(percent(run.standing["goodput"])),
            page.number(str(run.standing["incidents"])),
        ]
        for run in runs
        if run.events("Started") and run.events("Step")
    ]
    head = ["run", "hardware", "clips/s:n", "waiting for data:n", "goodput:n", "incidents:n"]
    return [page.section("Time and hardware", page.table(head, rows))] if rows else []


def _grid(study: Study) -> list[Markup]:
    result = study.result
    given = ["run", *result["columns"]]
    more = [key for row in result["rows"] for key in row if key not in (*given, "runs", "paper")]
    names = list(dict.fromkeys([*given, *more, "paper"]))
    numbers = {name for name in names if all(_is_number(row.get(name)) for row in result["rows"])}
    head = [f"{name}:n" if name in numbers else name for name in names]
    rows = [
        [page.number(_plain(row.get(name))) if name in numbers else page.text(_plain(row.get(name))) for name in names]
        for row in result["rows"]
    ]
    result_section = page.section("Result", page.table(head, rows, css="sortable"))
    return [result_section, *_data(study.runs), *_machines(study.runs)]


def _with_deviation(mean: float | None, deviation: float | None) -> str:
    return score(mean) if mean is None or deviation is None else f"{mean:.4f} ± {deviation:.4f}"


def _whole(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | None) and not isinstance(value, bool)


def _plain(value: Any) -> str:
    """A cell of a study's table."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
