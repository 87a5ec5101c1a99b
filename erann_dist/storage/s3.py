"""The objects of an S3 bucket below a prefix, as a folder: see erann_dist/storage/folder.py."""

import asyncio
import base64
import errno
import functools
import hashlib
import io
import os
import random
import tempfile
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit

from botocore.exceptions import (
    ClientError,
    ConnectionError,
    ConnectTimeoutError,
    EndpointConnectionError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)
from fsspec.asyn import FSTimeoutError, sync
from s3fs.core import S3_RETRYABLE_ERRORS, S3FileSystem

from erann_dist.errors import Unavailable, UserError, naming
from erann_dist.storage.s3_clients import Connection, credentials_stamp, find_connection, s3fs_client
from erann_dist.storage.stream_file import sequential_file

T = TypeVar("T")

# A request that fails in a way that may be transient is repeated, ATTEMPTS times in all, after pauses of about PAUSE_S,
# 2, 4, 8… times PAUSE_S. In any case an operation ends after REQUEST_S plus the time its bytes take at RATE.
ATTEMPTS = 6
PAUSE_S = 0.5
REQUEST_S = 60.0
# A clip that a run on many machines waits for is requested for longer: for about a minute, at PAUSE_S as above.
PATIENT_ATTEMPTS = 9
PATIENT_S = 180.0
LONGEST_PAUSE_S = 16.0
STOP_S = 0.2  # how often a pause checks whether it should stop
RATE = 1e6  # bytes per second
CONNECT_S = 10.0
SILENCE_S = 20.0  # without a byte on a connection
PARALLEL = 4  # concurrent requests in one transfer
RANGE = 16 << 20  # bytes of a ranged read
STREAM_RANGE = 4 << 20  # the same in a stream, which keeps PARALLEL of them in memory
PART = 32 << 20  # bytes of a part of an upload; anything up to this size goes in one request
PART_SIZE = "erann-part-size"  # in an object's metadata

PASSING = (*S3_RETRYABLE_ERRORS, ConnectionError, IncompleteReadError)
EXPIRED_CODES = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
PASSING_CODES = {"BadDigest", "IncompleteBody", "OperationAborted", "RequestTimeout", "XAmzContentSHA256Mismatch"}


