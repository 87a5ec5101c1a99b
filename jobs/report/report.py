"""`erann report`: writes one page about runs and studies."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from erann_dist.data.clip_reader import write_text
from erann_dist.storage.folder import open_folder
from jobs.outputs import check_output
from jobs.report.reading import read, runs_of
from jobs.report.report_page import report_page

REPORT = "report.html"  # In the folder that it is about.


def report(urls: Sequence[str], out: Path | None, endpoint: str | None) -> dict[str, Any]:
    """Write the page about the runs and studies in these folders.

    out: the file; by default report.html in the first folder. Raises UsageError if a folder is neither or `out` is a
    folder, UserError if a study's results can't be read.
    """
    if out:
        check_output(out)
    entries = [read(url, endpoint) for url in urls]
    text = report_page(entries)
    if out:
        write_text(out, text)
    else:
        open_folder(urls[0], endpoint).write(REPORT, text.encode())
    runs = runs_of(entries)
    return {
        "report": str(out or f"{urls[0]}/{REPORT}"),
        "bytes": len(text.encode()),
        "runs": [run.url for run in runs],
        "notes": [f"{each.name}: {note}" for each in [*entries, *runs] for note in each.notes],
    }
