"""Workers under torchrun: the command stays beside them, says in one line what ended them, and leaves none behind."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from shards.sources.audioset import read_audioset
from tests.conftest import copy_tree, pack_here, small_recipe, small_steps, write_tone_set
from tests.support.commands import ERANN, Running
from tests.support.counting import gone, running

AGAIN = "run the same command again to resume from the last checkpoint"
TORCHRUN = {"launcher": "torchrun", "num_workers": 2}


def told(log: Path) -> list[str]:
    """The log's lines without those of the events."""
    return [line for line in log.read_text().splitlines() if not line.startswith(("CheckpointSaved(", "Phase("))]


def test_a_users_error_on_one_worker(tmp_path: Path) -> None:
    """Not what the other says of the connection that it then loses."""
    with running(tmp_path, {"fault": "user error", "fault_step": 3}, **TORCHRUN) as command:
        assert len(command.end(1)) == 1
    assert told(command.log) == ["erann: clip 7 is bad"]


def test_an_exception_on_one_worker(tmp_path: Path) -> None:
    """In full, and its own only."""
    with running(tmp_path, {"fault": "exception", "fault_step": 3}, **TORCHRUN) as command:
        assert len(command.end(1)) == 1
    first, *_, raised, line = told(command.log)
    assert first.startswith("Traceback")
    assert command.log.read_text().count("Traceback") == 1
    assert raised == "RuntimeError: no such device"
    assert line == f"erann: the workers failed: worker 1: RuntimeError: no such device; {AGAIN}"


def test_a_worker_that_is_killed(tmp_path: Path) -> None:
    with running(tmp_path, {"steps": 400}, **TORCHRUN) as command:
        command.wait_for_step(15)
        ((_, second),) = command.starts()
        os.kill(second["pid"], signal.SIGKILL)
        (start,) = command.end(1)
    how = "its process was ended by SIGKILL, as when memory runs out"
    assert told(command.log) == [f"erann: the workers failed: worker 1: {how}; {AGAIN}"]
    assert gone([worker["pid"] for worker in start])


