"""The page about runs and studies."""

from collections.abc import Sequence

from markupsafe import Markup

from jobs.html import page
from jobs.html.page import percent
from jobs.report.classes import score
from jobs.report.curves import curves_of_several
from jobs.report.reading import Run, Study
from jobs.report.run_part import METRICS, main_metric, run_part
from jobs.report.study_part import study_part


def report_page(entries: Sequence[Run | Study]) -> str:
    """The page about runs and studies, in the given order; several are first compared with each other."""
    parts = [
        page.element(
            "article",
            i,
            run_part(entry, f"part-{i}") if isinstance(entry, Run) else study_part(entry, f"part-{i}"),
        )
        for i, entry in enumerate(entries)
    ]
    title = ", ".join(entry.name for entry in entries)
    if len(entries) > 1:
        parts.insert(0, _overview(entries))
    return page.document(title, parts, "report.css", "report.js")


def _overview(entries: Sequence[Run | Study]) -> Markup:
    runs = [entry for entry in entries if isinstance(entry, Run)]
    parts: list[Markup] = []
    if len(runs) > 1:
        hashes = {run.metrics["list_hash"] for run in runs if run.metrics}
        if len(hashes) > 1:
            parts.append(page.element("note", "The runs were evaluated on different clips: their hashes differ."))
        logged = [(run.name, run.lines) for run in runs if run.events("Step")]
        parts.append(page.section("Comparison of the runs", _comparison(runs)))
        if logged:
            parts.append(page.section("Curves", curves_of_several(logged, "all")))
    return page.element("overview", [(entry.name, entry.url) for entry in entries], parts)


def _comparison(runs: Sequence[Run]) -> Markup:
    rows = []
    for run in runs:
        metric, metrics, best = main_metric(run), run.metrics or {}, run.standing["best"]
        rows.append(
            [
                page.text(run.name),
                page.text(run.recipe.model.variant if run.recipe else "–"),
                page.text(run.standing["state"]),
                page.text(METRICS[metric] if metric else "–"),
                page.number(score(metrics[metric] if metric and metrics else None)),
                page.number(score(best["value"]) if best else "–"),
                page.number(f"{metrics['clips']:,}" if metrics else "–"),
                page.number(percent(run.standing["goodput"]) if run.standing["goodput"] is not None else "–"),
                page.text(page.element("code", metrics["list_hash"][:12] + "…" if metrics else "–")),
            ]
        )
    head = ["run", "variant", "state", "metric", "result:n", "best step:n", "clips:n", "goodput:n"]
    return page.table([*head, "hash of the list"], rows, css="sortable")