@dataclass(frozen=True)
class S3Folder:
    """The objects of a bucket below a prefix. Credentials come from the environment, a profile or the machine's role.

    Every method raises UserError when S3 refuses, when errors persist, and when a response takes too long.
    """

    url: str
    endpoint: str | None = None

    def __str__(self) -> str:
        return self.url

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """The objects whose name in the folder starts with prefix: name -> bytes, sorted by name."""
        found = {}
        query: dict[str, Any] = {"Prefix": self._key(prefix)}
        while True:
            page = self._request("listed", "", "list_objects_v2", **query)
            found.update({self._name(each["Key"]): each["Size"] for each in page.get("Contents", ())})
            if not page.get("IsTruncated"):
                # Consoles create empty objects whose keys end in a slash as "directories".
                return {name: found[name] for name in sorted(found) if name and not name.endswith("/")}
            query["ContinuationToken"] = page["NextContinuationToken"]

    def is_empty(self) -> bool:
        """Whether there is no object in it."""
        return not self._request("listed", "", "list_objects_v2", Prefix=self._key(""), MaxKeys=1).get("Contents")

    def exists(self, name: str) -> bool:
        try:
            self._head("read", name)
        except FileNotFoundError:
            return False
        return True

    def read(self, name: str) -> bytes:
        """The whole content, with the length and checksum that S3 reports. Raises FileNotFoundError."""
        file = io.BytesIO()
        self.fetch(name, file)
        return file.getvalue()

    def read_range(
        self, name: str, start: int, size: int, etag: str | None, stop: threading.Event | None = None
    ) -> bytes:
        """Bytes start .. start + size of the object with that ETag, or any. It retries longer than the other methods.

        stop: when it is set, nothing is retried. Raises FileNotFoundError.
        """
        at = {"Bucket": self._bucket, "Key": self._key(name)} | ({"IfMatch": etag} if etag else {})

        async def ask(s3: S3FileSystem) -> bytes:
            return await _retried(lambda: _range(s3, start, start + size, at), PATIENT_ATTEMPTS, stop)

        try:
            return self._wait("read", name, PATIENT_S, ask)
        except _Changed:
            raise self._error("read", name, "it is no longer the object that this run began with") from None

    def size_and_version(self, name: str, stop: threading.Event | None = None) -> tuple[int, str]:
        """The object's size in bytes, and its ETag. Retries as long as read_range. Raises FileNotFoundError."""
        head = self._head("read", name, PATIENT_ATTEMPTS, PATIENT_S, stop)
        return head["ContentLength"], head["ETag"]

    def version(self, name: str) -> str:
        """A string that changes when the object does: its ETag. Raises FileNotFoundError."""
        return self.size_and_version(name)[1]

    @contextmanager
    def reading(self, name: str) -> Iterator[BinaryIO]:
        """A nameless local copy, with the length and checksum that S3 reports. Raises FileNotFoundError."""
        with naming(tempfile.gettempdir()), tempfile.TemporaryFile() as file:
            self.fetch(name, file)
            file.seek(0)
            yield file

    def stream(self, name: str, start: int = 0, end: int | None = None) -> BinaryIO:
        """Bytes start .. end of the object, for sequential reading, as a context manager.

        PARALLEL ranges of it are requested ahead, and retried as long as by read_range. A shorter object ends earlier.
        Raises FileNotFoundError; reading raises UserError, also when the object changes meanwhile.
        """
        size, etag = self.size_and_version(name)
        pieces = self._pieces(name, etag, start, size if end is None else min(end, size))
        return sequential_file(pieces, f"{self.url}/{name}")

    def fetch(self, name: str, file: BinaryIO, on_progress: Callable[[int], None] = lambda done: None) -> None:
        """Copy the content, all of one version and with the length and checksum that S3 reports, to an open file.

        on_progress gets the number of bytes copied so far, and may raise. Raises FileNotFoundError.
        """
        for _ in range(ATTEMPTS):
            head = self._head("read", name)
            problem = "it changed while it was read"
            with suppress(_Changed):
                self._fetch_version(name, head, file, on_progress)
                if _is_content_of(file, head):
                    return
                problem = "what arrives does not match its checksum"
        raise self._error("read", name, f"{problem}, {ATTEMPTS} times in a row")

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """A new local file to write, read and seek in; uploaded at the end, unless the body raises. Don't close it."""
        with naming(tempfile.gettempdir()), tempfile.TemporaryFile() as file:
            yield file
            self._store(name, file)

    def write(self, name: str, data: bytes) -> None:
        self._store(name, io.BytesIO(data))

    def delete(self, name: str) -> None:
        """Delete an object, if it exists."""
        self._request("deleted", name, "delete_object", Key=self._key(name))

    def discard_unfinished(self, prefix: str = "") -> None:
        """Abort the uploads that killed processes left of files whose name starts with prefix; an upload still in
        progress fails."""
        query: dict[str, Any] = {"Prefix": self._key(prefix)}
        while True:
            page = self._request("cleared of unfinished uploads", "", "list_multipart_uploads", **query)
            for upload in page.get("Uploads", ()):
                self._abort(self._name(upload["Key"]), upload["UploadId"])
            if not page.get("IsTruncated"):
                return
            query |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    @property
    def _bucket(self) -> str:
        return self.url.removeprefix("s3://").partition("/")[0]

    def _key(self, name: str) -> str:
        prefix = self.url.removeprefix("s3://").partition("/")[2]
        return f"{prefix}/{name}" if prefix else name

    def _name(self, key: str) -> str:
        return key.removeprefix(self._key(""))

    def _pieces(self, name: str, etag: str, start: int, end: int) -> Generator[bytes, None, None]:
        """The bytes start .. end of the object with that ETag, range by range."""
        at = {"Bucket": self._bucket, "Key": self._key(name), "IfMatch": etag}
        starts = iter(range(start, end, STREAM_RANGE))
        ahead: deque[asyncio.Task[bytes]] = deque()

        async def fetch(s3: S3FileSystem, first: int) -> bytes:
            return await _retried(lambda: _range(s3, first, min(first + STREAM_RANGE, end), at), PATIENT_ATTEMPTS)

        async def next_piece(s3: S3FileSystem) -> bytes:
            for first in islice(starts, PARALLEL - len(ahead)):
                ahead.append(asyncio.create_task(fetch(s3, first)))
                # The failure that comes first in the object ends the stream; asyncio would log the others.
                ahead[-1].add_done_callback(lambda task: task.cancelled() or task.exception())
            return await ahead.popleft() if ahead else b""

        try:
            while data := self._wait("read", name, PATIENT_S, next_piece):
                yield data
        except _Changed:
            raise self._error("read", name, "it was changed meanwhile; run the same command again") from None
        finally:
            for task in ahead:
                task.get_loop().call_soon_threadsafe(task.cancel)

    def _fetch_version(
        self, name: str, head: dict[str, Any], file: BinaryIO, on_progress: Callable[[int], None]
    ) -> None:
        size, done = head["ContentLength"], 0
        at = {"Bucket": self._bucket, "Key": self._key(name), "IfMatch": head["ETag"]}
        file.seek(0)
        file.truncate()

        async def fetch(s3: S3FileSystem) -> None:
            async def fetch_range(start: int) -> None:
                nonlocal done
                data = await _retried(lambda: _range(s3, start, min(start + RANGE, size), at))
                file.seek(start)
                file.write(data)
                done += len(data)
                on_progress(done)

            await _few_at_once(fetch_range, range(0, size, RANGE))

        self._wait("read", name, REQUEST_S + size / RATE, fetch)

    def _store(self, name: str, file: BinaryIO) -> None:
        """Upload the file's content as the object `name`."""
        md5s = _md5s(file, PART)
        for _ in range(ATTEMPTS):
            # Not found: another process aborted the upload, or the response to its completion was lost.
            with suppress(FileNotFoundError):
                self._send(name, file, md5s)
            with suppress(FileNotFoundError):
                if self._holds(name, file, _etag(md5s)):
                    return
        self.delete(name)
        raise self._error("written", name, f"what S3 stored is not what was sent, {ATTEMPTS} times in a row")

    def _send(self, name: str, file: BinaryIO, md5s: list[bytes]) -> None:
        key = self._key(name)
        if len(md5s) == 1:
            file.seek(0)
            body = {"Body": file.read(), "ContentMD5": base64.b64encode(md5s[0]).decode()}
            self._request("written", name, "put_object", Key=key, **body, seconds=REQUEST_S + PART / RATE)
            return
        # The size of the parts is stored too, because a reader needs it to check the ETag.
        metadata = {PART_SIZE: str(PART)}
        begun = self._request("written", name, "create_multipart_upload", Key=key, Metadata=metadata)
        upload = {"Bucket": self._bucket, "Key": key, "UploadId": begun["UploadId"]}

        async def send(s3: S3FileSystem) -> None:
            parts: list[dict[str, Any]] = [{"PartNumber": i + 1} for i in range(len(md5s))]

            async def send_part(i: int) -> None:
                file.seek(i * PART)
                body = {"Body": file.read(PART), "ContentMD5": base64.b64encode(md5s[i]).decode()}
                answer = await _retried(lambda: s3._call_s3("upload_part", PartNumber=i + 1, **body, **upload))
                parts[i]["ETag"] = answer["ETag"]

            await _few_at_once(send_part, range(len(parts)))
            whole = {"MultipartUpload": {"Parts": parts}}
            await _retried(lambda: s3._call_s3("complete_multipart_upload", **whole, **upload))

        try:
            self._wait("written", name, REQUEST_S + PART * len(md5s) / RATE, send)
        except BaseException:
            with suppress(UserError):  # the first error is more informative
                self._abort(name, begun["UploadId"])
            raise

    def _holds(self, name: str, file: BinaryIO, etag: str) -> bool:
        """Whether the object is the file. Where its ETag is not an MD5 (encryption with a KMS key), it is read back."""
        head = self._head("written", name)
        if head["ContentLength"] != file.seek(0, os.SEEK_END):
            return False
        if head["ETag"].strip('"') == etag:
            return True
        with self.reading(name) as stored:
            return _md5s(stored, PART) == _md5s(file, PART)

    def _head(
        self,
        done: str,
        name: str,
        attempts: int | None = None,
        seconds: float | None = None,
        stop: threading.Event | None = None,
    ) -> dict[str, Any]:
        """Size, ETag and more about the object. Raises FileNotFoundError."""
        at = {"Bucket": self._bucket, "Key": self._key(name)}

        async def ask(s3: S3FileSystem) -> dict[str, Any]:
            try:
                return await s3._call_s3("head_object", **at)
            except OSError as error:
                # A refused HEAD has no body with the reason: no such key or no such bucket, denied or expired.
                if not isinstance(error.__cause__, ClientError) or _may_pass(error.__cause__):
                    raise
                answer = await s3._call_s3("get_object", **at)
                answer["Body"].close()
                return answer

        return self._wait(done, name, seconds or REQUEST_S, lambda s3: _retried(lambda: ask(s3), attempts, stop))

    def _abort(self, name: str, upload: str) -> None:
        with suppress(FileNotFoundError):  # finished or aborted meanwhile
            self._request("cleared", name, "abort_multipart_upload", Key=self._key(name), UploadId=upload)

    def _request(
        self, done: str, name: str, method: str, seconds: float | None = None, **fields: Any
    ) -> dict[str, Any]:
        """Send one request and return its response."""

        async def ask(s3: S3FileSystem) -> dict[str, Any]:
            return await _retried(lambda: s3._call_s3(method, Bucket=self._bucket, **fields))

        return self._wait(done, name, seconds or REQUEST_S, ask)

    def _wait(self, done: str, name: str, seconds: float, work: Callable[[S3FileSystem], Awaitable[T]]) -> T:
        """Run work on s3fs's event loop for at most that many seconds; a failure becomes a readable error."""
        s3 = _file_system(self.endpoint)
        kind: type[UserError]
        try:
            return sync(s3.loop, work, s3, timeout=seconds)
        except FSTimeoutError:
            reason, kind = f"no answer within {round(seconds, 1):g} s: check the network and the endpoint", Unavailable
        except _Missing:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.url}/{name}") from None
        except _Refused as error:
            reason, kind = str(error), Unavailable if error.passes else UserError
        raise self._error(done, name, reason, kind)

    def _error(self, done: str, name: str, reason: str, kind: type[UserError] = UserError) -> UserError:
        return kind(f"{self.url}/{name}".rstrip("/") + f" could not be {done}: {reason}")


