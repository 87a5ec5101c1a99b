"""Preflight's processes on the nodes of a cluster, which run functions there, and their results."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.capacity import Bundle
from erann_dist.errors import UserError, in_one_line

K = TypeVar("K")


@dataclass(frozen=True)
class Node:
    """A node of the cluster."""

    id: str
    address: str
    hostname: str
    resources: dict[str, float] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        return f"{self.address} ({self.hostname})"

    def holds(self, bundle: Bundle) -> int:
        """How many workers would fit on the node if nothing else ran there."""
        return min(int(self.resources.get(kind, 0) // amount) for kind, amount in bundle.items())


def living_nodes() -> list[Node]:
    """The nodes that are alive now, sorted by address."""
    nodes = [
        Node(each["NodeID"], each["NodeManagerAddress"], each["NodeManagerHostname"], each["Resources"])
        for each in ray.nodes()
        if each["Alive"]
    ]
    return sorted(nodes, key=lambda node: (node.address, node.id))


class _Probe:
    def do(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function on the node. It is sent by name, so the node's own version of it runs."""
        return function(*arguments)


@contextmanager
def probes_on(nodes: list[Node]) -> Iterator[dict[Node, Any]]:
    """A process on each node, which reserves none of its CPUs and GPUs. Its `do` runs a function there."""
    probes = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node.id, soft=False)
        probes[node] = ray.remote(_Probe).options(num_cpus=0, scheduling_strategy=there).remote()
    try:
        yield probes
    finally:
        for probe in probes.values():
            ray.kill(probe)


@contextmanager
def crew_of(number: int, bundle: Bundle) -> Iterator[list[tuple[Node, Any]]]:
    """Processes with their nodes, by rank, placed and given resources as Ray Train does with a run's workers.

    The list is empty if there is no longer capacity for all of them.
    """
    if not number:
        yield []
        return
    group = placement_group([bundle] * number)
    crew = []
    try:
        if group.wait(timeout_seconds=10):
            by_id = {node.id: node for node in living_nodes()}
            places = placement_group_table(group)["bundles_to_node_id"]
            for rank in range(number):
                place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
                options = {"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0), "scheduling_strategy": place}
                crew.append((by_id[places[rank]], ray.remote(_Probe).options(**options).remote()))
        yield crew
    finally:
        for _, worker in crew:
            ray.kill(worker)
        remove_placement_group(group)


def answers(asked: Mapping[K, Any], seconds: float) -> tuple[dict[K, Any], dict[K, str]]:
    """The results of the calls that finish within `seconds`, and for each of the others one line on why it has none."""
    found, problems = {}, {}
    if asked:
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=seconds)
    for key, call in asked.items():
        try:
            found[key] = ray.get(call, timeout=0)
        except GetTimeoutError:
            problems[key] = f"no answer within {seconds:g} s"
        except RayError as error:
            problems[key] = _line(error)
    return found, problems


def _line(error: RayError) -> str:
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, UserError):
        return str(cause)
    if isinstance(cause, OSError):
        return in_one_line(cause)
    text = str(cause).strip()
    if isinstance(cause, RayError):
        # Ray's error for a process that could not start contains its traceback.
        raised: list[str] = re.findall(r"^[\w.]*(?:Error|Exception): .*", text, re.MULTILINE)
        return (raised or text.splitlines())[-1]
    return f"{type(cause).__name__}: {(text.splitlines() or [''])[-1]}"
