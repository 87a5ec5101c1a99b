"""Room for workers on a cluster: placement groups of one worker each, those that stand and those that wait.

They count what is free for this run now, whoever else works there; nodes that are about to go give none; and a cluster
that can grow sees by them what is wanted.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from cluster.stop_request import Notice
from erann_dist.errors import NoRoom, Stopped
from erann_dist.words import count

Bundle = dict[str, float]
_SETTLE_S = 2.0  # without more room; what workers before held comes back in less


@contextmanager
def room_for(bundle: Bundle, most: int) -> Iterator[Callable[[], int]]:
    """Ask for room for so many workers, which is kept until the context ends; how many there is room for."""
    groups = [placement_group([bundle]) for _ in range(most)]
    try:
        yield lambda: sum(placement_group_table(group)["state"] == "CREATED" for group in groups)
    finally:
        for group in groups:
            remove_placement_group(group)


def free_room(bundle: Bundle) -> int:
    """For how many workers there is room now, as far as that can be told without asking for it."""
    return _workers(bundle, ray.available_resources())


def all_room(bundle: Bundle) -> int:
    """For how many workers there is room when nobody else works on the cluster."""
    return _workers(bundle, ray.cluster_resources())


def _workers(bundle: Bundle, resources: dict[str, float]) -> int:
    return min(int(resources.get(kind, 0) // amount) for kind, amount in bundle.items())


def bundle_of(device: str, least: int) -> Bundle:
    """What a worker of a run of at least so many asks for. device: auto, cpu or cuda."""
    gpus = ray.cluster_resources().get("GPU", 0)
    use_gpu = device == "cuda" or (device == "auto" and gpus >= least)
    return {"CPU": 1.0, "GPU": 1.0} if use_gpu else {"CPU": 1.0}


def wait_for_room(
    bundle: Bundle, least: int, most: int, *, seconds: float, say: Callable[[str], None], stop: Notice
) -> int:
    """How many workers there is room for, as soon as it is enough. Raises NoRoom when it is not in so many seconds.

    say: is told once what is waited for.
    """
    began = changed = time.monotonic()
    found, said = 0, False
    with room_for(bundle, most) as room:
        while True:
            if reason := stop():
                raise Stopped(reason)
            found, before = room(), found
            now = time.monotonic()
            changed = now if found != before else changed
            settled = now - changed >= _SETTLE_S
            if found == most or (found >= least and settled):
                return found
            if found < least and settled:
                missing = _missing(bundle, least, found)
                if now - began >= seconds:
                    waited = f" after {seconds:g} s" if seconds else ""
                    raise NoRoom(f"{missing}{waited}; start fewer (run.workers) or add nodes")
                if not said:
                    say(f"{missing}; waiting up to {seconds:g} s for more")
                    said = True
            time.sleep(0.2)


def _missing(bundle: Bundle, least: int, found: int) -> str:
    each = " and ".join(count(amount, kind) for kind, amount in bundle.items())
    nodes = [node for node in ray.nodes() if node["Alive"]]
    there = {kind: sum(node["Resources"].get(kind, 0) for node in nodes) for kind in bundle}
    # What this run itself holds while it waits is free for it.
    free = {kind: ray.available_resources().get(kind, 0) + found * amount for kind, amount in bundle.items()}
    in_use = [
        f"{there[kind] - free[kind]:g} of the {count(there[kind], kind)}" for kind in bundle if free[kind] < there[kind]
    ]
    return (
        f"{count(least, 'worker')} with {each} each requested, but there is room for {found}: "
        f"the cluster has {count(len(nodes), 'node')} with {' and '.join(count(there[kind], kind) for kind in bundle)}"
        + (f"; others use {' and '.join(in_use)}" if in_use else "")
    )
