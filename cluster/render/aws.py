"""The file for `ray up` on Amazon EC2."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.environment import HEALTH_CHECKS
from cluster.render.checks import require, require_pinned
from cluster.render.instances import Instance, find_instance
from cluster.render.template import fill, read_template
from erann_dist.errors import UsageError
from erann_dist.versions import pinned_requirements

_CONTAINER_LIMITS = ["--ulimit nofile=65536:65536", "--ulimit memlock=-1:-1"]


@dataclass(frozen=True)
class AwsCluster:
    name: str
    region: str
    zones: list[str]
    ami: str
    instance: str
    min_workers: int
    max_workers: int
    spot: bool
    idle_minutes: int
    head_profile: str  # the profiles are names of IAM instance profiles
    worker_profile: str
    image: str | None  # either this or the program's wheel
    wheel: Path | None
    subnet: str | None
    security_group: str | None
    efa: bool | None  # None: if the instances have it and there are several of them


def render_aws(cluster: AwsCluster) -> str:
    """The YAML file. Raises UsageError for invalid options."""
    instance = _checked(cluster)
    subnets = [cluster.subnet] if cluster.subnet else None
    groups = [cluster.security_group] if cluster.security_group else None
    efa = _wants_efa(cluster, instance)
    interfaces = _interfaces(instance.efa_cards, cluster.subnet, cluster.security_group) if efa else None
    values: dict[str, Any] = {
        "node": f"{instance.gpus} x {instance.gpu}, {instance.vcpus} vCPUs, {instance.memory} GiB, "
        f"{instance.nvme} GB of NVMe, {instance.network} Gbit/s",
        "plan": f"--gpus-per-node {instance.gpus} --cores-per-node {instance.vcpus // 2} --network {instance.network}",
        "name": cluster.name,
        "min_workers": cluster.min_workers,
        "max_workers": cluster.max_workers,
        "idle_minutes": cluster.idle_minutes,
        "region": cluster.region,
        "zones": ",".join(cluster.zones) or None,
        "use_internal_ips": True if interfaces and len(interfaces) > 1 else None,
        "ami": cluster.ami,
        "head_profile": {"Name": cluster.head_profile},
        "worker_profile": {"Name": cluster.worker_profile},
        "instance": instance.name,
        "resources": {"CPU": instance.vcpus, "GPU": instance.gpus},
        "market": {"MarketType": "spot"} if cluster.spot else None,
        "network_interfaces": interfaces,
        "subnets": subnets,
        "security_groups": groups,
        # With network interfaces, these are set there and must not be set here.
        "worker_subnets": None if efa else subnets,
        "worker_security_groups": None if efa else groups,
        "scratch": read_template("scratch.sh"),
        "cache": f"{instance.nvme * 9 // 10}GB",
    }
    return fill(read_template("aws.yaml"), values | _program(cluster, efa))


def _program(cluster: AwsCluster, efa: bool) -> dict[str, Any]:
    """How the program is installed on the nodes and started there: in an image, or from its wheel."""
    mounts = {"~/.ray/auth_token": "~/.ray/auth_token"}
    shells = "grep -q RAY_AUTH_MODE ~/.bashrc || echo 'export RAY_AUTH_MODE=token' >> ~/.bashrc"
    if cluster.image:
        path = ""
        docker: dict[str, Any] | None = {
            "image": cluster.image,
            "container_name": "erann",
            "pull_before_run": True,
            "run_options": _CONTAINER_LIMITS,
        }
        adapters = ["--device=/dev/infiniband"] if efa else []
        worker_docker: dict[str, Any] | None = {"worker_run_options": ["--volume /scratch:/scratch", *adapters]}
        setup, head_setup = [shells], []
    else:
        assert cluster.wheel
        path = "~/erann/bin/"
        docker = worker_docker = None
        mounts[f"~/{cluster.wheel.name}"] = str(cluster.wheel.absolute())
        pins = " ".join(f"'{pin}'" for pin in pinned_requirements())
        make = "python3 -m venv ~/erann"
        setup = [
            shells,
            f"test -x ~/erann/bin/pip || {make} || "
            f"{{ sudo apt-get update && sudo apt-get install -y --no-install-recommends python3-venv && {make}; }}",
            f"~/erann/bin/pip install --quiet --no-cache-dir {pins} ~/{cluster.wheel.name}",
            "grep -q erann/bin ~/.bashrc || echo 'export PATH=$HOME/erann/bin:$PATH' >> ~/.bashrc",
        ]
        head_setup = [f'~/erann/bin/pip install --quiet --no-cache-dir "$HOME/{cluster.wheel.name}[aws]"']
    variables = " ".join(f"{name}={value}" for name, value in {"RAY_AUTH_MODE": "token", **HEALTH_CHECKS}.items())
    start = f"export {variables}; ulimit -n 65536; {path}ray start"
    head = "--head --port=6379 --num-cpus=0 --num-gpus=0 --dashboard-host=127.0.0.1"
    # Waits for the spot interruption notice and drains the node in Ray (cluster/spot.py).
    watch = f"export {variables}; setsid nohup flock --nonblock /tmp/erann-spot.lock {path}python -m cluster.spot"
    return {
        "file_mounts": mounts,
        "docker": docker,
        "worker_docker": worker_docker,
        "setup_commands": setup,
        "head_setup_commands": head_setup,
        "stop": f"{path}ray stop",
        "start_head": f"{start} {head} --autoscaling-config=~/ray_bootstrap_config.yaml",
        "start_worker": [
            f"{path}ray stop",
            f"{start} --address=$RAY_HEAD_IP:6379",
            *([f"{watch} > /tmp/erann-spot.log 2>&1 < /dev/null &"] if cluster.spot else []),
        ],
    }


def _interfaces(cards: int, subnet: str | None, group: str | None) -> list[dict[str, Any]]:
    """The network interfaces: one with an address, and the adapters of all network cards.

    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/efa-acc-inst-types.html
    """

    def interface(card: int, device: int, kind: str) -> dict[str, Any]:
        place = {"NetworkCardIndex": card, "DeviceIndex": device, "InterfaceType": kind}
        return place | {"SubnetId": subnet, "Groups": [group], "DeleteOnTermination": True}

    if cards == 1:  # Both in one interface, so that the instance keeps its public address.
        return [interface(0, 0, "efa")]
    others = [interface(card, 0, "efa-only") for card in range(1, cards)]
    return [interface(0, 0, "interface"), interface(0, 1, "efa-only"), *others]


def _wants_efa(cluster: AwsCluster, instance: Instance) -> bool:
    if cluster.efa is None:
        return instance.efa_cards > 0 and cluster.max_workers > 1
    return cluster.efa


def _checked(cluster: AwsCluster) -> Instance:
    require("--name", cluster.name, r"[A-Za-z0-9][A-Za-z0-9-]{0,62}", "letters, digits and hyphens, 63 at most")
    require("--region", cluster.region, r"[a-z]{2}(-[a-z]+)+-\d", "a region's name, such as us-west-2")
    for zone in cluster.zones:
        require("--zone", zone, re.escape(cluster.region) + "[a-z0-9-]+", f"a zone of {cluster.region}")
    require("--ami", cluster.ami, r"ami-[0-9a-f]{8,17}", "the id of an image, such as ami-0123456789abcdef0")
    for option, name in (("--head-profile", cluster.head_profile), ("--worker-profile", cluster.worker_profile)):
        require(option, name, r"[\w+=,.@-]{1,128}", "the name of an IAM instance profile (not its ARN)")
    if cluster.subnet:
        what = "the id of a subnet, such as subnet-0123456789abcdef0"
        require("--subnet", cluster.subnet, r"subnet-[0-9a-f]{8,17}", what)
    if cluster.security_group:
        what = "the id of a security group, such as sg-0123456789abcdef0"
        require("--security-group", cluster.security_group, r"sg-[0-9a-f]{8,17}", what)
    if cluster.min_workers > cluster.max_workers:
        raise UsageError(f"--min-workers {cluster.min_workers}: more than --max-workers {cluster.max_workers}")
    if (cluster.image is None) == (cluster.wheel is None):
        raise UsageError("give either --image, which contains the program, or --wheel, from which it is installed")
    if cluster.image:
        require_pinned(cluster.image)
    if cluster.wheel:
        if not re.fullmatch(r"erann_dist-[\w.+-]+\.whl", cluster.wheel.name):
            raise UsageError(
                f"--wheel {cluster.wheel}: not this program's; build it with pip wheel --no-deps -w dist ."
            )
        if not cluster.wheel.is_file():
            raise UsageError(f"--wheel {cluster.wheel}: no such file; build it with pip wheel --no-deps -w dist .")
    instance = find_instance(cluster.instance)
    if cluster.efa and not instance.efa_cards:
        raise UsageError(f"--efa: {instance.name} has no Elastic Fabric Adapter")
    if _wants_efa(cluster, instance) and not (cluster.subnet and cluster.security_group):
        raise UsageError(
            f"{instance.name} has EFA, which needs --subnet and --security-group (open to itself); give both, or "
            "--no-efa to go without EFA"
        )
    return instance
