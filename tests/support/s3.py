"""An S3 server on loopback with a proxy in front of it that injects faults.

with s3_server() as server:
    folder = open_folder(f"{server.bucket_url}/set", server.endpoint)
    server.faults = once(DROP, "UploadPart")      # any function Request -> Fault | None
    ...
    assert any(request.operation == "UploadPart" for request in server.requests)
    server.client.list_multipart_uploads(Bucket=server.bucket)      # boto3, past the proxy
"""

import asyncio
import base64
import gc
import hashlib
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl, urlsplit

import boto3
import pytest
from moto.moto_server.werkzeug_app import MotoRequestHandler
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from erann_dist.storage import s3, s3_ranges
from erann_dist.storage.folder import open_folder

BUCKET = "sounds"
SECRET = "the-secret-access-key"  # of no use outside of a test; one test looks for it in messages

Faults = Callable[["Request"], "Fault | None"]


@dataclass(frozen=True)
class Request:
    nth: int  # of all the requests of the server, from 0
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]  # names in lower case
    size: int  # of the body

    @property
    def operation(self) -> str:
        """The operation as boto3 names it."""
        key = "/" in self.path.strip("/")
        match self.method:
            case "GET" | "HEAD" if key:
                return "GetObject" if self.method == "GET" else "HeadObject"
            case "GET":
                return "ListMultipartUploads" if "uploads" in self.query else "ListObjectsV2"
            case "PUT" if key:
                return "UploadPart" if "partNumber" in self.query else "PutObject"
            case "POST" if key:
                return "CreateMultipartUpload" if "uploads" in self.query else "CompleteMultipartUpload"
            case "DELETE" if key:
                return "AbortMultipartUpload" if "uploadId" in self.query else "DeleteObject"
        return f"{self.method} bucket"


@dataclass(frozen=True)
class Fault:
    kind: Literal[
        "error",  # S3's XML with a status and a code; S3 does nothing
        "drop",  # the connection ends before an answer; S3 does nothing
        "lose",  # S3 does it, but its answer is lost with the connection
        "truncate",  # half of the body, then the connection ends
        "short",  # half of the body, and a Content-Length that says so
        "slow",  # the answer comes after some seconds
        "trickle",  # the answer's bytes come one by one, so many seconds apart
        "flip_answer",  # one bit of the answer's body is wrong
        "flip_request",  # one bit of the request's body is wrong; S3 sees it by the Content-MD5
        "flip_stored",  # the same, but S3 does not look
        "headers",  # headers of the answer are others
    ]
    status: int = 0
    code: str = ""
    seconds: float = 0
    headers: tuple[tuple[str, str], ...] = ()


DROP, LOSE, TRUNCATE, SHORT = Fault("drop"), Fault("lose"), Fault("truncate"), Fault("short")
FLIP_ANSWER, FLIP_REQUEST, FLIP_STORED = Fault("flip_answer"), Fault("flip_request"), Fault("flip_stored")
INTERNAL_ERROR = Fault("error", 500, "InternalError")
SLOW_DOWN = Fault("error", 503, "SlowDown")
EXPIRED = Fault("error", 400, "ExpiredToken")
DENIED = Fault("error", 403, "AccessDenied")


def slow(seconds: float) -> Fault:
    return Fault("slow", seconds=seconds)


def trickle(seconds: float) -> Fault:
    return Fault("trickle", seconds=seconds)


def headers(**others: str) -> Fault:
    """Headers of the answer are these: etag="..."; an underscore stands for a hyphen."""
    return Fault("headers", headers=tuple((name.replace("_", "-"), value) for name, value in others.items()))


def always(fault: Fault, *operations: str) -> Faults:
    """Every request of these operations (of all, when none are named) meets the fault."""
    return lambda request: fault if not operations or request.operation in operations else None


def once(fault: Fault, *operations: str) -> Faults:
    """Only the first such request meets the fault."""
    left = [fault]

    def decide(request: Request) -> Fault | None:
        return left.pop() if left and (not operations or request.operation in operations) else None

    return decide


