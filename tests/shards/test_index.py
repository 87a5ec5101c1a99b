"""Tars of others, read in place: no label goes to another clip, and nothing is left out in silence."""

import gzip
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from erann_dist.data.manifest import MANIFEST, REPORT, load_manifest
from erann_dist.errors import UserError
from erann_dist.storage.folder import LocalFolder
from shards.index import index
from shards.sources.samples import parse_fields
from tests.shards.test_samples import tar_of
from tests.shards.test_verify import foreign_tar, problems, sound


def indexed(folder: Path, labels: str | None = None) -> dict[str, list[str]]:
    """Each clip's labels, by key."""
    list(index(LocalFolder(str(folder)), None, parse_fields(labels)))
    assert problems(folder) == []
    manifest = load_manifest(folder)
    rows = pq.read_table(folder / MANIFEST, columns=["key", "labels"]).to_pylist()
    return {row["key"]: [manifest.info.label_ids[i] for i in row["labels"]] for row in rows}


def reported(folder: Path) -> dict[str, tuple[str, str]]:
    return {row["source"]: (row["reason"], row["detail"]) for row in pq.read_table(folder / REPORT).to_pylist()}


def test_a_second_sample_of_one_key_keeps_its_labels(tmp_path: Path) -> None:
    first, second = ("a.flac", sound(0.1)), ("a.flac", sound(0.2))
    tar = tar_of(first, ("a.cls", b"dog"), second, ("a.cls", b"cat"))
    (tmp_path / "0.tar").write_bytes(tar.getvalue())
    assert indexed(tmp_path) == {"a": ["dog"], "a%232": ["cat"]}


def test_keys_with_dots(tmp_path: Path) -> None:
    members = {f"clip.v{i}.{kind}": data for i in (1, 2) for kind, data in (("flac", sound(0.1)), ("cls", b"%d" % i))}
    foreign_tar(tmp_path / "0.tar", members)
    assert indexed(tmp_path) == {"clip%2Ev1": ["1"], "clip%2Ev2": ["2"]}


def test_equal_keys_in_two_folders_are_two_clips(tmp_path: Path) -> None:
    foreign_tar(tmp_path / "train" / "0.tar", {"1.flac": sound(0.1), "1.cls": b"dog", "2.flac": sound(), "2.cls": b"x"})
    foreign_tar(tmp_path / "eval" / "0.tar", {"1.flac": sound(0.2), "1.cls": b"cat", "2.flac": sound(), "2.cls": b"x"})
    assert indexed(tmp_path) == {"eval%2F0%2F1": ["cat"], "2": ["x"], "train%2F0%2F1": ["dog"]}
    assert reported(tmp_path) == {"train/0.tar/2": ("duplicate", "an earlier sample has this key")}


def test_a_broken_first_copy_hides_no_good_one(tmp_path: Path) -> None:
    tar = tar_of(("a.flac", b"broken"), ("a.wav", sound(0.1, kind="WAV")), ("a.cls", b"dog"))
    (tmp_path / "0.tar").write_bytes(tar.getvalue())
    assert indexed(tmp_path) == {"a": ["dog"]}


def test_labels_of_another_encoding(tmp_path: Path) -> None:
    members = {}
    texts = [
        "dog".encode("utf-8-sig"),
        b"dog\r\n",
        "dog".encode("utf-16"),
        json.dumps({"label": "dog"}).encode("utf-16"),
    ]
    for i, text in enumerate(texts):
        members |= {f"{i}.flac": sound(0.1), f"{i}.{'json' if text is texts[-1] else 'cls'}": text}
    foreign_tar(tmp_path / "0.tar", members)
    assert set(map(tuple, indexed(tmp_path).values())) == {("dog",)}


def test_labels_at_a_path(tmp_path: Path) -> None:
    members = {}
    for key, content in (("1", {"tag": ["dog", "pet"]}), ("2", {"tag": "cat"}), ("3", {"text": "x"})):
        members |= {f"{key}.flac": sound(0.1), f"{key}.json": json.dumps(content).encode(), f"{key}.txt": b"caption"}
    foreign_tar(tmp_path / "0.tar", members)
    assert indexed(tmp_path, "json:tag") == {"1": ["dog", "pet"], "2": ["cat"]}
    assert reported(tmp_path) == {"0.tar/3": ("wrong label", "its json has no tag; its keys are text")}


def test_captions_are_refused(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(101):
        members |= {f"{i}.wav": sound(0.01, kind="WAV"), f"{i}.txt": f"caption {i}".encode()}
    foreign_tar(tmp_path / "0.tar", members)
    with pytest.raises(UserError, match="101 different labels in 101 clips.*captions.*--labels json:KEY"):
        indexed(tmp_path)
    assert not (tmp_path / MANIFEST).exists()


@pytest.mark.parametrize("name", ["1.tar.gz", "b/1.tgz", "1.tar.zst", "1.tar"])
def test_compressed_tars_are_named(tmp_path: Path, name: str) -> None:
    foreign_tar(tmp_path / "0.tar", {"1.flac": sound(0.1), "1.cls": b"dog"})
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress((tmp_path / "0.tar").read_bytes()))
    with pytest.raises(UserError, match=f"{path}: is compressed.*erann pack webdataset"):
        indexed(tmp_path)
