"""Errors that are the user's to fix: shown as one line, never as a traceback.

Exit codes of the `erann` command: 2 when what was typed can't be used (a command, an option, a recipe, a path that
does not exist), 1 when the work failed on what it found (data, shards, checkpoints), 130 after Ctrl-C, 143 when a run
was told to stop and has saved what it had.
"""

import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_OWN = ("erann_dist", "shards", "cluster", "jobs")
_CREDENTIALS = re.compile(r"(?<=://)[^\s/@]*:[^\s@]*@")


def without_credentials(text: str) -> str:
    """The text with *** in place of user:password in the URLs that it contains."""
    return _CREDENTIALS.sub("***@", text)


def require_no_credentials(url: str) -> None:
    """Raise UsageError, which does not repeat them, when a URL contains credentials.

    A bucket's name has neither @ nor a colon, unless it is the ARN of an access point; keys may have them, and secret
    keys a slash.
    """
    scheme, separator, rest = url.partition("://")
    bucket = rest.partition("/")[0]
    if scheme == "s3":
        found = "@" in bucket or (":" in bucket and not bucket.startswith("arn:"))
    else:
        found = bool(separator) and "@" in rest
    if found:
        raise UsageError(
            f"{scheme}://***: credentials do not belong in a URL, which is logged; set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or write them to ~/.aws/credentials"
        )


def in_one_line(error: OSError) -> str:
    """What the system refused, such as room on a full disk: which file, and why.

    An error that names no file is of a step of this program, which is named: reading a file that is open, starting a
    process, a connection.
    """
    reason = error.strerror or str(error) or type(error).__name__
    if isinstance(error.filename, str | bytes):
        return f"{os.fsdecode(error.filename)}: {reason}"
    return f"{_attempted(error)}: {reason}"


def _attempted(error: OSError) -> str:
    """The innermost function of this program's that the error passed through, and what that called."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [str(frame.f_globals.get("__name__", "")) for frame in frames]
    own = [i for i, module in enumerate(modules) if module.partition(".")[0] in _OWN]
    if not own:
        return "the system"
    last = own[-1]
    called = "".join(f" ({frame.f_code.co_qualname})" for frame in frames[last + 1 : last + 2])
    return f"{modules[last]}, {frames[last].f_code.co_qualname}{called}"


@contextmanager
def naming(file: str | Path) -> Iterator[None]:
    """Let a system's error that names no file, such as that of a write to a full disk, name this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(file)
        raise


class UserError(Exception):
    """The work can't continue with what was found. The message is one line: what, which file or key, what to do."""

    exit_code = 1

    def __init__(self, text: str, fix: str = "") -> None:
        """fix: what to do, where a caller may show it apart from the text."""
        super().__init__(text, fix)
        self.text, self.fix = text, fix

    def __str__(self) -> str:
        return f"{self.text}; {self.fix}" if self.fix else self.text


class UsageError(UserError):
    """What was typed can't be used, whatever the data says."""

    exit_code = 2


class Unavailable(UserError):
    """S3 can't be reached or used now. The same may go well later."""


class Stopped(UserError):
    """The run was told to stop, and has saved what it had."""

    exit_code = 143  # as of a process that SIGTERM ended


class NoCapacity(UserError):
    """The cluster had no room for a run's workers for as long as they were to wait."""
