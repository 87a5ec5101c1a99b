"""s3fs and Arrow's client ask in the same way, whatever the environment wants: server, region, proxy, name, keys."""

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import AsyncMock

import numpy as np
import pytest

from erann_dist.errors import UserError
from erann_dist.storage import s3, s3_clients, slow_reads
from erann_dist.storage.folder import open_folder
from erann_dist.storage.s3 import S3Folder, connection
from erann_dist.storage.s3_ranges import S3Object
from erann_dist.storage.slow_reads import SlowReads
from tests.support.s3 import EXPIRED, Fault, Request, Server, forget_clients, s3_server

DATA = np.random.default_rng(0).bytes(5000)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(s3, "PAUSE_S", 0.005)
    with s3_server() as server:
        server.client.put_object(Bucket=server.bucket, Key="set/x.tar", Body=DATA)
        yield server


def the_object(url: str, endpoint: str | None, slow: SlowReads | None = None) -> S3Object:
    folder = open_folder(url, endpoint)
    assert isinstance(folder, S3Folder)
    return S3Object(folder, "x.tar", threading.Event(), slow)


def read_both_ways(server: Server, url: str, endpoint: str | None) -> tuple[Request, Request]:
    """The requests by which Arrow's client and s3fs read the same bytes."""
    tar = the_object(url, endpoint)
    assert tar.read(10, 100) == DATA[10:110]
    assert tar.read_carefully(20, 100) == DATA[20:120]
    ranged = [request for request in server.requests if "range" in request.headers]
    arrow, s3fs = ranged[-2:]
    assert ("aws-sdk-cpp" in arrow.headers["user-agent"], "aiobotocore" in s3fs.headers["user-agent"]) == (True, True)
    return arrow, s3fs


def scope(request: Request) -> str | None:
    """In whose name a request is signed, and for which region."""
    found = re.search(r"Credential=([^/]+)/\d+/([^/]+)/", request.headers.get("authorization", ""))
    return f"{found[1]} {found[2]}" if found else None


def assert_alike(arrow: Request, s3fs: Request) -> None:
    assert (arrow.path, arrow.headers["host"], scope(arrow)) == (s3fs.path, s3fs.headers["host"], scope(s3fs))
    assert arrow.headers.get("x-amz-security-token") == s3fs.headers.get("x-amz-security-token")


def behind_proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the proxy can be reached: the names are Amazon's."""
    monkeypatch.setenv("http_proxy", server.endpoint)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


