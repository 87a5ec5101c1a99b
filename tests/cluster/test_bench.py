"""The benchmarks run to their end and give the figures they promise; how fast is their matter."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from erann_dist.errors import UserError
from erann_dist.models.erann import ERANN
from erann_dist.models.spec import build_model, macs_of
from erann_dist.train.batchnorm import RunningStatistics
from erann_dist.train.distributed import Workers, single_worker
from jobs.bench import training
from jobs.bench.training import Groups, NullModel, Turn, _speeds, measure, with_engine
from jobs.bench.training_table import Setting, bench_table, settings
from jobs.training.probe_run import endless
from shards.sources.audioset import read_audioset
from tests.conftest import copy_tree, pack_here, small_recipe, write_tone_set
from tests.support.commands import erann


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_bench_augment(tmp_path: Path) -> None:
    options = ["--variant", "ERANN-3-1", "--crop-s", 0.5, "--clips", 1, "--rounds", 1]
    result = erann(tmp_path, "bench", "augment", *options)
    example, shifted = result["training_example_ms"], 2 * 4 / 5
    assert result["share_of_example_ours"] == pytest.approx(shifted * result["ours_ms"] / example, abs=1e-3)
    assert result["speedup"] == pytest.approx(result["torchaudio_ms"] / result["ours_ms"], rel=0.02)
    assert min(result["front_end_ms"], result["torchaudio_alone_ms"]) > 0


@pytest.mark.slow
def test_bench_kills(tmp_path: Path, tone_shards: Path) -> None:
    """Real kills, and weights bit-identical to those of the undisturbed run."""
    result = erann(tmp_path, "bench", "kills", tone_shards, "--steps", 40, "--kills", 4)
    assert [row["what"] for row in result["table"]] == ["worker", "workers", "driver", "node"]
    assert result["bit_identical"] == result["kills"] == 4
    assert result["starts"] == result["runs"] + result["kills"]
    assert all(row["resumed_from"] % 5 == 0 for row in result["table"])
    assert all(row["log"].startswith(f"worker {row['rank']} on ") for row in result["table"] if row["what"] == "worker")
    assert result["steps_lost"] == sum(row["step"] - row["resumed_from"] for row in result["table"])
    assert 0 < result["goodput"] < 1
    assert result["left_over"] == []


@pytest.mark.slow
def test_bench_train(tmp_path: Path, tone_shards: Path) -> None:
    recipe = [f"data.train={tone_shards}", f"data.eval={tone_shards}", "data.crop_s=0.5", "optim.zero_stage=1"]
    recipe += ["augment.partner=fresh"]
    options = ["--launcher", "torchrun", "--steps", 3, "--rounds", 1, "--job-rounds", 1]
    result = erann(tmp_path, "bench", "train", "demo.yaml", *recipe, *options)
    assert result["workers"] == 2
    assert set(result["ways"]) == {"plain", "deepspeed_0", "deepspeed_1", "deepspeed_2", "loader", "job"}
    for name, way in result["ways"].items():
        key = "torchrun_ratio" if name == "job" else f"{name}_ratio"
        assert result[key] == way["ratio"] == way["rounds"][0] > 0
        assert way["clips_per_s"] == pytest.approx(2 * way["examples_per_s"], abs=0.02)
        assert "mfu" not in way  # of a GPU only
    assert result["bare_clips_per_s"] == pytest.approx(2 * result["bare_examples_per_s"], abs=0.02)
    assert result["deepspeed_ratio"] == result["deepspeed_1_ratio"]
    assert 0 <= result["data_wait"] < 1
    layers = result["us_per_step"]
    assert layers.keys() == result["share_of_gpu_step"].keys()
    assert layers.keys() > {"loop", "deepspeed_0", "loader", "torchrun", "loop: statistics", "loop: sampler"}
    for layer, share in result["share_of_gpu_step"].items():
        assert share == pytest.approx(layers[layer] / 106_000, abs=3e-5)
    assert list(tmp_path.iterdir()) == []


def test_the_speeds_of_a_way(tmp_path: Path) -> None:
    """A step of 16 examples in half a second; an example a second takes a thousandth of the GPUs' peak."""
    recipe = small_recipe(tmp_path / "shards", tmp_path / "run", augment={"partner": "in_batch"})
    assert _speeds(recipe, 0.5, 0.001) == {"examples_per_s": 32, "clips_per_s": 32, "mfu": 0.032}
    recipe = small_recipe(tmp_path / "shards", tmp_path / "run", augment={"partner": "fresh"})
    assert _speeds(recipe, 0.5, None) == {"examples_per_s": 32, "clips_per_s": 64}


@pytest.mark.parametrize("way", ["bare", "plain"])
def test_a_turn_leaves_nothing_in_a_gpus_cache(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ways' processes share its memory. Also when the turn fails."""
    emptied: list[str] = []

    def fail(*_: object, **__: object) -> None:
        raise UserError("the GPU is too small")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(way))
    monkeypatch.setattr(training, "_bare", fail)
    monkeypatch.setattr(training, "train", fail)
    turn = Turn(way, small_recipe(tmp_path / "shards", tmp_path / "run"), 1, 1)
    for device in ("cpu", "cuda"):
        with pytest.raises(UserError):
            measure(turn, Workers(0, 1, torch.device(device)))
    assert emptied == [way]


