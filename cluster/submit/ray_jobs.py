"""Ray's job submission: send a command to a cluster, follow it, come back to it, stop it."""

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

# Without a word on it Ray would take this machine's token, if any program ever made one, to every cluster.
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

# What goes along of the client's environment, and what stays here: Ray shows the first to whoever sees the job.
_PASSED_ON = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_NO_SIGN_REQUEST",
    "AWS_REQUEST_PAYER",
)
_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray's own, in its order
_RUN = "erann_run"  # the job's metadata: the run that it is,
_READ = "erann_read_sha256"  # and the recipes that it was sent with
_PORTS = {"http": 80, "https": 443, "ray": 10001}
_MARK = "cluster/job"  # in a package: a file that no other has
_STOP_S = 120  # that a job has to save its checkpoint when it is stopped; Ray's own 3 are too few
_ANSWER_S = 10.0
_SILENCE_S = 60.0  # without a line, after which a connection may be dead, and is made anew
_PATIENCE_S = 600.0
_AGENT_S = 60.0  # that a new cluster gets until it takes jobs
_POLL_S = 1.0

# They tell of each upload and of each end of a connection.
for _name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
    logging.getLogger(f"ray.{_name}").setLevel(logging.WARNING)

Dependencies = Literal["image", "pip"]


