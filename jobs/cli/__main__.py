"""The `erann` command."""

import io
import sys
from typing import Annotated

import typer

from cluster.environment import is_first_process
from erann_dist.errors import UserError, in_one_line, without_credentials
from erann_dist.versions import check_torchaudio, program_versions
from jobs.cli import bench, cluster, shards, submit, training, watching
from jobs.cli.options import examples
from jobs.terminal.progress import console

app = typer.Typer(
    name="erann",
    help="Train ERANN audio taggers on AudioSet: from audio files to tar shards to an evaluated model."
    + examples(
        "erann pack esc50 --root ESC-50 --esc10 --out shard-sets/esc10",
        "erann pretrain esc10.yaml run.workers=2",
        "erann evaluate runs/esc10 shard-sets/esc10 --fold 5",
        "erann tag runs/esc10 sound.wav",
    ),
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (shards, training, watching, submit, cluster, bench):
    group.add_to(app)


def _print_version(requested: bool) -> None:
    if requested:
        print(", ".join(f"{name} {version}" for name, version in program_versions().items()))
        raise typer.Exit


# Commands that first load PyTorch, which takes seconds: they print a line before that.
_LOAD_PYTORCH = {"pretrain", "preflight", "finetune", "study", "pipeline", "evaluate", "tag", "demo"}


@app.callback()
def every_command(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the versions of erann and its libraries."
        ),
    ] = False,
) -> None:
    check_torchaudio()
    if context.invoked_subcommand in _LOAD_PYTORCH and not {"-h", "--help"} & set(sys.argv) and is_first_process():
        console.print(f"{context.invoked_subcommand}: loading", style="dim")


def main() -> None:
    """Run the command. A user error prints one line on stderr and sets an exit code (errors.py); no traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for a terminal or a file that is not UTF-8
    try:
        app()
    except UserError as error:
        console.print(f"erann: {without_credentials(str(error))}", markup=False)
        sys.exit(error.exit_code)
    except OSError as error:
        console.print(f"erann: {without_credentials(in_one_line(error))}", markup=False)
        sys.exit(UserError.exit_code)


if __name__ == "__main__":
    main()
