"""Ray's job submission: submit a command to a cluster, follow its log, stop it."""

import asyncio
import json
import logging
import os
import re
import shlex
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlsplit

# Unless this is set, Ray would send this machine's token, if any program ever created one, to every cluster.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import aiohttp
import ray
import requests
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from cluster.submit.driver import VERSIONS
from cluster.submit.package import Package, pins, versions
from erann_dist.errors import UsageError, UserError

# The variables of the client's environment that are sent, and those that are not: Ray shows what is sent to everyone
# who can see the job.
_PASSED_ON = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_NO_SIGN_REQUEST",
    "AWS_REQUEST_PAYER",
)
_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray's own variables, in its order.
_RUN = "erann_run"  # Key of a job's metadata: its run.
_READ = "erann_read_sha256"  # Key of a job's metadata: the hash of the files that its command reads.
_PORTS = {"http": 80, "https": 443, "ray": 10001}
_UNIQUE = "cluster/job"  # A file that makes each job's package unique.
_STOP_S = 120  # Time for a stopped job to save its checkpoint; Ray's default of 3 s is too short.
_ANSWER_S = 10.0
_SILENCE_S = 60.0  # After this long without a line, a connection may be dead, and is opened again.
_PATIENCE_S = 600.0
_AGENT_S = 60.0  # Time for a new cluster to accept jobs.
_POLL_S = 1.0

# They log each upload and each closed connection.
for _name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
    logging.getLogger(f"ray.{_name}").setLevel(logging.WARNING)

Dependencies = Literal["image", "pip"]


