"""The benchmarks run to their end and give the figures they promise; how fast is their matter."""

from pathlib import Path

import pytest

from shards.sources.audioset import read_audioset
from tests.commands import erann
from tests.conftest import pack_here, write_tone_set


def test_bench_sampler(tmp_path: Path) -> None:
    segments, _, _ = write_tone_set(tmp_path / "tones", 30)
    lines = (
        segments.read_text().replace("/m/000", "/m/09x0r").replace("/m/001", "/m/04rlf").replace("/m/002", "/m/05zppz")
    )
    segments.write_text(lines)
    result = erann(tmp_path, "bench", "sampler", segments, "--rounds", 1)
    assert result["clips"] == 30
    assert {"build_s", "private_mb", "draws_per_s", "seek_ms"} <= result.keys()
    assert result["draws_per_s"] > 0 < result["seek_ms"]


def test_bench_loader(tmp_path: Path) -> None:
    shards = pack_here(read_audioset(*write_tone_set(tmp_path / "tones", 30)), tmp_path / "shards")
    result = erann(tmp_path, "bench", "loader", shards, "--batches", 4, "--crop-s", 0.5, "--rounds", 1)
    ways = result["ways"]
    for name in ("local", "warm_cache", "cold_cache"):  # of one round, and rounded
        assert abs(result[f"{name}_ratio"] - ways[name]["clips_per_s"] / result["limit_clips_per_s"]) < 1e-3
    best = max(figures["clips_per_s"] for name, figures in ways.items() if name.startswith("webloader"))
    assert abs(result["vs_webloader"] - ways["local"]["clips_per_s"] / best) < 1e-3
    assert result["balanced_overhead"] > 0
    assert all(figures["peak_mb"] > 1 and figures["cpu_share"] > 0 for figures in ways.values())


@pytest.mark.parametrize(
    ("options", "killed"),
    [(["--kills", 3], ["worker", "workers", "driver"]), (["--kills", 1, "--every", 1], ["node"])],
)
def test_bench_kills(tmp_path: Path, tone_shards: Path, options: list[object], killed: list[str]) -> None:
    """Real kills, and weights bit-identical to those of the undisturbed run."""
    result = erann(tmp_path, "bench", "kills", tone_shards, "--steps", 16, *options)
    assert [row["what"] for row in result["table"]] == killed
    assert result["bit_identical"] == result["kills"] == len(killed)
    assert result["starts"] == result["runs"] + result["kills"]
    assert all(row["resumed_from"] % 5 == 0 or row["resumed_from"] == 16 for row in result["table"])
    assert result["steps_lost"] == sum(row["step"] - row["resumed_from"] for row in result["table"])
    assert 0 < result["goodput"] < 1
    assert result["left_over"] == []