class _Refused(Exception):
    """A permanent failure, of a response or the lack of one. The message is the reason and what to do."""

    def __init__(self, reason: str, passes: bool = False) -> None:
        """passes: all attempts failed, but a later one may succeed."""
        super().__init__(reason)
        self.passes = passes


class _Missing(Exception):
    """No such object, or no such upload."""


class _Changed(Exception):
    """The object no longer has the requested ETag."""


class CutShort(Exception):
    """A response that claims to be complete and is not."""


def connection(endpoint: str | None, bucket: str) -> Connection:
    """How s3fs requests the bucket's objects, for another client. Raises what s3fs raises."""
    s3 = _file_system(endpoint)
    return cast(Connection, sync(s3.loop, find_connection, s3, bucket, timeout=REQUEST_S))


def _file_system(endpoint: str | None) -> S3FileSystem:
    return _kept_file_system(endpoint, os.getpid(), CONNECT_S, SILENCE_S)


@functools.cache
def _kept_file_system(endpoint: str | None, process: int, connect_s: float, silence_s: float) -> S3FileSystem:
    """The s3fs client of this process.

    A forked process keeps its parent's client too: if it were collected there, closing its connections would remove
    them from the epoll that both processes share, and the parent would wait for responses in vain.
    """
    return s3fs_client(endpoint, connect_s, silence_s)


