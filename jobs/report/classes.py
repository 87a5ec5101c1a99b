"""The results by class: a sortable table, and a confusion matrix."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from jobs.html import page

_LONG = 40  # With more rows, a table scrolls, to keep the rest of the page within reach.
_MATRIX = 60  # With more classes, no confusion matrix is drawn.
_WIDE = 20  # From this number of classes on, the matrix's cells are small.
_DEEP = 0.55  # Above this opacity of a cell, its number is white.


def class_table(per_class: Sequence[dict[str, Any]], column: str, confusion: list[list[int]] | None) -> Markup:
    """Each class's average precision or accuracy, the best first. column: ap or accuracy, the key to sort by."""
    titles = {"ap": "average precision", "auc": "AUC", "accuracy": "accuracy"}
    columns = [name for name in titles if name in per_class[0]]
    counts = "positives" if "positives" in per_class[0] else "clips"
    confused_with = _confused_with(per_class, confusion) if confusion else None
    order = sorted(range(len(per_class)), key=lambda c: -1 if (v := per_class[c][column]) is None else v, reverse=True)
    rows = []
    for rank, c in enumerate(order, 1):
        of_class = per_class[c]
        cells = [page.element("rank", rank), page.text(of_class["name"])]
        cells.append(page.bar_cell(of_class[column] or 0.0))
        cells += [page.number(score(of_class[name])) for name in columns]
        cells.append(page.number(f"{of_class[counts]:,}"))
        rows.append([*cells, page.text(confused_with[c])] if confused_with else cells)
    head = ["", "class", "", *(f"{titles[name]}:n" for name in columns), f"{counts}:n"]
    if confused_with:
        head.append("most often confused with")
    return page.table(head, rows, css="sortable long" if len(rows) > _LONG else "sortable")


def _confused_with(per_class: Sequence[dict[str, Any]], confusion: list[list[int]]) -> list[str]:
    """For each class, the other class that its clips were most often predicted as."""
    found = []
    for c, counts in enumerate(confusion):
        other = max((i for i in range(len(counts)) if i != c), key=lambda i: counts[i], default=c)
        confused = other != c and counts[other] > 0
        found.append(f"{per_class[other]['name']} ({counts[other]:,})" if confused else "")
    return found


def confusion_matrix(names: Sequence[str], confusion: list[list[int]]) -> Markup:
    """The confusion matrix: rows are the true classes, columns the predicted ones."""
    if len(names) > _MATRIX:
        return page.soft(
            f"{len(names)} classes are too many for a matrix; the table shows what each is most often confused with."
        )
    lines = [
        (names[true], [_cell(names, true, c, count, sum(counts)) for c, count in enumerate(counts)])
        for true, counts in enumerate(confusion)
    ]
    matrix = page.element("matrix", names, lines, "wide" if len(names) >= _WIDE else "")
    return matrix + page.soft(
        "Rows are true classes, columns predicted classes. The deeper the colour, the larger the share of the row's "
        "clips. Correct predictions are on the diagonal."
    )


def _cell(names: Sequence[str], true: int, predicted: int, count: int, clips: int) -> dict[str, Any] | None:
    if not count:
        return None
    opacity = 0.15 + 0.85 * count / clips
    css = " ".join(filter(None, ("hit" if true == predicted else "miss", "deep" if opacity > _DEEP else "")))
    title = f"{names[true]} predicted as {names[predicted]}: {count:,} of {clips:,}"
    return {"css": css, "opacity": opacity, "title": title, "count": count}


def score(value: float | None) -> str:
    """A metric as text."""
    return "–" if value is None else f"{value:.4f}"
