"""Errors that are the user's to mend: shown as one line, never as a traceback.

Exit codes of the `erann` command: 2 when what was typed can't be used (a command, an option, a recipe, a path that
does not exist), 1 when the work failed on what it found (data, shards, checkpoints), 130 after Ctrl-C, 143 when a run
was told to stop and has saved what it had.
"""

import os


def in_one_line(error: OSError) -> str:
    """What the system refused, such as room on a full disk: which file, and why."""
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "system"
    return f"{name}: {error.strerror or error}"


class UserError(Exception):
    """The work can't go on with what was found. The message is one line: what, which file or key, what to do."""

    exit_code = 1


class UsageError(UserError):
    """What was typed can't be used, whatever the data says."""

    exit_code = 2


class Unavailable(UserError):
    """S3 can't be reached or used now. The same may go well later."""


class Stopped(UserError):
    """The run was told to stop, and has saved what it had."""

    exit_code = 143  # as of a process that SIGTERM ended


class NoRoom(UserError):
    """The cluster had no room for a run's workers for as long as they were to wait."""
