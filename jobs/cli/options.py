"""Options that several commands have."""

import re
import textwrap
from typing import Annotated, Literal

import typer

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout at the end, and nothing else there.")
]
Address = Annotated[str | None, typer.Option(help="Address of a Ray cluster; without one, an embedded one is started.")]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model folder, or the folder of a finished run; or one in S3.")
]
Shards = Annotated[str, typer.Argument(metavar="URL", help="The shard set: a folder or s3://bucket/prefix.")]
Endpoint = Annotated[
    str | None, typer.Option(help="URL of the S3 server; AWS_ENDPOINT_URL, a profile or Amazon's if not given.")
]
Launcher = Literal["ray", "torchrun", "none"]

_WIDTH = 70  # of a line of an example, which a terminal of 80 columns shows whole


def examples(*commands: str) -> str:
    """The end of a command's help. A long command is continued on further lines, and may be pasted into a shell."""
    shown = "\n\n".join(" \\\n    ".join(_lines(command)) for command in commands)
    return f"\n\nExample:\n\n```sh\n{shown}\n```"


def _lines(command: str) -> list[str]:
    """A command in lines; an option stays with its value."""
    joined = re.sub(r"(--[a-z-]+) (?=[^-])", "\\1\0", command)
    lines = textwrap.wrap(joined, _WIDTH, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\0", " ") for line in lines]
