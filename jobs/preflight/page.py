"""Preflight's verdicts on the terminal, printed as they come, and the conclusion at the end."""

from typing import Any

from rich.console import Console

from jobs.preflight.verdicts import State, Verdict
from jobs.terminal.progress import duration

_WORDS: dict[State, str] = {"ok": "ok", "warning": "warning", "failed": "FAILED", "not checked": "-"}


def print_verdict(console: Console, verdict: Verdict) -> None:
    """What was found, followed by each problem and its fix."""
    found = f"not checked: {verdict.found}" if verdict.state == "not checked" else verdict.found
    lines = [found] if found else []
    for problem in verdict.problems:
        lines += [problem.text, f"  fix: {problem.mend}"]
    for number, line in enumerate(lines):
        head = f"{_WORDS[verdict.state]:9}{verdict.check:12}" if number == 0 else " " * 21
        console.print(head + line, markup=False)


def print_end(console: Console, result: dict[str, Any]) -> None:
    """The advice, and whether the run can start."""
    for line in result["advice"]:
        console.print(f"advice   {line}", markup=False)
    failed = [check["check"] for check in result["checks"] if check["state"] == "failed"]
    state = f"not ready: {', '.join(failed)} failed" if failed else f"{result['recipe']} can start here"
    console.print(f"{state}; checked in {duration(result['seconds'])}", markup=False)
