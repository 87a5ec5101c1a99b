"""What `erann stats` shows: the page for the terminal and the one in HTML."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from erann_dist.errors import UserError
from erann_dist.storage.folder import open_folder
from jobs.html.page import percent
from jobs.shard_sets.pack import summary
from jobs.shard_sets.stats import stats, stats_page
from jobs.shard_sets.stats_page import hours
from jobs.terminal.show import packed_page, size
from shards.sources.folder import read_folder
from shards.sources.rows import FileCounts
from shards.statistics import EXAMPLES
from tests.conftest import pack_here
from tests.shards.test_statistics import CLIPS, REPORT, write_set
from tests.support.html_page import Page, require_self_contained

HOSTILE = "<script>alert(1)</script>"


def page_of(root: Path, clips: list[dict[str, Any]], report: list[dict[str, Any]], **facts: Any) -> Page:
    folder = open_folder(write_set(root / "set", clips, report, **facts))
    stats(folder, 1200, root / "page.html")
    return Page((root / "page.html").read_text())


def terminal(capsys: pytest.CaptureFixture[str], root: Path, **facts: Any) -> str:
    folder = open_folder(write_set(root, facts.pop("clips", CLIPS), facts.pop("report", REPORT), **facts))
    stats_page(stats(folder, facts.pop("examples", 1200), None))
    return capsys.readouterr().out


def test_the_html_page_says_what_the_result_says(tmp_path: Path) -> None:
    page = page_of(tmp_path, CLIPS, REPORT)
    rows = {tuple(cells) for cells in page.cells}
    assert ("eval", "", "2", "4", "50.0%") in {cells[:5] for cells in rows}
    assert ("2", "", "1", "3", "33.3%") in {cells[:5] for cells in rows}
    assert ("1", "A", "", "4", "4", "100%", "0.003", "100") in rows
    assert ("4", "D", "", "0", "1", "0%", "0.000", "–") in rows
    assert ("mp3 stereo", "", "2", "50.0%") in rows
    assert ("missing", "2", "25.0%", "m1m: no file") in rows
    for text in ("57.1%", "of 7 listed clips", "1,200", "100 ×", "300 ×", "500 ×", "1 without clips:", "1.75 s"):
        assert text in page.texts
    assert page.tags >= {"svg", "table", "section"}


def test_the_html_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    clips = [{**clip, "key": f"1-{i % 2}-A-{i}", "fold": i + 1} for i, clip in enumerate(CLIPS)]
    page = page_of(tmp_path, clips, REPORT, name="esc50")
    assert not page.tags & {"script", "img", "a"}
    require_self_contained(page)


def test_the_html_page_escapes_what_comes_from_data(tmp_path: Path) -> None:
    clips = [{**CLIPS[0], "format": HOSTILE, "split": HOSTILE, "key": HOSTILE}]
    report = [{**REPORT[0], **dict.fromkeys(("key", "reason", "source", "detail"), HOSTILE), "split": "</td>"}]
    facts = {"name": HOSTILE, "label_names": [HOSTILE, "$a^b_{$", "&amp;", "D"], "versions": {HOSTILE: '"'}}
    page = page_of(tmp_path, clips, report, codec=HOSTILE, **facts)
    assert "script" not in page.tags
    texts = " ".join(page.texts)
    assert texts.count(HOSTILE) >= 10
    assert "</td>" in texts
    assert "&amp;" in texts


def test_sources_with_a_low_rate_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "2 clips (50.0%) from sources below 28,000 Hz (2 at 16,000 Hz): their mel bins above half that rate stay"
    low = {"format": "pcm 16000 Hz mono"}
    clips = [{**clip, **(low if i < 2 else {})} for i, clip in enumerate(CLIPS)]
    assert f"warning: {line}" in terminal(capsys, tmp_path / "a", clips=clips, sample_rate=44_100)
    assert "warning" not in terminal(capsys, tmp_path / "b", sample_rate=44_100)
    assert any(text.startswith(line) for text in page_of(tmp_path / "c", clips, [], sample_rate=44_100).texts)


def test_a_real_low_rate_is_warned_of_when_it_is_packed(
    tmp_path: Path, real_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """UrbanSound8K at 22.05 kHz next to a clip of ESC-10 at 44.1 kHz."""
    folder = tmp_path / "clips/a"
    folder.mkdir(parents=True)
    low = sorted((real_data / "urbansound8k/audio").rglob("*.wav"))[:2]
    for path in [*low, min((real_data / "esc10/audio").iterdir())]:
        (folder / path.name).symlink_to(path)
    found = summary(open_folder(str(pack_here(read_folder(tmp_path / "clips"), tmp_path / "shards"))))
    assert found["low_rate"]["rates"] == [{"rate": 22_050, "clips": 2}]
    packed_page(found)
    assert "warning: 2 clips (66.7%) from sources below 28,000 Hz (2 at 22,050 Hz)" in capsys.readouterr().out


def test_the_html_page_of_an_indexed_set(tmp_path: Path) -> None:
    clips = [{**clip, "peak": None, "format": None} for clip in CLIPS]
    texts = " ".join(page_of(tmp_path, clips, [], packing={}).texts)
    assert "Without an official list its coverage is unknown" in texts
    assert "listed clips" not in texts
    assert "overloaded" not in texts


def test_the_html_page_of_a_set_with_shared_recordings(tmp_path: Path) -> None:
    clips = [{**CLIPS[0], "key": "1-77-A-0"}, {**CLIPS[0], "key": "2-77-A-0", "fold": 2}]
    page = page_of(tmp_path, clips, [], name="esc50")
    assert ["77", "1, 2"] in page.cells
    page = page_of(tmp_path, clips[:1], [], name="esc50")
    assert "Each of the 1 Freesound recordings is in one fold only." in page.texts


def test_the_same_set_makes_the_same_page(tmp_path: Path) -> None:
    folder = open_folder(write_set(tmp_path / "set", CLIPS, REPORT))
    for name in ("a.html", "b.html"):
        stats(folder, 1200, tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_the_result_is_json(tmp_path: Path) -> None:
    folder = open_folder(write_set(tmp_path / "set", CLIPS, REPORT))
    result = stats(folder, 1200, None)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert "html" not in result
    assert stats(folder, 1200, tmp_path / "page.html")["html"] == str(tmp_path / "page.html")


def test_the_terminal_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = terminal(capsys, tmp_path)
    assert "4 of 7 listed clips (57.1%)" in out
    assert re.search(r"eval +2 +4 +50\.0%", out)
    assert re.search(r"A +4 +4 +100% +0\.003 +100", out)
    assert "1 of 4 classes have no clips: D" in out
    assert re.search(r"missing +2 +25\.0%", out)
    assert "balanced sampling of 1,200 examples:\n" in out
    assert "at least 100, in the median 300, at most 500 times" in out


def test_the_terminal_page_names_where_the_default_budget_is_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stats_page(stats(open_folder(write_set(tmp_path, CLIPS, REPORT)), EXAMPLES, None))
    assert "16,000,000 examples (500,000 iterations" in capsys.readouterr().out


def test_the_terminal_page_shows_the_ends_of_many_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"class{i:02d}" for i in range(30)]
    clips = [{**CLIPS[0], "key": f"{i}-{j}", "labels": [i]} for i in range(20) for j in range(i + 1)]
    out = terminal(capsys, tmp_path, clips=clips, label_ids=names, label_names=names)
    assert "6 largest, 6 smallest of 20" in out
    shown = re.findall(r"^class(\d\d) ", out, re.MULTILINE)
    assert [int(name) for name in shown] == [19, 18, 17, 16, 15, 14, 5, 4, 3, 2, 1, 0]
    assert "10 of 30 classes have no clips: class20" in out


def test_the_terminal_page_of_an_indexed_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = terminal(capsys, tmp_path, clips=[{**CLIPS[0], "peak": None, "format": None}], report=[], packing={})
    assert "unknown: the set was indexed" in out
    assert "100%" not in out


def test_the_terminal_page_takes_labels_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "[red]A[/red] " in terminal(capsys, tmp_path, label_names=["[red]A[/red]", "B", "C", "D"])


def test_no_shard_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no shard set here"):
        stats(open_folder(str(tmp_path)), 1200, None)


def test_numbers_for_people() -> None:
    assert [percent(share) for share in (0, 1e-6, 0.5, 0.999999, 1)] == ["0%", "< 0.1%", "50.0%", "> 99.9%", "100%"]
    assert [hours(value) for value in (5382.1, 12.34, 2.345, 0.0456)] == ["5,382", "12.3", "2.35", "0.046"]
    assert [size(value) for value in (1, 25e6, 1e9, 2.5e12)] == ["0.0 MB", "25.0 MB", "1.0 GB", "2.5 TB"]


def test_the_files_found_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = open_folder(write_set(tmp_path / "set", CLIPS, REPORT))
    counts = FileCounts(12_345, 12_343, 2, ["x.wav", HOSTILE], listed=7, with_file=5, without_file=2)
    path = tmp_path / "set" / "report.parquet"
    pq.write_table(pq.read_table(path).replace_schema_metadata({"files": json.dumps(asdict(counts))}), path)
    result = stats(folder, 1200, tmp_path / "page.html")
    stats_page(result)
    shown = capsys.readouterr().out
    for line in counts.lines():
        assert line in shown
    assert f"When it was packed: {'; '.join(counts.lines())}." in Page((tmp_path / "page.html").read_text()).texts
    assert counts.lines()[0] == f"12,345 sound files found, 12,343 matched, 2 unmatched: x.wav, {HOSTILE}"
    assert counts.lines()[1] == "7 clips listed, 5 with a file, 2 without"
