"""Where commands write is checked before they work, and held against a second one."""

import subprocess
import sys
from pathlib import Path

import pytest

from erann_dist.errors import UsageError, UserError
from erann_dist.storage.folder import LocalFolder
from jobs.outputs import check_output, packing_into


def test_a_place_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_output(tmp_path / "new" / "deep" / "x.png")
    check_output(tmp_path / "file")
    with pytest.raises(UsageError, match="is a folder"):
        check_output(tmp_path)
    with pytest.raises(UserError, match=r"file is not a folder"):
        check_output(tmp_path / "file" / "x.png")


def test_two_commands_do_not_pack_into_one_folder(tmp_path: Path) -> None:
    folder = LocalFolder(str(tmp_path / "set"))
    with packing_into(folder):
        with pytest.raises(UserError, match="set: is being packed by another process"), packing_into(folder):
            pass
        with packing_into(LocalFolder(str(tmp_path / "other"))):
            pass
        assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert list(tmp_path.iterdir()) == []  # an empty folder is not left
    with packing_into(folder):
        folder.write("x", b"")
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["x"]


def test_without_a_loopback_interface_there_is_one_line() -> None:
    """As in a network namespace that nobody has set up."""
    script = "from cluster.environment import meeting_on_loopback\nwith meeting_on_loopback(): pass"
    namespace = ["unshare", "--net", "--map-root-user"]
    if subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("no network namespaces here")
    done = subprocess.run([*namespace, sys.executable, "-c", script], capture_output=True, text=True)
    assert "UserError: workers on one machine communicate over its loopback interface, but lo is down" in done.stderr
