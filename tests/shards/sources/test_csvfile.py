"""Lists as spreadsheets, scripts and other systems write them."""

import gzip
from pathlib import Path

import pytest

from erann_dist.errors import UserError
from shards.sources.audioset import read_audioset
from shards.sources.csvfile import read_header, read_lines, read_table
from shards.sources.esc50 import read_esc50
from shards.sources.fsd50k import read_fsd50k
from shards.sources.urbansound8k import read_urbansound8k
from tests.shards.test_audioset import touch

TEXT = 'path,labels\na.wav,"dog, rain"\nb.wav,café\n'
ROWS = [{"path": "a.wav", "labels": "dog, rain"}, {"path": "b.wav", "labels": "café"}]


def table(path: Path) -> list[dict[str, str]]:
    return [line for _, line in read_table(path, ("path", "labels"))]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("zipped", [False, True])
def test_encodings_and_line_ends(tmp_path: Path, encoding: str, end: str, zipped: bool) -> None:
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    data = (mark + TEXT.replace("\n", end)).encode(encoding)
    path = tmp_path / ("list.csv.gz" if zipped else "list.csv")
    path.write_bytes(gzip.compress(data) if zipped else data)
    assert table(path) == ROWS


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.csv", "path;labels\na.wav;dog, rain\nb.wav;café\n"),
        ("list.csv", "path\tlabels\na.wav\tdog, rain\nb.wav\tcafé\n"),
        ("list.tsv", "path\tlabels\na.wav\tdog, rain\nb.wav\tcafé\n"),
        ("list.csv", '"path";"labels"\n"a.wav";"dog, rain"\n"b.wav";"café"\n'),
        ("list.csv", 'path,labels\n   \n"a.wav" ,"dog, rain" \n\nb.wav, "café"  \r\n , \n'),
        ("list.csv", '\n  \npath,labels\na.wav,"dog, rain"\nb.wav,café'),
    ],
)
def test_delimiters_blanks_and_empty_lines(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert table(tmp_path / name) == ROWS


def test_quotes_inside_a_field_are_kept(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text('path,labels\na.wav,"""Bee, wasp, etc."" ,Dog"\n"two\nlines ",x\n')
    assert table(tmp_path / "list.csv") == [
        {"path": "a.wav", "labels": '"Bee, wasp, etc." ,Dog'},
        {"path": "two\nlines ", "labels": "x"},
    ]


def test_columns_by_number(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text('id1,30,"people marching",test\nid2,40,"dog, bark",train\n')
    lines = [line for _, line in read_table(tmp_path / "list.csv", ("0", "2"), header=False)]
    assert [(line["0"], line["2"]) for line in lines] == [("id1", "people marching"), ("id2", "dog, bark")]
    with pytest.raises(UserError, match=r"list.csv:1: no column 4"):
        list(read_table(tmp_path / "list.csv", ("0", "4"), header=False))
    (tmp_path / "list.csv").write_text("id1,30,a\nid2,40\n")
    with pytest.raises(UserError, match=r"list.csv:2: 2 fields where the first line has 3"):
        list(read_table(tmp_path / "list.csv", ("0", "2"), header=False))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TEXT.encode("latin-1"), r"list.csv:3: not a text file in UTF-8 .*iconv -f latin1"),
        (TEXT.encode("utf-16-le"), r"list.csv: not a text file in UTF-8 \(it contains zeros\)"),
        (TEXT.encode("utf-16")[:-1], r"list.csv: not a text file in UTF-16"),
        (b'path,labels\na.wav,"dog\n', r"list.csv:\d: unexpected end of data"),
        (b'path,labels\na.wav,"dog"x\n', r"list.csv:2: "),
        (b"", r"list.csv:1: no column path"),
    ],
)
def test_what_is_no_list_is_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "list.csv").write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        table(tmp_path / "list.csv")
    assert "\n" not in str(error.value)


def test_the_header_alone(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(" path , labels\nx,y\n")
    assert read_header(tmp_path / "list.csv") == ["path", "labels"]
    (tmp_path / "list.csv").write_text("")
    assert read_header(tmp_path / "list.csv") == []


def test_line_numbers_count_every_line(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text('# one\n  # two\n\n   \na,b\n# three\nc,"d" \n')
    assert list(read_lines(tmp_path / "list.csv", comment="#")) == [(5, ["a", "b"]), (7, ["c", "d"])]


@pytest.mark.parametrize(
    "text",
    [
        'abcdefghijk, 30.000, 40.000, "/m/09x0r,/m/05zppz"\n   \n',
        'YTID, start_seconds, end_seconds, positive_labels\nabcdefghijk, 30.000, 40.000, "/m/09x0r,/m/05zppz"\n',
        'abcdefghijk, 30.000, 40.000, "/m/09x0r,/m/05zppz" \r\n',
        "# YTID;start;end\nabcdefghijk;30.000;40.000;/m/09x0r,/m/05zppz\n",
        'abcdefghijk\t30.000\t40.000\t"/m/09x0r,/m/05zppz"\n,,,\n',
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_segment_lists_with_the_same_oddities(tmp_path: Path, text: str, encoding: str) -> None:
    touch(tmp_path / "audio", "abcdefghijk.wav")
    (tmp_path / "eval_segments.csv").write_bytes(text.replace(",,,", "\t\t\t").encode(encoding))
    source = read_audioset(tmp_path / "eval_segments.csv", tmp_path / "audio")
    (row,) = source.rows.to_pylist()
    assert (row["key"], row["labels"], row["reason"]) == ("abcdefghijk_30000", [0, 1], None)


def test_a_header_is_expected_in_the_first_line_only(tmp_path: Path) -> None:
    touch(tmp_path / "audio", "abcdefghijk.wav")
    line = 'abcdefghijk, 30.000, 40.000, "/m/09x0r"\n'
    (tmp_path / "s.csv").write_text(f"{line}YTID, start_seconds, end_seconds, positive_labels\n")
    with pytest.raises(UserError, match="s.csv:2: not a segment"):
        read_audioset(tmp_path / "s.csv", tmp_path / "audio")


def test_the_data_sets_own_lists_with_the_same_oddities(tmp_path: Path) -> None:
    touch(tmp_path / "esc", "audio/1-1-A-0.wav")
    touch(tmp_path / "us8k", "fold1/100-3-0-0.wav")
    touch(tmp_path / "fsd", "dev_audio/64760.wav")
    lists = {
        "esc/esc50.csv": "filename;fold;target;category;esc10\r\n1-1-A-0.wav;1;0;dog;True\r\n   \r\n",
        "us8k/UrbanSound8K.csv": "slice_file_name\tfold\tclassID\tclass\n100-3-0-0.wav\t1\t3\tdog_bark\n",
        "fsd/vocabulary.csv": "0;Bark;/m/2\n",
        "fsd/dev.csv": 'fname, labels, mids, split\n64760,"Bark" ,"/m/2",train\n',
    }
    for name, text in lists.items():
        (tmp_path / name).write_text(text, encoding="utf-16")
    sources = (read_esc50(tmp_path / "esc"), read_urbansound8k(tmp_path / "us8k"), read_fsd50k(tmp_path / "fsd"))
    assert [(source.rows["key"].to_pylist(), source.rows["reason"].to_pylist()) for source in sources] == [
        (["1-1-A-0"], [None]),
        (["100-3-0-0"], [None]),
        (["64760"], [None]),
    ]
