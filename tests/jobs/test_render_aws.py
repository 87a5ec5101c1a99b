"""erann cluster render aws: a file that Ray takes, that EC2 takes, and that opens nothing but SSH."""

import dataclasses
import gzip
import json
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import moto.ec2
import pytest
import yaml
from moto import mock_aws

from cluster.environment import HEALTH_CHECKS
from cluster.render.aws import AwsCluster, render_aws
from cluster.render.instances import INSTANCES
from cluster.render.template import read_template
from erann_dist.errors import UsageError

ROOT = Path(__file__).parents[2]
OWN_NETWORK = {"subnet": "subnet-0123456789abcdef0", "security_group": "sg-0123456789abcdef0"}


def cluster(**options: Any) -> AwsCluster:
    """A cluster of the defaults, with an image."""
    values: dict[str, Any] = {
        "name": "erann",
        "region": "us-west-2",
        "zones": [],
        "ami": "ami-0123456789abcdef0",
        "instance": "g6e.12xlarge",
        "min_workers": 0,
        "max_workers": 1,
        "spot": True,
        "idle_minutes": 10,
        "head_profile": "erann-head",
        "worker_profile": "erann-node",
        "image": "example.com/erann:0.1.0",
        "wheel": None,
        "subnet": None,
        "security_group": None,
        "efa": None,
    }
    return AwsCluster(**values | options)


def rendered(**options: Any) -> dict[str, Any]:
    loaded = yaml.safe_load(render_aws(cluster(**options)))
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "erann_dist-0.1.0-py3-none-any.whl"
    path.touch()
    return path


def all_kinds(wheel: Path) -> list[dict[str, Any]]:
    return [
        {},
        {"image": None, "wheel": wheel},
        {"spot": False, "min_workers": 2, "max_workers": 16, "efa": False, "zones": ["us-west-2a", "us-west-2b"]},
        *({"instance": each.name, "max_workers": 4, **OWN_NETWORK} for each in INSTANCES),
    ]


def test_ray_takes_the_file(wheel: Path) -> None:
    """Its schema and its own checks, as `ray up` begins with."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    for options in all_kinds(wheel):
        validate_config(prepare_config(rendered(**options)))


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """An AWS account of this test's alone, with a default network and the two instance profiles."""
    import boto3

    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray puts the key for SSH
    with mock_aws():
        iam = boto3.client("iam")
        for name in ("erann-head", "erann-node"):
            iam.create_instance_profile(InstanceProfileName=name)
        yield boto3.client("ec2", region_name="us-west-2")


