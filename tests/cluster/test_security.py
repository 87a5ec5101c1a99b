"""What docs/reference/security*.md say of networks, other users, tokens and buckets, tried on the real thing."""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from moto import settings
from moto.core.authorization import ActionAuthenticatorMixin
from ray._private.services import get_node_ip_address

from erann_dist.errors import UserError
from erann_dist.log.events import Incident
from erann_dist.storage import s3
from erann_dist.storage.folder import LocalFolder, open_folder
from jobs.runs.summary import list_runs
from jobs.training.pretrain import pretrain
from shards import build
from shards.clip import Packing
from shards.sources.audioset import read_audioset
from shards.stage import copy, staging
from tests.conftest import pack_here, small_recipe, small_steps, write_tone_set
from tests.support.commands import ERANN, Running
from tests.support.s3 import Server, forget_clients, s3_server
from tests.support.workers import of_kind
from tests.test_security import ROOT

RAY = str(Path(sys.executable).parent / "ray")
PING = """
import sys
from ray._raylet import GcsClient
print(len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=30)))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a packed set of tones."""
    place = tmp_path_factory.mktemp("place")
    pack_here(read_audioset(*write_tone_set(place / "set", 40)), place / "shards")
    return place


@dataclass
class Seen:
    """What the processes of a command listened to: addresses, and the paths of sockets with those of their folders."""

    addresses: dict[str, set[str]]  # by what was listening
    sockets: set[Path]

    def look(self, process: psutil.Process) -> None:
        try:
            name = " ".join(process.cmdline())[:60]
            for each in process.net_connections("all"):
                if each.family == socket.AF_UNIX and isinstance(each.laddr, str) and each.laddr.startswith("/"):
                    self.sockets.add(Path(each.laddr))
                elif each.family != socket.AF_UNIX and each.laddr and not each.raddr:
                    self.addresses.setdefault(each.laddr.ip, set()).add(name)
        except psutil.Error:  # it has just ended
            pass


def is_loopback(address: str) -> bool:
    found = ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def is_private(path: Path) -> bool:
    """Whether a folder on the way to it lets nobody else through."""
    return any(folder.stat().st_mode & 0o077 == 0 and folder.stat().st_uid == os.getuid() for folder in path.parents)


@pytest.mark.parametrize(("launcher", "workers"), [("none", 1), ("torchrun", 2), ("ray", 2)])
def test_a_run_on_one_machine_is_closed_to_all_others(
    place: Path, monkeypatch: pytest.MonkeyPatch, launcher: str, workers: int
) -> None:
    """Nothing of it listens to a network, its sockets are where other users can't go, and Ray asks for a token."""
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)  # as a user has it
    monkeypatch.setenv("HOME", str(place))
    run = {"launcher": launcher, "workers": workers}
    recipe = small_recipe(Path("shards"), Path("runs") / launcher, run=run, optim=small_steps(8))
    (place / f"{launcher}.yaml").write_text(yaml.safe_dump(recipe.model_dump()))
    command = Running(place, "pretrain", f"{launcher}.yaml")
    seen, private, refused = Seen({}, set()), set[Path](), ""
    deadline = time.monotonic() + 500
    while command.process.poll() is None and time.monotonic() < deadline:
        command._watch() if psutil.pid_exists(command.process.pid) else None
        for process in [psutil.Process(command.process.pid), *command.family.values()]:
            seen.look(process)
        private |= {path for path in seen.sockets - private if path.exists() and is_private(path)}
        if launcher == "ray" and not refused and (gcs := gcs_address(list(command.family.values()))):
            refused = without_and_with_token(*gcs)
        time.sleep(0.2)
    assert command.process.wait(60) == 0, command.text()
    assert command.survivors() == []
    assert seen.addresses  # gloo's, if nothing else
    assert {ip: names for ip, names in seen.addresses.items() if not is_loopback(ip)} == {}
    assert seen.sockets == private
    expected = {"none": [], "torchrun": ["socket"], "ray": ["plasma_store", "raylet"]}[launcher]
    assert set(expected) <= {path.name for path in seen.sockets}
    assert "AuthenticationError" in refused or launcher != "ray"
    assert not (place / ".ray").exists()


