"""The two S3 clients, s3fs and Arrow's, made from the same settings: server, proxy and credentials.

The settings are what botocore finds in its configuration, credentials and environment. Arrow's client, which reads less
of that by itself, is given what s3fs's client was made with. Two settings have no variable of Amazon's own and use
GDAL's names: AWS_NO_SIGN_REQUEST=YES reads public buckets without credentials, AWS_REQUEST_PAYER=requester pays for
requests to a bucket whose owner does not. fsspec's FSSPEC_S3_ANON and FSSPEC_S3_REQUESTER_PAYS do the same.
"""

import functools
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec.config
import pyarrow.fs
from aiobotocore.session import AioSession
from botocore.credentials import Credentials, RefreshableCredentials
from botocore.exceptions import ClientError
from botocore.utils import get_environ_proxies
from s3fs.core import S3FileSystem

_TRUE = {"1", "on", "true", "yes"}
_AMAZONS_OWN = re.compile(r"s3(\.[a-z0-9-]+)?\.amazonaws\.com")  # not the endpoint of a VPC


@dataclass(frozen=True)
class Connection:
    """How the objects of a bucket are requested."""

    server: str  # the endpoint's URL
    region: str  # the bucket's region, for which requests are signed
    virtual_host: bool  # the bucket is part of the host's name, not of the path
    proxy: str | None = field(repr=False)  # its URL, which may contain a password
    ca_file: str | None  # the trusted certificates; none: the system's
    requester_pays: bool
    credentials: tuple[str, str, str | None] | None = field(repr=False)  # key, secret key, token; none: anonymous


def s3fs_client(endpoint: str | None, connect_s: float, silence_s: float) -> S3FileSystem:
    """A new s3fs client that does not retry. It picks up keys that are renewed in the credentials file."""
    config = {
        "connect_timeout": connect_s,
        "read_timeout": silence_s,
        "max_pool_connections": 64,
        "retries": {"total_max_attempts": 1},
        # The MD5s of s3.py do what botocore's CRCs do, and also work on S3 servers other than Amazon's.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    configured = fsspec.config.conf.get("s3", {})  # strings, where a variable has set them
    session = AioSession(profile=configured.get("profile"))
    session.register("before-parameter-build.s3", functools.partial(_take_renewed_keys, session, _Seen()))
    s3 = S3FileSystem(
        endpoint_url=endpoint,
        anon=_is_true(os.environ.get("AWS_NO_SIGN_REQUEST") or configured.get("anon")),
        requester_pays=os.environ.get("AWS_REQUEST_PAYER") == "requester" or _is_true(configured.get("requester_pays")),
        session=session,
        config_kwargs=config,
        use_listings_cache=False,
        skip_instance_cache=True,
    )
    # botocore retries after status 500 but not after a truncated response, s3fs does the opposite, and neither checks
    # the content; together their retries multiply. So only s3.py retries.
    s3.retries = 1
    return s3


def _is_true(value: object) -> bool:
    return str(value).lower() in _TRUE


async def find_connection(s3: S3FileSystem, bucket: str) -> Connection:
    """The settings with which the s3fs client sends requests for this bucket. Raises what its requests raise."""
    client = await s3.set_session()
    server = client.meta.endpoint_url
    url = urlsplit(server)
    region, amazons_own = client.meta.region_name or "us-east-1", bool(_AMAZONS_OWN.fullmatch(url.hostname or ""))
    if (url.hostname or "").endswith(".amazonaws.com"):
        region = await _region_of(s3, bucket) or region  # botocore follows a redirect to it, Arrow does not
        if amazons_own:
            server = f"{url.scheme}://s3.{region}.amazonaws.com"
    found = None if s3.anon else await s3.session.get_credentials()
    keys = await found.get_frozen_credentials() if found else None
    proxy = get_environ_proxies(client.meta.endpoint_url).get(url.scheme)
    return Connection(
        server=server,
        region=region,
        # As in botocore: not with the user's own endpoint, nor with a dot, which no certificate would match.
        virtual_host=amazons_own and "." not in bucket and not _is_endpoint_given(s3),
        proxy=proxy if not proxy or "://" in proxy else f"http://{proxy.removeprefix('//')}",
        ca_file=s3.session.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE"),
        requester_pays=bool(s3.requester_pays),
        credentials=(keys.access_key, keys.secret_key, keys.token) if keys else None,
    )


def _is_endpoint_given(s3: S3FileSystem) -> bool:
    return bool(s3.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"))


async def _region_of(s3: S3FileSystem, bucket: str) -> str | None:
    """The bucket's region, which Amazon names even when it refuses the request."""
    try:
        answer = await s3._call_s3("head_bucket", Bucket=bucket)
    except OSError as error:
        if not isinstance(error.__cause__, ClientError):
            raise
        answer = error.__cause__.response
    region: str | None = answer["ResponseMetadata"].get("HTTPHeaders", {}).get("x-amz-bucket-region")
    return region


def arrow_client(at: Connection, connect_s: float, request_s: float) -> pyarrow.fs.S3FileSystem:
    """A new Arrow client that does not retry. It can't request with requester pays."""
    url = urlsplit(at.server)
    access_key, secret_key, token = at.credentials or (None, None, None)
    return pyarrow.fs.S3FileSystem(
        access_key=access_key,
        secret_key=secret_key,
        session_token=token,
        anonymous=at.credentials is None,
        region=at.region,
        scheme=url.scheme,
        # Given even for Amazon's own: otherwise Arrow would look for one in the environment by other rules.
        endpoint_override=url.netloc,
        force_virtual_addressing=at.virtual_host,
        proxy_options=_with_port(at.proxy) if at.proxy else None,
        tls_ca_file_path=at.ca_file,
        connect_timeout=connect_s,
        request_timeout=request_s,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=1),
    )


def _with_port(proxy: str) -> str:
    """Arrow needs the proxy's port."""
    url = urlsplit(proxy)
    port = url.port or (443 if url.scheme == "https" else 80)
    host = f"[{url.hostname}]" if ":" in (url.hostname or "") else url.hostname
    user, at, _ = url.netloc.rpartition("@")
    return f"{url.scheme}://{user}{at}{host}:{port}"


# --- Keys that are renewed in a file ---

Stamp = tuple[tuple[int, int, int] | None, ...]


def credentials_stamp() -> Stamp:
    """A value that changes when the files that keys are read from change."""
    names = (
        os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"),
        os.environ.get("AWS_CONFIG_FILE", "~/.aws/config"),
    )
    return tuple(_file_stamp(Path(os.path.expanduser(name))) for name in names)


def _file_stamp(path: Path) -> tuple[int, int, int] | None:
    with suppress(OSError):
        status = path.stat()
        return status.st_ino, status.st_size, status.st_mtime_ns
    return None


@dataclass
class _Seen:
    stamp: Stamp = field(default_factory=credentials_stamp)


async def _take_renewed_keys(session: AioSession, seen: _Seen, **_: Any) -> None:
    """Called before each request. botocore reads a file once, and renews only keys from a role or a service."""
    stamp = credentials_stamp()
    if stamp == seen.stamp:
        return
    seen.stamp = stamp
    own, found = await session.get_credentials(), await AioSession(profile=session.profile).get_credentials()
    if isinstance(own, Credentials) and not isinstance(own, RefreshableCredentials) and found:
        keys = await found.get_frozen_credentials()
        own.access_key, own.secret_key, own.token = keys.access_key, keys.secret_key, keys.token
