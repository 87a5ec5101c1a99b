"""A stand-in for the training: a step is an all-reduce, its checkpoint a file with a number.

Each worker imports this module. So it imports what such a worker needs and nothing else.
"""

import faulthandler
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from erann_dist.errors import Stopped, Unavailable, UserError
from erann_dist.log.events import CheckpointSaved, Emit
from erann_dist.train.distributed import Workers

SECONDS = 180.0


def write_text(path: Path, text: str) -> None:
    """A file that is there only as a whole."""
    part = path.with_name(f".{path.name}")
    part.write_text(text)
    part.replace(path)


def count_steps(config: dict[str, Any], workers: Workers, emit: Emit) -> None:
    """Counts to config["steps"], a checkpoint every config["every"] steps and when told to stop.

    Each worker of each start notes itself in a file in config["place"].
    """
    place, saved = Path(config["place"]), Path(config["place"]) / "saved"
    first = int(saved.read_text()) if saved.exists() else 0
    own = {"pid": os.getpid(), "rank": workers.rank, "world_size": workers.world_size, "from": first}
    own |= {"failure": workers.failure and workers.failure.text, "launched": workers.launched}
    write_text(place / f"worker-{time.time_ns()}-{workers.rank}", json.dumps(own))

    def save(step: int) -> None:
        if workers.is_rank_zero:
            write_text(saved, str(step))
            emit(CheckpointSaved(step, str(saved), 0.0, 0.0))
        workers.barrier()

    for step in range(first, config["steps"]):
        if "watchdog_s" in config:
            faulthandler.dump_traceback_later(config["watchdog_s"], exit=True)
        reason = workers.stop_request()
        told = torch.tensor([float(reason is not None)])
        dist.all_reduce(told)
        if told.item():
            save(step)
            raise Stopped(f"stopped at step {step}: {reason and reason.text}")
        if step == config.get("fault_step") and workers.rank == workers.world_size - 1:
            if config["fault"] == "user error":
                raise UserError("clip 7 is bad")
            if config["fault"] == "exception":
                raise RuntimeError("no such device")
            if not (place / "once").exists():
                (place / "once").touch()
                if config["fault"] == "S3 away":
                    raise Unavailable("s3://bucket/set/0.tar could not be read: S3 can't do it now")
                time.sleep(SECONDS)
        if workers.is_rank_zero:
            write_text(place / "step", str(step + 1))
        time.sleep(config["step_s"])
        if (step + 1) % config["every"] == 0:
            save(step + 1)
    write_text(place / f"done-{workers.rank}", str(config["steps"]))


COMMAND = """
import json, sys
from cluster.launch import launch
from cluster.launch_spec import LaunchSpec
from erann_dist.errors import UserError
from tests.support.counting import count_steps
config, options = json.loads(sys.argv[1])
try:
    spec = LaunchSpec(count_steps, config, handles_stop=True, **options)
    launch(spec, lambda event: print(event, file=sys.stderr))
except UserError as error:
    print(f"erann: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
"""


class Command:
    """A process that launches `count_steps` on workers, as `erann pretrain` launches a training."""

    def __init__(self, place: Path, config: dict[str, Any], **options: Any) -> None:
        self.place = place
        config = {"place": str(place), "steps": 40, "every": 10, "step_s": 0.1} | config
        options = {"launcher": "ray", "device": "cpu", "num_workers": 2, "max_failures": 2} | options
        options = {"wait_for_workers": SECONDS} | options
        self.log = place / "log"
        (place / "command.py").write_text(COMMAND)
        arguments = [sys.executable, str(place / "command.py"), json.dumps([config, options])]
        with self.log.open("w") as log, (place / "stdout").open("w") as out:
            self.process = subprocess.Popen(arguments, cwd=place, stdout=out, stderr=log)

    def wait_until(self, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + SECONDS
        while not (answer := condition()):
            assert time.monotonic() < deadline, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        return answer

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: (self.place / "step").exists() and int((self.place / "step").read_text()) >= step)

    def starts(self) -> list[list[dict[str, Any]]]:
        """What the workers of each start noted of themselves, by rank."""
        starts: list[list[dict[str, Any]]] = []
        for path in sorted(self.place.glob("worker-*[0-9]")):
            note = json.loads(path.read_text())
            if not starts or len(starts[-1]) == starts[-1][0]["world_size"]:
                starts.append([])
            starts[-1].append(note)
        return [sorted(start, key=lambda note: note["rank"]) for start in starts]

    def end(self, code: int = 0) -> list[list[dict[str, Any]]]:
        assert self.process.wait(SECONDS) == code, self.log.read_text()
        return self.starts()


@contextmanager
def running(*arguments: Any, **options: Any) -> Iterator[Command]:
    command = Command(*arguments, **options)
    try:
        yield command
    finally:
        command.process.kill()
        command.process.wait()


def gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)