def test_a_signal_before_the_workers_have_begun(tmp_path: Path) -> None:
    with running(tmp_path, {"steps": 400}, **TORCHRUN) as command:
        command.wait_until(lambda: len(psutil.Process(command.process.pid).children()) == 2)
        command.process.terminate()
        command.end(143)
    assert told(command.log) == ["erann: stopped at step 0: stop requested by SIGTERM"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a packed set of tones."""
    place = tmp_path_factory.mktemp("place")
    pack_here(read_audioset(*write_tone_set(place / "set", 40)), place / "shards")
    return place


def write_recipe(place: Path, name: str, shards: str = "shards", **run: object) -> Path:
    settings = {"launcher": "torchrun", "workers": 2, **run}
    recipe = small_recipe(
        Path(shards), Path("runs") / name, run=settings, optim=small_steps(12), checkpoint={"every": 2}
    )
    (place / f"{name}.yaml").write_text(yaml.safe_dump(recipe.model_dump()))
    return place / f"{name}.yaml"


def weights(place: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(place / "runs" / name / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> tuple[str, str]:
    """What a run says on a terminal, and on stdout."""
    main, terminal = pty.openpty()
    seen: list[bytes] = []

    def watch() -> None:
        try:
            while piece := os.read(main, 65536):
                seen.append(piece)
        except OSError:  # all that had the terminal open have ended
            pass

    arguments = ["pretrain", str(write_recipe(place, "undisturbed")), "--json"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "150"}
    process = subprocess.Popen(
        [*ERANN, *arguments], cwd=place, stdout=subprocess.PIPE, stderr=terminal, env=environment, text=True
    )
    os.close(terminal)
    watcher = threading.Thread(target=watch)
    watcher.start()
    answer, _ = process.communicate(timeout=300)
    watcher.join()
    os.close(main)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", b"".join(seen).decode())
    assert process.returncode == 0, text
    return text, answer


def test_a_terminal_shows_how_the_run_stands(undisturbed: tuple[str, str]) -> None:
    text, answer = undisturbed
    assert re.search(r"training on 40 clips, evaluating on 40, 2 workers on cpu", text)
    assert re.search(r"step +[━╸╺]+ +\d+ of 12", text)
    assert re.search(r"goodput +\d+\.\d% since this command was started", text)
    assert json.loads(answer)["clips"] == 40


SLOW = [pytest.param(how, 128 + how, marks=pytest.mark.slow) for how in (signal.SIGTERM, signal.SIGHUP)]


@pytest.mark.parametrize(
    ("how", "code"),
    [
        (signal.SIGKILL, -9),
        (signal.SIGINT, 130),
        *SLOW,
    ],
)
def test_stopped_and_run_again(place: Path, undisturbed: Any, how: signal.Signals, code: int) -> None:
    """Nothing survives the command, and the next one ends with the weights of the undisturbed run."""
    name = f"stopped-{how.name}"
    recipe = write_recipe(place, name)
    command = Running(place, "pretrain", recipe)
    command.wait_for(place / "runs" / name / "checkpoints" / "step-00000004-0001" / "COMMITTED")
    assert command.end(how) == code
    assert command.survivors() == []
    assert "Traceback" not in command.text()
    if how != signal.SIGKILL:
        resume, why = command.text().splitlines()[-2:]
        assert resume.startswith("run the same command again to resume from the last checkpoint")
        assert re.match(rf"erann: stop requested by {how.name}: stopped at step \d+ of \d+, whose checkpoint is", why)
    assert command.text().count("Ctrl-C again stops at once") == (how == signal.SIGINT)
    assert not (place / "runs" / name / "model").exists()
    again = Running(place, "pretrain", recipe, "--resume", "must")
    assert again.process.wait(300) == 0, again.text()
    expected, found = weights(place, "undisturbed"), weights(place, name)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_one_bad_clip_too_many(place: Path) -> None:
    copy_tree(place / "shards", place / "broken")
    for tar in (place / "broken").glob("*.tar"):
        data = bytearray(tar.read_bytes())
        data[3000::2000] = bytes(x ^ 1 for x in data[3000::2000])
        tar.write_bytes(data)
    command = Running(place, "pretrain", write_recipe(place, "damaged", "broken"))
    assert command.process.wait(300) == 1
    *_, line = command.text().splitlines()
    assert line.startswith("erann: broken/audioset-")
    assert "is damaged; check the set with erann verify" in line
    assert "Traceback" not in command.text()


def test_what_cannot_be_used_has_an_exit_code_of_its_own(place: Path) -> None:
    """Found by the workers: this machine's tests see no GPU."""
    command = Running(place, "pretrain", write_recipe(place, "elsewhere", device="cuda"))
    assert command.process.wait(300) == 2
    line = "erann: run.device is cuda, but this host has 0 GPUs for 2 workers"
    assert command.text().splitlines()[-1] == line
    assert "Traceback" not in command.text()


def test_a_torchrun_of_the_users_own(place: Path, undisturbed: Any) -> None:
    """As on several machines: each of its workers is the whole command, the first one alone answers."""
    recipe = write_recipe(place, "own")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "jobs.cli.__main__", "pretrain", str(recipe), "--json"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["clips"] == 40
    expected, found = weights(place, "undisturbed"), weights(place, "own")
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_rank_that_something_else_has_set(place: Path) -> None:
    """As a batch system does: this process is the only one, so it checks the recipe, and answers."""
    environment = os.environ | {"RANK": "1", "WORLD_SIZE": "2"}
    recipe = write_recipe(place, "ranked", launcher="none", workers=1)
    for options, code in ([], 0), (["--resume", "never"], 2):
        command = [*ERANN, "pretrain", str(recipe), "--json", *options]
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stderr
        if code == 0:
            assert json.loads(done.stdout)["clips"] == 40
