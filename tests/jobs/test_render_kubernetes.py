"""erann cluster render kubernetes: of KubeRay's and Kubernetes' fields, safe, and what was asked for."""

import dataclasses
import re
import shlex
import subprocess
from importlib.metadata import version
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.environment import HEALTH_CHECKS
from cluster.render.kubernetes import render_kubernetes
from erann_dist.errors import UsageError
from jobs.cli.__main__ import app
from tests.support.manifests import cluster_spec, kubernetes_cluster, pods


def rendered(**options: Any) -> dict[str, Any]:
    loaded = yaml.safe_load(render_kubernetes(kubernetes_cluster(**options)))
    assert isinstance(loaded, dict)
    return loaded


ALL_OPTIONS: dict[str, Any] = {
    "min_workers": 2,
    "max_workers": 4,
    "gpus": 8,
    "storage_class": "gp3",
    "secret": "s3-keys",
    "service_account": "trainer",
    "s3_region": "us-west-2",
    "s3_endpoint": "https://s3.example.com:9000",
    "node_selector": ["node.kubernetes.io/instance-type=p5.48xlarge", "pool="],
    "tolerations": ["spot", "team=audio", "example.com/gpu=a100:NoExecute", "gpu:PreferNoSchedule"],
}
KINDS = [{}, {"kind": "RayCluster"}, ALL_OPTIONS, {"kind": "RayCluster", **ALL_OPTIONS}]


