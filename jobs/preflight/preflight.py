"""Checks whether a cluster is ready for a recipe's run; the last check runs a few real training steps."""

import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from cluster.embedded import opening, ray_cluster  # before Ray, whose environment it sets

# isort: split
from ray.exceptions import RayError
from ray.util import get_node_ip_address

from cluster.capacity import Bundle, bundle_of, free_capacity, wait_for_capacity
from cluster.preflight import collectives, facts, storage
from cluster.preflight.facts import Facts, Gpu
from cluster.preflight.probes import Node, answers, crew_of, living_nodes, probes_on
from cluster.preflight.storage import Reading
from cluster.stop_request import no_stop_request
from erann_dist.data.manifest import Manifest
from erann_dist.errors import NoCapacity, UsageError, UserError
from erann_dist.models.base import count_parameters
from erann_dist.models.spec import build_model
from erann_dist.recipe import Recipe
from erann_dist.storage.folder import LocalFolder, open_folder
from erann_dist.train import checkpoint
from erann_dist.train.work_plan import SamplePlan, micro_batches_per_rank
from erann_dist.words import count
from jobs.plan.simulation import Simulation
from jobs.preflight.verdicts import (
    Demand,
    Problem,
    Verdict,
    advice,
    all_reduce_verdict,
    by_node,
    cache_verdict,
    clocks_verdict,
    estimate_verdict,
    judge,
    nodes_verdict,
    shards_verdict,
    step_verdict,
    supply_verdict,
    versions_verdict,
)
from jobs.terminal.progress import console
from jobs.training.pretrain import check_run, is_finished
from jobs.training.probe_run import ProbeResult, take_steps

_START_S = 120.0  # Time for processes to start and to load large libraries.
_READ_S = 3.0
_PATIENCE_S = 90.0  # Time to wait for a response from S3.
_CLASSES = 527  # AudioSet's, if the shard set can't be read.
_DRAWS = 4_000_000  # Clips drawn to predict the cache's hit rate.

_READABLE = (
    "every node must be able to read the whole set: by a path that all nodes have, or from s3:// with network access, "
    "endpoint and credentials on each node; erann verify finds damaged shards"
)
_FOLDER = "start the command in a folder that all nodes have"
_DRIVER = "check the driver there (nvidia-smi), and that torch is a CUDA build"
_SHARED = "set run.dir to storage that all nodes and this host share: a mounted file system, or s3://bucket/prefix"
_PORTS = (
    "let the nodes reach each other on all ports (security group, firewall); to use another network interface, set "
    "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME for ray start"
)


def preflight(recipe: Recipe, address: str | None, on_verdict: Callable[[Verdict], None]) -> dict[str, Any]:
    """Check everything that the recipe's run needs of the cluster, and call `on_verdict` with each verdict.

    Nothing is left in run.dir. Raises UsageError if the recipe is not for Ray, UserError if there is no cluster or it
    is lost.
    """
    if recipe.run.launcher != "ray":
        raise UsageError(f"run.launcher is {recipe.run.launcher}; preflight checks Ray clusters: run.launcher=ray")
    began = time.monotonic()
    console.print(opening(address), markup=False)
    try:
        # Ray reports lost nodes on stdout, where only the verdicts belong.
        with redirect_stdout(sys.stderr), ray_cluster(address, recipe.run.min_workers):
            checks = _Checks(recipe, address, on_verdict)
            checks.run()
    except RayError as error:
        raise UserError(f"the Ray cluster is lost ({type(error).__name__})") from error
    return {
        "recipe": recipe.run.name,
        "ready": all(verdict.state in ("ok", "warning") for verdict in checks.done.values()),
        "seconds": time.monotonic() - began,
        "checks": [asdict(verdict) for verdict in checks.done.values()],
        "advice": checks.advice,
    }


@dataclass(frozen=True)
class _Site:
    """The cluster, with preflight's processes on it."""

    bundle: Bundle
    capacity: int  # for workers
    probes: dict[Node, Any]
    crew: list[tuple[Node, Any]]  # by rank
    facts: dict[Node, Facts]
    gpus: dict[int, Gpu]  # by rank

    @property
    def places(self) -> list[Node]:
        """The workers' nodes, by rank."""
        return [node for node, _ in self.crew]

    @property
    def worked_on(self) -> dict[Node, Any]:
        """The probes of the nodes that can hold workers of the run, where this program can be started."""
        return {n: probe for n, probe in self.probes.items() if n in self.facts and n.holds(self.bundle)}

    @property
    def readers(self) -> dict[tuple[Node, int], Any]:
        """A process for each worker of the run, and one on each node that can hold workers but has none now."""
        crew = {(node, rank): worker for rank, (node, worker) in enumerate(self.crew) if node in self.facts}
        others = {(n, -1): probe for n, probe in self.worked_on.items() if n not in self.places}
        return crew | others


