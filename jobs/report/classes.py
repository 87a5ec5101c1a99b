"""How each class fares: a table that can be sorted, and a confusion matrix."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from jobs.html import page

_LONG = 40  # rows from which on a table scrolls, so that the rest of the page is near
_MATRIX = 60  # classes up to which a confusion matrix is drawn
_WIDE = 20  # classes from which on its cells are small
_DEEP = 0.55  # opacity of a colour from which on its number is white


def class_table(per_class: Sequence[dict[str, Any]], column: str, confusion: list[list[int]] | None) -> Markup:
    """Each class's average precision or accuracy, the best first. column: ap or accuracy, a key of `per_class`."""
    titles = {"ap": "average precision", "auc": "AUC", "accuracy": "accuracy"}
    columns = [name for name in titles if name in per_class[0]]
    counts = "positives" if "positives" in per_class[0] else "clips"
    taken_for = _taken_for(per_class, confusion) if confusion else None
    order = sorted(range(len(per_class)), key=lambda c: -1 if (v := per_class[c][column]) is None else v, reverse=True)
    rows = []
    for rank, c in enumerate(order, 1):
        of_class = per_class[c]
        cells = [page.element("rank", rank), page.text(of_class["name"])]
        cells.append(page.bar_cell(of_class[column] or 0.0))
        cells += [page.number(score(of_class[name])) for name in columns]
        cells.append(page.number(f"{of_class[counts]:,}"))
        rows.append([*cells, page.text(taken_for[c])] if taken_for else cells)
    head = ["", "class", "", *(f"{titles[name]}:n" for name in columns), f"{counts}:n"]
    if taken_for:
        head.append("most often taken for")
    return page.table(head, rows, css="sortable long" if len(rows) > _LONG else "sortable")


def _taken_for(per_class: Sequence[dict[str, Any]], confusion: list[list[int]]) -> list[str]:
    """For each class the other one that most of its clips were taken for."""
    found = []
    for c, counts in enumerate(confusion):
        other = max((i for i in range(len(counts)) if i != c), key=lambda i: counts[i], default=c)
        taken = other != c and counts[other] > 0
        found.append(f"{per_class[other]['name']} ({counts[other]:,})" if taken else "")
    return found


def confusion_matrix(names: Sequence[str], confusion: list[list[int]]) -> Markup:
    """Rows are the true classes, columns those that the clips were taken for."""
    if len(names) > _MATRIX:
        return page.soft(f"{len(names)} classes are too many for a matrix; the table says what each is taken for.")
    lines = [
        (names[true], [_cell(names, true, c, count, sum(counts)) for c, count in enumerate(counts)])
        for true, counts in enumerate(confusion)
    ]
    matrix = page.element("matrix", names, lines, "wide" if len(names) >= _WIDE else "")
    return matrix + page.soft(
        "A row for each true class, a column for each that its clips were taken for; the deeper the colour, the larger "
        "the share of the row's clips. What is right stands on the diagonal."
    )


def _cell(names: Sequence[str], true: int, taken: int, count: int, clips: int) -> dict[str, Any] | None:
    if not count:
        return None
    opacity = 0.15 + 0.85 * count / clips
    css = " ".join(filter(None, ("hit" if true == taken else "miss", "deep" if opacity > _DEEP else "")))
    title = f"{names[true]} taken for {names[taken]}: {count:,} of {clips:,}"
    return {"css": css, "opacity": opacity, "title": title, "count": count}


def score(value: float | None) -> str:
    """A metric for people."""
    return "–" if value is None else f"{value:.4f}"