TWO_CLUSTERS = """
import os
from cluster.embedded import ray_cluster
for _ in range(2):
    with ray_cluster():
        assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    print({name for name in os.environ if name.startswith("RAY_AUTH")})
"""


def test_the_token_goes_with_the_cluster(tmp_path: Path) -> None:
    """What the process does next, at another cluster too, is done without it."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    command = [sys.executable, "-c", TWO_CLUSTERS]
    done = subprocess.run(command, env=ours | {"HOME": str(tmp_path)}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["set()", "set()"]
    assert not (tmp_path / ".ray").exists()


def gcs_address(family: list[psutil.Process]) -> tuple[str, str] | None:
    """Where the family's Ray cluster is to be reached, and the token for it, once a worker is there."""
    for process in family:
        try:
            found = re.search(r"--gcs-address=(\S+)", " ".join(process.cmdline()))
            if found and "raylet" in process.name():
                return found[1], process.environ()["RAY_AUTH_TOKEN"]
        except psutil.Error:
            pass
    return None


def without_and_with_token(address: str, token: str) -> str:
    """What a process of another user would be told; with the token it would be let in."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    refusals = []
    for mine in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        done = subprocess.run([sys.executable, "-c", PING, address], env=ours | mine, capture_output=True, text=True)
        assert done.returncode == 1, done.stdout
        refusals.append(done.stderr)
    mine = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    done = subprocess.run([sys.executable, "-c", PING, address], env=ours | mine, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all("AuthenticationError" in refusal for refusal in refusals)
    return refusals[0]


@dataclass(frozen=True)
class Head:
    """A cluster that `ray start --head` has started, with a token."""

    gcs: int
    dashboard: int
    client: int
    agent: int
    token: Path
    process: psutil.Process

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"


def free_ports(count: int) -> list[int]:
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in taken]
    for each in taken:
        each.close()
    return ports


def answers(port: int) -> bool:
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def started(
    command: list[str], environment: dict[str, str], log: Path, is_ready: Callable[[], bool]
) -> Iterator["subprocess.Popen[bytes]"]:
    """A head of Ray, once it is ready; it and all that it has started are gone at the end."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=file, stderr=file, start_new_session=True
        )
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 180
        while not is_ready():
            family = psutil.Process(process.pid).children(recursive=True)
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield process
    finally:
        family += psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(60)
        for each in psutil.wait_procs(family, timeout=30)[1]:
            each.kill()


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("head")
    token = folder / "token"
    token.write_text("f00d" * 16)
    token.chmod(0o600)
    gcs, dashboard, client, agent = free_ports(4)
    options = {
        "port": gcs,
        "dashboard-port": dashboard,
        "ray-client-server-port": client,
        "dashboard-agent-listen-port": agent,
        "num-cpus": 1,
        "temp-dir": tempfile.mkdtemp(),  # a short path; it goes with the tests' own folder
    }
    command = [RAY, "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())]
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    ports = (gcs, dashboard, client, agent)
    with started(command, environment, folder / "log", lambda: all(map(answers, ports))) as process:
        yield Head(gcs, dashboard, client, agent, token, psutil.Process(process.pid))


def test_a_head_listens_to_all_networks_but_for_its_dashboard(head: Head) -> None:
    listening = [
        each.laddr
        for process in [head.process, *head.process.children(recursive=True)]
        for each in process.net_connections("inet")
        if each.status == psutil.CONN_LISTEN
    ]
    reachable = {each.port for each in listening if not is_loopback(each.ip)}
    assert {head.gcs, head.client, head.agent} <= reachable
    assert head.dashboard in {each.port for each in listening} - reachable
    assert len(reachable) >= 8  # raylet, object manager, metrics, the agents' own


def status(url: str, token: str | None = None) -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def in_environment(head: Head, *command: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    return subprocess.run(list(map(str, command)), env=ours | environment, capture_output=True, text=True, timeout=300)


def test_a_cluster_with_a_token_refuses_without_it(head: Head, tmp_path: Path) -> None:
    token = head.token.read_text()
    assert [status(f"{head.http}/api/jobs/", each) for each in (None, "0" * 64, token)] == [401, 403, 200]
    assert [status(f"http://127.0.0.1:{head.agent}/api/job_agent/jobs/", each) for each in (None, "0" * 64)] == [
        401,
        403,
    ]
    submit = [RAY, "job", "submit", "--address", head.http, "--", "touch", tmp_path / "ran"]
    with_token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(head.token)}
    refused = in_environment(head, *submit, HOME=str(tmp_path))
    assert refused.returncode != 0
    assert "Authentication required" in refused.stdout + refused.stderr
    assert not (tmp_path / "ran").exists()
    done = in_environment(head, *submit, **with_token)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "ran").exists()