@dataclass(frozen=True)
class Submission:
    """A command for a cluster."""

    arguments: list[str]  # of erann
    run: str  # the folder's URL
    trains: bool  # it: there may be one such job at a time
    package: Package
    dependencies: Dependencies  # of the nodes: their own image's, or installed by pip for the job

    @property
    def what(self) -> str:
        """By which the cluster's list of jobs shows it: the run that it trains, or what it does with it."""
        return self.run if self.trains else f"{self.arguments[0]} of {self.run}"

    @property
    def entrypoint(self) -> str:
        return shlex.join(["python", "-m", "cluster.submit.driver", *self.arguments])

    @property
    def environment(self) -> dict[str, str]:
        """Of all the job's processes. Raises UserError for a secret in it: Ray shows it to whoever sees the job."""
        passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        for name, value in passed.items():
            if "@" in urlsplit(value).netloc:
                raise UserError(f"{name}: holds a user or a password, which Ray would show with the job; take it out")
        own = {VERSIONS: json.dumps(versions()), "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_S), "PYTHONUNBUFFERED": "1"}
        return passed | own

    @property
    def kept_here(self) -> list[str]:
        """The names of this machine's credentials: nodes have their own, by a role or a secret of the cluster's."""
        return [name for name in _CREDENTIALS if name in os.environ]

    @property
    def runtime_env(self) -> dict[str, Any]:
        """Without the package, which is the working directory."""
        pip = {"pip": {"packages": pins(), "pip_check": False}} if self.dependencies == "pip" else {}
        return {"env_vars": self.environment} | pip


@dataclass(frozen=True)
class Cluster:
    """A connection to a cluster's dashboard."""

    address: str  # as it was asked for
    client: JobSubmissionClient


def connect(address: str | None) -> Cluster:
    """Raises UsageError and UserError: no address, nothing there, something else there, no token, another Ray."""
    address = address or next((os.environ[name] for name in _ADDRESSES if os.environ.get(name)), None)
    if address is None:
        raise UsageError("which cluster? Give --address http://HEAD:8265, or set RAY_ADDRESS to it")
    parts = urlsplit(address)
    if parts.scheme not in _PORTS or not parts.hostname:
        raise UsageError(f"{address}: is no cluster's address; http://HEAD:8265 is one, or ray://HEAD:10001")
    for name in _ADDRESSES:  # Ray would prefer them to the address that is asked for
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
        raise UserError(f"{address}: Ray {theirs} runs there, and {ours} here; install the cluster's version here")
    return Cluster(address, client)


def _require_answer(url: str) -> None:
    """Raise OSError at once where nothing answers; Ray itself would wait for minutes."""
    parts = urlsplit(url)
    socket.create_connection((str(parts.hostname), parts.port or _PORTS[parts.scheme]), timeout=_ANSWER_S).close()


@contextmanager
def _in_one_line(address: str) -> Iterator[None]:
    """What can be wrong with an address, or with what answers there."""
    try:
        yield
    except AuthenticationError as error:
        raise _wants_token(address) from error
    except requests.exceptions.SSLError as error:
        raise UserError(f"{address}: no TLS, or a certificate that is not trusted here: {_line(error)}") from error
    except (requests.exceptions.JSONDecodeError, requests.exceptions.HTTPError, KeyError) as error:
        raise _no_dashboard(address) from error
    except requests.exceptions.ProxyError as error:
        raise UserError(f"{address}: its proxy does not answer{_proxy_hint(address)}") from error
    except (ConnectionError, requests.exceptions.RequestException, OSError) as error:
        raise UserError(
            f"{address}: no Ray dashboard answers there ({_line(error)}); is the head up, is the port that of the "
            f"dashboard (8265 by default), and does it listen on more than loopback?{_proxy_hint(address)}"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{address}: {_line(error)}{_proxy_hint(address)}") from error


def _proxy_hint(address: str) -> str:
    """That requests go through a proxy, if they do, and how to go without; no user and password of it."""
    parts = urlsplit(address)
    scheme, host = "https" if parts.scheme == "https" else "http", parts.hostname or ""
    proxy = requests.utils.select_proxy(address, requests.utils.get_environ_proxies(f"{scheme}://{parts.netloc}"))
    if not proxy:
        return ""
    server = urlsplit(proxy if "://" in proxy else f"//{proxy}")
    where = f"{server.hostname}:{server.port}" if server.port else server.hostname
    return f"; requests go through the proxy {where} of {scheme}_proxy: set no_proxy={host} to go without"


def _wants_token(address: str) -> UserError:
    return UserError(
        f"{address}: asks for a token, or for another one; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH or "
        "RAY_AUTH_TOKEN to the cluster's"
    )


def _no_dashboard(address: str) -> UserError:
    return UserError(
        f"{address}: what answers there is no Ray dashboard; its port is 8265 by default{_proxy_hint(address)}"
    )


def _line(error: Exception) -> str:
    text = str(error)
    if "Traceback" in text:  # the dashboard's own, which ends with what is wrong
        text = text.rstrip(" .\n").splitlines()[-1]
    return " ".join(text.split())[:200]


def submit(cluster: Cluster, work: Submission) -> tuple[str, bool]:
    """Send it, unless a job that trains the same run is on its way; the job's id, and whether it is new.

    Raises UserError, also when that job trains it by another command or other recipes.
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
            # Ray keeps packages by their content, and drops one with the last job that has it: at that moment this job
            # would find it there and then not any more. So each has its own.
            Path(folder, _MARK).write_text(job_id)
            try:
                with _in_one_line(cluster.address):
                    return _send(cluster, work, job_id, folder), True
            except _Again:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_S)


class _Again(UserError):
    """It may be taken at another try."""


def _send(cluster: Cluster, work: Submission, job_id: str, folder: str) -> str:
    try:
        return cluster.client.submit_job(
            entrypoint=work.entrypoint,
            submission_id=job_id,
            runtime_env=work.runtime_env | {"working_dir": folder},
            metadata={_RUN: work.what, _READ: work.package.read_sha256},
        )
    except RuntimeError as error:
        # The cluster has just come up, or somebody sent it at the same moment.
        if any(reason in str(error) for reason in ("No available agent", "already exists")):
            raise _Again(f"{cluster.address}: {_line(error)}") from error
        raise


def _require_same(job: JobDetails, work: Submission) -> None:
    """Raise UserError when a job that trains the run of this work does so by other settings."""
    if job.entrypoint != work.entrypoint:
        how = f"another command: {job.entrypoint}"
    elif (job.metadata or {}).get(_READ) != work.package.read_sha256:
        how = "the same command, but the recipes here have changed since"
    else:
        return
    raise UserError(
        f"{work.run}: job {job.submission_id} trains it already, by {how}; stop it first "
        f"(erann jobs stop {job.submission_id}), or give another run.name"
    )


def _stem(work: Submission) -> str:
    """The part of an id that says what it is; what is not safe in every URL and shell is left out."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", work.run.rstrip("/").rpartition("/")[2])
    return f"{work.arguments[0]}-{name}"


def find(cluster: Cluster, job_id: str) -> JobDetails:
    """Raises UserError when the cluster has no such job."""
    with _in_one_line(cluster.address):
        jobs = cluster.client.list_jobs()
    for job in jobs:
        if job_id in (job.submission_id, job.job_id):
            return job
    raise UserError(f"{job_id}: no such job at {cluster.address}; erann jobs list shows them")


def list_jobs(cluster: Cluster) -> list[JobDetails]:
    """The submitted ones, the oldest first."""
    with _in_one_line(cluster.address):
        jobs = [job for job in cluster.client.list_jobs() if job.submission_id]
    return sorted(jobs, key=lambda job: job.start_time or 0)


def run_of(job: JobDetails) -> str | None:
    return (job.metadata or {}).get(_RUN)


def logs(cluster: Cluster, job_id: str) -> str:
    with _in_one_line(cluster.address):
        return str(cluster.client.get_job_logs(quote(job_id, safe="")))


def stop(cluster: Cluster, job_id: str) -> JobStatus:
    """Tell a job to stop, and wait until it has saved what it had. Its last status."""
    with _in_one_line(cluster.address):
        cluster.client.stop_job(quote(job_id, safe=""))
        deadline = time.monotonic() + 2 * _STOP_S
        while not (status := _status(cluster, job_id)).is_terminal() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return status


def follow(cluster: Cluster, job_id: str, show: Callable[[str], None], tell: Callable[[str], None]) -> JobStatus:
    """Show a job's log until it ends, over lost connections. Its last status.

    tell: is told when the connection is lost, and when it is back. Raises UserError when nothing answers for ten
    minutes, and when a cluster answers that has no such job, or wants another token.
    """
    log = _Log(show)
    lost_at: float | None = None
    while True:
        try:
            _require_answer(cluster.client.get_address())
            status = _status(cluster, job_id)
            if lost_at is not None:
                tell(f"connected again to {cluster.address}")
                lost_at = None
            asyncio.run(_tail(cluster, job_id, log))
            if status.is_terminal():
                return status
        except AuthenticationError as error:
            raise _wants_token(cluster.address) from error
        except (OSError, RuntimeError, requests.exceptions.RequestException, aiohttp.ClientError) as error:
            if "status code 404" in str(error):
                raise UserError(
                    f"{job_id}: gone from {cluster.address}, whose head must be a new one; submitted again, the run "
                    "goes on from its last checkpoint"
                ) from error
            now = time.monotonic()
            if lost_at is None:
                lost_at = now
                tell(f"connection to {cluster.address} lost ({_line(error)}); the job goes on, trying again")
            if now - lost_at > _PATIENCE_S:
                raise UserError(
                    f"{cluster.address}: no answer for {_PATIENCE_S / 60:.0f} minutes; the job may be running: "
                    f"erann jobs logs {shlex.quote(job_id)} --address {shlex.quote(cluster.address)} --follow"
                ) from error
            time.sleep(_POLL_S)


def _status(cluster: Cluster, job_id: str) -> JobStatus:
    return JobStatus(cluster.client.get_job_status(quote(job_id, safe="")))


@dataclass
class _Log:
    """A log that every connection sends from its beginning."""

    show: Callable[[str], None]
    shown: int = 0  # characters

    def take(self, chunk: str, at: int) -> None:
        """A chunk that begins at a character of the log."""
        self.show(chunk[max(0, self.shown - at) :])
        self.shown = max(self.shown, at + len(chunk))


async def _tail(cluster: Cluster, job_id: str, log: _Log) -> None:
    """Show the log until the job ends or nothing comes for a while."""
    at = 0
    async with aclosing(cluster.client.tail_job_logs(quote(job_id, safe=""))) as chunks:
        while True:
            try:
                chunk = await asyncio.wait_for(anext(chunks), _SILENCE_S)
            except (StopAsyncIteration, TimeoutError):
                return
            log.take(chunk, at)
            at += len(chunk)
