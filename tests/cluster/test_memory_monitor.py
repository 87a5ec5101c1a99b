"""What Ray's memory monitor ends: a short text, and no lost cluster."""

import pytest
import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import WorkerGroupError

from cluster.ray_train import _explain, _lost_cluster_in_one_line
from erann_dist.errors import UserError


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", list)


RAYS_TEXT = "Task was killed due to the node running low on memory. " + "Memory on the node was 3.9GB / 4.0GB. " * 35


def test_a_worker_is_an_incident_of_one_short_line() -> None:
    killed = WorkerHealthCheckFailedError("failed", OutOfMemoryError(RAYS_TEXT))
    _, text = _explain(WorkerGroupError("failed", {0: killed}), {})
    assert "memory" in text
    assert len(text) < 200


def test_any_other_text_of_rays_is_cut() -> None:
    killed = WorkerHealthCheckFailedError("failed", RayError(RAYS_TEXT))
    _, text = _explain(WorkerGroupError("failed", {0: killed}), {})
    assert len(text) < 300


def test_at_the_start_the_cluster_is_not_lost() -> None:
    with pytest.raises(UserError) as error, _lost_cluster_in_one_line():
        raise OutOfMemoryError(RAYS_TEXT)
    assert "memory" in str(error.value)
    assert "lost" not in str(error.value)
    with pytest.raises(UserError, match="lost"), _lost_cluster_in_one_line():
        raise RayActorError