@dataclass
class Server:
    endpoint: str
    client: Any  # boto3's, past the proxy
    bucket: str = BUCKET
    faults: Faults = lambda request: None
    requests: list[Request] = field(default_factory=list)

    @property
    def bucket_url(self) -> str:
        return f"s3://{self.bucket}"

    def count(self, operation: str) -> int:
        return sum(request.operation == operation for request in self.requests)

    def empty(self) -> None:
        """No faults, no requests seen, nothing in the bucket."""
        self.faults = lambda request: None
        self.requests.clear()
        for each in self.client.list_objects_v2(Bucket=self.bucket).get("Contents", ()):
            self.client.delete_object(Bucket=self.bucket, Key=each["Key"])
        for each in self.client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", ()):
            self.client.abort_multipart_upload(Bucket=self.bucket, Key=each["Key"], UploadId=each["UploadId"])

    def stored(self, key: str) -> bytes | None:
        """The object as it is on the server, if there is one."""
        try:
            return self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        except self.client.exceptions.NoSuchKey:
            return None

    def unfinished(self) -> list[str]:
        """The keys of incomplete multipart uploads."""
        return [each["Key"] for each in self.client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", ())]


def set_credentials(patch: pytest.MonkeyPatch) -> None:
    """Credentials that moto takes, and none of this machine's own."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_MAX_ATTEMPTS"):
        patch.delenv(name, raising=False)
    patch.setenv("AWS_ACCESS_KEY_ID", "test-key")
    patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("AWS_CONFIG_FILE", "/dev/null")
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    patch.setenv("NO_PROXY", "127.0.0.1")


@contextmanager
def s3_server() -> Iterator[Server]:
    """A server with one empty bucket; the credentials for it are in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        set_credentials(patch)
        patch.setattr(MotoRequestHandler, "log", lambda *args: None)
        moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        moto.start()
        upstream = "http://{}:{}".format(*moto.get_host_and_port())
        client = boto3.client("s3", endpoint_url=upstream)
        server = Server("", client)
        try:
            _forget_everything(upstream)
            client.create_bucket(Bucket=server.bucket)
            with _proxy(server, *moto.get_host_and_port()) as server.endpoint:
                yield server
        finally:
            forget_clients()
            client.close()
            _forget_everything(upstream)
            moto.stop()


def put_set(server: Server, shards: Path) -> None:
    """A shard set into the bucket, as set/; the requests for it are not counted."""
    folder = open_folder(f"{server.bucket_url}/set", server.endpoint)
    for path in shards.iterdir():
        if path.is_file():
            folder.write(path.name, path.read_bytes())
    server.requests.clear()


def forget_clients() -> None:
    """Close this process's connections; new clients look for credentials anew."""
    s3_ranges.forget_clients()
    s3._kept_file_system.cache_clear()
    S3FileSystem.clear_instance_cache()
    gc.collect()


def _forget_everything(upstream: str) -> None:
    """moto's state belongs to the process and outlives its servers."""
    urllib.request.urlopen(urllib.request.Request(f"{upstream}/moto-api/reset", method="POST")).close()


@contextmanager
def _proxy(server: Server, host: str, port: int) -> Iterator[str]:
    loop = asyncio.new_event_loop()
    tasks: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        tasks.add(task)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while await _serve(server, reader, writer, host, port):
                    pass
        finally:
            tasks.discard(task)
            writer.transport.abort()

    async def stop() -> None:
        listener.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await listener.wait_closed()

    thread = threading.Thread(target=loop.run_forever, name="s3-proxy")
    thread.start()
    listener = asyncio.run_coroutine_threadsafe(asyncio.start_server(connected, "127.0.0.1", 0), loop).result()
    try:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _serve(
    server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int
) -> bool:
    """One request and its answer. False when the connection is to end."""
    start, headers = _parse(await reader.readuntil(b"\r\n\r\n"))
    method, target, _ = start.split(" ", 2)
    if headers.get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    url = urlsplit(target)
    query = dict(parse_qsl(url.query, keep_blank_values=True))
    request = Request(len(server.requests), method, url.path, query, headers, len(body))
    server.requests.append(request)
    fault = server.faults(request)
    kind = fault.kind if fault else None
    if url.scheme:  # it is asked as an HTTP proxy: for moto any server's name is its own
        target = target.removeprefix(f"{url.scheme}://{url.netloc}")
        headers = headers | {"host": f"{host}:{port}"}

    if kind == "drop":
        return False
    if kind in ("flip_request", "flip_stored"):
        body = _flipped(body)
    if fault and kind == "error":
        answer_start, answer = f"HTTP/1.1 {fault.status} Error", _error_xml(fault.code)
        answer_headers = {"content-type": "application/xml"}
    elif kind != "flip_stored" and headers.get("content-md5", "") not in (
        "",
        base64.b64encode(hashlib.md5(body).digest()).decode(),
    ):
        # As S3 does; moto does not look.
        answer_start, answer, answer_headers = "HTTP/1.1 400 Bad Request", _error_xml("BadDigest"), {}
    else:
        answer_start, answer_headers, answer = await _forward(f"{method} {target} HTTP/1.1", headers, body, host, port)
    if kind == "lose":
        return False
    if fault and kind == "slow":
        await asyncio.sleep(fault.seconds)
    if kind == "flip_answer":
        answer = _flipped(answer)
    if kind == "short":
        answer = answer[: len(answer) // 2]
    if fault:
        answer_headers |= fault.headers
    if method != "HEAD":
        answer_headers["content-length"] = str(len(answer))
    answer_headers.pop("transfer-encoding", None)
    answer_headers["connection"] = "keep-alive"
    lines = [answer_start, *(f"{name}: {value}" for name, value in answer_headers.items()), "", ""]
    writer.write("\r\n".join(lines).encode("latin-1"))
    if method == "HEAD":
        answer = b""
    if kind == "truncate":
        writer.write(answer[: len(answer) // 2])
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        return False
    if fault and kind == "trickle":
        for i in range(len(answer)):
            writer.write(answer[i : i + 1])
            await writer.drain()
            await asyncio.sleep(fault.seconds)
        return True
    writer.write(answer)
    await writer.drain()
    return True


async def _forward(
    start: str, headers: dict[str, str], body: bytes, host: str, port: int
) -> tuple[str, dict[str, str], bytes]:
    """The server's own answer, over a connection for this request."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        own = headers | {"connection": "close"}
        own.pop("expect", None)
        lines = [start, *(f"{name}: {value}" for name, value in own.items()), "", ""]
        writer.write("\r\n".join(lines).encode("latin-1") + body)
        answer = await reader.read()
    finally:
        writer.transport.abort()
    head, _, content = answer.partition(b"\r\n\r\n")
    return *_parse(head), content


def _parse(head: bytes) -> tuple[str, dict[str, str]]:
    start, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return start, {name.lower(): value.strip() for name, _, value in pairs}


def _flipped(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :] if body else body


def _error_xml(code: str) -> bytes:
    return (
        f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{code}.</Message>'
        f"<Token-0>{SECRET}</Token-0><RequestId>1</RequestId></Error>"
    ).encode()