class _Checks:
    """The checks in their order, and their verdicts."""

    def __init__(self, recipe: Recipe, address: str | None, on_verdict: Callable[[Verdict], None]) -> None:
        self.recipe, self.address, self._on_verdict = recipe, address, on_verdict
        self.done: dict[str, Verdict] = {}
        self.advice: list[str] = []
        self._data = recipe.data.model_dump_json()

    def run(self) -> None:
        with _scratch_next_to(self.recipe) as scratch:
            with self._site() as site:
                self._clocks(site)
                clips, readings = self._shards(site)
                self._store(site, scratch)
                self._cache(site)
                all_reduce_s = self._all_reduce(site, clips)
            trial = self._step(site, scratch, all_reduce_s)
        self._supply(site, trial, clips, readings)
        self._estimate(site, trial, clips, all_reduce_s)

    def _report(self, verdict: Verdict) -> None:
        self.done[verdict.check] = verdict
        self._on_verdict(verdict)

    def _is_blocked(self, check: str, *needed: str) -> bool:
        """Whether a check is impossible because an earlier one failed; if so, that is reported."""
        missing = next((name for name in needed if self.done[name].state in ("failed", "not checked")), None)
        if missing:
            why = "failed" if self.done[missing].state == "failed" else "could not be checked"
            self._report(Verdict(check, "not checked", f"{missing} {why}"))
        return missing is not None

    @contextmanager
    def _site(self) -> Iterator[_Site]:
        """Start the processes, and report on the nodes and the versions on them."""
        run, no_capacity = self.recipe.run, None
        bundle = bundle_of(run.device, run.min_workers)
        capacity = free_capacity(bundle)
        try:
            workers = wait_for_capacity(
                bundle, run.min_workers, run.max_workers, seconds=0, emit=lambda _: None, stop=no_stop_request
            )
        except NoCapacity as error:
            workers, no_capacity = 0, error.text  # The verdict suggests the fix.
            # Reported at once: no later check changes it.
            self._report(nodes_verdict(self.recipe, bundle, living_nodes(), [], no_capacity, {}, {}, []))
        # The nodes are listed last: a node that has just joined may have got a worker.
        with crew_of(workers, bundle) as crew, probes_on(nodes := living_nodes()) as probes:
            if workers and not crew:  # There was capacity a moment ago.
                no_capacity = f"the resources for {count(workers, 'worker')} were taken by others in the meantime"
            asked = {node: probe.do.remote(facts.facts) for node, probe in probes.items()}
            processes = [*probes.items(), *crew]
            entering = {n: process.do.remote(facts.enter, os.getcwd()) for n, (_, process) in enumerate(processes)}
            looking = {rank: worker.do.remote(facts.gpu) for rank, (_, worker) in enumerate(crew) if "GPU" in bundle}
            there, silent = answers(asked, _START_S)
            outside = {processes[n][0]: text for n, text in answers(entering, _START_S)[1].items()}
            gpus, no_gpu = answers(looking, _START_S)
            troubles = by_node({node: text for node, text in outside.items() if node in there}, _FOLDER)
            no_gpus = {crew[rank][0]: f"its GPU can't be used: {text}" for rank, text in no_gpu.items()}
            troubles += by_node({node: text for node, text in no_gpus.items() if node in there}, _DRIVER)
            site = _Site(bundle, max(capacity, workers), probes, crew, there, gpus)
            if not self.done:
                verdict = nodes_verdict(
                    self.recipe, bundle, nodes, site.places, no_capacity, there, site.gpus, troubles
                )
                self._report(verdict)
            self._report(versions_verdict(facts.facts(), there, silent))
            yield site

    def _clocks(self, site: _Site) -> None:
        self._report(clocks_verdict(*facts.offsets({node: site.probes[node] for node in site.facts})))

    def _shards(self, site: _Site) -> tuple[Manifest | None, dict[Node, list[Reading]]]:
        """The training clips, and how fast each node reads them."""
        try:
            clips, eval_clips = storage.open_sets(self._data)
        except (UserError, OSError) as error:
            self._report(judge("shards", "", [Problem(f"{_this_host()}: {error}", _READABLE)]))
            return None, {}
        readers = site.readers
        if not readers:
            self._report(Verdict("shards", "not checked", "no node can hold a worker"))
            return clips, {}
        opened = {reader: probe.do.remote(storage.count_clips, self._data) for reader, probe in readers.items()}
        opened, problems = answers(opened, _START_S)
        # All nodes read at the same time, as in training.
        asked = {
            reader: readers[reader].do.remote(storage.read_clips, self._data, _READ_S, number)
            for number, reader in enumerate(opened)
        }
        read, later = answers(asked, _PATIENCE_S)
        readings: dict[Node, list[Reading]] = {}
        for (node, _), reading in read.items():
            readings.setdefault(node, []).append(reading)
        trouble = by_node({node: text for (node, _), text in (problems | later).items()}, _READABLE)
        self._report(
            judge("shards", "", trouble)
            if trouble
            else shards_verdict(len(clips), len(eval_clips), len(clips.tars), readings)
        )
        return clips, readings

    def _store(self, site: _Site, scratch: str) -> None:
        """Let each node write a file and look for those of the others."""
        run = open_folder(self.recipe.run_url)
        here = f"token-{secrets.token_hex(8)}"
        try:
            storage.write_token(scratch, here)
        except UserError as error:
            text = f"{_this_host()}: {str(error).replace(f'/{here}', '')}"
            self._report(judge("run folder", "", [Problem(text, _SHARED)]))
            return
        probes = site.worked_on
        names_of = {node: f"token-{node.id}" for node in probes}
        asked = {node: probe.do.remote(storage.write_token, scratch, names_of[node]) for node, probe in probes.items()}
        made, refused = answers(asked, _PATIENCE_S)
        silent = {node: text.replace(f"/{names_of[node]}", "") for node, text in refused.items()}
        written = [here, *(names_of[node] for node in made)]
        asked = {node: probes[node].do.remote(storage.tokens_seen, scratch, written) for node in made}
        seen, lost = answers(asked, _PATIENCE_S)
        seen_here = storage.tokens_seen(scratch, written)
        asked = {
            node: probes[node].do.remote(storage.remove_token, scratch, names_of[node], top)
            for node, top in made.items()
        }
        answers(asked, _PATIENCE_S)
        apart = [node for node in seen if here not in seen[node] or names_of[node] not in seen_here]
        text = f"the others don't see what it writes to {self.recipe.run.dir}, which is a local folder there"
        problems = by_node(silent | lost | dict.fromkeys(apart, text), _SHARED)
        try:
            check_run(self.recipe, run, "auto")
        except UserError as error:
            problems.append(Problem(str(error), "use another run.name, or the recipe that the run was started with"))
        if is_finished(run):
            text = f"{run}: this run is finished, and would not be run again"
            problems.append(Problem(text, "to run it again, use another run.name", fails=False))
        found = f"{run}: shared by {count(len(seen), 'node')} and this host"
        self._report(judge("run folder", str(run) if problems else found, problems))

    def _cache(self, site: _Site) -> None:
        if cache := self.recipe.data.cache:
            probes = site.worked_on
            asked = {node: probe.do.remote(storage.cache_disk, cache.dir) for node, probe in probes.items()}
            self._report(cache_verdict(cache, *answers(asked, _PATIENCE_S)))

    def _all_reduce(self, site: _Site, clips: Manifest | None) -> float:
        """Seconds of an all-reduce of the model's gradients over as many workers as the run has."""
        if self._is_blocked("all-reduce", "nodes", "versions"):
            return 0.0
        workers = len(site.crew)
        if workers == 1:
            self._report(judge("all-reduce", "not needed for one worker", []))
            return 0.0
        if problems := _unreachable({node: site.probes[node] for node in site.places}):
            self._report(judge("all-reduce", "", by_node(problems, _PORTS)))
            return 0.0
        with torch.device("meta"):
            classes = clips.num_classes if clips else _CLASSES
            elements = count_parameters(build_model(self.recipe.model.variant, classes))
        (first, probe), use_gpu = site.crew[0], "GPU" in site.bundle
        port, silent = answers({first: probe.do.remote(collectives.free_port)}, _START_S)
        asked = {
            rank: worker.do.remote(
                collectives.all_reduce_seconds, rank, workers, first.address, port[first], elements, use_gpu
            )
            for rank, (_, worker) in enumerate(site.crew)
            if port
        }
        took, failed = answers(asked, _START_S)
        problems = silent | {site.places[rank]: text for rank, text in failed.items()}
        if problems:
            self._report(judge("all-reduce", "", by_node(problems, _PORTS)))
            return 0.0
        seconds: float = max(took.values())
        self._report(all_reduce_verdict(workers, 4 * elements, seconds))
        return seconds

    def _step(self, site: _Site, scratch: str, all_reduce_s: float) -> ProbeResult | None:
        if self._is_blocked("step", "nodes", "versions", "shards", "run folder", "all-reduce"):
            return None
        run, workers = self.recipe.run, len(site.crew)
        try:
            # The resources that the processes held are freed soon.
            wait_for_capacity(
                site.bundle, run.min_workers, workers, seconds=30, emit=lambda _: None, stop=no_stop_request
            )
            trial = take_steps(self.recipe, scratch, workers, self.address)
        except UserError as error:
            self._report(judge("step", "", [Problem(error.text, "see the message; the same error would end the run")]))
            return None
        self._report(step_verdict(self.recipe, trial, all_reduce_s, list(site.gpus.values())))
        return trial

    def _supply(
        self, site: _Site, trial: ProbeResult | None, clips: Manifest | None, readings: dict[Node, list[Reading]]
    ) -> None:
        if self._is_blocked("supply", "step"):
            return
        assert trial
        assert clips
        optim, draws = self.recipe.optim, SamplePlan(self.recipe, clips)
        examples = micro_batches_per_rank(optim, trial.workers) * optim.micro_batch
        ranks: dict[Node, list[int]] = {}
        for rank, node in enumerate(site.places):
            ranks.setdefault(node, []).append(rank)
        demand = Demand(
            clips_per_s=examples * draws.clips_per_example / trial.step_s,
            clip_bytes=float(clips.sizes.mean()),
            set_bytes=int(clips.sizes.sum(dtype=np.int64)),
            is_remote=any(source.url.startswith("s3://") for source in self.recipe.data.train),
            hits=_late_hits(self.recipe, clips, list(ranks.values())) if self.recipe.data.cache else None,
        )
        cores = {node: there.cores for node, there in site.facts.items()}
        self._report(supply_verdict(self.recipe, demand, readings, cores))

    def _estimate(self, site: _Site, trial: ProbeResult | None, clips: Manifest | None, all_reduce_s: float) -> None:
        if self._is_blocked("estimate", "step"):
            return
        assert trial
        assert clips
        committed = checkpoint.committed(open_folder(self.recipe.run_url))
        done = checkpoint.step_of(committed[-1]) if committed else 0
        self._report(estimate_verdict(trial, self.recipe.steps(len(clips)), done))
        self.advice = advice(self.recipe, trial, all_reduce_s, site.capacity, list(site.gpus.values()))