async def _retried(
    attempt: Callable[[], Awaitable[T]], attempts: int | None = None, stop: threading.Event | None = None
) -> T:
    """The result of attempt(), repeated after failures that may be transient. Raises _Missing, _Changed or _Refused.

    stop: when it is set, nothing is repeated.
    """
    attempts = attempts or ATTEMPTS
    for i in range(attempts):
        if i:
            again = time.monotonic() + min(PAUSE_S * 2 ** (i - 1), LONGEST_PAUSE_S) * random.uniform(0.5, 1.5)
            while (left := again - time.monotonic()) > 0 and not (stop and stop.is_set()):
                await asyncio.sleep(min(left, STOP_S))
            if stop and stop.is_set():
                break
        keys = credentials_stamp()
        try:
            return await attempt()
        except Exception as error:
            # s3fs turns an error response into an OSError and leaves the response, with its code, as the cause.
            cause = error.__cause__ if isinstance(error.__cause__, ClientError) else error
            renewed = _has_expired(cause) and credentials_stamp() != keys
            if not (_may_pass(cause) or renewed):
                break
    raise _explained(cause, attempts)


def _has_expired(error: BaseException) -> bool:
    return isinstance(error, ClientError) and error.response["Error"]["Code"] in EXPIRED_CODES


def _may_pass(error: BaseException) -> bool:
    if not isinstance(error, ClientError):
        return isinstance(error, (*PASSING, CutShort))
    status = error.response["ResponseMetadata"]["HTTPStatusCode"]
    return status >= 500 or status == 429 or error.response["Error"]["Code"] in PASSING_CODES


