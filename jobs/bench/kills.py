"""Training under faults: kills workers, the command itself and nodes, and measures the cost and the effect."""

import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import yaml
from rich.table import Table

from cluster.embedded import ray_cluster  # noqa: F401 - before Ray, whose environment it sets

# isort: split
from ray.cluster_utils import Cluster

from erann_dist.data.manifest import load_manifest
from erann_dist.environment import end_with_parent
from erann_dist.errors import UserError
from erann_dist.log.run_log import LOG, Line, read_log
from erann_dist.storage.folder import LocalFolder
from jobs.terminal.progress import console
from jobs.terminal.show import console as page
from jobs.terminal.show import facts_page

What = Literal["worker", "workers", "driver", "node"]

_WORKERS = 2
_CHECKPOINT_EVERY = 5  # steps
_EVAL_CLIPS = 16
_IN_TURN: tuple[What, ...] = ("worker", "workers", "driver", "node")
_IN_TURN_TIMED: tuple[What, ...] = ("node", "worker")
_GRACE_S = 150.0  # Time for Ray's agents to end after the process that started them was killed.


@dataclass(frozen=True)
class Fault:
    """What to kill, once the run has done this step and trained for this many seconds."""

    what: What
    step: int = 1
    after_s: float = 0.0


@dataclass(frozen=True)
class Killed:
    what: What
    rank: int | None  # of the one worker that was killed
    at: float  # unix time


@dataclass(frozen=True)
class Row:
    """One kill, and its effect according to the run's log."""

    kill: int
    run: int
    what: What
    rank: int | None  # of the one worker that was killed
    step: int  # the last step that had been done
    resumed_from: int
    steps_lost: int
    seconds_lost: float  # according to the log: since the last step that counts
    restart_s: float  # of these, the time until training restarted; the rest is for recomputed steps
    log: str
    bit_identical: bool  # whether the run's final weights equal those of the undisturbed run


def bench_kills(shards: str, kills: int, seed: int, steps: int, every: float | None) -> dict[str, Any]:
    """Runs in which a worker, all workers, the driver and a node are killed one after another, at random times.

    every: instead, one run in which a node and a worker are killed alternately, one every so many seconds.
    """
    rng = random.Random(seed)
    rows: list[Row] = []
    goodputs: list[float] = []
    starts = 0
    # A short name: in a folder with a long path, the paths of Ray's sockets would be too long.
    scratch_folder = tempfile.TemporaryDirectory(prefix="", ignore_cleanup_errors=True)
    with scratch_folder as scratch, _Family() as family:
        # Files left by killed processes, including Ray's, are in there. RAY_ADDRESS would replace the embedded cluster.
        os.environ["TMPDIR"] = scratch
        os.environ.pop("RAY_ADDRESS", None)
        undisturbed = _Run(Path(scratch, "undisturbed"), shards, steps, family)
        console.print(f"undisturbed: {steps} steps")
        undisturbed.train([], rng)
        while len(rows) < kills:
            number = 1 + len(goodputs)
            run = _Run(Path(scratch, f"run-{number}"), shards, steps, family)
            console.print(f"run {number}")
            killed = run.train(_faults(rng, len(rows), kills, steps, every), rng)
            lines = read_log(LocalFolder(str(run.folder)))
            last_start = max(line["time"] for line in lines if line["event"] == "Started")
            killed = [each for each in killed if each.at < last_start]  # Otherwise the run finished anyway.
            if not killed:
                raise UserError(f"the run of {steps} steps was over before anything was killed; give more --steps")
            identical = run.weights() == undisturbed.weights()
            rows += [_row(each, len(rows) + i, number, lines, identical) for i, each in enumerate(killed, 1)]
            goodputs.append(_goodput(lines))
            starts += sum(line["event"] == "Started" for line in lines)
            console.print(f"run {number}: weights {'bit-identical' if identical else 'DIFFERENT'}")
            if every:
                break
        undisturbed_goodput = _goodput(read_log(LocalFolder(str(undisturbed.folder))))
    return {
        "steps": steps,
        "runs": len(goodputs),
        "kills": len(rows),
        "bit_identical": sum(row.bit_identical for row in rows),
        "starts": starts,  # one for each run and each kill, if nothing else failed
        "steps_lost": sum(row.steps_lost for row in rows),
        "steps_lost_per_kill": round(statistics.mean(row.steps_lost for row in rows), 2),
        "seconds_lost_per_kill": round(statistics.mean(row.seconds_lost for row in rows), 2),
        "restart_s_per_kill": round(statistics.mean(row.restart_s for row in rows), 2),
        "goodput": round(statistics.mean(goodputs), 4),
        "undisturbed_goodput": round(undisturbed_goodput, 4),
        "left_over": family.left_over,  # Processes that did not end by themselves.
        "table": [asdict(row) for row in rows],
    }