CONNECT = """
import sys
from cluster.embedded import ray_cluster
from erann_dist.errors import UserError
try:
    with ray_cluster(sys.argv[1]):
        print("in")
except UserError as error:
    print(error)
"""


def test_the_command_has_the_token_from_the_environment(head: Head, tmp_path: Path) -> None:
    address = f"127.0.0.1:{head.gcs}"
    connect = [sys.executable, "-c", CONNECT, address]
    refused = in_environment(head, *connect, HOME=str(tmp_path))
    assert refused.stdout.startswith(f"no Ray cluster at {address}: ")
    assert len(refused.stdout.splitlines()) == 1
    done = in_environment(head, *connect, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(head.token))
    assert done.stdout.splitlines() == ["in"], done.stderr


def certificate(folder: Path) -> dict[str, str]:
    """A certificate for this host of a CA of its own, which is itself: the settings by which Ray uses it."""
    folder.mkdir()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, folder.name)])
    addresses = ["127.0.0.1", get_node_ip_address()]  # Ray puts the second in place of the first
    names = x509.SubjectAlternativeName([x509.IPAddress(ip_address(each)) for each in addresses])
    key, now = rsa.generate_private_key(public_exponent=65537, key_size=2048), datetime.now(UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(1))
    made = made.add_extension(names, critical=False).add_extension(x509.BasicConstraints(True, None), critical=True)
    unencrypted = serialization.NoEncryption()
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "key").write_bytes(key.private_bytes(pem, pkcs8, unencrypted))
    (folder / "certificate").write_bytes(made.sign(key, hashes.SHA256()).public_bytes(pem))
    files = {"SERVER_CERT": "certificate", "SERVER_KEY": "key", "CA_CERT": "certificate"}
    return {"RAY_USE_TLS": "1"} | {f"RAY_TLS_{setting}": str(folder / file) for setting, file in files.items()}


@pytest.mark.slow
def test_a_cluster_with_tls_admits_only_its_cas_certificates(tmp_path: Path) -> None:
    ours, others = certificate(tmp_path / "ours"), certificate(tmp_path / "others")
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    options = ["--include-dashboard=false", "--num-cpus=0"]
    start = [RAY, "start", "--head", "--block", f"--port={port}", f"--temp-dir={tempfile.mkdtemp()}", *options]

    def start_client(code: str, tls: dict[str, str]) -> "subprocess.Popen[str]":
        command, pipe = [sys.executable, "-c", code, address], subprocess.PIPE
        return subprocess.Popen(command, env=os.environ | tls, stdout=pipe, stderr=pipe, text=True)

    def is_ready() -> bool:
        return start_client(PING, ours).communicate(timeout=120)[0] == "1\n"

    with started(start, ours, tmp_path / "log", is_ready):
        strangers = [start_client(PING, tls) for tls in ({}, others)]  # whom Ray lets wait
        connected, error = start_client(CONNECT, ours).communicate(timeout=120)
        assert connected.splitlines() == ["in"], error
        for stranger in strangers:
            answer, _ = stranger.communicate(timeout=120)
            assert (stranger.returncode, answer) == (1, "")


# The permission that each operation needs.
# Source: docs.aws.amazon.com/service-authorization/latest/reference/list_amazons3.html
ACTIONS = {
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "DeleteObject": "s3:DeleteObject",
    "ListObjectsV2": "s3:ListBucket",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
}


