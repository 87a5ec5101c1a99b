"""What docs/reference/security-files.md says of others' files: they are read, never run, and lead nowhere else."""

import ast
import hashlib
import io
import json
import pickle
import re
import resource
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from erann_dist.data.clip_reader import ClipReader
from erann_dist.data.manifest import MANIFEST, SHARDS, load_manifest
from erann_dist.data.sources import load_source
from erann_dist.data.streaming import stream_clips
from erann_dist.errors import UserError
from erann_dist.models.spec import build_model
from erann_dist.recipe import DataSource
from erann_dist.storage.folder import LocalFolder, open_folder
from erann_dist.train import checkpoint, model_folder
from jobs.terminal.progress import PlainConsole
from shards import index
from shards.sources.folder import read_folder
from tests.conftest import copy_tree, pack_here
from tests.erann_dist.data.test_sources import rewrite
from tests.erann_dist.train.test_checkpoint import save
from tests.shards.test_stage import run as stage
from tests.shards.test_verify import change_table, problems
from tests.test_layers import FILES, ROOT

PAGES = sorted((ROOT / "docs" / "reference").glob("security*.md"))
TESTS = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_every_test_on_the_page_is_there() -> None:
    text = "".join(page.read_text() for page in PAGES)
    named = TESTS.findall(text)
    assert len(named) > 20
    assert len(named) == text.count(".py::"), "a test is named in another way"
    for path, name in named:
        tree = ast.parse((ROOT / path).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{path}::{name}"


# Calls that run what they read, or hand it to a shell.
FORBIDDEN = re.compile(
    r"(c?[pP]ickle|cloudpickle|dill|marshal|shelve|joblib)\.(loads?|open|Unpickler)|torch\.(load|hub\..*|jit\.load)"
    r"|(numpy\.load|pandas\.read_pickle)|yaml\.(load|load_all|full_load|unsafe_load)"
    r"|eval|exec|compile|__import__|runpy\..*|os\.(system|popen|exec.*|spawn.*)|subprocess\.(getoutput|getstatusoutput)"
    r"|webdataset\.(gopen.*|WebDataset|DataPipeline)|tarfile\..*\.extract(all)?|shutil\.unpack_archive"
)
# What they read there is from a process of the same command, through a socket or file of the same user's.
EXCEPTIONS = {
    "cluster/torchrun.py": {"pickle.load"},
    "jobs/bench/training.py": {"pickle.loads"},
    "jobs/bench/loading.py": {"webdataset.WebDataset"},
}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Each call with the full name of what is called, as far as it begins with something imported or built in."""
    tree = ast.parse(path.read_text())
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, *rest = ast.unparse(node.func).split(".")
            yield ".".join([names.get(first, first), *rest]), node


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_is_run(path: Path) -> None:
    found = set()
    for name, call in calls(path):
        if FORBIDDEN.fullmatch(name) or name.endswith((".extractall", ".extract")):
            found.add(name)
        assert not any(word.arg == "shell" for word in call.keywords), f"{path}:{call.lineno}"
        assert not any(word.arg == "allow_pickle" for word in call.keywords), f"{path}:{call.lineno}"
    assert found == EXCEPTIONS.get(path.relative_to(ROOT).as_posix(), set())


def test_the_search_for_what_runs_finds_it(tmp_path: Path) -> None:
    text = "import numpy as np\nfrom torch import load as l\nimport yaml\nnp.load(x)\nl(x)\nyaml.load(x)\nx.eval()\n"
    (tmp_path / "x.py").write_text(text)
    names = [name for name, _ in calls(tmp_path / "x.py")]
    assert names == ["numpy.load", "torch.load", "yaml.load", "x.eval"]
    assert [bool(FORBIDDEN.fullmatch(name)) for name in names] == [True, True, True, False]


class Planted:
    """Leaves a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return Path(self._mark).touch, ()


def one_line(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_pickle_in_place_of_weights(tmp_path: Path) -> None:
    mark, folder = tmp_path / "mark", LocalFolder(str(tmp_path / "model"))
    info = model_folder.ModelInfo("ERANN-0-1", "tagging", ["a"], ["A"], 44_100)
    model_folder.save_model(folder, build_model("ERANN-0-1", 1), info, {}, "")
    data = pickle.dumps(Planted(mark))
    folder.write("model.safetensors", data)
    assert "model.safetensors: can't be read" in one_line(lambda: model_folder.load_model(folder))
    pickle.loads(data)
    assert mark.exists()  # it would have run


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
def test_a_pickle_in_place_of_a_checkpoint(tmp_path: Path, file: str) -> None:
    """With the checksum that belongs to it."""
    mark, run = tmp_path / "mark", LocalFolder(str(tmp_path / "run"))
    name = save(checkpoint.begin(run), 7)
    data = pickle.dumps(Planted(mark))
    marker = json.loads(run.read(f"{name}/COMMITTED")) | {file: hashlib.sha256(data).hexdigest()}
    run.write(f"{name}/{file}", data)
    run.write(f"{name}/COMMITTED", json.dumps(marker).encode())
    assert f"{name}: not a checkpoint of this version of the program" in one_line(lambda: checkpoint.load(run, name))
    assert not mark.exists()


def everything_below(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}


@pytest.mark.parametrize(
    "url", ["pipe:touch mark", "pipe://touch mark", "http://host/set", "file:///etc", "|touch mark"]
)
def test_a_url_is_no_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert one_line(lambda: load_source(DataSource(url=url))).startswith(url)
    assert list(tmp_path.iterdir()) == []


READERS: list[Callable[[Path], object]] = [
    load_manifest,
    problems,
    lambda shards: stage(shards, shards.parent / "copy"),
]


@pytest.mark.parametrize("name", ["../out.tar", "/etc/passwd", "a/../../out.tar", "", "./x.tar", "\x1b[2Jx.tar", None])
@pytest.mark.parametrize("read", READERS, ids=["load", "verify", "stage"])
def test_a_tars_name_leads_nowhere_else(
    tone_shards: Path, tmp_path: Path, name: str, read: Callable[[Path], object]
) -> None:
    shards = copy_tree(tone_shards, tmp_path / "sets" / "shards")
    (tmp_path / "sets" / "out.tar").write_bytes((shards / "audioset-000002.tar").read_bytes())
    change_table(shards / SHARDS, {"name": name}, row=2)
    before = everything_below(tmp_path)
    line = one_line(lambda: read(shards))
    if name is None:
        assert "shards.parquet: the column name has nulls" in line
    else:
        assert f"shards.parquet: {name!r} is not the name of a tar in the set's folder; do not trust the set" in line
    after = everything_below(tmp_path)
    assert [path for path in after if path not in before and not path.startswith(f"{tmp_path}/sets/copy/")] == []
    assert all(after[path] == data for path, data in before.items())


def test_a_tars_name_is_no_command(tone_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shards = copy_tree(tone_shards, tmp_path / "shards")
    change_table(shards / SHARDS, {"name": "pipe:touch mark"}, row=2)
    clips = load_manifest(shards)
    row = clips.shards.tolist().index(2)
    reader = ClipReader(clips)
    lines = [
        one_line(lambda: list(stream_clips(clips))),
        one_line(lambda: reader.crop(row, 0, np.empty(100, np.int16))),
        one_line(lambda: stage(shards, tmp_path / "copy")),
    ]
    reader.close()
    assert all(f"{shards}/pipe:touch mark: " in line for line in lines)
    assert "pipe:touch mark: missing" in " ".join(problems(shards, quick=True))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "claim",
    [
        {"size": 2**31 - 1},
        {"offset": 10**13},
        {"offset": -512},
        {"offset": 2**63 - 1},
        {"size": -1},
        {"shard": 5},
        {"shard": -1},
    ],
    ids=str,
)
def test_what_a_manifest_claims_is_in_the_tars(tone_shards: Path, tmp_path: Path, claim: dict[str, object]) -> None:
    shards = copy_tree(tone_shards, tmp_path / "shards")
    change_table(shards / MANIFEST, claim)
    line = one_line(lambda: load_manifest(shards))
    (column,) = claim
    assert re.search(rf"manifest\.parquet: (clip '\S+' is in no tar of shards\.parquet|the column {column} has )", line)
    if "the column" in line:
        assert line == one_line(lambda: problems(shards, quick=True))
    else:
        assert problems(shards, quick=True)


@pytest.mark.parametrize("label", [3, 32_767, -1])
def test_a_label_that_is_none(tone_shards: Path, tmp_path: Path, label: int) -> None:
    shards = copy_tree(tone_shards, tmp_path / "shards")
    change_table(shards / MANIFEST, {"labels": [label]})
    line = one_line(lambda: load_manifest(shards))
    assert re.search(r"manifest\.parquet: (has labels outside its 3 classes|the column labels has -1)", line)


def flac() -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, [0.25] * 44_100, 44_100, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def member(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    return info, data


def test_members_of_tars_are_never_written_anywhere(tmp_path: Path) -> None:
    """By packing from tars, nor by indexing, verifying and reading them where they are."""
    place = tmp_path / "here" / "audio"
    (place / "c").mkdir(parents=True)
    secret = tmp_path / "secret.flac"
    secret.write_bytes(flac())
    members = [
        member("../../up.flac", flac()),
        member(f"{tmp_path}/absolute.flac", flac()),
        member("link.flac", kind=tarfile.SYMTYPE, link=str(secret)),
        member("hard.flac", kind=tarfile.LNKTYPE, link=str(secret)),
        member("device.flac", kind=tarfile.CHRTYPE),
        member("plain.flac", flac()),
    ]
    members += [member(f"{info.name.removesuffix('.flac')}.cls", b"x") for info, _ in members]
    with tarfile.open(place / "c" / "theirs.tar", "w") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    before = everything_below(tmp_path)

    packed = load_manifest(pack_here(read_folder(place), tmp_path / "packed"))
    assert len(packed) == 3  # the files themselves; not what a link points to
    assert problems(tmp_path / "packed") == []

    indexed = tmp_path / "here" / "audio" / "c"
    list(index.index(LocalFolder(str(indexed))))
    clips = load_manifest(indexed)
    assert sorted(clips.keys.to_pylist()) == sorted(
        ["%2E%2E%2F%2E%2E%2Fup", f"{tmp_path}/absolute".replace("/", "%2F"), "plain"]
    )
    report = {row["key"]: row["detail"] for row in pq.read_table(indexed / "report.parquet").to_pylist()}
    assert report == dict.fromkeys(["link", "hard", "device"], "a link or a sparse file, not a plain one")
    assert problems(indexed) == []
    assert len(list(stream_clips(clips))) == 3
    ours = {str(indexed / name) for name in ("manifest.parquet", "shards.parquet", "report.parquet")}
    after = {path: data for path, data in everything_below(tmp_path).items() if "/packed/" not in path}
    assert {path: data for path, data in after.items() if path not in ours} == before


def test_a_sparse_file_is_not_blown_up(tmp_path: Path) -> None:
    """A tar of 20 kB with a file in it that claims a terabyte, which tarfile would give as so many zeros."""
    shards = tmp_path / "shards"
    shards.mkdir()
    sparse = "GNU.sparse."
    about = {f"{sparse}major": "0", f"{sparse}minor": "1", f"{sparse}map": "0,512", f"{sparse}size": str(10**12)}
    with tarfile.open(shards / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("bomb.flac", "bomb.json"):
            info, data = member(name, bytes(512))
            info.pax_headers = about
            tar.addfile(info, io.BytesIO(data))
        for info, data in (member("a.flac", flac()), member("a.cls", b"x")):
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(shards / "x.tar") as tar:
        (place, _) = [m.offset_data for m in tar if m.issparse() and m.size == 10**12]
    script = """
import resource, sys
from pathlib import Path
from erann_dist.storage.folder import LocalFolder
from shards import index
from tests.shards.test_verify import change_table, problems
shards = Path(sys.argv[1])
list(index.index(LocalFolder(str(shards))))
change_table(shards / "manifest.parquet", {"offset": int(sys.argv[2])}, row=0)
print(problems(shards))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2 << 20)
"""
    command = [sys.executable, "-c", script, str(shards), str(place)]
    limit = 16 << 30  # of addresses, so that no machine runs out of memory when it fails
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    found = f"['{shards}/x.tar: a.flac is in manifest.parquet but not in the tar']"
    assert done.stdout.splitlines() == [found, "True"], done.stderr


ESCAPE = "\x1b[2Jgone"


def test_labels_hold_no_control_characters(tone_shards: Path, tmp_path: Path) -> None:
    shards = copy_tree(tone_shards, tmp_path / "shards")
    rewrite(shards, label_names=["A", ESCAPE, "C"])
    refused = r"the label '\x1b[2Jgone' contains control characters"
    assert f"{shards}/manifest.parquet: {refused}" in one_line(lambda: load_manifest(shards))

    folder = LocalFolder(str(tmp_path / "model"))
    info = model_folder.ModelInfo("ERANN-0-1", "tagging", ["a"], [ESCAPE], 44_100)
    model_folder.save_model(folder, build_model("ERANN-0-1", 1), info, {}, "")
    assert f"{folder}/config.json: {refused}" in one_line(lambda: model_folder.load_model(folder))

    (tmp_path / "audio" / ESCAPE).mkdir(parents=True)
    (tmp_path / "audio" / ESCAPE / "x.flac").write_bytes(flac())
    source = read_folder(tmp_path / "audio")
    assert refused in one_line(lambda: pack_here(source, tmp_path / "out"))
    assert not (tmp_path / "out").exists()

    (tmp_path / "theirs").mkdir()
    with tarfile.open(tmp_path / "theirs" / "x.tar", "w") as tar:
        for info_, data in (member("a.flac", flac()), member("a.cls", ESCAPE.encode())):
            tar.addfile(info_, io.BytesIO(data))
    assert refused in one_line(lambda: list(index.index(LocalFolder(str(tmp_path / "theirs")))))


def test_a_terminal_gets_no_control_characters() -> None:
    from rich.table import Table

    out = io.StringIO()
    console = PlainConsole(file=out, force_terminal=True, color_system=None, width=200, markup=False)
    table = Table()
    table.add_column(f"{ESCAPE}1")
    table.add_row(f"\x9b2J\x07{ESCAPE}2")
    console.print(f"erann: {ESCAPE}3\r: gone\nsecond line")
    console.print(table)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", out.getvalue())
    for text in (r"erann: \x1b[2Jgone3\x0d: gone", "second line", r"\x1b[2Jgone1", r"\x9b2J\x07\x1b[2Jgone2"):
        assert text in out.getvalue()


def test_the_command_shows_no_control_characters(tone_shards: Path, tmp_path: Path) -> None:
    shards = copy_tree(tone_shards, tmp_path / "shards")
    change_table(shards / MANIFEST, {"key": f"{ESCAPE}\x9b", "size": 2**31 - 1})
    command = [
        str(Path(sys.executable).parent / "erann"),
        "tag",
        str(tmp_path / ESCAPE),
        str(shards),
        "--out",
        "x.parquet",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert r"\x1b[2Jgone: no model here" in done.stderr
    command = [str(Path(sys.executable).parent / "erann"), "verify", str(shards)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert r"\x1b[2Jgone\x9b" in done.stderr + done.stdout
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", done.stderr + done.stdout)


def test_an_endpoints_password_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("erann_dist.storage.s3.ATTEMPTS", 1)
    for name, value in (("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b")):
        monkeypatch.setenv(name, value)
    for endpoint in ("user:pa55word@127.0.0.1:1", "http://user:pa55word@127.0.0.1:1", "http://user:pa55word@[:1"):
        assert "pa55word" not in one_line(lambda endpoint=endpoint: open_folder("s3://b/x", endpoint).exists("a"))


def test_facts_of_another_kind(tone_shards: Path, tmp_path: Path) -> None:
    shards = copy_tree(tone_shards, tmp_path / "shards")
    rewrite(shards, label_names=[{"a": 1}, 2, None])
    assert "manifest.parquet: not a shard set's manifest" in one_line(lambda: load_manifest(shards))