def test_an_endpoint_and_a_token(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-token")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-north-1")
    forget_clients()
    arrow, s3fs = read_both_ways(server, "s3://sounds/set", server.endpoint)
    assert_alike(arrow, s3fs)
    assert scope(arrow) == "test-key eu-north-1"
    assert arrow.headers["x-amz-security-token"] == "a-token"


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://s3.us-east-1.amazonaws.com",
        "http://vpce-1a2b.s3.us-east-1.vpce.amazonaws.com",
        "http://minio.example.com:9000",
    ],
)
def test_through_a_proxy(server: Server, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """To Amazon's own servers, a VPC's endpoint and another server. Without the proxy none can be reached."""
    behind_proxy(server, monkeypatch)
    forget_clients()
    arrow, s3fs = read_both_ways(server, "s3://sounds/set", endpoint)
    assert_alike(arrow, s3fs)
    assert arrow.headers["host"] == endpoint.removeprefix("http://")


def test_amazons_own_endpoint(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """As botocore does, for bucket names that can be part of a host's."""
    monkeypatch.setattr(s3_clients, "_region_of", AsyncMock(return_value="eu-west-1"))
    forget_clients()
    found = connection(None, "sounds")
    assert (found.server, found.region, found.virtual_host) == ("https://s3.eu-west-1.amazonaws.com", "eu-west-1", True)
    assert not connection(None, "with.dots").virtual_host


def test_a_bucket_in_another_region(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.client.create_bucket(Bucket="far-away", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    server.client.put_object(Bucket="far-away", Key="set/x.tar", Body=DATA)
    behind_proxy(server, monkeypatch)
    forget_clients()
    found = connection("http://s3.us-east-1.amazonaws.com", "far-away")
    assert (found.region, found.server) == ("eu-west-1", "http://s3.eu-west-1.amazonaws.com")
    arrow, _ = read_both_ways(server, "s3://far-away/set", "http://s3.us-east-1.amazonaws.com")
    assert scope(arrow) == "test-key eu-west-1"


@pytest.mark.parametrize("variable", ["AWS_NO_SIGN_REQUEST", "FSSPEC_S3_ANON"])
def test_without_credentials(server: Server, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    import fsspec.config

    monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": "true"} if variable == "FSSPEC_S3_ANON" else {})
    monkeypatch.setenv(variable, "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    server.client.put_object(Bucket=server.bucket, Key="set/x.tar", Body=DATA, ACL="public-read")
    forget_clients()
    arrow, s3fs = read_both_ways(server, "s3://sounds/set", server.endpoint)
    assert "authorization" not in arrow.headers
    assert_alike(arrow, s3fs)


def test_no_credentials_at_all_is_one_line(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    forget_clients()
    with pytest.raises(UserError, match="AWS_NO_SIGN_REQUEST"):
        the_object("s3://sounds/set", server.endpoint).read(0, 10)


def test_the_requester_pays(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow's client can't ask so: s3fs reads, and after some reads that is told."""
    monkeypatch.setenv("AWS_REQUEST_PAYER", "requester")
    monkeypatch.setattr(slow_reads, "_SLOW_AT_LEAST", 10)
    forget_clients()
    slow = SlowReads()
    tar = the_object("s3://sounds/set", server.endpoint, slow)
    for start in range(20):
        assert tar.read(start, 100) == DATA[start : start + 100]
    paid = [request.headers.get("x-amz-request-payer") for request in server.requests if request.method == "GET"]
    assert paid == ["requester"] * 20
    assert slow.problem
    assert "requester pays" in slow.problem


def test_keys_that_are_renewed_in_the_file(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both clients take the new ones at their next request, also in the middle of a run."""

    def write(key: str) -> None:
        (tmp_path / "credentials").write_text(
            f"[default]\naws_access_key_id = {key}\naws_secret_access_key = s\naws_session_token = {key}-token\n"
        )

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    write("first")
    forget_clients()
    tar = the_object("s3://sounds/set", server.endpoint)
    assert tar.read(0, 10) == DATA[:10]
    write("second-key")
    assert tar.read(0, 20) == DATA[:20]
    assert tar.read_carefully(0, 30) == DATA[:30]
    renewed = [request for request in server.requests if scope(request).startswith("second-key")]
    assert server.requests[-len(renewed) :] == renewed
    assert [client for client in ("aws-sdk-cpp", "aiobotocore") for r in renewed if client in r.headers["user-agent"]]

    # The old ones expire while the file is being renewed: the same request is sent again.
    def expires(request: Request) -> Fault | None:
        if scope(request).startswith("second-key"):
            write("third-renewed")
            return EXPIRED
        return None

    server.faults = expires
    assert tar.read_carefully(0, 40) == DATA[:40]
    assert scope(server.requests[-1]).startswith("third-renewed")


def test_expired_keys_that_nobody_renews_are_one_line(server: Server) -> None:
    server.faults = lambda request: EXPIRED
    with pytest.raises(UserError, match="expired"):
        the_object("s3://sounds/set", server.endpoint).read_carefully(0, 10)
    assert len(server.requests) <= 3


def test_a_fast_client_that_always_fails_is_told_and_not_waited_for(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slow_reads, "_SLOW_AT_LEAST", 10)
    slow = SlowReads()
    tar = the_object("s3://sounds/set", server.endpoint, slow)
    server.faults = lambda request: (
        Fault("error", 400, "Teapot") if "aws-sdk-cpp" in request.headers["user-agent"] else None
    )
    for start in range(20):
        assert tar.read(start, 100) == DATA[start : start + 100]
    tried = sum("aws-sdk-cpp" in request.headers["user-agent"] for request in server.requests)
    assert tried <= 2 * slow_reads._GIVE_UP_AFTER
    assert slow.problem
    assert "during" in slow.problem  # Arrow's own code and operation


@pytest.mark.parametrize("url", ["s3://b/x//y", "s3://b//x"])
def test_an_empty_part_of_a_url_is_one_line(url: str) -> None:
    with pytest.raises(UserError, match=url):
        open_folder(url)