@dataclass(frozen=True)
class Submission:
    """A command to submit to a cluster."""

    arguments: list[str]  # of erann
    run: str  # URL of the run's folder
    trains: bool  # whether it trains the run, which only one job may do at a time
    package: Package
    dependencies: Dependencies  # those of the nodes' image, or installed by pip for the job

    @property
    def what(self) -> str:
        """What the list of jobs shows: the run that the job trains, or what it does with the run."""
        return self.run if self.trains else f"{self.arguments[0]} of {self.run}"

    @property
    def entrypoint(self) -> str:
        return shlex.join(["python", "-m", "cluster.submit.driver", *self.arguments])

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the job's processes. Raises UserError for a secret in it, which Ray would show."""
        passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        for name, value in passed.items():
            if "@" in urlsplit(value).netloc:
                raise UserError(f"{name}: contains a user or a password, which Ray would show with the job; remove it")
        own = {VERSIONS: json.dumps(versions()), "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_S), "PYTHONUNBUFFERED": "1"}
        return passed | own

    @property
    def kept_here(self) -> list[str]:
        """The names of this machine's credentials, which are not sent: nodes have their own, by a role or a secret."""
        return [name for name in _CREDENTIALS if name in os.environ]

    @property
    def runtime_env(self) -> dict[str, Any]:
        """Ray's runtime environment, without the package, which is the working directory."""
        pip = {"pip": {"packages": pins(), "pip_check": False}} if self.dependencies == "pip" else {}
        return {"env_vars": self.environment} | pip


@dataclass(frozen=True)
class Cluster:
    """A connection to a cluster's dashboard."""

    address: str  # as given by the user
    client: JobSubmissionClient


def connect(address: str | None) -> Cluster:
    """Connect to a cluster's dashboard.

    Raises UsageError if there is no address or it is invalid; UserError if no dashboard answers there, the token is
    missing or wrong, or the cluster has another version of Ray.
    """
    address = address or next((os.environ[name] for name in _ADDRESSES if os.environ.get(name)), None)
    if address is None:
        raise UsageError("no cluster address; give --address http://HEAD:8265, or set RAY_ADDRESS to it")
    parts = urlsplit(address)
    if parts.scheme not in _PORTS or not parts.hostname:
        raise UsageError(f"{address}: not a cluster's address; give http://HEAD:8265 or ray://HEAD:10001")
    for name in _ADDRESSES:  # Ray would prefer them to the given address.
        os.environ.pop(name, None)
    with _in_one_line(address):
        _require_answer(address)
        try:
            client = JobSubmissionClient(address)
        except RuntimeError as error:
            if "404" in str(error):
                raise _no_dashboard(address) from error
            raise
    theirs, ours = client._server_ray_version or "", ray.__version__
    if theirs.split(".")[:2] != ours.split(".")[:2]:
        raise UserError(
            f"{address}: runs Ray {theirs}, but Ray {ours} is installed here; install the cluster's version"
        )
    return Cluster(address, client)


def _require_answer(url: str) -> None:
    """Raise OSError at once if nothing answers; Ray itself would wait for minutes."""
    parts = urlsplit(url)
    socket.create_connection((str(parts.hostname), parts.port or _PORTS[parts.scheme]), timeout=_ANSWER_S).close()


@contextmanager
def _in_one_line(address: str) -> Iterator[None]:
    """Turn errors in connecting to an address into one-line errors."""
    try:
        yield
    except AuthenticationError as error:
        raise _wants_token(address) from error
    except requests.exceptions.SSLError as error:
        raise UserError(f"{address}: no TLS, or an untrusted certificate: {_line(error)}") from error
    except (requests.exceptions.JSONDecodeError, requests.exceptions.HTTPError, KeyError) as error:
        raise _no_dashboard(address) from error
    except requests.exceptions.ProxyError as error:
        raise UserError(f"{address}: its proxy does not answer{_proxy_hint(address)}") from error
    except (ConnectionError, requests.exceptions.RequestException, OSError) as error:
        raise UserError(
            f"{address}: no Ray dashboard answers there ({_line(error)}); check that the head is up, that this is the "
            f"dashboard's port (8265 by default), and that it listens on more than loopback{_proxy_hint(address)}"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{address}: {_line(error)}{_proxy_hint(address)}") from error


def _proxy_hint(address: str) -> str:
    """A hint that requests use a proxy, if they do, and how to avoid it; without the proxy's credentials."""
    parts = urlsplit(address)
    scheme, host = "https" if parts.scheme == "https" else "http", parts.hostname or ""
    proxy = requests.utils.select_proxy(address, requests.utils.get_environ_proxies(f"{scheme}://{parts.netloc}"))
    if not proxy:
        return ""
    server = urlsplit(proxy if "://" in proxy else f"//{proxy}")
    where = f"{server.hostname}:{server.port}" if server.port else server.hostname
    return f"; requests use the proxy {where} of {scheme}_proxy: set no_proxy={host} to bypass it"


def _wants_token(address: str) -> UserError:
    return UserError(
        f"{address}: requires a token, or another token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH or "
        "RAY_AUTH_TOKEN to the cluster's token"
    )


def _no_dashboard(address: str) -> UserError:
    return UserError(
        f"{address}: the server there is no Ray dashboard; its port is 8265 by default{_proxy_hint(address)}"
    )


def _line(error: Exception) -> str:
    text = str(error)
    if "Traceback" in text:  # The dashboard's traceback, which ends with the error.
        text = text.rstrip(" .\n").splitlines()[-1]
    return " ".join(text.split())[:200]


def submit(cluster: Cluster, work: Submission) -> tuple[str, bool]:
    """Submit the work, unless a job that trains the same run is in progress. Returns the job's id, and if it is new.

    Raises UserError, also if that job trains the run with another command or other recipes.
    """
    with tempfile.TemporaryDirectory(prefix="erann-submit-") as folder:
        work.package.write(Path(folder))
        deadline = time.monotonic() + _AGENT_S
        while True:
            with _in_one_line(cluster.address):
                jobs = cluster.client.list_jobs()
            for job in jobs:
                if work.trains and run_of(job) == work.what and not job.status.is_terminal():
                    _require_same(job, work)
                    return str(job.submission_id), False
            taken = {job.submission_id for job in jobs}
            job_id = next(name for i in count(1) if (name := f"{_stem(work)}-{i}") not in taken)
            # Ray identifies packages by their content, and drops one with the last job that uses it. A job submitted at
            # that moment could lose its package, so each job has its own.
            Path(folder, _UNIQUE).write_text(job_id)
            try:
                with _in_one_line(cluster.address):
                    return _send(cluster, work, job_id, folder), True
            except _RetryError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_S)


class _RetryError(UserError):
    """The submission may succeed when tried again."""


def _send(cluster: Cluster, work: Submission, job_id: str, folder: str) -> str:
    try:
        return cluster.client.submit_job(
            entrypoint=work.entrypoint,
            submission_id=job_id,
            runtime_env=work.runtime_env | {"working_dir": folder},
            metadata={_RUN: work.what, _READ: work.package.read_sha256},
        )
    except RuntimeError as error:
        # The cluster has just come up, or the same job is being submitted by another client.
        if any(reason in str(error) for reason in ("No available agent", "already exists")):
            raise _RetryError(f"{cluster.address}: {_line(error)}") from error
        raise


def _require_same(job: JobDetails, work: Submission) -> None:
    """Raise UserError if the job trains the run of this work with other settings."""
    if job.entrypoint != work.entrypoint:
        how = f"another command: {job.entrypoint}"
    elif (job.metadata or {}).get(_READ) != work.package.read_sha256:
        how = "the same command, but the recipes here have changed since"
    else:
        return
    raise UserError(
        f"{work.run}: job {job.submission_id} already trains it, by {how}; stop it first "
        f"(erann jobs stop {job.submission_id}), or give another run.name"
    )


def _stem(work: Submission) -> str:
    """The descriptive part of a job's id, without characters that are unsafe in a URL or shell."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", work.run.rstrip("/").rpartition("/")[2])
    return f"{work.arguments[0]}-{name}"


def find(cluster: Cluster, job_id: str) -> JobDetails:
    """The job of that id. Raises UserError if the cluster has none."""
    with _in_one_line(cluster.address):
        jobs = cluster.client.list_jobs()
    for job in jobs:
        if job_id in (job.submission_id, job.job_id):
            return job
    raise UserError(f"{job_id}: no such job at {cluster.address}; erann jobs list shows all jobs")


def list_jobs(cluster: Cluster) -> list[JobDetails]:
    """The submitted jobs, the oldest first."""
    with _in_one_line(cluster.address):
        jobs = [job for job in cluster.client.list_jobs() if job.submission_id]
    return sorted(jobs, key=lambda job: job.start_time or 0)


def run_of(job: JobDetails) -> str | None:
    return (job.metadata or {}).get(_RUN)


def logs(cluster: Cluster, job_id: str) -> str:
    with _in_one_line(cluster.address):
        return str(cluster.client.get_job_logs(quote(job_id, safe="")))


def stop(cluster: Cluster, job_id: str) -> JobStatus:
    """Request a job to stop, and wait until it has saved a checkpoint. Returns its last status."""
    with _in_one_line(cluster.address):
        cluster.client.stop_job(quote(job_id, safe=""))
        deadline = time.monotonic() + 2 * _STOP_S
        while not (status := _status(cluster, job_id)).is_terminal() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return status


def follow(cluster: Cluster, job_id: str, show: Callable[[str], None], report: Callable[[str], None]) -> JobStatus:
    """Show a job's log until it ends, reconnecting when the connection is lost. Returns its last status.

    report: called with a line when the connection is lost or restored. Raises UserError if nothing answers for ten
    minutes, or if the cluster has no such job or requires another token.
    """
    log = _Log(show)
    lost_at: float | None = None
    while True:
        try:
            _require_answer(cluster.client.get_address())
            status = _status(cluster, job_id)
            if lost_at is not None:
                report(f"reconnected to {cluster.address}")
                lost_at = None
            asyncio.run(_tail(cluster, job_id, log))
            if status.is_terminal():
                return status
        except AuthenticationError as error:
            raise _wants_token(cluster.address) from error
        except (OSError, RuntimeError, requests.exceptions.RequestException, aiohttp.ClientError) as error:
            if "status code 404" in str(error):
                raise UserError(
                    f"{job_id}: unknown at {cluster.address}, whose head was probably replaced; submit the command "
                    "again to resume from the run's last checkpoint"
                ) from error
            now = time.monotonic()
            if lost_at is None:
                lost_at = now
                report(f"connection to {cluster.address} lost ({_line(error)}); the job continues, reconnecting")
            if now - lost_at > _PATIENCE_S:
                raise UserError(
                    f"{cluster.address}: no answer for {_PATIENCE_S / 60:.0f} minutes; the job may still be running: "
                    f"erann jobs logs {shlex.quote(job_id)} --address {shlex.quote(cluster.address)} --follow"
                ) from error
            time.sleep(_POLL_S)


def _status(cluster: Cluster, job_id: str) -> JobStatus:
    return JobStatus(cluster.client.get_job_status(quote(job_id, safe="")))


@dataclass
class _Log:
    """Shows a log once, although every connection sends it from its beginning."""

    show: Callable[[str], None]
    shown: int = 0  # characters

    def take(self, chunk: str, at: int) -> None:
        """Show the new part of a chunk, which begins at character `at` of the log."""
        self.show(chunk[max(0, self.shown - at) :])
        self.shown = max(self.shown, at + len(chunk))


async def _tail(cluster: Cluster, job_id: str, log: _Log) -> None:
    """Show the log until the job ends or nothing arrives for a while."""
    at = 0
    async with aclosing(cluster.client.tail_job_logs(quote(job_id, safe=""))) as chunks:
        while True:
            try:
                chunk = await asyncio.wait_for(anext(chunks), _SILENCE_S)
            except (StopAsyncIteration, TimeoutError):
                return
            log.take(chunk, at)
            at += len(chunk)
