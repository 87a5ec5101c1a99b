"""The commands of README.md and docs/: each is one that the program takes, and the README's run in their order."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup
from typer.main import get_command

from jobs.cli.__main__ import app
from jobs.submission.submit import COMMANDS, check_command
from tests.support.commands import erann

ROOT = Path(__file__).parents[1]
DATA = "data.train=s3://bucket/train data.eval=s3://bucket/eval run.dir=s3://bucket/runs"
SHOWN = re.compile(r"^    (?:\$ )?(?:\.venv/bin/)?erann (.*)$", re.MULTILINE)


def commands_of(page: Path) -> list[str]:
    """The commands that a page shows, without what is said of them behind three spaces or a #."""
    lines = SHOWN.findall(page.read_text().replace("\\\n", " "))
    return [re.split(r" {3,}(?=[\w#])| # | \(", line)[0].partition(" > ")[0].strip() for line in lines]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ALL = [(str(page.relative_to(ROOT)), command) for page in PAGES for command in commands_of(page)]


def context_of_the_command() -> typer.Context:
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    return group.make_context("erann", ["demo"])


def test_commands_are_found() -> None:
    assert len(ALL) > 60


@pytest.mark.parametrize(("page", "command"), ALL)
def test_each_is_a_command_that_the_program_takes(page: str, command: str) -> None:
    """Its options are there, and its keys are those of recipes."""
    command = command.replace("$data", DATA).replace("$ami", "ami-0123456789abcdef0").replace(" …", " x")
    words = shlex.split(command)
    if words[0] in ("cluster", "jobs", "bench"):  # groups: tests/jobs/test_docs.py runs those of cluster
        return
    if words[0] == "submit":
        words = [word for word in words[1:] if word not in ("--detach", "--dry-run")]
        if "--address" in words:
            place = words.index("--address")
            del words[place : place + 2]
    check_command(context_of_the_command(), words)


QUICK = ["optim.epochs=0.3", "run.log_every=1"]
# What the README's commands need that is not at hand in a test: AudioSet, a bucket, a cluster, a pretrained model.
ELSEWHERE = re.compile(r"audioset|s3://|\$data|jobs list|runs/variants")


@pytest.mark.slow
def test_the_readmes_commands_in_their_order(real_data: Path, tmp_path: Path) -> None:
    """In one folder, with real audio; trainings are made short by keys behind them."""
    place = tmp_path / "project"
    place.mkdir()
    (place / "ESC-50").symlink_to(real_data / "esc10")
    ran: list[str] = []
    for command in commands_of(ROOT / "README.md"):
        words = shlex.split(command)
        if ELSEWHERE.search(command) or words[0] == "cluster":
            continue
        result: Any = erann(place, *words, *(QUICK if words[0] in COMMANDS else []))
        assert result
        ran.append(words[0])
    assert {"pack", "verify", "stats", "pretrain", "finetune", "evaluate", "tag"} <= set(ran)