def policies() -> dict[str, Any]:
    """The page's, by the title above each, for the test's own bucket."""
    page = (ROOT / "docs" / "reference" / "security-bucket.md").read_text()
    blocks = re.findall(r"\*\*(\w+)\*\*(?:[^\n]+\n)+\n```json\n(.*?)```", page, re.DOTALL)
    return {title: json.loads(text.replace("BUCKET", "sounds")) for title, text in blocks}


@contextmanager
def credentials(server: Server, user: str, policy: dict[str, Any]) -> Iterator[None]:
    """Be a user of this name, who may do what the policy says and no more."""
    iam = boto3.client("iam", endpoint_url=server.client.meta.endpoint_url)
    iam.create_user(UserName=user)
    iam.put_user_policy(UserName=user, PolicyName="all", PolicyDocument=json.dumps(policy))
    key = iam.create_access_key(UserName=user)["AccessKey"]
    iam.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        patch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        forget_clients()
        server.requests.clear()
        patch.setattr(ActionAuthenticatorMixin, "request_count", 0)
        patch.setattr(settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0.0)
        try:
            yield
        finally:
            forget_clients()


def used(server: Server) -> set[tuple[str, str]]:
    """The permissions that the requests since needed: action, and the bucket or the key's first folder."""
    found = set()
    for request in server.requests:
        bucket, _, key = request.path.strip("/").partition("/")
        found.add((ACTIONS[request.operation], f"{bucket}/{key.partition('/')[0]}/*" if key else bucket))
    return found


def granted(policy: dict[str, Any]) -> set[tuple[str, str]]:
    return {
        (action, resource.removeprefix("arn:aws:s3:::"))
        for statement in policy["Statement"]
        for action in statement["Action"]
        for resource in statement["Resource"]
    }


