"""Manifests for KubeRay: a RayJob, which runs a command and is then removed, and a RayCluster, which stays."""

import re
import shlex
import textwrap
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from cluster.environment import HEALTH_CHECKS
from cluster.render.checks import require, require_pinned
from cluster.render.template import fill, read_template
from erann_dist.errors import UsageError
from erann_dist.versions import installed

_NAME = "[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?"
_LABEL_NAME = "[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_LABEL_KEY = f"({_NAME}/)?{_LABEL_NAME}"
_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
# KubeRay appends six characters for a job's cluster, and ten for a cluster's service; names may have 63.
_LONGEST = {"RayJob": 47, "RayCluster": 53}
_DRAIN = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "90"}


@dataclass(frozen=True)
class KubernetesCluster:
    kind: Literal["RayJob", "RayCluster"]
    name: str
    image: str
    command: list[str]  # of a RayJob
    min_workers: int  # pods with GPUs
    max_workers: int
    gpus: int  # this and the next three are per such pod
    cpus: int
    memory: int  # GiB
    cache: int  # GiB
    storage_class: str | None  # of the cache; None: the node's local disk
    secret: str | None
    service_account: str | None
    s3_region: str | None
    s3_endpoint: str | None
    node_selector: list[str]  # key=value
    tolerations: list[str]  # key[=value][:effect]


def render_kubernetes(cluster: KubernetesCluster) -> str:
    """The manifest. Raises UsageError for invalid options."""
    _check(cluster)
    environment = dict(HEALTH_CHECKS)
    if cluster.s3_region:
        environment["AWS_DEFAULT_REGION"] = cluster.s3_region
    if cluster.s3_endpoint:
        environment["AWS_ENDPOINT_URL"] = cluster.s3_endpoint
    resources = {
        "cpu": str(cluster.cpus),
        "memory": f"{cluster.memory}Gi",
        "nvidia.com/gpu": str(cluster.gpus),
    }
    if not cluster.storage_class:  # Then ephemeral storage holds the cache, besides logs and compiled kernels.
        resources["ephemeral-storage"] = f"{cluster.cache + 20}Gi"
    values: dict[str, Any] = {
        "name": cluster.name,
        "entrypoint": shlex.join(cluster.command),
        "ray_version": installed("ray"),
        "autoscaling": cluster.min_workers < cluster.max_workers,
        "service_account": cluster.service_account,
        "image": cluster.image,
        "head_env": _as_list(environment),
        "worker_env": _as_list(environment | _DRAIN),
        "env_from": [{"secretRef": {"name": cluster.secret}}] if cluster.secret else None,
        "min_workers": cluster.min_workers,
        "max_workers": cluster.max_workers,
        "node_selector": dict(_label(each) for each in cluster.node_selector) or None,
        "tolerations": [_toleration(each) for each in ("nvidia.com/gpu:NoSchedule", *cluster.tolerations)],
        "resources": resources,
        "shared_memory": f"{max(1, cluster.memory // 4)}Gi",
        "cache": f"{cluster.cache * 9 // 10}GB",  # A GiB is 1.07 GB, which leaves space for the file system's metadata.
        "cache_volume": _cache_volume(cluster),
    }
    start, indent = ("rayjob.yaml", 4) if cluster.kind == "RayJob" else ("raycluster.yaml", 2)
    spec = fill(read_template("raycluster_spec.yaml"), values)
    return fill(read_template(start), values) + textwrap.indent(spec, " " * indent)


def _as_list(environment: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in environment.items()]


def _cache_volume(cluster: KubernetesCluster) -> dict[str, Any]:
    size = f"{cluster.cache}Gi"
    if not cluster.storage_class:
        return {"name": "cache", "emptyDir": {"sizeLimit": size}}
    claim = {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": cluster.storage_class,
        "resources": {"requests": {"storage": size}},
    }
    return {"name": "cache", "ephemeral": {"volumeClaimTemplate": {"spec": claim}}}


def _label(text: str) -> tuple[str, str]:
    require("--node-selector", text, f"{_LABEL_KEY}=({_LABEL_NAME})?", "a label, such as key=value")
    key, _, value = text.partition("=")
    return key, value


def _toleration(text: str) -> dict[str, str]:
    pattern = f"{_LABEL_KEY}(=({_LABEL_NAME})?)?(:({'|'.join(_EFFECTS)}))?"
    require(
        "--toleration", text, pattern, f"a taint, such as key[=value][:effect], with effect {' or '.join(_EFFECTS)}"
    )
    taint, _, effect = text.partition(":")
    key, equal, value = taint.partition("=")
    operator = {"operator": "Equal", "value": value} if equal else {"operator": "Exists"}
    return {"key": key} | operator | ({"effect": effect} if effect else {})


def _check(cluster: KubernetesCluster) -> None:
    longest = _LONGEST[cluster.kind]
    pattern = rf"(?=.{{1,{longest}}}$)[a-z]([-a-z0-9]*[a-z0-9])?"
    what = (
        f"lower-case letters, digits and inner hyphens, beginning with a letter, {longest} at most for a {cluster.kind}"
    )
    require("--name", cluster.name, pattern, what)
    require_pinned(cluster.image)
    if cluster.min_workers > cluster.max_workers:
        raise UsageError(f"--min-workers {cluster.min_workers}: more than --max-workers {cluster.max_workers}")
    for option, name in (
        ("--secret", cluster.secret),
        ("--service-account", cluster.service_account),
        ("--storage-class", cluster.storage_class),
    ):
        if name is not None:
            require(option, name, _NAME, "the name of such an object: lower-case letters, digits, hyphens and dots")
    if cluster.s3_region is not None:
        require("--s3-region", cluster.s3_region, r"[\w-]+", "a region's name, such as us-west-2")
    if cluster.s3_endpoint is not None:
        server = urlsplit(cluster.s3_endpoint)
        if server.scheme not in ("http", "https") or not server.hostname or re.search(r"\s", cluster.s3_endpoint):
            raise UsageError(f"--s3-endpoint {cluster.s3_endpoint!r}: not a URL such as https://s3.example.com")
        if server.username or server.password:
            raise UsageError("--s3-endpoint: contains a password; pass it in a secret, with --secret")
    if cluster.kind == "RayJob" and cluster.command[:1] != ["erann"]:
        raise UsageError("a RayJob runs an erann command, given after --: -- erann pretrain audioset.yaml")
    if cluster.kind == "RayCluster" and cluster.command:
        raise UsageError("a RayCluster runs no command; omit it, and submit it to the cluster once it is up")