def test_the_whole_job_under_ray(tmp_path: Path, tone_shards: Path) -> None:
    """Its figures are those of the steps behind the warm-up, although its workers are in other processes."""
    recipe = endless(small_recipe(tone_shards, tmp_path / "run", run={"launcher": "ray", "workers": 2}), 2)
    with Groups(recipe, str(tmp_path)) as groups:
        began = time.perf_counter()
        measured = groups.take(Turn("job", recipe, 2, 4, null=True))
    assert 0 < measured.step_s * 4 < time.perf_counter() - began
    assert 0 <= measured.data_wait < 1


def test_bench_train_says_what_is_wrong_with_the_data(tmp_path: Path, tone_shards: Path) -> None:
    """Found by the job's loader, in another process."""
    copy_tree(tone_shards, tmp_path / "shards")
    for tar in (tmp_path / "shards").glob("*.tar"):
        data = bytearray(tar.read_bytes())
        data[3000::2000] = bytes(x ^ 1 for x in data[3000::2000])
        tar.write_bytes(data)
    recipe = ["data.train=shards", "data.eval=shards", "data.crop_s=0.5"]
    options = ["--launcher", "none", "--steps", 3, "--rounds", 1, "--job-rounds", 1]
    line = erann(tmp_path, "bench", "train", "demo.yaml", *recipe, *options, code=1)
    assert line.startswith("erann: shards/audioset-")
    assert "is damaged; check the set with erann verify" in line


def test_the_bare_loop_does_the_same_work(tmp_path: Path, tone_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many micro-batches of the same shape, as many steps of the optimizer."""
    recipe = endless(small_recipe(tone_shards, tmp_path / "run"), 2)
    done: list[object] = []
    forward, step = ERANN.forward, torch.optim.Adam.step

    def counted_forward(self: ERANN, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        done.append((tuple(x.shape), mask is not None, self.training, torch.is_autocast_enabled("cpu")))
        return forward(self, x, mask)

    def counted_step(self: torch.optim.Adam, *arguments: Any) -> Any:
        done.append(("step", len(self.param_groups[0]["params"]), self.defaults["fused"]))
        return step(self, *arguments)

    monkeypatch.setattr(ERANN, "forward", counted_forward)
    monkeypatch.setattr(torch.optim.Adam, "step", counted_step)
    work = {}
    for way in ("bare", "plain"):
        done.clear()
        with single_worker(torch.device("cpu")) as workers:
            assert measure(Turn(way, recipe, 2, 4), workers).step_s > 0
        work[way] = done[: 6 * 5]  # six steps of four micro-batches; ours takes one step more
    assert len(work["bare"]) == 6 * 5
    assert work["bare"] == work["plain"]


def test_each_way_has_its_engine(tmp_path: Path, tone_shards: Path) -> None:
    recipe = small_recipe(tone_shards, tmp_path / "run", run={"engine": "deepspeed"}, optim={"zero_stage": 2})
    ways = ["plain", "loader", "deepspeed_0", "deepspeed_1", "deepspeed_2", "job"]
    engines = {way: with_engine(recipe, way) for way in ways}
    assert [engines[way].run.engine for way in ways] == ["torch"] + ["deepspeed"] * 5
    assert [engines[way].optim.zero_stage for way in ways[2:]] == [0, 1, 2, 2]


def test_the_null_model_trains_in_as_many_tensors_as_the_real_one(tmp_path: Path) -> None:
    null, real = NullModel("ERANN-1-6", 3), build_model("ERANN-1-6", 3)
    assert len(list(null.parameters())) == len(list(real.parameters()))
    assert len(RunningStatistics(null)._running) == len(RunningStatistics(real)._running)
    null(torch.randn(4, 1, 128, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in null.parameters())


@pytest.mark.slow
def test_bench_table(tmp_path: Path, tone_shards: Path) -> None:
    """Tiny and on the CPU, where fp16 is refused and the rest goes on."""
    recipe = small_recipe(tone_shards, tmp_path / "run", data={"crop_s": 0.5})
    tiny = Setting("ERANN-3-1", micro_batch=2, precision="fp32")
    lines = [tiny, replace(tiny, channels_last=False), replace(tiny, precision="tf32"), replace(tiny, precision="fp16")]
    result = bench_table(recipe, lines, warm_up=1, steps=1)
    *measured, refused = result["table"]
    assert all(line["examples_per_s"] > 0 and line["mfu"] > 0 and line["problem"] is None for line in measured)
    assert (refused["examples_per_s"], refused["mfu"]) == (None, None)
    assert "needs a GPU" in refused["problem"]
    flops = macs_of("ERANN-3-1", 3, 22_050) * 2 * 3
    mfu = measured[0]["examples_per_s"] * flops / (result["peak_tflops"]["fp32"] * 1e12)
    assert measured[0]["mfu"] == pytest.approx(mfu, rel=0.2)  # of rounded figures


def test_the_table_has_each_setting_once() -> None:
    lines = list(settings(["ERANN-1-6"], [8, 32], ["fp32", "bf16"]))
    assert len(lines) == len(set(lines)) == 2 + 2 * 2 * 2 - 1
    assert Setting("ERANN-1-6", 8) in lines
    assert Setting("ERANN-1-6", 32, "fp32", compile=True, channels_last=False) in lines


def test_the_table_needs_a_gpu(tmp_path: Path) -> None:
    assert erann(tmp_path, "bench", "train", "--table", code=2) == "erann: --table needs an NVIDIA GPU"
