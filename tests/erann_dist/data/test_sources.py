"""The clips that a recipe's sources select, and one line for each thing that can be wrong with them."""

import dataclasses
import json
import os
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from erann_dist.data.manifest import Manifest, load_manifest
from erann_dist.data.sources import (
    count_reported,
    count_shared,
    load_source,
    load_sources,
    load_train_and_eval,
    selection,
)
from erann_dist.errors import UsageError, UserError
from erann_dist.recipe import DataSection, DataSource
from shards.sources.rows import Source, SourceRow, rows_table
from tests.conftest import copy_tree, pack_here

CLASSES = 4  # the last one without clips


@pytest.fixture(scope="session")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty clips in three folds and two splits, some without, and three rows that could not be packed."""
    root = tmp_path_factory.mktemp("folded")
    soundfile.write(root / "a.wav", np.linspace(-0.5, 0.5, 66_150), 44_100)
    rows = [
        SourceRow(
            key=f"clip{i:02d}",
            labels=[i % 3] if i % 5 else [0, 2],
            path=os.fsencode(root / "a.wav"),
            source="a.wav",
            split=["train", "test", None][i % 3],
            fold=[1, 2, 3, None][i % 4],
            start=i / 100,
            reason="missing" if i >= 30 else None,
        )
        for i in range(33)
    ]
    names = [f"c{c}" for c in range(CLASSES)]
    return pack_here(Source("s", "tagging", names, names, rows_table(rows), []), root / "shards")


def number(key: str) -> int:
    return int(key.removeprefix("clip"))


def selected(folded: Path, **choice: object) -> set[int]:
    clips = load_source(DataSource(url=str(folded), **choice))
    return {number(key) for key in clips.keys.to_pylist()}


def key_list(path: Path, numbers: range) -> str:
    path.write_text("\n".join(f"clip{i:02d}" for i in numbers))
    return str(path)


def test_splits_folds_and_lists_of_keys_select_together(folded: Path, tmp_path: Path) -> None:
    everything = set(range(30))
    only, without = key_list(tmp_path / "keys", range(5, 100)), key_list(tmp_path / "without", range(20, 25))
    assert selected(folded) == everything
    assert selected(folded, split="test") == {i for i in everything if i % 3 == 1}
    assert selected(folded, fold=[1, 3]) == {i for i in everything if i % 4 in (0, 2)}
    assert selected(folded, keys=only) == set(range(5, 30))
    assert selected(folded, without=without) == everything - set(range(20, 25))
    assert selected(folded, keys=only, without=without, split="train", fold=[2]) == {9}


def test_a_selection_keeps_the_columns_together(folded: Path, tmp_path: Path) -> None:
    sources = [DataSource(url=str(folded), fold=[2]), DataSource(url=str(folded), split="test")]
    both, whole = load_sources(sources), load_manifest(folded)
    assert len(both) == sum(len(load_source(source)) for source in sources)
    rows = [whole.keys.to_pylist().index(key) for key in both.keys.to_pylist()]
    assert both.rows.tolist() == rows
    assert np.array_equal(both.targets(np.arange(len(both))), whole.targets(np.array(rows)))
    assert [str(both.tars[i]) for i in both.shards] == [str(whole.tars[whole.shards[row]]) for row in rows]
    for name in ("folds", "offsets", "sizes", "samples", "crc32s"):
        assert np.array_equal(getattr(both, name), getattr(whole, name)[rows])


def test_another_selection_is_other_content(folded: Path, tmp_path: Path) -> None:
    choices = [{}, {"fold": [1]}, {"fold": [2]}, {"without": key_list(tmp_path / "without", range(3))}]
    hashes = {load_source(DataSource(url=str(folded), **choice)).info.content_hash for choice in choices}
    assert len(hashes) == len(choices)
    again = DataSource(url=str(folded), without=key_list(tmp_path / "again", range(3)))
    assert load_source(again).info.content_hash in hashes


def test_lists_of_keys_in_tables(folded: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["clip03", "clip05"], "x": [1, 2]}), tmp_path / "list")
    assert selected(folded, keys=str(tmp_path / "list")) == {3, 5}
    for text in (
        "key\nclip03\nclip05\n",
        "\ufeffx, key\r\n1,clip03\r\n\r\n2, clip05\r\n",
        '"key","x"\nclip03,1\n"clip05",2',
    ):
        (tmp_path / "list").write_text(text, newline="")
        assert selected(folded, keys=str(tmp_path / "list")) == {3, 5}
    (tmp_path / "list").write_bytes(b"PAR1 damaged PAR1")
    with pytest.raises(UserError, match="list: damaged .*; it needs one key per line, or a column `key`"):
        selected(folded, keys=str(tmp_path / "list"))


def test_keys_that_are_not_in_the_set_are_counted(folded: Path, tmp_path: Path) -> None:
    only = key_list(tmp_path / "keys", range(28, 40))
    found = selection(DataSource(url=str(folded), fold=[1], keys=only, without=key_list(tmp_path / "w", range(3))))
    absent = {"file": only, "count": 10, "examples": ["clip30", "clip31", "clip32"]}
    assert found == {
        "shards": str(folded),
        "fold": [1],
        "keys": only,
        "without": str(tmp_path / "w"),
        "not_in_set": [absent],
    }
    assert selection(DataSource(url=str(folded))) == {"shards": str(folded)}


def test_a_key_may_contain_blanks(tmp_path: Path) -> None:
    """Keys of sets that others made."""
    soundfile.write(tmp_path / "a.wav", np.zeros(4410), 44_100)
    rows = [SourceRow(key, [0], os.fsencode(tmp_path / "a.wav"), "") for key in ("a b", "c")]
    shards = pack_here(Source("s", "tagging", ["a"], ["A"], rows_table(rows), []), tmp_path / "shards")
    (tmp_path / "list").write_text(" a b \r\nd\r\n")
    assert load_source(DataSource(url=str(shards), keys=str(tmp_path / "list"))).keys.to_pylist() == ["a b"]


def test_clips_without_labels_can_not_be_evaluated(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(4410), 44_100)
    rows = [SourceRow("a", [], os.fsencode(tmp_path / "a.wav"), "")]
    shards = str(pack_here(Source("s", "tagging", ["a"], ["A"], rows_table(rows), []), tmp_path / "shards"))
    with pytest.raises(UserError, match=f"{shards}: none of its 1 clips to evaluate has a label"):
        load_train_and_eval(both(shards, shards, allow_overlap=True))


def test_coverage_counts_the_rows_of_the_keys_asked_for(folded: Path, tmp_path: Path) -> None:
    """Rows 30, 31 and 32 are in the report."""
    assert count_reported(DataSource(url=str(folded))) == 3
    assert count_reported(DataSource(url=str(folded), keys=key_list(tmp_path / "keys", range(32)))) == 2
    assert count_reported(DataSource(url=str(folded), without=key_list(tmp_path / "without", range(31)))) == 2
    assert count_reported(DataSource(url=str(folded), fold=[1], keys=str(tmp_path / "keys"))) == 0


@pytest.mark.parametrize(
    ("choice", "line"),
    [
        ({"fold": [7]}, r"no clip has split None and fold \[7\]; the splits are .* and the folds \[1, 2, 3\]"),
        ({"fold": []}, r"no clip has split None and fold \[\]"),
        ({"split": "dev"}, r"no clip has split dev and fold None; the splits are \['test', 'train'\]"),
        ({"keys": "nowhere"}, "^nowhere: No such file"),
        ({"without": "."}, "^.: is a folder"),
        ({"keys": "empty"}, "^empty: none of its 0 keys is in "),
        ({"without": "others"}, "^others: none of its 2 keys is in .*; it needs one key per line, or a column"),
        ({"keys": "short.csv"}, "^short.csv: not a list of keys .*; it needs one key per line, or a column `key`"),
        ({"keys": "open.csv"}, "^open.csv: not a list of keys .*unexpected end of data"),
        ({"without": "all"}, "the lists of keys, the split and the folds leave no clip"),
        ({"keys": "binary"}, "^binary: not a list of keys .*utf-8"),
    ],
    ids=str,
)
def test_a_selection_that_can_not_be_is_one_line(
    folded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: dict[str, object], line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").touch()
    Path("others").write_text("clip40\nclip41\n")
    Path("short.csv").write_text("name,key\nx\n")
    Path("open.csv").write_text('key,name\nclip01,"x\n')
    Path("binary").write_bytes(b"\xff\xfe\x00")
    key_list(Path("all"), range(30))
    with pytest.raises(UsageError, match=line) as error:
        load_source(DataSource(url=str(folded), **choice))
    assert "\n" not in str(error.value)


def rewrite(shards: Path, **facts: object) -> None:
    """Change what the manifest says of its set."""
    path = shards / "manifest.parquet"
    table = pq.read_table(path)
    said = json.loads(table.schema.metadata[b"erann"]) | facts
    pq.write_table(table.replace_schema_metadata({"erann": json.dumps(said)}), path)


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        ({"schema_version": 1}, "manifest.parquet: schema version 1, this program reads 2; pack the set again$"),
        ({"schema_version": "new"}, "manifest.parquet: schema version new, this program reads 2"),
        ({"colour": "red"}, "manifest.parquet: not a shard set's manifest .*colour"),
        ({"sample_rate": 16_000}, "is at 16000 Hz, ERANN needs 44100 Hz; pack it again"),
    ],
    ids=str,
)
def test_a_set_of_another_make_is_refused(folded: Path, tmp_path: Path, facts: dict[str, object], line: str) -> None:
    shards = copy_tree(folded, tmp_path / "shards")
    rewrite(shards, **facts)
    with pytest.raises(UserError, match=line) as error:
        load_source(DataSource(url=str(shards)))
    assert "\n" not in str(error.value)
    assert str(shards) in str(error.value)


def test_sets_of_other_labels_are_not_mixed(folded: Path, tmp_path: Path) -> None:
    shards = copy_tree(folded, tmp_path / "shards")
    rewrite(shards, label_ids=["c0", "x", "c2", "c3"])
    line = r"has different labels \(4\) than .*, first at index 1 \(c1 and x\); use sets made from one class list"
    with pytest.raises(UserError, match=line):
        load_sources([DataSource(url=str(folded)), DataSource(url=str(shards))])
    with pytest.raises(UserError, match=line):
        load_train_and_eval(DataSection(train=str(folded), eval=str(shards)))


@pytest.mark.parametrize("table", ["manifest.parquet", "shards.parquet"])
@pytest.mark.parametrize("part", [0, 0.5, 0.99])
def test_a_table_that_is_missing_or_cut_is_named(folded: Path, tmp_path: Path, table: str, part: float) -> None:
    shards = copy_tree(folded, tmp_path / "shards")
    content = (shards / table).read_bytes()
    (shards / table).write_bytes(content[: int(len(content) * part)])
    with pytest.raises(UserError, match=f"{table}: damaged"):
        load_manifest(shards)
    (shards / table).unlink()
    with pytest.raises(UserError, match=f"no shard set here \\({table} is missing\\); make one with erann pack"):
        load_manifest(shards)


@pytest.mark.parametrize("table", ["manifest.parquet", "shards.parquet"])
def test_a_flipped_bit_in_a_table_is_never_data(folded: Path, tmp_path: Path, table: str) -> None:
    """It is seen, or it is where nothing is that training reads."""
    shards = copy_tree(folded, tmp_path / "shards")
    content, whole = (folded / table).read_bytes(), load_manifest(folded)
    refused, right = [], 0
    for place in range(4, len(content), 23):
        (shards / table).write_bytes(content[:place] + bytes([content[place] ^ 8]) + content[place + 1 :])
        try:
            found = load_manifest(shards)
        except UserError as error:
            refused.append(str(error))
        else:
            for field in fields(Manifest):
                a, b = getattr(whole, field.name), getattr(found, field.name)
                if field.name == "tars":
                    assert [(tar.name, tar.size) for tar in a] == [(tar.name, tar.size) for tar in b]
                elif field.name != "info":
                    assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b
            right += 1
    assert all(table in line and "\n" not in line for line in refused)
    assert len(refused) > right / 3


def test_columns_that_are_not_a_manifests(folded: Path, tmp_path: Path) -> None:
    shards = copy_tree(folded, tmp_path / "shards")
    path = shards / "manifest.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["crc32"]), path)
    with pytest.raises(UserError, match="manifest.parquet: has no column crc32"):
        load_manifest(shards)
    pq.write_table(pq.read_table(folded / "manifest.parquet").replace_schema_metadata(), path)
    with pytest.raises(UserError, match="manifest.parquet: not a shard set's manifest"):
        load_manifest(shards)


def both(train: object, evaluation: object, **others: object) -> DataSection:
    return DataSection.model_validate({"train": train, "eval": evaluation, **others})


def test_clips_are_not_both_trained_on_and_evaluated(folded: Path, tmp_path: Path) -> None:
    copy = str(copy_tree(folded, tmp_path / "copy"))
    whole, first = str(folded), {"url": str(folded), "fold": [1]}
    fold_1 = len(load_source(DataSource.model_validate(first)))
    for train, evaluation, shared in (
        (whole, whole, 30),
        (whole, copy, 30),  # wherever they lie
        (whole, first, fold_1),
        ([{"url": copy, "fold": [2]}, {"url": copy, "fold": [1, 3]}], first, fold_1),
    ):
        with pytest.raises(UsageError, match=rf"share {shared} of the \d+ clips to evaluate"):
            load_train_and_eval(both(train, evaluation))
        load_train_and_eval(both(train, evaluation, allow_overlap=True))
    load_train_and_eval(both({"url": whole, "fold": [2, 3]}, first))


def test_another_clip_of_the_same_key_is_not_shared(folded: Path) -> None:
    clips = load_manifest(folded)
    assert count_shared(clips, clips) == 30
    assert count_shared(clips, dataclasses.replace(clips, crc32s=clips.crc32s ^ 1)) == 0