def launch(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` and its autoscaler ask of EC2, a node of each type; the resolved file."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = AWSNodeProvider.fillout_available_node_types_resources(prepare_config(config))
    validate_config(config)
    config = AWSNodeProvider.bootstrap_config(config)
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for node_type, settings in config["available_node_types"].items():
        provider.create_node(settings["node_config"], {"ray-user-node-type": node_type}, 1)
    return config


def instances_of(ec2: Any) -> dict[str, Any]:
    """The running instances by their node type."""
    found = [each for group in ec2.describe_instances()["Reservations"] for each in group["Instances"]]
    return {next(tag["Value"] for tag in each["Tags"] if tag["Key"] == "ray-user-node-type"): each for each in found}


def test_ec2_takes_the_file(account: Any) -> None:
    config = launch(rendered())
    nodes = instances_of(account)
    assert nodes["head"]["InstanceType"] == "m7i.xlarge"
    assert "InstanceLifecycle" not in nodes["head"]
    assert nodes["gpu"]["InstanceType"] == "g6e.12xlarge"
    assert nodes["gpu"]["InstanceLifecycle"] == "spot"
    profiles = {name: node["IamInstanceProfile"]["Arn"].rpartition("/")[2] for name, node in nodes.items()}
    assert profiles == {"head": "erann-head", "gpu": "erann-node"}
    types = config["available_node_types"]
    assert (types["head"]["resources"]["CPU"], types["head"]["resources"].get("GPU", 0)) == (0, 0)
    assert types["gpu"]["resources"]["GPU"] == 4
    assert types["gpu"]["resources"]["accelerator_type:L40S"] == 1


def test_only_ssh_is_open_to_the_world(account: Any) -> None:
    launch(rendered())
    open_ports = []
    for node in instances_of(account).values():
        groups = [group["GroupId"] for group in node["SecurityGroups"]]
        for group in account.describe_security_groups(GroupIds=groups)["SecurityGroups"]:
            for rule in group["IpPermissions"]:
                if rule["IpRanges"] or rule["Ipv6Ranges"]:
                    open_ports.append((rule["IpProtocol"], rule["FromPort"], rule["ToPort"]))
    assert set(open_ports) == {("tcp", 22, 22)}


@pytest.mark.parametrize(("instance", "interfaces"), [("g6e.12xlarge", 1), ("p4d.24xlarge", 5), ("p5en.48xlarge", 17)])
def test_efa_on_every_network_card(account: Any, instance: str, interfaces: int) -> None:
    """EC2's own names and types of these fields, an adapter for each card, one interface with an address."""
    vpc = account.describe_vpcs()["Vpcs"][0]["VpcId"]
    subnet = account.describe_subnets()["Subnets"][0]["SubnetId"]
    group = account.create_security_group(GroupName="own", Description="own", VpcId=vpc)["GroupId"]
    config = rendered(instance=instance, max_workers=2, subnet=subnet, security_group=group)
    launch(config)
    asked = config["available_node_types"]["gpu"]["node_config"]["NetworkInterfaces"]
    assert len(asked) == interfaces
    adapters = [each["NetworkCardIndex"] for each in asked if each["InterfaceType"] in ("efa", "efa-only")]
    assert adapters == list(range(next(each.efa_cards for each in INSTANCES if each.name == instance)))
    assert sum(each["InterfaceType"] in ("efa", "interface") for each in asked) == 1
    assert len({(each["NetworkCardIndex"], each["DeviceIndex"]) for each in asked}) == interfaces
    # EC2 gives no public address to an instance with several interfaces.
    assert config["provider"].get("use_internal_ips", False) == (interfaces > 1)


def test_the_known_instances_are_as_amazon_says() -> None:
    """Against moto's copy of what DescribeInstanceTypes answers."""
    packed = Path(moto.ec2.__file__).parent / "resources" / "instance_types.json.gz"
    theirs = json.loads(gzip.decompress(packed.read_bytes()))
    for ours in INSTANCES:
        facts = theirs[ours.name]
        (gpu,), network = facts["GpuInfo"]["Gpus"], facts["NetworkInfo"]
        assert (ours.gpus, ours.gpu.split()[0]) == (gpu["Count"], gpu["Name"]), ours.name
        assert int(ours.gpu.split()[1]) == pytest.approx(gpu["MemoryInfo"]["SizeInMiB"] / 1024, rel=0.08)
        assert ours.vcpus == facts["VCpuInfo"]["DefaultVCpus"]
        assert ours.memory == facts["MemoryInfo"]["SizeInMiB"] // 1024
        assert ours.nvme == facts["InstanceStorageInfo"]["TotalSizeInGB"]
        assert ours.efa_cards == network.get("EfaInfo", {}).get("MaximumEfaInterfaces", 0)
        speed = re.search(r"(?:(\d+)x )?(\d+) Gigabit", network["NetworkPerformance"])
        assert speed
        assert ours.network == int(speed[1] or 1) * int(speed[2])
        assert facts["ProcessorInfo"]["SupportedArchitectures"] == ["x86_64"]
        assert "spot" in facts["SupportedUsageClasses"]


def run_with_stubs(command: str, folder: Path, **stubs: str) -> subprocess.CompletedProcess[str]:
    """Run a command as Ray does on a node, in a login shell's subshell, with these scripts in place of programs."""
    folder.mkdir(exist_ok=True)
    for name, script in stubs.items():
        path = folder / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder), "RAY_HEAD_IP": "10.0.0.1"}
    wrapped = ["bash", "-c", f"true && export OMP_NUM_THREADS=1 && ({command})"]
    return subprocess.run(wrapped, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("installed", [False, True])
def test_ray_is_started_safely(tmp_path: Path, wheel: Path, installed: bool) -> None:
    config = rendered(**({"image": None, "wheel": wheel} if installed else {}))
    say = 'env | grep ^RAY_; echo "$@"'
    bin_folder = tmp_path / "erann" / "bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "ray").write_text(f"#!/bin/bash\n{say}\n")
    (bin_folder / "ray").chmod(0o755)
    started = []
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        done = run_with_stubs(config[key][1], tmp_path, ray=say)
        assert done.returncode == 0, done.stderr
        *variables, arguments = done.stdout.splitlines()
        assert dict(line.split("=", 1) for line in variables) == {
            **HEALTH_CHECKS,
            "RAY_AUTH_MODE": "token",
            "RAY_HEAD_IP": "10.0.0.1",
        }
        started.append(arguments.split())
    head, worker = started
    assert {"--head", "--num-cpus=0", "--dashboard-host=127.0.0.1", "--port=6379"} < set(head)
    assert worker == ["start", "--address=10.0.0.1:6379"]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_spot_nodes_watch_for_the_notice(tmp_path: Path) -> None:
    assert len(rendered(spot=False)["worker_start_ray_commands"]) == 2
    *_, watch = rendered()["worker_start_ray_commands"]
    python = 'echo "$RAY_AUTH_MODE" "$@" >> $HOME/started; sleep 5'
    done = run_with_stubs(watch, tmp_path, python=python)
    assert (done.returncode, done.stdout) == (0, "")
    again = run_with_stubs(f"{watch} sleep 1", tmp_path, python=python)
    assert again.returncode == 0
    assert (tmp_path / "started").read_text() == "token -m cluster.spot\n"  # once, however often Ray is started


def test_nodes_get_this_machines_versions(wheel: Path) -> None:
    install = rendered(image=None, wheel=wheel)["setup_commands"][2]
    words = shlex.split(install)
    pins = dict(word.split("==") for word in words if "==" in word)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [re.match(r"[\w.-]+(\[[\w,]+\])?", each) for each in project["dependencies"]]
    assert list(pins) == [each[0] for each in required if each]
    assert pins["ray[default,train]"] == version("ray")
    assert pins["torch"] == version("torch").split("+")[0]
    assert words[-1] == f"~/{wheel.name}"


def test_a_wheel_in_a_folder_with_a_strange_name(tmp_path: Path) -> None:
    folder = tmp_path / "a: \"b'\n- c # {d}"
    folder.mkdir()
    path = folder / "erann_dist-0.1.0-py3-none-any.whl"
    path.touch()
    assert rendered(image=None, wheel=path)["file_mounts"][f"~/{path.name}"] == str(path)


LSBLK = """
case "$*" in
    *MODEL*) printf '%s' "$DISKS" ;;
    *LABEL*) printf '%s' "$LABELS" ;;
esac
"""
DISK = "Amazon EC2 NVMe Instance Storage\n"
EBS = "/dev/nvme0n1 Amazon Elastic Block Store\n"


@pytest.mark.parametrize(
    ("disks", "labels", "mounted", "done"),
    [
        (f"{EBS}/dev/nvme1n1 {DISK}", "", [], ["mkfs.ext4 erann-scratch /dev/nvme1n1", "mount /dev/nvme1n1 /scratch"]),
        (
            f"/dev/nvme2n1 {DISK}{EBS}/dev/nvme1n1 {DISK}",
            "",
            [],
            [
                "mdadm --level=0 --raid-devices=2 /dev/nvme2n1 /dev/nvme1n1",
                "mkfs.ext4 erann-scratch /dev/md/scratch",
                "mount /dev/md/scratch /scratch",
            ],
        ),
        (
            f"/dev/nvme1n1 {DISK}/dev/nvme2n1 {DISK}",
            "/dev/nvme1n1 host:scratch\n/dev/md127 erann-scratch\n/dev/nvme2n1 host:scratch\n/dev/md127 erann-scratch",
            [],
            ["mount /dev/md127 /scratch"],
        ),
        (f"/dev/nvme1n1 {DISK}", "", ["/opt/dlami/nvme"], ["mount --bind /opt/dlami/nvme /scratch"]),
        (f"/dev/nvme1n1 {DISK}", "", ["/scratch"], []),
    ],
    ids=["one disk", "two disks", "two disks, restarted", "Amazon's image", "done already"],
)
def test_nvme_disks_become_the_scratch_folder(
    tmp_path: Path, disks: str, labels: str, mounted: list[str], done: list[str]
) -> None:
    """The commands that would change the machine, without their uninteresting options."""
    outcome = run_scratch(tmp_path, disks, labels, mounted)
    assert outcome.returncode == 0, outcome.stderr
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line for line in lines if not line.startswith(("mkdir", "chown"))] == done
    assert lines[-1].startswith("chown ")


def test_no_nvme_disk(tmp_path: Path) -> None:
    outcome = run_scratch(tmp_path, EBS, "", [])
    assert outcome.returncode == 1
    assert outcome.stderr.startswith("no NVMe disk of its own")


def run_scratch(folder: Path, disks: str, labels: str, mounted: list[str]) -> subprocess.CompletedProcess[str]:
    (script,) = rendered()["available_node_types"]["gpu"]["initialization_commands"]
    assert script == read_template("scratch.sh")
    log = 'args=(); for a; do case "$a" in -q|-m|0|-o|noatime|-L|-p|--create|--run) ;; *) args+=("$a");; esac; done; '
    environment = f"DISKS={shlex.quote(disks)} LABELS={shlex.quote(labels)}"
    stubs = {
        "lsblk": LSBLK,
        "mountpoint": f'[[ " {" ".join(mounted)} " == *" ${{@: -1}} "* ]]',
        "sudo": '"$@"',
    }
    for name in ("mdadm", "mkfs.ext4", "mount", "mkdir", "chown"):
        create = "args=(${args[@]/$2});" if name == "mdadm" else ""
        stubs[name] = f'{log} {create} echo {name} "${{args[@]}}" >> $HOME/log'
    return run_with_stubs(f"export {environment}; {script}", folder, **stubs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "a b"}, "--name 'a b': not letters, digits and hyphens"),
        ({"name": "x\n- y"}, "--name"),
        ({"region": "us-west-2a"}, "--region 'us-west-2a': not a region's name"),
        ({"zones": ["eu-west-1a"]}, "--zone 'eu-west-1a': not a zone of us-west-2"),
        ({"ami": "latest"}, "--ami 'latest': not the id of an image"),
        ({"head_profile": "arn:aws:iam::1:instance-profile/x"}, "--head-profile .*: not the name of an IAM instance"),
        ({"subnet": "vpc-1"}, "--subnet"),
        ({"security_group": "default"}, "--security-group"),
        ({"instance": "g5.metal"}, "--instance g5.metal: not among the supported types; give one of g5.4xlarge, "),
        ({"min_workers": 2}, "--min-workers 2: more than --max-workers 1"),
        ({"image": None}, "give either --image, .* or --wheel"),
        ({"wheel": Path("erann_dist-1.whl")}, "give either --image, .* or --wheel"),
        ({"image": None, "wheel": Path("torch-2.11-x.whl")}, "--wheel torch-2.11-x.whl: not this program's"),
        (
            {"image": None, "wheel": Path("erann_dist-9-py3-none-any.whl")},
            "no such file; build it with pip wheel --no-deps",
        ),
        ({"image": "erann"}, "--image erann: has no fixed tag"),
        ({"image": "host:5000/erann"}, "--image host:5000/erann: has no fixed tag"),
        ({"image": "me/erann:latest"}, "has no fixed tag"),
        ({"image": "me/erann:1; reboot"}, "not the name of a container image"),
        ({"instance": "g5.4xlarge", "efa": True}, "--efa: g5.4xlarge has no Elastic Fabric Adapter"),
        ({"max_workers": 2}, "g6e.12xlarge has EFA, which needs --subnet and --security-group"),
    ],
)
def test_what_can_not_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        render_aws(cluster(**options))
    assert "\n" not in str(refused.value)


def test_a_digest_is_as_good_as_a_tag() -> None:
    image = "example.com/erann@sha256:" + "0" * 64
    assert rendered(image=image)["docker"]["image"] == image


def test_every_field_is_in_the_file() -> None:
    """None of the options is forgotten: another value gives another file."""
    base = cluster(subnet="subnet-00000000", security_group="sg-00000000", max_workers=8, efa=False)
    others: dict[str, Any] = {
        "name": "other",
        "region": "us-east-1",
        "zones": ["us-west-2a"],
        "ami": "ami-00000000",
        "instance": "p4d.24xlarge",
        "min_workers": 1,
        "max_workers": 9,
        "spot": False,
        "idle_minutes": 11,
        "head_profile": "other",
        "worker_profile": "other",
        "image": "example.com/other:1",
        "subnet": "subnet-11111111",
        "security_group": "sg-11111111",
        "efa": True,
    }
    for field, value in others.items():
        assert render_aws(dataclasses.replace(base, **{field: value})) != render_aws(base), field
