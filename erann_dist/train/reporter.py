"""Reports a start of a run: its beginning, its steps and its incidents."""

import socket
import time
from collections.abc import Iterable

from erann_dist.clock import steady_time
from erann_dist.data.loader import BadClips
from erann_dist.log.events import Emit, Event, Finished, Incident, IncidentKind, Started
from erann_dist.log.run_log import RunLog, goodput, lost
from erann_dist.train.distributed import device_name
from erann_dist.train.run import Run
from erann_dist.train.watchdog import stacks_left
from erann_dist.versions import program_versions


class Reporter:
    """Rank 0's events go to the run's log and to the caller; those of other workers are dropped."""

    def __init__(self, run: Run, log: RunLog | None, emit: Emit) -> None:
        """log: on rank 0."""
        self.log = log
        self._run = run
        self._sinks: list[Emit] = [log.event, emit] if log else []
        self._problems: dict[str, IncidentKind] = {}  # of caches, storage and the log: a line each
        self._reported: set[str] = set()
        self._is_storage_reported = any(line.get("kind") == "storage" for line in log.found) if log else False

    def emit(self, event: Event) -> None:
        for sink in self._sinks:
            sink(event)

    def start(self, step: int, resumed_from: str | None, damaged: list[str], start_number: int) -> None:
        """Report that the training begins after this step, and what was lost since the last start. All workers call it.

        resumed_from: the checkpoint's name. damaged: lines about checkpoints and results. start_number: rank 0's.
        """
        run, workers = self._run, self._run.workers
        hosts = workers.all_gather(socket.gethostname())
        hardware = workers.all_gather(device_name(workers.device))
        stacks = [stack for each in workers.all_gather(stacks_left(run.recipe.run_url)) for stack in each]
        if not self.log:
            return
        self.emit(
            Started(
                step=step,
                steps=run.steps,
                workers=workers.world_size,
                device=str(workers.device),
                train_clips=len(run.clips),
                eval_clips=len(run.eval_clips),
                resumed_from=f"{run.folder}/{resumed_from}" if resumed_from else None,
                launched=workers.launched,
                hosts=hosts,
                hardware=hardware,
                versions=program_versions(),
            )
        )
        for problem in damaged:
            self.emit(Incident(step, "checkpoint", problem))
        if self.log.found:
            self.emit(self._interruption(self.log, step, stacks, start_number))

    def _interruption(self, log: RunLog, step: int, stacks: list[tuple[str, str]], start_number: int) -> Incident:
        """Why the previous start ended, and what that cost."""
        run, workers = self._run, self._run.workers
        gone = lost(log.found, step, workers.launched, steady_time(), max(log.reached, workers.reached))
        if workers.failure:
            kind, text = workers.failure.kind, workers.failure.text
        else:
            before = log.found[-1]
            kind = "stop" if before.get("told") else "failure"
            why = f": {before['text']}" if before["event"] == "Ended" else ""
            text = f"the command before this one ended at step {gone.last_step}{why}"
        if stacks:
            name = f"stacks/start-{start_number:04d}.txt"
            run.folder.write(name, "".join(f"{rank}\n{stack}\n" for rank, stack in stacks).encode())
            text += f"; the stacks of {', '.join(rank for rank, _ in stacks)} are in {run.folder}/{name}"
        return Incident(step, kind, text, gone.steps, gone.seconds)

    def step_done(self, step: int) -> None:
        if self.log:
            self.log.reach(step)

    def problem(self, kind: IncidentKind, text: str | None) -> None:
        """Record a problem of this worker; `incidents` reports it, once rank 0 has it."""
        if text:
            self._problems.setdefault(text, kind)

    def gather_problems(self) -> None:
        """Collect the other workers' problems on rank 0. All workers call it."""
        for problems in self._run.workers.all_gather(self._problems):
            self._problems |= problems

    def ignore(self, keys: Iterable[str]) -> None:
        """Do not report these bad clips, which an earlier start has reported."""
        self._reported |= set(keys)

    def incidents(self, step: int, bad_clips: BadClips) -> None:
        """Report each bad clip and each problem once.

        Slow reads from S3 are reported only once in a run, because each worker may have another reason.
        """
        self.problem("log", self.log.problem if self.log else None)
        for key in sorted(bad_clips.found.keys() - self._reported):
            self.emit(Incident(step, "bad_clip", bad_clips.found[key], keys=[key]))
            self._reported.add(key)
        for text in sorted(self._problems.keys() - self._reported):
            kind = self._problems[text]
            if kind != "storage" or not self._is_storage_reported:
                self.emit(Incident(step, kind, text))
            self._is_storage_reported |= kind == "storage"
            self._reported.add(text)

    def was_evaluated(self, step: int) -> bool:
        """Whether the run's log has an evaluation at this step. All workers call it and get the same answer."""
        lines = self.log.lines if self.log else []
        found = any(line["event"] == "Evaluated" and line["step"] == step for line in lines)
        return self._run.workers.broadcast(found)

    def finish(self, metrics: dict[str, float]) -> None:
        if self.log:
            outcome = metrics | {"model": f"{self._run.folder}/model"}
            seconds = time.perf_counter() - self._run.began
            self.emit(Finished(self._run.steps, seconds, goodput(self.log.lines, steady_time()), outcome))
