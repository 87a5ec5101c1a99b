"""docs/clusters.md says what the program does."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cluster.environment import HEALTH_CHECKS
from cluster.render.instances import INSTANCES
from jobs.cluster_commands import cluster_app

TEXT = (Path(__file__).parents[2] / "docs" / "clusters.md").read_text()
COMMANDS = re.findall(r"^    erann cluster (render .*)$", TEXT.replace("\\\n", " "), re.MULTILINE)


def test_the_health_checks() -> None:
    assert dict(re.findall(r"^\| `(RAY_health_\w+)` \| \d+ \| (\d+) \|$", TEXT, re.MULTILINE)) == HEALTH_CHECKS


def test_the_instances() -> None:
    told = {
        name: [cell.strip() for cell in cells.split("|")]
        for name, cells in re.findall(r"^\| ([gp]\d\S+) \|(.*)\|$", TEXT, re.MULTILINE)
    }
    assert told == {
        each.name: [
            f"{each.gpus} × {each.gpu}",
            f"{each.vcpus}",
            f"{each.nvme:,}",
            f"{each.network:,}",
            f"{each.efa_cards or ''}",
            f"{each.vcpus / 2 * 250 / 2 / each.gpus:,.0f}",  # examples/s: cores, clips/s of one, two clips an example
        ]
        for each in INSTANCES
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands(command: str) -> None:
    words = shlex.split(command.partition(" > ")[0].replace("$ami", "ami-0123456789abcdef0"))
    outcome = CliRunner().invoke(cluster_app, words, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    text = outcome.stdout
    assert yaml.safe_load(text)
    # The cache that the docs give the recipe is the one that the file tells of.
    (told,) = re.findall(r"data.cache={dir: /scratch/erann, max_bytes: (\w+)}$", text, re.MULTILINE)
    shown = re.findall(r"data.cache={dir: /scratch/erann, max_bytes: (\w+)}'", TEXT)
    assert told in shown


def test_both_targets_are_shown() -> None:
    assert {command.split()[1] for command in COMMANDS} >= {"aws", "kubernetes"}
