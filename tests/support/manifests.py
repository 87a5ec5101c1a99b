"""Kubernetes manifests, as `erann cluster render kubernetes` writes them."""

from typing import Any

from cluster.render.kubernetes import KubernetesCluster


def kubernetes_cluster(**options: Any) -> KubernetesCluster:
    """A cluster of the command's defaults."""
    values: dict[str, Any] = {
        "kind": "RayJob",
        "name": "erann",
        "image": "example.com/erann:0.1.0",
        "command": ["erann", "pretrain", "audioset.yaml"] if options.get("kind", "RayJob") == "RayJob" else [],
        "min_workers": 0,
        "max_workers": 1,
        "gpus": 1,
        "cpus": 8,
        "memory": 32,
        "cache": 400,
        "storage_class": None,
        "secret": None,
        "service_account": None,
        "s3_region": None,
        "s3_endpoint": None,
        "node_selector": [],
        "tolerations": [],
    }
    return KubernetesCluster(**values | options)


def cluster_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    """The Ray cluster of a RayJob or a RayCluster."""
    spec: dict[str, Any] = manifest["spec"]
    return spec["rayClusterSpec"] if manifest["kind"] == "RayJob" else spec


def pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The pods' specs: the head's and the GPU group's."""
    spec = cluster_spec(manifest)
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
