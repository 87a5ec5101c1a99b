"""A system's error as one line: what, and why."""

import errno
import os
import socket
from pathlib import Path

import pytest
import torch

from erann_dist.data.clip_reader import write_text
from erann_dist.errors import UsageError, in_one_line, naming, without_credentials
from erann_dist.storage.folder import LocalFolder
from erann_dist.train.engine import require_compiler


def test_the_files_name() -> None:
    with pytest.raises(OSError, match="missing") as error:
        Path("missing").read_text()
    assert in_one_line(error.value) == "missing: No such file or directory"


def test_without_a_file_it_is_what_was_attempted() -> None:
    """The innermost function of this program, and what that called."""
    with open("/dev/full", "r+b", buffering=0) as full, pytest.raises(OSError, match="Invalid argument") as error:
        LocalFolder("/etc").fetch("passwd", full)  # which can't be truncated
    assert in_one_line(error.value).startswith("erann_dist.storage.folder, LocalFolder.fetch")
    elsewhere = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    assert in_one_line(elsewhere) == "the system: Cannot allocate memory"
    assert in_one_line(TimeoutError()) == "the system: TimeoutError"
    assert in_one_line(socket.gaierror(-2, "Name or service not known")).endswith(": Name or service not known")


def test_a_write_to_a_full_disk_names_the_file() -> None:
    """/dev/full refuses writes, and Python's error names no file."""
    with pytest.raises(OSError, match="space") as error, naming("/dev/full"), open("/dev/full", "w") as file:
        file.write("x")
    assert in_one_line(error.value) == "/dev/full: No space left on device"
    with pytest.raises(FileNotFoundError) as missing, naming("another"):
        Path("missing").read_text()
    assert missing.value.filename == "missing"


def test_files_that_are_written_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="space") as error:
        LocalFolder(str(tmp_path)).write("x", b"data")
    assert error.value.filename == str(tmp_path / "x")
    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(OSError, match="space") as error:
        write_text(tmp_path / "page.html", "text")
    assert error.value.filename == str(tmp_path / "page.html")


@pytest.mark.parametrize(("device", "wanted"), [("cpu", "g++"), ("cuda", "gcc or clang")])
def test_compiling_without_a_compiler(monkeypatch: pytest.MonkeyPatch, device: str, wanted: str) -> None:
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UsageError, match="optim.compile") as error:
        require_compiler(torch.device(device))
    assert wanted in str(error.value)


def test_a_compiler_with_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "sh -c")  # any program
    require_compiler(torch.device("cpu"))


def test_credentials_are_taken_out_of_urls() -> None:
    text = "at s3://AKIA:se/cr+et@bucket/x and http://user:pass@host:80/: s3://b/c@d: no"
    assert without_credentials(text) == "at s3://***@bucket/x and http://***@host:80/: s3://b/c@d: no"
