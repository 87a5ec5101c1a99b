"""Errors that are the user's to fix: shown as one line, never as a traceback.

Exit codes of the `erann` command: 2 when the input can't be used (a command, an option, a recipe, a path that does not
exist), 1 when the work failed because of what it found (data, shards, checkpoints), 130 after Ctrl-C, 143 when a run
stopped on request and saved its state.
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
    """Raise UsageError when a URL contains credentials; the message does not repeat them.

    A bucket's name contains neither @ nor a colon, unless it is the ARN of an access point; object keys may contain
    both, and secret keys may contain a slash.
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
    """A system error in one line, such as a full disk: which file, and why.

    An error without a file name comes from a step of this program, which is named instead: reading an open file,
    starting a process, a connection.
    """
    reason = error.strerror or str(error) or type(error).__name__
    if isinstance(error.filename, str | bytes):
        return f"{os.fsdecode(error.filename)}: {reason}"
    return f"{_attempted(error)}: {reason}"


def _attempted(error: OSError) -> str:
    """The innermost function of this program that the error passed through, and what it called."""
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
    """Add this file's name to a system error that has none, such as a write to a full disk."""
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
    """The command line or the recipe can't be used, whatever the data contains."""

    exit_code = 2


class Unavailable(UserError):
    """S3 can't be reached or used now. A later attempt may succeed."""


class Stopped(UserError):
    """The run was asked to stop and has saved its state."""

    exit_code = 143  # that of a process ended by SIGTERM


class NoCapacity(UserError):
    """The cluster had no capacity for a run's workers within the time that they may wait."""