def kills_page(result: dict[str, Any]) -> None:
    """One line per kill, then the totals."""
    names = ["kill", "run", "what", "step", "resumed_from", "steps_lost", "seconds_lost", "restart_s", "bit_identical"]
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(name.replace("_", " "), justify="left" if name == "what" else "right")
    for row in result["table"]:
        what = row["what"] if row["rank"] is None else f"worker {row['rank']}"
        shown = row | {"what": what, "bit_identical": "yes" if row["bit_identical"] else "no"}
        table.add_row(*(str(shown[name]) for name in names))
    page.print(table)
    facts_page(result)


def _faults(rng: random.Random, done: int, kills: int, steps: int, every: float | None) -> list[Fault]:
    """The faults of the next run."""
    if every:
        return [Fault(_IN_TURN_TIMED[i % 2], after_s=(i + 1) * every) for i in range(kills)]
    kinds = _IN_TURN[done % len(_IN_TURN) :][: kills - done]
    return [Fault(*each) for each in zip(kinds, sorted(rng.sample(range(1, steps), len(kinds))), strict=True)]


class _Run:
    """A run of the `erann pretrain` command."""

    def __init__(self, folder: Path, shards: str, steps: int, family: "_Family") -> None:
        self.folder = folder
        self._family = family
        self._place = folder.with_suffix(".command")
        self._place.mkdir()
        keys, recipe = self._place / "eval-keys", self._place / "recipe.yaml"
        keys.write_text("\n".join(load_manifest(shards).keys[:_EVAL_CLIPS].to_pylist()))
        tree = {
            "model": {"variant": "ERANN-3-1"},
            "data": {"train": shards, "eval": {"url": shards, "keys": str(keys)}, "crop_s": 1, "allow_overlap": True},
            "optim": {"global_batch": 16, "micro_batch": 8, "examples": 16 * steps},
            "checkpoint": {"every": _CHECKPOINT_EVERY},
            "run": {
                "name": folder.name,
                "dir": str(folder.parent),
                "workers": _WORKERS,
                "device": "cpu",
                "log_every": 1,  # The step of a kill is read from the log.
                "max_failures": 1000,  # Kills may come faster than checkpoints.
            },
        }
        recipe.write_text(yaml.safe_dump(tree))
        self._command = [sys.executable, "-m", "jobs.cli.__main__", "pretrain", str(recipe)]
        self._output = self._place / "output"

    def train(self, faults: list[Fault], rng: random.Random) -> list[Killed]:
        """Run the command until the run finishes, starting it again when it was killed.

        Returns what was killed, which is not everything if the run finishes first.
        """
        killed: list[Killed] = []
        for of_one_command in _by_command(faults):
            with ExitStack() as stack:
                loses_node = any(fault.what == "node" for fault in of_one_command)
                nodes = stack.enter_context(_nodes()) if loses_node else None
                process = stack.enter_context(self._started(nodes))
                for fault in of_one_command:
                    if not (step := self._wait_for(fault, starts=len(killed), process=process)):
                        break
                    time.sleep(rng.random() * step["seconds"])  # anywhere in a step
                    rank = rng.randrange(_WORKERS) if fault.what == "worker" else None
                    name = fault.what if rank is None else f"worker {rank}"
                    console.print(f"  {name} killed after step {step['step']}")
                    killed.append(Killed(fault.what, rank, time.time()))
                    self._kill(fault.what, rank, process, nodes, rng)
                if process.wait() not in (0, -signal.SIGKILL):
                    raise UserError(f"the training failed: {self._output.read_text().strip().splitlines()[-1]}")
            if (self.folder / "model" / "config.json").exists():
                break
        return killed

    @contextmanager
    def _started(self, nodes: "_Nodes | None") -> Iterator[subprocess.Popen[bytes]]:
        address = ["--address", nodes.address] if nodes else []
        with self._output.open("ab") as output:
            # A separate session: the remains of an embedded cluster whose driver was killed end their whole group.
            process = subprocess.Popen(
                [*self._command, *address],
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def _wait_for(self, fault: Fault, starts: int, process: subprocess.Popen[bytes]) -> Line | None:
        """Wait until the fault is due, after more than `starts` starts. The last step; None if the run ends first."""
        while process.poll() is None:
            lines = read_log(LocalFolder(str(self.folder)))
            began = [number for number, line in enumerate(lines) if line["event"] == "Started"]
            if len(began) > starts:
                steps = [line for line in lines[began[-1] :] if line["event"] == "Step"]
                if steps and steps[-1]["step"] >= fault.step and time.time() - lines[0]["time"] >= fault.after_s:
                    return steps[-1]
            time.sleep(0.2)
        return None

    def _kill(
        self,
        what: What,
        rank: int | None,
        command: subprocess.Popen[bytes],
        nodes: "_Nodes | None",
        rng: random.Random,
    ) -> None:
        processes = self._family.look()
        if what == "driver":
            command.kill()
        elif what == "node":
            assert nodes
            nodes.replace(rng.randrange(_WORKERS))
        else:
            workers = [process for process in processes if _is_worker(process)]
            if len(workers) != _WORKERS:
                return  # The run has just finished.
            workers.sort(key=lambda process: not self._is_first(process))
            for process in workers if rank is None else [workers[rank]]:
                process.kill()

    def _is_first(self, worker: psutil.Process) -> bool:
        """Whether this is the first worker, which alone writes the run's log."""
        return str(self.folder / LOG) in [file.path for file in worker.open_files()]

    def weights(self) -> bytes:
        return (self.folder / "model" / "model.safetensors").read_bytes()


def _by_command(faults: list[Fault]) -> list[list[Fault]]:
    """The faults by start of the command, which is started again after it was killed."""
    commands: list[list[Fault]] = [[]]
    for fault in faults:
        commands[-1].append(fault)
        if fault.what == "driver":
            commands.append([])
    return commands


def _is_worker(process: psutil.Process) -> bool:
    with suppress(psutil.Error):  # The process has just ended.
        return process.status() != psutil.STATUS_ZOMBIE and process.cmdline()[0].startswith("ray::RayTrainWorker")
    return False


class _Nodes:
    """A Ray cluster with a head without CPUs, and a node with one CPU for each worker."""

    def __init__(self) -> None:
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.address: str = self._cluster.address
        self._nodes = [self._cluster.add_node(num_cpus=1) for _ in range(_WORKERS)]

    def replace(self, number: int) -> None:
        """Kill a node's raylet, and so its worker, and start another node in its place."""
        self._cluster.remove_node(self._nodes[number], allow_graceful=False)
        self._nodes[number] = self._cluster.add_node(num_cpus=1)

    def close(self) -> None:
        self._cluster.shutdown()


@contextmanager
def _nodes() -> Iterator[_Nodes]:
    nodes = _Nodes()
    try:
        yield nodes
    finally:
        nodes.close()


class _Family:
    """All descendants of this process that were ever seen. At the end of the context, all have ended."""

    def __init__(self) -> None:
        self._known: set[psutil.Process] = set()
        self.left_over: list[str] = []  # those that had to be killed

    def look(self) -> list[psutil.Process]:
        """The current descendants."""
        now = psutil.Process().children(recursive=True)
        self._known.update(now)
        return now

    def __enter__(self) -> "_Family":
        return self

    def __exit__(self, *_: object) -> None:
        self.look()
        _, alive = psutil.wait_procs(self._known, timeout=_GRACE_S)
        for process in alive:
            with suppress(psutil.Error):  # it has just ended
                self.left_over.append(" ".join(process.cmdline()))
                process.kill()


def _row(killed: Killed, number: int, run: int, lines: list[Line], identical: bool) -> Row:
    """The row of a kill, from the run's log."""
    events = [line for line in lines if line["time"] > killed.at]
    start = next((line for line in events if line["event"] == "Started"), None)
    incident = next((line for line in events if line["event"] == "Incident" and line["kind"] == "failure"), None)
    if not start or not incident:
        raise UserError(f"run {run}: its log has no start or no incident after kill {number} ({killed.what})")
    return Row(
        kill=number,
        run=run,
        what=killed.what,
        rank=killed.rank,
        step=start["step"] + incident["steps_lost"],
        resumed_from=start["step"],
        steps_lost=incident["steps_lost"],
        seconds_lost=round(incident["seconds_lost"], 2),
        # Time between commands does not count as lost.
        restart_s=round(start["time"] - max(killed.at, start["launched"]), 2),
        log=incident["text"],
        bit_identical=identical,
    )


def _goodput(lines: list[Line]) -> float:
    return [line["goodput"] for line in lines if line["event"] == "Finished"][-1]
