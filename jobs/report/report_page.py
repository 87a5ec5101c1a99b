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

_STYLE = Markup("""
article + article { margin-top: 56px; padding-top: 40px; border-top: 2px solid var(--line); }
.note { border-left: 4px solid var(--warn); background: var(--card); padding: 8px 14px; border-radius: 4px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 6px 28px; }
figure { margin: 0; min-width: 0; } .charts figcaption { font-weight: 600; font-size: 13px; }
.legend { font-size: 13px; color: var(--soft); max-width: none; }
.legend span { margin-right: 16px; white-space: nowrap; }
.legend i { display: inline-block; width: 14px; height: 4px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle; }
.sortable button { all: unset; cursor: pointer; } .sortable button:focus-visible { outline: 2px solid var(--fill); }
.sortable button::after { content: " ↕"; opacity: .45; }
.sortable [aria-sort=ascending] button::after { content: " ↑"; opacity: 1; }
.sortable [aria-sort=descending] button::after { content: " ↓"; opacity: 1; }
tfoot td { font-weight: 600; border-bottom: 0; }
.apart { color: var(--soft); border-left: 4px solid var(--line); padding-left: 14px; }
.apart tfoot td { font-weight: 400; }
.matrix table { width: auto; margin: 0 auto; border-collapse: separate; border-spacing: 1px; }
.matrix td, .matrix th { border: 0; padding: 0; text-align: center; vertical-align: middle; }
.matrix td { min-width: 40px; height: 30px; font-size: 13px; background: var(--back); }
.matrix thead td { background: none; }
.matrix thead th { vertical-align: bottom; height: 1px; }
.matrix th span { writing-mode: vertical-rl; transform: rotate(180deg); white-space: nowrap; max-height: 130px;
  overflow: hidden; text-overflow: ellipsis; padding-top: 4px; }
.matrix th[scope=row] { position: sticky; left: 0; text-align: right; padding-right: 8px; white-space: nowrap;
  max-width: 150px; overflow: hidden; text-overflow: ellipsis; }
.matrix.wide td { min-width: 15px; height: 16px; font-size: 10px; }
.matrix.wide th { font-size: 11px; line-height: 1.2; }
.matrix td.hit { background: rgb(var(--hit) / var(--a)); } .matrix td.miss { background: rgb(var(--miss) / var(--a)); }
.matrix td.deep { color: #fff; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 280px), 1fr)); gap: 22px; }
.spectrogram { position: relative; margin: 0 0 22px 30px; }
.spectrogram img { display: block; width: 100%; height: 128px; border-radius: 6px; }
.spectrogram i { position: absolute; right: calc(100% + 5px); margin-bottom: -8px; }
.spectrogram i.time { right: auto; left: 0; top: calc(100% + 1px); margin: 0; }
.spectrogram i.end { left: auto; right: 0; }
.spectrogram i { font: normal 11px/16px inherit; font-size: 11px; font-style: normal; color: var(--soft); }
.clips audio { display: block; width: 100%; height: 32px; }
@media print { .clips audio { display: none; } }
.clips figcaption { margin: 6px 0 4px; font-size: 13px; overflow-wrap: anywhere; }
.clips ul { list-style: none; margin: 0; padding: 0; font-size: 13px; }
.clips li { display: grid; grid-template-columns: minmax(0, 1fr) 70px 58px; gap: 8px; align-items: center; }
.clips li > span:first-child { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.clips em { font-style: normal; text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.clips .true { font-weight: 600; }
details { border-top: 1px solid var(--line); padding: 10px 0; } summary { cursor: pointer; }
summary span { color: var(--soft); margin-left: 10px; }
pre { margin: 0; overflow-x: auto; } ul.entries { padding-left: 20px; }
@media (max-width: 640px) { .matrix th[scope=row] { max-width: 96px; } .matrix td { min-width: 30px; } }
@media print { .clips, .charts { grid-template-columns: repeat(2, 1fr); } figure { break-inside: avoid; } }
""")
# Without it the page reads as well; its tables stay as they are.
_SCRIPT = Markup("""
for (const table of document.querySelectorAll(".sortable table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    if (!head.textContent) return;
    const isNumber = head.classList.contains("n"), button = document.createElement("button");
    const value = row => {
      const text = row.cells[column].textContent;
      return isNumber ? parseFloat(text.replaceAll(",", "")) : text;
    };
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const first = isNumber ? "descending" : "ascending", second = isNumber ? "ascending" : "descending";
      const order = head.getAttribute("aria-sort") === first ? second : first, sign = order === "ascending" ? 1 : -1;
      const compare = (a, b) => isNumber
        ? isNaN(a) - isNaN(b) || (isNaN(a) ? 0 : sign * (a - b))
        : sign * a.localeCompare(b, undefined, {numeric: true});
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort((a, b) => compare(value(a), value(b))));
      heads.forEach(each => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
    });
  });
}
""")


def report_page(entries: Sequence[Run | Study]) -> str:
    """The page about runs and studies, in the order given; of several, first how they stand beside each other."""
    parts = [
        Markup('<article id="part-{}">\n{}\n</article>').format(
            i, run_part(entry, f"part-{i}") if isinstance(entry, Run) else study_part(entry, f"part-{i}")
        )
        for i, entry in enumerate(entries)
    ]
    title = ", ".join(entry.name for entry in entries)
    if len(entries) > 1:
        parts.insert(0, Markup("<article>\n{}\n</article>").format(_overview(entries)))
    return page.document(title, parts, _STYLE, _SCRIPT)


def _overview(entries: Sequence[Run | Study]) -> Markup:
    runs = [entry for entry in entries if isinstance(entry, Run)]
    links = Markup().join(
        Markup('<li><a href="#part-{}">{}</a> <span class="soft">{}</span></li>').format(i, entry.name, entry.url)
        for i, entry in enumerate(entries)
    )
    parts = [Markup('<h1>{} reports</h1>\n<ul class="entries">{}</ul>').format(len(entries), links)]
    if len(runs) > 1:
        hashes = {run.metrics["list_hash"] for run in runs if run.metrics}
        if len(hashes) > 1:
            parts.append(Markup('<p class="note">The runs were evaluated on different clips: their hashes differ.</p>'))
        logged = [(run.name, run.lines) for run in runs if run.events("Step")]
        parts.append(page.section("The runs beside each other", _beside(runs)))
        if logged:
            parts.append(page.section("Curves", curves_of_several(logged, "all")))
    return Markup("\n").join(parts)


def _beside(runs: Sequence[Run]) -> Markup:
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
                Markup("<td><code>{}</code></td>").format(metrics["list_hash"][:12] + "…" if metrics else "–"),
            ]
        )
    head = ["run", "variant", "state", "metric", "result:n", "best step:n", "clips:n", "goodput:n"]
    return page.table([*head, "hash of the list"], rows, css="sortable")
