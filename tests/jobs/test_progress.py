"""What a person sees of a run on the terminal."""

import io

import pytest
from rich.console import Console

from erann_dist.events import Incident, Started, Step
from jobs import progress


@pytest.mark.parametrize("terminal", [False, True])
def test_incidents_are_lines_of_their_own(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    seen = io.StringIO()
    shown = Console(file=seen, force_terminal=terminal, highlight=False, soft_wrap=True, width=200, color_system=None)
    monkeypatch.setattr(progress, "console", shown)
    texts = ["set[1]/a.tar: clip x is damaged; check the set with erann verify set[1]", "/scratch: the cache is full"]
    with progress.RunView() as view:
        view(Started(0, 10, 1, "cpu", 40, 40, None))
        view(Step(3, 0.5, 1e-3, 1.0, 2.0, 0.0, 1.0, None, 0))
        for text in texts:
            view(Incident(4, text))
        view(Step(10, 0.5, 1e-3, 1.0, 2.0, 0.0, 1.0, None, 1))
    for text in texts:
        assert f"step 4: {text}\n" in seen.getvalue()