def test_the_policies_of_the_page_are_enough_and_not_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack, stage, train and look at the runs with them, on a server that enforces them."""
    monkeypatch.setattr(s3, "PART", 256 << 10)  # so that tars and checkpoints go in parts
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)
    monkeypatch.setattr(s3, "ATTEMPTS", 2)
    monkeypatch.setattr(s3, "PAUSE_S", 0.01)
    packing, training = policies()["Packing"], policies()["Training"]
    source = read_audioset(*write_tone_set(tmp_path / "set", 24))
    with s3_server() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        shards, runs = f"{server.bucket_url}/shards/tones", f"{server.bucket_url}/runs"
        for key in ("shards/tones/left.tar", "runs/one/checkpoints/left"):  # by a process that was killed
            server.client.create_multipart_upload(Bucket=server.bucket, Key=key)
        server.client.put_object(Bucket=server.bucket, Key="private/x", Body=b"x")

        with credentials(server, "packer", packing):
            plan = build.Plan(source, Packing(clips_per_shard=8), open_folder(shards))
            assert build.start(plan)
            for shard in range(plan.num_shards):
                build.keep(plan.task(shard), build.build_shard(plan.task(shard)))
            build.finish(plan)
            assert not build.start(plan)  # as the same command run again does, which clears up
            assert used(server) == granted(packing)
            for folder, name in ((f"{runs}/one", "x"), (f"{server.bucket_url}/private", "x")):
                refused(lambda: open_folder(folder).write(name, b""))  # noqa: B023 - called in this round
                refused(lambda: open_folder(folder).read(name))  # noqa: B023

        recipe = small_recipe(
            Path("unused"),
            tmp_path / "one",
            data={"train": shards, "eval": shards},
            run={"dir": runs},
            checkpoint={"every": 1, "keep_last": 1},
        )
        with credentials(server, "trainer", training):
            events: list[Any] = []
            pretrain(recipe, "auto", None, events.append)
            assert of_kind(events, Incident) == []
            with staging(open_folder(shards), LocalFolder(str(tmp_path / "copy"))) as plan_of_copy:
                copy(plan_of_copy, lambda done: None)
            assert [each["run"] for each in list_runs(runs, None)["runs"]] == ["one"]
            assert used(server) == granted(training)
            refused(lambda: open_folder(shards).write("x", b""))
            refused(lambda: open_folder(shards).delete("manifest.parquet"))
            refused(lambda: open_folder(f"{server.bucket_url}/private").read("x"))
        assert server.unfinished() == []
        assert server.stored("shards/tones/manifest.parquet")


def refused(action: Any) -> None:
    with pytest.raises(UserError, match=r"access denied: these credentials may not do it"):
        action()


SECRETS = ("AKIAFAKEKEYOFATEST", "fake/secret+key", "fake-session-token", "fake-proxy-password")


def test_no_output_repeats_a_secret(place: Path, tmp_path: Path) -> None:
    """Those of a URL, the credentials file, the environment and a proxy: not in what commands print, log and write."""
    key, secret, token, password = SECRETS
    (tmp_path / "credentials").write_text(
        f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\naws_session_token = {token}\n"
    )
    recipe = tmp_path / "small.yaml"
    tree = small_recipe(Path("x"), tmp_path / "x").model_dump(mode="json", exclude_none=True, exclude={"data", "run"})
    recipe.write_text(yaml.safe_dump(tree))
    of_run = ["run.launcher=none", "run.engine=torch", "data.crop_s=1", "data.allow_overlap=true"]
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.delenv(name)
        for name, value in {
            "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
            "AWS_ENDPOINT_URL": server.endpoint,
            "HTTPS_PROXY": f"http://user:{password}@127.0.0.1:1",
            "HF_TOKEN": token,
        }.items():
            patch.setenv(name, value)
        for path in (place / "shards").iterdir():
            server.client.put_object(Bucket=server.bucket, Key=f"set/{path.name}", Body=path.read_bytes())
        shards, runs, away = f"{server.bucket_url}/set", f"{server.bucket_url}/runs", "https://127.0.0.1:2"
        hidden = f"s3://{key}:{secret}@{server.bucket}/set"
        data = [f"data.train={shards}", f"data.eval={shards}", *of_run]
        commands: list[tuple[int, list[str]]] = [
            (0, ["pretrain", str(recipe), *data, f"run.dir={runs}"]),
            (0, ["runs", runs]),
            (0, ["report", f"{runs}/small", "--out", "report.html"]),
            (0, ["tag", f"{runs}/small", shards, "--out", "tags.parquet"]),
            (0, ["verify", shards]),
            (1, ["verify", shards, "--endpoint", away]),  # by the proxy, which is not there
            (1, ["verify", f"{server.bucket_url}/none"]),
            (2, ["pretrain", str(recipe), f"data.train={hidden}", f"data.eval={hidden}", *of_run]),
            (2, ["pretrain", str(recipe), *data, f"run.dir={hidden}"]),
            (2, ["verify", hidden]),
            (2, ["verify", shards, "--endpoint", f"http://{key}:{secret}@127.0.0.1:2"]),
            (2, ["evaluate", hidden, shards]),
            (2, ["tag", hidden, "a.wav", "b.wav"]),
            (2, ["stage", hidden, "copy"]),
            (2, ["runs", hidden]),
            (2, ["report", hidden]),
            (2, ["plan", str(recipe), f"data.train={hidden}", f"data.eval={hidden}"]),
            (2, ["pack", "folder", "--root", "x", "--out", hidden]),
        ]
        outputs: dict[str, bytes] = {}
        for code, command in commands:
            done = subprocess.run([*ERANN, *command], cwd=tmp_path, capture_output=True)
            assert done.returncode == code, (command, done.stderr.decode())
            outputs[" ".join(command)] = done.stdout + done.stderr
        (tmp_path / "credentials").unlink()
        outputs |= {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        stored = server.client.list_objects_v2(Bucket=server.bucket)["Contents"]
        outputs |= {each["Key"]: server.stored(each["Key"]) or b"" for each in stored}
    assert "runs/small/metrics.jsonl" in outputs
    found = {where: each for where, output in outputs.items() for each in SECRETS if each.encode() in output}
    assert found == {}
