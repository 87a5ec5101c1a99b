"""Pairs of torch and torchaudio: what was found by trying each, and what a user reads of one that can't work."""

import importlib
import importlib.metadata
from typing import Any

import pytest

from erann_dist import versions
from erann_dist.errors import UserError

# Each was installed, and the front end and a step of the model run (Linux, x86-64, Python 3.11).
TRIED = {
    ("2.11.0", "2.11.0"): True,
    ("2.12.0", "2.11.0"): True,
    ("2.12.1", "2.11.0"): True,
    ("2.13.0", "2.11.0"): True,
    ("2.14.0", "2.11.0"): True,
    ("2.14.1", "2.11.0"): True,
    ("2.15.0", "2.11.0"): False,
    ("2.11.0", "2.11.1"): False,
    ("2.12.0", "2.11.1"): False,
    ("2.12.1", "2.11.1"): False,
    ("2.13.0", "2.11.1"): True,
    ("2.14.0", "2.11.1"): True,
    ("2.14.1", "2.11.1"): True,
    ("2.15.0", "2.11.1"): True,
}


def pretend(monkeypatch: pytest.MonkeyPatch, **found: str) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found.get(name) or real(name))


@pytest.mark.parametrize(("torch", "torchaudio"), TRIED)
def test_a_pair_that_was_tried(torch: str, torchaudio: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, torch=f"{torch}+cu130", torchaudio=torchaudio)
    if TRIED[torch, torchaudio]:
        versions.check_torchaudio()
        return
    with pytest.raises(UserError) as error:
        versions.check_torchaudio()
    text = str(error.value)
    assert f"torch {torch} and torchaudio {torchaudio} do not work together" in text
    for release in ("2.11.0", "2.11.1"):
        assert f"torchaudio=={release} with torch " in text
    assert "\n" not in text


def test_a_release_that_nobody_has_tried_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, torch="2.20.0", torchaudio="2.12.0")
    versions.check_torchaudio()


@pytest.mark.parametrize(
    "error",
    [
        OSError("Could not load this library: libtorchaudio.so"),
        RuntimeError("compiled with different CUDA versions\nInstall"),
        ImportError("libc10_cuda.so: cannot open shared object file"),
    ],
)
def test_one_that_does_not_load_says_what_fits(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(UserError, match="do not work together; install a pair that does") as raised:
        versions.import_torchaudio()
    assert str(error).splitlines()[0] in str(raised.value)
    assert "\n" not in str(raised.value)


def test_pins_are_of_what_is_installed() -> None:
    pins = versions.pinned_requirements()
    assert f"torch=={importlib.metadata.version('torch').partition('+')[0]}" in pins
    assert f"ray[default,train]=={importlib.metadata.version('ray')}" in pins
    assert not [pin for pin in pins if "pytest" in pin or ";" in pin]