def _explained(error: BaseException, attempts: int) -> Exception:
    """The error as codes and botocore's own messages; the rest of a response can contain session tokens."""
    again = f", {attempts} times in a row" if _may_pass(error) else ""
    if isinstance(error, ClientError):
        code = error.response["Error"]["Code"]
        match code:
            case "NoSuchKey" | "NoSuchUpload" | "404":
                return _Missing()
            case "PreconditionFailed" | "412":
                return _Changed()
            case _ if code in EXPIRED_CODES:
                reason = "the credentials have expired: renew them and run the same command again"
            case "InvalidAccessKeyId" | "InvalidToken" | "SignatureDoesNotMatch":
                reason = "S3 does not know these credentials: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            case "AccessDenied" | "AllAccessDisabled" | "403":
                reason = (
                    "access denied: these credentials may not do it, or the bucket's name is wrong; a bucket whose "
                    "requester pays needs AWS_REQUEST_PAYER=requester"
                )
            case "NoSuchBucket":
                reason = "no such bucket: check the URL and the endpoint, or create it"
            case "AuthorizationHeaderMalformed" | "IllegalLocationConstraintException" | "PermanentRedirect":
                reason = "the bucket is in another region: set AWS_DEFAULT_REGION"
            case _:
                reason = "S3 can't do it now: try again later" if again else "S3 refuses"
        return _Refused(f"{reason} ({code}{again})", bool(again))
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return _Refused(
            "no credentials for S3: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a "
            "public bucket AWS_NO_SIGN_REQUEST=YES"
        )
    if isinstance(error, EndpointConnectionError | ConnectTimeoutError):
        server = urlsplit(error.kwargs["endpoint_url"]).netloc
        return _Refused(f"could not connect to {server}{again}: check the endpoint and the network", bool(again))
    if again:
        return _Refused(f"no answer, or one cut short ({type(error).__name__}{again}): check the network", True)
    return _Refused(" ".join(str(error).split()))


async def _few_at_once(do: Callable[[int], Awaitable[None]], values: Iterable[int]) -> None:
    """do(value) for all values, PARALLEL at a time; the first failure cancels the others and is raised."""
    rest = iter(values)

    async def work() -> None:
        for value in rest:
            await do(value)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(PARALLEL):
                group.create_task(work())
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None


async def _range(s3: S3FileSystem, start: int, end: int, at: dict[str, str]) -> bytes:
    answer = await s3._call_s3("get_object", Range=f"bytes={start}-{end - 1}", **at)
    async with answer["Body"] as body:
        data: bytes = await body.read()
    if len(data) != end - start:
        raise CutShort
    return data


def _is_content_of(file: BinaryIO, head: dict[str, Any]) -> bool:
    """Whether the file has the object's checksum, if the ETag is a checksum."""
    etag = head["ETag"].strip('"')
    if head.get("ServerSideEncryption", "").startswith("aws:"):  # a KMS key: no MD5 of the plain text
        return True
    if "-" not in etag:
        md5 = _md5(b"")
        file.seek(0)
        for data in iter(lambda: file.read(RANGE), b""):
            md5.update(data)
        return md5.hexdigest() == etag
    part = head["Metadata"].get(PART_SIZE)
    return part is None or _etag(_md5s(file, int(part))) == etag


def _md5s(file: BinaryIO, part: int) -> list[bytes]:
    """The MD5 of each part of the file; an empty file is one part."""
    file.seek(0)
    return [_md5(data).digest() for data in iter(lambda: file.read(part), b"")] or [_md5(b"").digest()]


def _etag(md5s: list[bytes]) -> str:
    """The ETag that S3 gives an object uploaded in these parts."""
    return md5s[0].hex() if len(md5s) == 1 else f"{_md5(b''.join(md5s)).hexdigest()}-{len(md5s)}"


def _md5(data: bytes) -> "hashlib._Hash":
    return hashlib.md5(data, usedforsecurity=False)
