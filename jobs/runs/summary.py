"""The runs in a folder, from their logs: their state, starts, incidents, evaluations and curves."""

import difflib
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from erann_dist.errors import UsageError, UserError
from erann_dist.log.run_log import LOG, Line, goodput, read_damaged_log
from erann_dist.storage.folder import Folder, LocalFolder, open_folder

# A run counts as running until it has logged nothing for _SILENCE_S, or for _SILENCES times its longest silence so far:
# it logs nothing during an evaluation.
_SILENCE_S, _SILENCES = 120.0, 2.0


def list_runs(url: str, endpoint: str | None) -> dict[str, Any]:
    """The state of each run in a folder. Raises UsageError if there is no such folder or no run in it."""
    now = time.time()
    names = _names(open_folder(url, endpoint))
    runs = []
    for name in names:
        lines, skipped = _log(url, name, endpoint)
        runs.append(_standing(url, name, lines, now, endpoint) | {"skipped_lines": skipped})
    return {"folder": url, "runs": runs}


def show_run(url: str, name: str, endpoint: str | None, plot: Path | None) -> dict[str, Any]:
    """A run's state, starts, incidents and evaluations. plot: the image for its curves, if any. Raises UserError."""
    lines, skipped = _log(url, name, endpoint)
    log = f"{_run_url(url, name)}/{LOG}"
    if not lines:
        raise UserError(f"{log}: contains no event; the run's workers have not started, or it is damaged")
    if plot:
        if not any(line["event"] in ("Step", "Evaluated") for line in lines):
            raise UserError(f"{log}: contains no steps yet, so there is nothing to plot")
        from jobs.runs.plot import draw_run  # slow to import

        draw_run(lines, _run_url(url, name), plot)
    return (
        _standing(url, name, lines, time.time(), endpoint)
        | {"skipped_lines": skipped}
        | {"folder": url, "starts": _events(lines, "Started"), "incident_list": _events(lines, "Incident")}
        | {"evaluations": evaluations(lines), "plot": str(plot) if plot else None}
    )


def find_run(url: str, name: str | None, endpoint: str | None) -> tuple[str, str] | None:
    """The folder and the name of the requested run; None if the URL is a folder of runs. Raises UsageError.

    url: a folder of runs, or a run's own folder.
    """
    names = _names(open_folder(url, endpoint))
    if name is None and "." in names:
        folder, _, own = url.rstrip("/").rpartition("/")
        return folder or ".", own
    if name is None or name in names:
        return (url, name) if name else None
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    raise UsageError(f"{url}: no run {name}; " + (f"did you mean {near[0]}?" if near else f"there are {_some(names)}"))


def evaluations(lines: Sequence[Line]) -> list[Line]:
    """The run's evaluations. One that was repeated after a restart counts once."""
    return list({(line["step"], line.get("averaged")): line for line in _events(lines, "Evaluated")}.values())


def _names(folder: Folder) -> list[str]:
    if isinstance(folder, LocalFolder) and not Path(folder.url).is_dir():
        raise UsageError(f"{folder}: no such folder")
    names = [name.rpartition("/")[0] or "." for name in folder.sizes() if Path(name).name == LOG]
    if not names:
        raise UsageError(f"{folder}: contains no run (no {LOG}); give the folder that a recipe's run.dir names")
    return names


def _log(url: str, name: str, endpoint: str | None) -> tuple[list[Line], int]:
    return read_damaged_log(open_folder(_run_url(url, name), endpoint))


def _run_url(url: str, name: str) -> str:
    return f"{url.rstrip('/')}/{name}"


def _events(lines: Sequence[Line], kind: str) -> list[Line]:
    return [line for line in lines if line["event"] == kind]


def _standing(url: str, name: str, lines: Sequence[Line], now: float, endpoint: str | None) -> dict[str, Any]:
    found = standing(name, lines, now)
    if found["state"] != "finished" and open_folder(_run_url(url, name), endpoint).exists("model/config.json"):
        found |= {"state": "finished", "why": None}  # The model exists; the last lines of the log were lost.
    return found


def standing(name: str, lines: Sequence[Line], now: float) -> dict[str, Any]:
    """A run's state according to its log: state, step, best evaluation, goodput; None for what is unknown yet.

    The key why is what ended the command of an unfinished run.
    """
    names = ("step", "steps", "workers", "best", "goodput", "last_event", "silent_s", "why")
    found: dict[str, Any] = dict.fromkeys(names)
    found |= {"run": name, "state": "empty", "incidents": len(_events(lines, "Incident"))}
    if not lines:
        return found
    last = lines[-1]["time"]
    state = _state(lines, now)
    for line in lines:
        if line["event"] in ("Started", "Step", "Finished", "Ended"):
            found["step"] = line["step"]
    if starts := _events(lines, "Started"):
        found |= {key: starts[-1][key] for key in ("steps", "workers")}
    share = goodput(lines, now if state == "running" else last)
    return found | {
        "state": state,
        "why": lines[-1]["text"] if lines[-1]["event"] == "Ended" else None,
        "best": _best(lines),
        "goodput": share,
        "last_event": last,
        "silent_s": max(0.0, now - last),
    }


def _state(lines: Sequence[Line], now: float) -> str:
    if _events(lines, "Finished"):
        return "finished"
    if lines[-1]["event"] == "Ended":
        return "stopped"
    # The time between two commands is not a silence of the run.
    silences = [b["time"] - a["time"] for a, b in pairwise(lines) if b["event"] != "Started"]
    return "running" if now - lines[-1]["time"] <= max(_SILENCE_S, _SILENCES * max(silences, default=0)) else "stopped"


def _best(lines: Sequence[Line]) -> dict[str, Any] | None:
    """The best of all evaluations, by the first metric."""
    scores = [(next(iter(line["metrics"].items())), line) for line in evaluations(lines) if line["metrics"]]
    scores = [((name, value), line) for (name, value), line in scores if value is not None]
    if not scores:
        return None
    (name, value), line = max(scores, key=lambda each: each[0][1])
    return {"metric": name, "value": value, "step": line["step"], "averaged": line.get("averaged")}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
