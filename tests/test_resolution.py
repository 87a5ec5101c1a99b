"""Without the lock: pip resolves each set of extras within a minute. Run by `make test-newest`, on the oldest and the
newest Python weekly: pip looks up what it would install, and installs nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MINUTE = 60.0

pytestmark = pytest.mark.newest


@pytest.fixture(scope="module", params=["pip<23.1", "pip<26", "pip"])
def python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python of its own with this pip: Debian 12's, Debian 13's, the newest."""
    folder = tmp_path_factory.mktemp("pip") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--upgrade", request.param], check=True)
    return python


@pytest.mark.parametrize("extras", ["", "[dev]", "[aws]", "[dev,aws,hdf5]"])
def test_pip_resolves_within_a_minute(python: Path, extras: str) -> None:
    command = [str(python), "-m", "pip", "install", "--dry-run", "--progress-bar", "off", f"{ROOT}{extras}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=MINUTE, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "Would install" in done.stdout
