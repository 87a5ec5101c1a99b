"""What tests share: the real data beside the repository, small shard sets, and worker processes over gloo."""

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

# Before anything imports Ray or torch: quiet, private, and independent of the machine's number of cores.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# With a niceness of 15, which is the default of Ray for its workers, they would starve next to another test process.
os.environ.setdefault("RAY_worker_niceness", "0")
if "ERANN_TEST_GPU" not in os.environ:  # which `make test-gpu` sets: all other tests count on a machine without one
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["DS_ACCELERATOR"] = "cpu"
# One intra-op thread, as recipes have it: results depend on the number, and several processes compete for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])  # what tests start imports from them, on Ray's workers too
if "ERANN_TESTS" not in os.environ:  # this is pytest's own process
    # Killed processes leave files of theirs, Ray's too. Removed behind multiprocessing, which removes its own, and so
    # registered before that is imported. The name is short: paths of sockets may not be long.
    os.environ["TMPDIR"] = os.environ["ERANN_TESTS"] = tempfile.tempdir = tempfile.mkdtemp(prefix="erann-")
    atexit.register(shutil.rmtree, tempfile.tempdir, ignore_errors=True)
    # What a shell starts in the background ignores Ctrl-C, and so would the commands that tests start and stop by it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Ray looks in the temporary folder for the cluster that was started last: each of pytest-xdist's processes has its own.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and Path(os.environ["TMPDIR"]).name != worker:
    os.environ["TMPDIR"] = tempfile.tempdir = str(Path(os.environ["ERANN_TESTS"]) / worker)
    os.mkdir(tempfile.tempdir)

import multiprocessing.forkserver

import numpy as np
import pytest
import soundfile

from erann_dist.recipe import Recipe
from erann_dist.storage.folder import LocalFolder
from shards import build
from shards.clip import Packing
from shards.sources.audioset import read_audioset
from shards.sources.rows import Source

# What worker processes are forked with. torch imports Dynamo when the first optimizer is made, and DeepSpeed its own
# optimizers, which takes each process 3 s; with a GPU, what else they do then is left to the workers.
PRELOAD = ["tests.support.workers", "jobs.training.scheduler", "deepspeed"]
if "ERANN_TEST_GPU" not in os.environ:
    PRELOAD += ["torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer"]


def _preload(modules: list[str]) -> None:
    """In place of multiprocessing's, for there is one server in a process: code that sets its own list adds to ours."""
    multiprocessing.forkserver._forkserver.set_forkserver_preload([*PRELOAD, *modules])


multiprocessing.forkserver.set_forkserver_preload = _preload
_preload([])

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """../shared/data: real audio and the real AudioSet lists."""
    if not SHARED.is_dir():
        pytest.skip(f"real data is absent ({SHARED})")
    return SHARED


def pack_here(source: Source, folder: Path, **options: Any) -> Path:
    """Pack a source in this process, without Ray; eight clips a shard."""
    plan = build.Plan(source, Packing(**{"clips_per_shard": 8} | options), LocalFolder(str(folder)))
    assert build.start(plan)
    for shard in range(plan.num_shards):
        build.keep(plan.task(shard), build.build_shard(plan.task(shard)))
    build.finish(plan)
    return folder


def copy_tree(source: Path, target: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(source, target)
    return target


def write_tone_set(root: Path, clips: int, classes: int = 3, seconds: float = 1.5) -> tuple[Path, Path, Path]:
    """A tiny AudioSet of tones: class c is a tone near 300·(c + 1) Hz. Returns segments, audio folder, class list."""
    rng = np.random.default_rng(clips)
    audio = root / "audio"
    audio.mkdir(parents=True)
    (root / "classes.csv").write_text(
        "index,mid,display_name\n" + "".join(f'{c},/m/{c:03d},"Tone, {c}"\n' for c in range(classes))
    )
    lines = []
    for i in range(clips):
        labels = sorted({i % classes, int(rng.integers(classes))})
        t = np.arange(round(44_100 * seconds * rng.uniform(0.7, 1))) / 44_100
        sound = sum(np.sin(2 * np.pi * 300 * (c + 1) * rng.uniform(0.97, 1.03) * t) for c in labels)
        soundfile.write(audio / f"{i:011d}.wav", 0.2 * sound + 0.01 * rng.standard_normal(len(t)), 44_100)
        mids = ",".join(f"/m/{c:03d}" for c in labels)
        lines.append(f'{i:011d}, 0.000, {seconds:.3f}, "{mids}"\n')
    (root / "tone_segments.csv").write_text("# YTID, start_seconds, end_seconds, positive_labels\n" + "".join(lines))
    return root / "tone_segments.csv", audio, root / "classes.csv"


@pytest.fixture(scope="session")
def tone_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed set of 40 tone clips in five shards."""
    root = tmp_path_factory.mktemp("tones")
    return pack_here(read_audioset(*write_tone_set(root, 40)), root / "shards")


def small_steps(count: int) -> dict[str, object]:
    """The optim section of a run whose steps cost little, four micro-batches of two; for tests of all else."""
    return {"global_batch": 8, "micro_batch": 2, "examples": 8 * count}


def small_recipe(shards: Path, run_dir: Path, **sections: dict[str, object]) -> Recipe:
    """ERANN-3-1 on half-second crops, four micro-batches of four a step; sections override keys."""
    tree: dict[str, dict[str, object]] = {
        "model": {"variant": "ERANN-3-1"},
        "data": {"train": str(shards), "eval": str(shards), "crop_s": 0.5, "allow_overlap": True},
        "augment": {},
        "optim": {"global_batch": 16, "micro_batch": 4, "examples": 64, "small_micro_batch": True},
        "checkpoint": {"every": 100},
        "run": {
            "name": run_dir.name,
            "dir": str(run_dir.parent),
            "launcher": "none",
            "engine": "torch",
            "log_every": 1,
        },
    }
    for name, keys in sections.items():
        tree.setdefault(name, {}).update(keys)
    return Recipe.model_validate(tree)