def _this_host() -> str:
    return f"{get_node_ip_address()} ({socket.gethostname()}), where the command runs"


@contextmanager
def _scratch_next_to(recipe: Recipe) -> Iterator[str]:
    """The URL of a folder next to the run's. It is not created here; at the end it is removed with its content."""
    scratch = f"{recipe.run.dir.rstrip('/')}/preflight-{secrets.token_hex(4)}"
    folder, made = open_folder(scratch), storage.first_missing(scratch)
    try:
        yield scratch
    finally:
        if isinstance(folder, LocalFolder):
            shutil.rmtree(scratch, ignore_errors=True)
            storage.remove_folders(scratch, made)
        else:
            with suppress(UserError):  # The store can't be used, which was already reported.
                folder.discard_unfinished()
                for name in folder.sizes():
                    folder.delete(name)


def _unreachable(probes: dict[Node, Any]) -> dict[Node, str]:
    """The nodes that can't connect to others, with the names of those."""
    ports, problems = answers({node: probe.do.remote(collectives.listen) for node, probe in probes.items()}, _START_S)
    asked = {}
    for node in ports:
        others = {str(other): (other.address, port) for other, port in ports.items() if other != node}
        asked[node] = probes[node].do.remote(collectives.unreachable, others)
    missed, silent = answers(asked, _START_S)
    for node, others in missed.items():
        if others:
            problems[node] = f"can't connect to {', '.join(others)}"
    return problems | silent


def _late_hits(recipe: Recipe, clips: Manifest, ranks_of_nodes: list[list[int]]) -> float:
    """Share of the reads that the nodes' caches serve at the end of the run, simulated for at most _DRAWS draws."""
    draws_a_step = recipe.optim.global_batch * SamplePlan(recipe, clips).clips_per_example
    steps = min(recipe.steps(len(clips)), max(2, _DRAWS // draws_a_step))
    simulation = Simulation(recipe, clips, ranks_of_nodes, np.zeros(len(clips), np.int64))
    *_, last = simulation.stretches(sorted({max(1, steps * 9 // 10), steps}))
    return sum(node.hits for node in last.nodes) / sum(node.clips for node in last.nodes)
