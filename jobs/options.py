"""Options that several commands have."""

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

EXAMPLE = "\n\nExample:\n\n    "