# The fields that are used, with their types. Fields that others have are refused here as Kubernetes would:
# KubeRay's of https://ray-project.github.io/kuberay/reference/api/ (v1.6), Kubernetes' own of
# https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1/.
def fields(required: str = "", **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def items(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of, "minItems": 1}


TEXT = {"type": "string"}
BOOLEAN = {"type": "boolean"}
COUNT = {"type": "integer", "minimum": 0}
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}  # DNS-1123 label
SUBDOMAIN = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$"}
LABEL_KEY = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
LABEL_VALUE = r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"
LABELS = {
    "type": "object",
    "propertyNames": {"pattern": LABEL_KEY},
    "additionalProperties": {"type": "string", "pattern": LABEL_VALUE},
}
ANNOTATIONS = {"type": "object", "propertyNames": {"pattern": LABEL_KEY}, "additionalProperties": TEXT}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|[kMGT]|[KMGT]i)?$"}
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}
RESOURCES = fields(requests=QUANTITIES, limits=QUANTITIES)
PROBE = fields(
    httpGet=fields("port", path=TEXT, port={"type": "integer"}),
    initialDelaySeconds=COUNT,
    periodSeconds=COUNT,
    timeoutSeconds=COUNT,
    failureThreshold=COUNT,
)
CONTAINER_SECURITY = fields(allowPrivilegeEscalation=BOOLEAN, capabilities=fields(drop=items(TEXT)))
CONTAINER = fields(
    "name image",
    name=NAME,
    image=TEXT,
    imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
    ports=items(fields("containerPort", name={"type": "string", "maxLength": 15}, containerPort={"type": "integer"})),
    env=items(fields("name", name={"type": "string", "pattern": r"^[A-Za-z_]\w*$"}, value=TEXT)),
    envFrom=items(fields("secretRef", secretRef=fields("name", name=SUBDOMAIN))),
    resources=RESOURCES,
    securityContext=CONTAINER_SECURITY,
    readinessProbe=PROBE,
    livenessProbe=PROBE,
    volumeMounts=items(fields("name mountPath", name=NAME, mountPath=TEXT)),
)
CLAIM = fields(
    "accessModes resources",
    accessModes=items({"enum": ["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"]}),
    storageClassName=SUBDOMAIN,
    resources=fields(requests=QUANTITIES),
)
VOLUME = fields(
    "name",
    name=NAME,
    emptyDir=fields(medium={"enum": ["", "Memory"]}, sizeLimit=QUANTITY),
    ephemeral=fields("volumeClaimTemplate", volumeClaimTemplate=fields("spec", spec=CLAIM)),
)
POD_TEMPLATE = fields(
    "spec",
    metadata=fields(labels=LABELS, annotations=ANNOTATIONS),
    spec=fields(
        "containers",
        serviceAccountName=SUBDOMAIN,
        automountServiceAccountToken=BOOLEAN,
        terminationGracePeriodSeconds=COUNT,
        nodeSelector=LABELS,
        tolerations=items(
            fields(
                key={"type": "string", "pattern": LABEL_KEY},
                operator={"enum": ["Exists", "Equal"]},
                value={"type": "string", "pattern": LABEL_VALUE},
                effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
            )
        ),
        securityContext=fields(
            runAsNonRoot=BOOLEAN,
            runAsUser=COUNT,
            runAsGroup=COUNT,
            fsGroup=COUNT,
            seccompProfile=fields("type", type={"enum": ["RuntimeDefault", "Localhost", "Unconfined"]}),
        ),
        containers=items(CONTAINER),
        volumes=items(VOLUME),
    ),
)
START_PARAMETERS = {"type": "object", "additionalProperties": TEXT}
CLUSTER_SPEC = fields(
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=fields(mode={"enum": ["disabled", "token"]}),
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=fields(
        idleTimeoutSeconds=COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        resources=RESOURCES,
        securityContext=CONTAINER_SECURITY,
    ),
    headGroupSpec=fields(
        "rayStartParams template",
        serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
        rayStartParams=START_PARAMETERS,
        template=POD_TEMPLATE,
    ),
    workerGroupSpecs=items(
        fields(
            "groupName minReplicas maxReplicas rayStartParams template",
            groupName=NAME,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=START_PARAMETERS,
            template=POD_TEMPLATE,
        )
    ),
)
JOB_SPEC = fields(
    "rayClusterSpec",
    entrypoint=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    jobId=TEXT,
    backoffLimit=COUNT,
    shutdownAfterJobFinishes=BOOLEAN,
    ttlSecondsAfterFinished=COUNT,
    rayClusterSpec=CLUSTER_SPEC,
)
METADATA = fields("name", name={**NAME, "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}, labels=LABELS)


def manifest_schema(kind: str) -> dict[str, Any]:
    spec = JOB_SPEC if kind == "RayJob" else CLUSTER_SPEC
    return fields(
        "apiVersion kind metadata spec",
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=METADATA,
        spec=spec,
    )


@pytest.mark.parametrize("options", KINDS)
def test_the_fields_are_kuberays(options: dict[str, Any]) -> None:
    manifest = rendered(**options)
    jsonschema.validate(manifest, manifest_schema(options.get("kind", "RayJob")))


@pytest.mark.parametrize("options", KINDS)
def test_what_kuberay_checks_beyond_the_fields(options: dict[str, Any]) -> None:
    """Of its ValidateRayJobSpec and ValidateRayClusterSpec."""
    spec = cluster_spec(rendered(**options))
    (group,) = spec["workerGroupSpecs"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert tuple(map(int, spec["rayVersion"].split("."))) >= (2, 52, 0)  # for authOptions
    assert spec["rayVersion"] == version("ray")
    for pod in pods(rendered(**options)):
        assert len(pod["containers"]) == 1
        assert "restartPolicy" not in pod  # the autoscaler's second version allows no other than its own
        mounted = {mount["name"] for mount in pod["containers"][0].get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in pod.get("volumes", [])}


@pytest.mark.parametrize("options", KINDS)
def test_pods_are_allowed_where_security_is_restricted(options: dict[str, Any]) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted"""
    for pod in pods(rendered(**options)):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            locked = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert container["securityContext"] == locked
        assert not any("hostPath" in volume for volume in pod.get("volumes", []))
    spec = cluster_spec(rendered(**options))
    assert spec["autoscalerOptions"]["securityContext"] == locked
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert spec["authOptions"] == {"mode": "token"}


def test_the_head_takes_no_work_and_the_workers_all_gpus() -> None:
    spec = cluster_spec(rendered(gpus=8, cpus=64, memory=256, min_workers=1, max_workers=4))
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    head, worker = pods(rendered(gpus=8, cpus=64, memory=256))
    assert not any("gpu" in name for name in head["containers"][0]["resources"]["limits"])
    resources = worker["containers"][0]["resources"]
    assert resources["requests"] == resources["limits"]
    assert {name: resources["limits"][name] for name in ("cpu", "memory", "nvidia.com/gpu")} == {
        "cpu": "64",
        "memory": "256Gi",
        "nvidia.com/gpu": "8",
    }
    (group,) = spec["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"], spec["enableInTreeAutoscaling"]) == (1, 4, True)
    assert cluster_spec(rendered(min_workers=1))["enableInTreeAutoscaling"] is False
    # Kubernetes' own health checks are patient, Ray's and the notice before the end are set.
    environment = {entry["name"]: entry["value"] for entry in worker["containers"][0]["env"]}
    assert HEALTH_CHECKS.items() < environment.items()
    assert 0 < float(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) < worker["terminationGracePeriodSeconds"]


def test_the_cache_has_its_room() -> None:
    *_, worker = pods(rendered(cache=400))
    volumes = {volume["name"]: volume for volume in worker["volumes"]}
    assert volumes["cache"]["emptyDir"] == {"sizeLimit": "400Gi"}
    assert worker["containers"][0]["resources"]["limits"]["ephemeral-storage"] == "420Gi"
    assert volumes["shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}
    *_, worker = pods(rendered(cache=400, storage_class="gp3"))
    volumes = {volume["name"]: volume for volume in worker["volumes"]}
    claim = volumes["cache"]["ephemeral"]["volumeClaimTemplate"]["spec"]
    assert (claim["storageClassName"], claim["resources"]["requests"]["storage"]) == ("gp3", "400Gi")
    assert "ephemeral-storage" not in worker["containers"][0]["resources"]["limits"]
    # A size that the recipe can be given as it stands.
    told = re.search(r"max_bytes: (\d+)GB", render_kubernetes(kubernetes_cluster(cache=400)))
    assert told
    assert int(told[1]) * 1e9 < 400 * 2**30


def test_secrets_are_named_and_the_rest_is_plain() -> None:
    text = render_kubernetes(kubernetes_cluster(**ALL_OPTIONS))
    assert "AWS_SECRET_ACCESS_KEY:" not in text
    for pod in pods(yaml.safe_load(text)):
        container = pod["containers"][0]
        environment = {entry["name"]: entry["value"] for entry in container["env"]}
        assert container["envFrom"] == [{"secretRef": {"name": "s3-keys"}}]
        assert environment["AWS_DEFAULT_REGION"] == "us-west-2"
        assert environment["AWS_ENDPOINT_URL"] == "https://s3.example.com:9000"
        assert pod["serviceAccountName"] == "trainer"


def test_where_the_gpu_pods_run() -> None:
    _, worker = pods(rendered(**ALL_OPTIONS))
    assert worker["nodeSelector"] == {"node.kubernetes.io/instance-type": "p5.48xlarge", "pool": ""}
    assert worker["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "spot", "operator": "Exists"},
        {"key": "team", "operator": "Equal", "value": "audio"},
        {"key": "example.com/gpu", "operator": "Equal", "value": "a100", "effect": "NoExecute"},
        {"key": "gpu", "operator": "Exists", "effect": "PreferNoSchedule"},
    ]


COMMANDS = [
    ["erann", "pretrain", "audioset.yaml", "run.workers={min: 8, max: 32}", "run.dir=s3://bucket/runs"],
    ["erann", "pretrain", 'it\'s "mine": {a}.yaml', "run.name=$HOME `id` $(id) ; exit #", ""],
    ["erann", "pretrain", "a\nb: c\n- d\n", "\t", "---", "é 🎵"],
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_arrives_as_it_was_typed(command: list[str]) -> None:
    """In HTTPMode one shell reads it, on the head."""
    manifest = rendered(command=command)
    assert manifest["spec"]["submissionMode"] == "HTTPMode"
    jsonschema.validate(manifest, manifest_schema("RayJob"))
    entrypoint = manifest["spec"]["entrypoint"]
    assert shlex.split(entrypoint) == command
    show = "erann() { printf '%s\\0' \"$@\"; }; "
    done = subprocess.run(["bash", "-c", show + entrypoint], capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:-1] == command[1:]


def test_a_job_that_fails_is_tried_again_and_cleaned_up() -> None:
    spec = rendered()["spec"]
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["jobId"] == "erann"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "Erann"}, "--name 'Erann': not lower-case letters, digits and inner hyphens"),
        ({"name": "1st"}, "--name"),
        ({"name": "a-"}, "--name"),
        ({"name": "a\nb: c"}, "--name"),
        ({"name": "a" * 48}, "47 at most for a RayJob"),
        ({"kind": "RayCluster", "name": "a" * 54}, "53 at most for a RayCluster"),
        ({"image": "erann"}, "--image erann: has no fixed tag"),
        ({"image": 'x:1"\ny: z'}, "not the name of a container image"),
        ({"min_workers": 2}, "--min-workers 2: more than --max-workers 1"),
        ({"secret": "AWS_KEY=abc"}, "--secret 'AWS_KEY=abc': not the name of such an object"),
        ({"service_account": "a b"}, "--service-account"),
        ({"storage_class": "GP3"}, "--storage-class"),
        ({"s3_region": "us west"}, "--s3-region"),
        ({"s3_endpoint": "s3.example.com"}, "--s3-endpoint 's3.example.com': not a URL"),
        ({"s3_endpoint": "https://key:secret@s3.example.com"}, "--s3-endpoint: contains a password"),
        ({"node_selector": ["gpu"]}, "--node-selector 'gpu': not a label, such as key=value"),
        ({"node_selector": ["a=b c"]}, "--node-selector"),
        ({"tolerations": ["gpu:Never"]}, "--toleration 'gpu:Never': not a taint"),
        ({"tolerations": [""]}, "--toleration"),
        ({"command": ["python", "x.py"]}, "a RayJob runs an erann command"),
        ({"kind": "RayCluster", "command": ["erann", "demo"]}, "a RayCluster runs no command"),
    ],
)
def test_what_can_not_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        render_kubernetes(kubernetes_cluster(**options))
    assert "\n" not in str(refused.value)
    assert "secret@" not in str(refused.value)


def test_every_field_is_in_the_file() -> None:
    """None of the options is forgotten: another value gives another file."""
    base = kubernetes_cluster(max_workers=8)
    others: dict[str, Any] = {
        "name": "other",
        "image": "other:1",
        "command": ["erann", "demo"],
        "min_workers": 1,
        "max_workers": 9,
        "gpus": 2,
        "cpus": 9,
        "memory": 33,
        "cache": 401,
        "storage_class": "other",
        "secret": "other",
        "service_account": "other",
        "s3_region": "other",
        "s3_endpoint": "http://other",
        "node_selector": ["other=1"],
        "tolerations": ["other"],
    }
    assert set(others) | {"kind"} == {field.name for field in dataclasses.fields(base)}
    for field, value in others.items():
        assert render_kubernetes(dataclasses.replace(base, **{field: value})) != render_kubernetes(base), field


def test_a_run_on_a_pods_disk_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    def render(*words: str) -> Any:
        app(["cluster", "render", "kubernetes", "--image", "x:1", *words], standalone_mode=False)
        return capfd.readouterr()

    told = render("--", "erann", "pretrain", "audioset.yaml", "run.dir=s3://bucket/runs")
    assert told.err == ""
    assert yaml.safe_load(told.out)["kind"] == "RayJob"
    assert "sets no run.dir=s3://" in render().err
    assert render("--kind", "RayCluster").err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("erann pretrain audioset.yaml run.wokers=2", "did you mean run.workers"),
        ("erann pretrain …", "…: no such recipe"),
        ("erann train audioset.yaml", "erann train: no such command"),
    ],
)
def test_a_command_that_would_fail_there_is_not_rendered(words: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        app(["cluster", "render", "kubernetes", "--image", "x:1", "--", *words.split()], standalone_mode=False)


def test_a_recipe_that_is_only_there_is_rendered(capfd: pytest.CaptureFixture[str]) -> None:
    words = "--image x:1 -- erann pretrain theirs.yaml run.dir=s3://bucket/runs".split()
    app(["cluster", "render", "kubernetes", *words], standalone_mode=False)
    assert "theirs.yaml is not on this machine, so its keys are not checked" in capfd.readouterr().err
