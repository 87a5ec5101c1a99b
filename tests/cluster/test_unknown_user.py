"""A user id without a name, as containers are started with: a run trains all the same."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import ERANN

USER_ID = 54_321
# It may read all files, for the interpreter can lie in a folder of root's.
_READS_ALL = "+dac_override,+dac_read_search"
AS_USER = ["setpriv", f"--reuid={USER_ID}", f"--regid={USER_ID}", "--clear-groups"]
AS_USER += [f"--inh-caps={_READS_ALL}", f"--ambient-caps={_READS_ALL}"]


@pytest.fixture
def place(tone_shards: Path) -> Iterator[Path]:
    """A folder of that user's, with a shard set; outside of the tests' own, which is closed to others."""
    if os.getuid() != 0 or subprocess.run([*AS_USER, "true"], capture_output=True).returncode:
        pytest.skip("needs root and setpriv, to start a process as another user")
    folder = Path(tempfile.mkdtemp(prefix="erann-user-", dir="/tmp"))
    try:
        shutil.copytree(tone_shards, folder / "shards")
        for path in (folder, *folder.rglob("*")):
            os.chown(path, USER_ID, USER_ID)
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("launcher", ["none", "ray"])
def test_it_trains(place: Path, launcher: str) -> None:
    keys = ["data.train=shards", "data.eval=shards", "data.allow_overlap=true", "data.crop_s=1"]
    keys += ["run.workers=1", f"run.launcher={launcher}"]
    keys += ["optim.global_batch=8", "optim.micro_batch=4", "optim.small_micro_batch=true", "optim.examples=16"]
    (place / "tiny.yaml").write_text("model: {variant: ERANN-3-1}\n")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": "/nonexistent",
        "TMPDIR": str(place),
        "RAY_AUTH_MODE": "disabled",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }
    done = subprocess.run(
        [*AS_USER, *ERANN, "pretrain", "tiny.yaml", *keys, "--json"],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (place / "runs/tiny/model/config.json").exists()


def test_the_name_is_there_before_torch_asks(place: Path) -> None:
    code = "import erann_dist, getpass; print(getpass.getuser())"
    command = [*AS_USER, sys.executable, "-c", code]
    done = subprocess.run(command, cwd=place, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert done.stdout.strip() == f"uid-{USER_ID}", done.stderr
