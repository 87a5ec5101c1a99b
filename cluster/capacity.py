"""The capacity of a cluster for workers, determined by requesting a placement group for each worker.

The groups that Ray has created count what is free for this run now, whatever else runs on the cluster. Nodes that are
being drained don't count, and an autoscaling cluster learns from the pending groups what is needed.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from erann_dist.errors import NoCapacity, Stopped
from erann_dist.log.events import StopRequest
from erann_dist.words import count

Bundle = dict[str, float]
_SETTLE_S = 2.0  # Time without a change in capacity; resources of earlier workers are freed sooner.


@contextmanager
def capacity_for(bundle: Bundle, most: int) -> Iterator[Callable[[], int]]:
    """Request the resources of up to `most` workers, and hold them until the context ends.

    Yields a function that returns for how many workers the resources are available now.
    """
    groups = [placement_group([bundle]) for _ in range(most)]
    try:
        yield lambda: sum(placement_group_table(group)["state"] == "CREATED" for group in groups)
    finally:
        for group in groups:
            remove_placement_group(group)


def free_capacity(bundle: Bundle) -> int:
    """How many workers fit now, as far as is known without requesting their resources."""
    return _workers(bundle, ray.available_resources())


def total_capacity(bundle: Bundle) -> int:
    """How many workers would fit if nothing else ran on the cluster."""
    return _workers(bundle, ray.cluster_resources())


def _workers(bundle: Bundle, resources: dict[str, float]) -> int:
    return min(int(resources.get(kind, 0) // amount) for kind, amount in bundle.items())


def bundle_of(device: str, least: int) -> Bundle:
    """The resources that each worker requests, in a run of at least `least` workers. device: auto, cpu or cuda."""
    gpus = ray.cluster_resources().get("GPU", 0)
    use_gpu = device == "cuda" or (device == "auto" and gpus >= least)
    return {"CPU": 1.0, "GPU": 1.0} if use_gpu else {"CPU": 1.0}


def wait_for_capacity(
    bundle: Bundle, least: int, most: int, *, seconds: float, emit: Callable[[str], None], stop: StopRequest
) -> int:
    """Wait until at least `least` workers fit; returns how many do. Raises NoCapacity after this many seconds.

    emit: called once, with what is missing.
    """
    began = changed = time.monotonic()
    found, reported = 0, False
    with capacity_for(bundle, most) as available_workers:
        while True:
            if reason := stop():
                raise Stopped(reason.text)
            found, before = available_workers(), found
            now = time.monotonic()
            changed = now if found != before else changed
            settled = now - changed >= _SETTLE_S
            if found == most or (found >= least and settled):
                return found
            if found < least and settled:
                missing = _missing(bundle, least, found)
                if now - began >= seconds:
                    waited = f" after {seconds:g} s" if seconds else ""
                    raise NoCapacity(f"{missing}{waited}", fix="start fewer (run.workers) or add nodes")
                if not reported:
                    emit(f"{missing}; waiting up to {seconds:g} s for more")
                    reported = True
            time.sleep(0.2)


def _missing(bundle: Bundle, least: int, found: int) -> str:
    each = " and ".join(count(amount, kind) for kind, amount in bundle.items())
    nodes = [node for node in ray.nodes() if node["Alive"]]
    total = {kind: sum(node["Resources"].get(kind, 0) for node in nodes) for kind in bundle}
    # What this run itself holds while it waits counts as free.
    free = {kind: ray.available_resources().get(kind, 0) + found * amount for kind, amount in bundle.items()}
    in_use = [
        f"{total[kind] - free[kind]:g} of the {count(total[kind], kind)}" for kind in bundle if free[kind] < total[kind]
    ]
    return (
        f"{count(least, 'worker')} with {each} each requested, but there is capacity for {found}: "
        f"the cluster has {count(len(nodes), 'node')} with {' and '.join(count(total[kind], kind) for kind in bundle)}"
        + (f"; others use {' and '.join(in_use)}" if in_use else "")
    )
