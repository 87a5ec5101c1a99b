"""Options shared by several commands."""

import re
import textwrap
from typing import Annotated, Literal

import typer

Json = Annotated[
    bool, typer.Option("--json", help="Print the result on stdout as one JSON object, and nothing else there.")
]
Address = Annotated[
    str | None, typer.Option(help="Address of a Ray cluster. Default: start an embedded one on this machine.")
]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model folder or the folder of a finished run, local or in S3.")
]
Shards = Annotated[str, typer.Argument(metavar="URL", help="The shard set: a folder or s3://bucket/prefix.")]
Endpoint = Annotated[
    str | None, typer.Option(help="URL of the S3 server. Default: AWS_ENDPOINT_URL, the AWS profile, or Amazon S3.")
]
Launcher = Literal["ray", "torchrun", "none"]

_WIDTH = 70  # Characters per line of an example, so that it fits a terminal of 80 columns.


def examples(*commands: str) -> str:
    """The examples at the end of a command's help. Long commands are wrapped, and can be pasted into a shell."""
    shown = "\n\n".join(" \\\n    ".join(_lines(command)) for command in commands)
    return f"\n\nExample:\n\n```sh\n{shown}\n```"


def _lines(command: str) -> list[str]:
    """A command wrapped into lines; an option stays on the same line as its value."""
    joined = re.sub(r"(--[a-z-]+) (?=[^-])", "\\1\0", command)
    lines = textwrap.wrap(joined, _WIDTH, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\0", " ") for line in lines]
