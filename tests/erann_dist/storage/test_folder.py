"""A folder on disk: whole files or none. The moves that every kind of folder must answer alike are in `play`."""

import pickle
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erann_dist.errors import UsageError
from erann_dist.storage.folder import Folder, LocalFolder, open_folder
from erann_dist.storage.s3 import S3Folder

NAMES = ["a", "b.tar", "b.tar.json", "deep/er/c", "deep/d e+%.json", "ü#?&.bin"]
MOVES = st.lists(
    st.tuples(st.sampled_from(["write", "writing", "patch", "fail", "delete"]), st.sampled_from(NAMES), st.binary()),
    max_size=12,
)


class Failure(Exception):
    pass


def fail_while_writing(folder: Folder, name: str, data: bytes, failure: BaseException) -> None:
    with folder.writing(name) as file:
        file.write(data)
        raise failure


def fetched(folder: Folder, name: str) -> bytes:
    """What fetch makes of a file that holds something else; on the way it tells how much is there."""
    told: list[int] = []
    with tempfile.TemporaryFile() as file:
        file.write(b"longer than the other" * 100)
        folder.fetch(name, file, told.append)
        file.seek(0)
        data = file.read()
    assert told == sorted(told)
    assert told[-1:] == [len(data)] * bool(data)
    return data


def play(folder: Folder, moves: list[tuple[str, str, bytes]]) -> None:
    """Make the moves on the folder and on a dict, and compare what they hold."""
    expected: dict[str, bytes] = {}
    for move, name, data in moves:
        if move == "delete":
            folder.delete(name)
            expected.pop(name, None)
        elif move == "fail":
            with pytest.raises(Failure):
                fail_while_writing(folder, name, data, Failure())
        elif move == "write":
            folder.write(name, data)
            expected[name] = data
        else:
            with folder.writing(name) as file:
                file.write(data)
                if move == "patch":
                    file.seek(0)
                    assert file.read() == data
                    file.seek(0)
                    file.write(b"patched")
            expected[name] = b"patched" + data[7:] if move == "patch" else data

    sizes = {name: len(data) for name, data in sorted(expected.items())}
    assert list(folder.sizes().items()) == list(sizes.items())
    assert folder.is_empty() == (not sizes)
    for prefix in ("b.tar", "deep/", "dee", "deep/er/c", "nothing"):
        assert folder.sizes(prefix) == {name: size for name, size in sizes.items() if name.startswith(prefix)}
    for name in NAMES:
        assert folder.exists(name) == (name in expected)
        if name in expected:
            assert folder.read(name) == expected[name]
            with folder.reading(name) as file:
                assert file.read() == expected[name]
                file.seek(-1 if expected[name] else 0, 2)
                assert file.read() == expected[name][-1:]
            assert fetched(folder, name) == expected[name]
        else:
            with pytest.raises(FileNotFoundError, match=r"No such file"):
                folder.read(name)
            with pytest.raises(FileNotFoundError, match=r"No such file"), folder.reading(name):
                pass
            with pytest.raises(FileNotFoundError, match=r"No such file"):
                fetched(folder, name)


def files_in(path: Path) -> list[str]:
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


@settings(max_examples=60, deadline=None)
@given(moves=MOVES)
def test_holds_what_was_written(moves: list[tuple[str, str, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as path:
        folder = open_folder(f"{path}/not/yet")
        play(folder, moves)
        assert files_in(Path(path, "not/yet")) == list(folder.sizes())


def test_a_folder_that_does_not_exist_is_empty(tmp_path: Path) -> None:
    folder = open_folder(str(tmp_path / "none"))
    assert folder.sizes() == {}
    assert folder.is_empty()
    assert not folder.exists("a")
    folder.delete("a")
    folder.discard_unfinished()
    assert not (tmp_path / "none").exists()


def test_a_file_shows_only_at_the_end(tmp_path: Path) -> None:
    folder = open_folder(str(tmp_path))
    folder.write("x", b"old")
    with folder.writing("x") as file:
        file.write(b"new")
        file.flush()
        assert folder.read("x") == b"old"
        assert folder.sizes() == {"x": 3}
        assert len(files_in(tmp_path)) == 2
    assert folder.read("x") == b"new"
    assert files_in(tmp_path) == ["x"]


def test_two_writers_of_one_name_do_not_mix(tmp_path: Path) -> None:
    folder = open_folder(str(tmp_path))
    with folder.writing("x") as one, folder.writing("x") as two:
        one.write(b"one")
        two.write(b"two!")
    assert folder.read("x") == b"one"  # ended last
    assert files_in(tmp_path) == ["x"]


def test_a_failure_keeps_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    folder = open_folder(str(tmp_path))
    folder.write("x", b"old")
    with pytest.raises(KeyboardInterrupt):
        fail_while_writing(folder, "x", b"new", KeyboardInterrupt())
    assert folder.read("x") == b"old"
    assert files_in(tmp_path) == ["x"]


WRITER = """
import sys, time
from erann_dist.storage.folder import open_folder
with open_folder(sys.argv[1]).writing("deep/x") as file:
    file.write(b"1" * 1_000_000)
    file.flush()
    print("written", flush=True)
    time.sleep(600)
"""


def test_a_killed_writer_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    folder = open_folder(str(tmp_path))
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]) as writer:
        assert writer.stdout
        try:
            assert writer.stdout.readline() == "written\n"
        finally:
            writer.send_signal(signal.SIGKILL)
    assert len(files_in(tmp_path)) == 1  # it was there to be left
    assert folder.sizes() == {}
    assert not folder.exists("deep/x")
    folder.write("deep/y", b"kept")
    folder.discard_unfinished()
    assert files_in(tmp_path) == ["deep/y"]


def test_errors_of_the_disk_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        open_folder(str(tmp_path / "file")).sizes()
    with pytest.raises(OSError, match="exists"):
        open_folder(str(tmp_path)).write("file/x", b"")
    assert files_in(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("url", "folder"),
    [
        ("sets/audioset/", LocalFolder("sets/audioset")),
        ("/sets", LocalFolder("/sets")),
        ("/", LocalFolder("/")),
        ("s3://bucket", S3Folder("s3://bucket")),
        ("s3://bucket/a/b//", S3Folder("s3://bucket/a/b")),
    ],
)
def test_the_url_says_which_kind(url: str, folder: Folder) -> None:
    assert open_folder(url) == folder
    assert str(open_folder(url)) == folder.url
    assert pickle.loads(pickle.dumps(open_folder(url))) == folder


@pytest.mark.parametrize(
    ("url", "endpoint", "message"),
    [
        ("s3://", None, "s3://: the bucket is missing"),
        ("s3:///key", None, "s3:///key: the bucket is missing"),
        ("gs://bucket/a", None, "gs://bucket/a: a folder is a path or s3://bucket/prefix, not gs://"),
        ("http://host/a", None, "http://host/a: a folder is a path or s3://bucket/prefix, not http://"),
        ("s3://bucket", "localhost:9000", "an S3 endpoint begins with http:// or https://"),
    ],
)
def test_other_urls_are_refused_in_one_line(url: str, endpoint: str | None, message: str) -> None:
    with pytest.raises(UsageError) as error:
        open_folder(url, endpoint)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
