"""What the pages say is what the program does; they link to each other, and none is long."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cluster.environment import HEALTH_CHECKS
from cluster.render.instances import INSTANCES
from jobs.cli.__main__ import app

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {page.relative_to(DOCS).as_posix(): page.read_text() for page in sorted(DOCS.rglob("*.md"))}
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(#?)([^)]*)\)")
COMMANDS = [
    (page, command)
    for page, text in PAGES.items()
    for command in re.findall(r"^    (?:\$ )?erann cluster (render .*)$", text.replace("\\\n", " "), re.MULTILINE)
]


def test_the_health_checks() -> None:
    assert (
        dict(re.findall(r"^\| `(RAY_health_\w+)` \| \d+ \| (\d+) \|$", PAGES["clusters/hosts.md"], re.MULTILINE))
        == HEALTH_CHECKS
    )


def test_the_instances() -> None:
    told = {
        name: [cell.strip() for cell in cells.split("|")]
        for name, cells in re.findall(r"^\| ([gp]\d\S+) \|(.*)\|$", PAGES["clusters/aws-instances.md"], re.MULTILINE)
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


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_the_commands(page: str, command: str) -> None:
    words = shlex.split(command.partition(" > ")[0].replace("$ami", "ami-0123456789abcdef0"))
    outcome = CliRunner().invoke(app, ["cluster", *words], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    if words[1] == "slurm":
        assert subprocess.run(["bash", "-n"], input=outcome.stdout, text=True).returncode == 0
        return
    assert yaml.safe_load(outcome.stdout)
    # The cache that the page gives the recipe is the one that the file tells of.
    (told,) = re.findall(r"data.cache={dir: /scratch/erann, max_bytes: (\w+)}$", outcome.stdout, re.MULTILINE)
    shown = re.findall(r"data.cache={dir: /scratch/erann, max_bytes: (\w+)}'", PAGES[page])
    assert told in shown or page == "clusters/index.md"  # which leaves it to the target's page


def test_each_target_has_a_page_with_its_command() -> None:
    assert {(page, command.split()[1]) for page, command in COMMANDS} >= {
        (f"clusters/{target}.md", target) for target in ("aws", "kubernetes", "slurm")
    }


def test_no_page_is_unfinished() -> None:
    assert not [page for page, text in PAGES.items() if re.search(r"@[A-Z]+@", text)]


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{name}" for name in PAGES)])
def test_links_lead_somewhere(page: str) -> None:
    text = (DOCS.parent / page).read_text()
    for target, _, part in LINK.findall(text):
        there = (DOCS.parent / page).parent / target if target else DOCS.parent / page
        assert there.exists(), target
        headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE) if part else []
        assert not part or part in [re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings], part


@pytest.mark.parametrize("page", PAGES)
def test_no_page_is_long(page: str) -> None:
    assert len((DOCS / page).read_bytes()) <= 8192


def test_every_page_is_reachable_from_the_index() -> None:
    reached: set[str] = set()
    to_read = ["index.md"]
    while to_read:
        page = to_read.pop()
        reached.add(page)
        links = {(DOCS / page).parent / target for target, _, _ in LINK.findall(PAGES[page]) if target}
        linked = {link.resolve().relative_to(DOCS.resolve()).as_posix() for link in links}
        to_read += (linked & PAGES.keys()) - reached
    assert reached == PAGES.keys()


# In place of those of the machine where a command is typed.
DATA = ["data.train=/t", "data.eval=/e", "run.dir=/runs"]
FOLDED = ["protocol.shards=/s", "run.dir=/runs"]
ELSEWHERE = {
    "pretrain": DATA,
    "preflight": DATA,
    "finetune": FOLDED,
    "transfer": FOLDED,
    "pipeline": ["run.dir=/runs"]
    + [f"pretrain.set.{each}" for each in DATA[:2]]
    + [f"finetune.{number}.set.{FOLDED[0]}" for number in range(3)],
}


def typed() -> Iterator[tuple[str, str]]:
    """The pages' commands that train, check or submit, by recipes that come along, and not under torchrun."""
    names = "submit|preflight|pretrain|finetune|study|pipeline"
    for page, text in {"README.md": (DOCS.parent / "README.md").read_text(), **PAGES}.items():
        data = dict(re.findall(r"^    (data)='(.*)'$", text, re.MULTILINE)).get("data", "")
        for line in re.sub(r"\\\n *", "", text).splitlines():
            command = re.search(rf"^ {{4}}(?:.*? -- +)?erann ((?:{names}) .*?)( {{4}}|$)", line)
            if command and ".yaml" in command[1] and not re.search(r"--launcher|\b(mine|tones)\.yaml", command[1]):
                yield page, command[1].partition(" > ")[0].replace("$data", data)


@pytest.mark.parametrize(("page", "command"), typed())
def test_what_is_typed_is_taken(page: str, command: str) -> None:
    """As far as that shows without data and cluster: `erann submit --dry-run` reads it as the command itself does."""
    words = shlex.split(command)
    if words[0] != "submit":
        kind = "transfer" if "transfer" in words else words[0]
        words = ["submit", *words, *ELSEWHERE.get(kind, DATA)]
        if "--from" in words and words[words.index("--from") + 1] != "none":
            words[words.index("--from") + 1] = "/model"
    outcome = CliRunner().invoke(app, [*words, "--dry-run"])
    assert outcome.exit_code == 0, f"{command}: {outcome.exception}"
