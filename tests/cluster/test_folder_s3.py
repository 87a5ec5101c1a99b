"""A folder in an S3 bucket, over a real connection, with the faults that S3 and networks have."""

import errno
import io
import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import md5
from multiprocessing.connection import Connection

import pytest
from hypothesis import HealthCheck, given, settings

from erann_dist.errors import UserError
from erann_dist.storage.folder import Folder, open_folder
from erann_dist.storage.s3 import S3Folder
from tests.erann_dist.storage.test_folder import MOVES, Failure, fail_while_writing, play
from tests.support.s3 import (
    DENIED,
    DROP,
    EXPIRED,
    FLIP_ANSWER,
    FLIP_REQUEST,
    FLIP_STORED,
    INTERNAL_ERROR,
    LOSE,
    SECRET,
    SHORT,
    SLOW_DOWN,
    TRUNCATE,
    Fault,
    Request,
    Server,
    always,
    forget_clients,
    headers,
    once,
    s3_server,
    slow,
    trickle,
)

ATTEMPTS = 3
SMALL = bytes(range(256))
LARGE = bytes(i * i % 251 for i in range(400_000))  # four ranges, three parts
LATE = slow(1)


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The server, empty, and limits that suit small files and short waits."""
    monkeypatch.setattr("erann_dist.storage.s3.ATTEMPTS", ATTEMPTS)
    monkeypatch.setattr("erann_dist.storage.s3.PAUSE_S", 0.001)
    monkeypatch.setattr("erann_dist.storage.s3.SILENCE_S", 0.3)
    monkeypatch.setattr("erann_dist.storage.s3.RANGE", 100_000)
    monkeypatch.setattr("erann_dist.storage.s3.PART", 150_000)
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)
    running.empty()
    yield running
    running.empty()


@pytest.fixture
def folder(server: Server) -> Folder:
    return open_folder(f"{server.bucket_url}/set", server.endpoint)


def refusal(action: Callable[[], object], name: str = "/x") -> str:
    """The one line with which the action fails."""
    with pytest.raises(UserError) as error:
        action()
    line = str(error.value)
    assert line.startswith(f"s3://sounds/set{name} could not be ")
    assert "\n" not in line
    assert SECRET not in line
    assert SECRET.encode() not in pickle.dumps(error.value)
    return line


def read_by_name(folder: Folder) -> bytes:
    with folder.reading("x") as file:
        return file.read()


def write_by_name(folder: Folder, data: bytes) -> None:
    with folder.writing("x") as file:
        file.write(data)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves=MOVES)
def test_holds_what_was_written(server: Server, moves: list[tuple[str, str, bytes]]) -> None:
    server.empty()
    play(open_folder(f"{server.bucket_url}/set", server.endpoint), moves)


def test_the_whole_bucket_is_a_folder_too(server: Server) -> None:
    bucket = open_folder(server.bucket_url, server.endpoint)
    bucket.write("set/x", SMALL)
    assert bucket.sizes() == {"set/x": 256}
    assert open_folder(f"{server.bucket_url}/set", server.endpoint).read("x") == SMALL
    assert open_folder(f"{server.bucket_url}/se", server.endpoint).sizes() == {}


def test_lists_page_by_page_and_leaves_out_directory_marks(
    server: Server, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "2")
    for key in ("set/", "set/sub/", "set/a", "set/b", "set/sub/c", "set/d", "set/e"):
        server.client.put_object(Bucket=server.bucket, Key=key, Body=b"1" * (not key.endswith("/")))
    assert list(folder.sizes().items()) == [("a", 1), ("b", 1), ("d", 1), ("e", 1), ("sub/c", 1)]
    assert server.count("ListObjectsV2") == 4


def test_a_large_file_goes_in_parts_and_comes_in_ranges(running: Server) -> None:
    """With the limits as they are."""
    running.empty()
    folder = open_folder(f"{running.bucket_url}/set", running.endpoint)
    block = os.urandom(1 << 20)
    with folder.writing("x") as file:
        for i in range(130):
            file.write(i.to_bytes(8, "big") + block)
        size = file.tell()
    assert (running.count("UploadPart"), running.count("PutObject")) == (5, 0)
    assert folder.sizes() == {"x": size}
    with folder.reading("x") as file:
        for i in range(130):
            assert file.read(8 + len(block)) == i.to_bytes(8, "big") + block
        assert file.read() == b""
    assert running.count("GetObject") == 9
    assert running.unfinished() == []
    running.empty()


# What each operation meets: once, and the work is done all the same; always, and it ends with one line.
DURING_READS = [
    (fault, operation) for operation in ("HeadObject", "GetObject") for fault in (DROP, INTERNAL_ERROR, SLOW_DOWN, LATE)
] + [(fault, "GetObject") for fault in (TRUNCATE, SHORT, FLIP_ANSWER)]
DURING_WRITES = [
    (fault, operation)
    for operation in ("PutObject", "HeadObject")
    for fault in (DROP, LOSE, INTERNAL_ERROR, SLOW_DOWN, LATE)
] + [(fault, "PutObject") for fault in (FLIP_REQUEST, FLIP_STORED)]
DURING_UPLOADS = [
    (fault, operation)
    for operation in ("CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload")
    for fault in (DROP, LOSE, INTERNAL_ERROR, SLOW_DOWN, LATE)
] + [(fault, "UploadPart") for fault in (FLIP_REQUEST, FLIP_STORED)]


def named(value: object) -> str:
    return f"{value.kind}{value.code}" if isinstance(value, Fault) else ""


@pytest.mark.parametrize(("fault", "operation"), DURING_READS, ids=named)
@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_reads_outlast_a_fault(server: Server, folder: Folder, data: bytes, fault: Fault, operation: str) -> None:
    folder.write("x", data)
    for read in (lambda: folder.read("x"), lambda: read_by_name(folder)):
        server.requests.clear()
        assert read() == data
        usual = server.count(operation)
        server.requests.clear()
        server.faults = once(fault, operation)
        assert read() == data
        assert server.count(operation) > usual
        server.faults = always(headers())


@pytest.mark.parametrize(("fault", "operation"), DURING_READS, ids=named)
@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_reads_end_when_a_fault_stays(
    server: Server, folder: Folder, data: bytes, fault: Fault, operation: str
) -> None:
    folder.write("x", data)
    server.faults = always(fault, operation)
    for read in (lambda: folder.read("x"), lambda: read_by_name(folder)):
        server.requests.clear()
        assert f"{ATTEMPTS} times in a row" in refusal(read)
        # aiohttp itself sends an idempotent request once more when a kept connection breaks; four ranges go at once.
        assert server.count(operation) <= 2 * ATTEMPTS * 4


@pytest.mark.parametrize(("fault", "operation"), DURING_WRITES, ids=named)
def test_small_writes_outlast_a_fault(server: Server, folder: Folder, fault: Fault, operation: str) -> None:
    for write in (lambda: folder.write("x", SMALL), lambda: write_by_name(folder, SMALL)):
        server.requests.clear()
        server.faults = once(fault, operation)
        write()
        assert server.stored("set/x") == SMALL
        assert server.count(operation) > 1
        folder.delete("x")


@pytest.mark.parametrize(("fault", "operation"), DURING_WRITES, ids=named)
def test_small_writes_end_when_a_fault_stays(server: Server, folder: Folder, fault: Fault, operation: str) -> None:
    server.faults = always(fault, operation)
    for write in (lambda: folder.write("x", SMALL), lambda: write_by_name(folder, SMALL)):
        server.requests.clear()
        assert f"{ATTEMPTS} times in a row" in refusal(write)
        assert server.count(operation) <= 2 * ATTEMPTS
        # Where S3 did its part and could not say so, the object is there, and whole.
        done = operation == "HeadObject" or fault in (LOSE, LATE)
        assert server.stored("set/x") == (SMALL if done else None)


@pytest.mark.parametrize(("fault", "operation"), DURING_UPLOADS, ids=named)
def test_uploads_in_parts_outlast_a_fault(server: Server, folder: Folder, fault: Fault, operation: str) -> None:
    server.faults = once(fault, operation)
    write_by_name(folder, LARGE)
    assert server.stored("set/x") == LARGE
    assert server.count(operation) > (3 if operation == "UploadPart" else 1)
    forget_lost_starts(server, folder, fault, operation)
    assert server.unfinished() == []


@pytest.mark.parametrize(("fault", "operation"), DURING_UPLOADS, ids=named)
def test_uploads_in_parts_end_when_a_fault_stays(server: Server, folder: Folder, fault: Fault, operation: str) -> None:
    server.faults = always(fault, operation)
    line = refusal(lambda: write_by_name(folder, LARGE))
    assert f"{ATTEMPTS} times in a row" in line
    done = operation == "CompleteMultipartUpload" and fault in (LOSE, LATE)
    assert server.stored("set/x") == (LARGE if done else None)
    forget_lost_starts(server, folder, fault, operation)
    assert server.unfinished() == []


def forget_lost_starts(server: Server, folder: Folder, fault: Fault, operation: str) -> None:
    """An upload whose start was not heard of has no known id: only discard_unfinished finds it."""
    if operation == "CreateMultipartUpload" and fault in (LOSE, LATE):
        server.faults = always(headers())
        assert server.unfinished() != []
        folder.discard_unfinished()


def test_the_deadline_ends_what_drips(server: Server, folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write("x", SMALL)
    monkeypatch.setattr("erann_dist.storage.s3.REQUEST_S", 0.5)
    server.faults = always(trickle(0.1), "GetObject")  # never silent for SILENCE_S
    assert "no answer within 0.5 s" in refusal(lambda: folder.read("x"))
    server.faults = always(trickle(0.1), "ListObjectsV2")
    assert "no answer within 0.5 s" in refusal(folder.sizes, "")


def test_the_deadline_aborts_an_upload(server: Server, folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("erann_dist.storage.s3.REQUEST_S", 3)  # a busy machine begins the upload in that
    monkeypatch.setattr("erann_dist.storage.s3.SILENCE_S", 60)
    server.faults = lambda request: slow(60) if request.query.get("partNumber") == "2" else None
    assert "no answer within " in refusal(lambda: write_by_name(folder, LARGE))
    assert server.stored("set/x") is None
    assert server.count("AbortMultipartUpload") == 1
    assert server.unfinished() == []


def test_lists_and_deletes_outlast_a_fault(server: Server, folder: Folder) -> None:
    folder.write("x", SMALL)
    for fault in (DROP, LOSE, TRUNCATE, SHORT, INTERNAL_ERROR, SLOW_DOWN, LATE):
        server.faults = once(fault, "ListObjectsV2")
        assert folder.sizes() == {"x": 256}
    for fault in (DROP, LOSE, INTERNAL_ERROR, SLOW_DOWN, LATE):
        server.faults = once(fault, "DeleteObject")
        folder.write("x", SMALL)
        folder.delete("x")
        assert server.stored("set/x") is None


@pytest.mark.parametrize("fault", [DROP, TRUNCATE, SHORT, INTERNAL_ERROR, SLOW_DOWN, LATE], ids=named)
def test_lists_end_when_a_fault_stays(server: Server, folder: Folder, fault: Fault) -> None:
    folder.write("x", SMALL)
    server.faults = always(fault, "ListObjectsV2")
    assert f"{ATTEMPTS} times in a row" in refusal(folder.sizes, "")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(EXPIRED, "expired: renew them and run the same command again (ExpiredToken)"), (DENIED, "access denied")],
    ids=named,
)
def test_a_refusal_is_not_repeated(server: Server, folder: Folder, fault: Fault, reason: str) -> None:
    folder.write("x", SMALL)
    server.faults = always(fault)
    for action in (
        lambda: folder.read("x"),
        lambda: read_by_name(folder),
        lambda: folder.exists("x"),
        lambda: folder.write("x", LARGE),
        lambda: folder.delete("x"),
    ):
        server.requests.clear()
        assert reason in refusal(action)
        # A HEAD can't say why, so a GET asks again; after status 400 botocore asks for the bucket's region in between.
        assert len(server.requests) <= 3
    assert reason in refusal(folder.sizes, "")
    assert reason in refusal(folder.discard_unfinished, "")


def test_credentials_that_expire_during_an_upload(server: Server, folder: Folder) -> None:
    server.faults = lambda request: EXPIRED if request.query.get("partNumber") == "3" else None
    assert "expired" in refusal(lambda: write_by_name(folder, LARGE))
    assert server.stored("set/x") is None
    assert server.unfinished() == []


def test_a_failure_while_writing_asks_nothing_of_the_server(server: Server, folder: Folder) -> None:
    with pytest.raises(Failure):
        fail_while_writing(folder, "x", LARGE, Failure())
    assert server.requests == []


def test_an_object_changed_while_it_is_read_is_read_anew(server: Server, folder: Folder) -> None:
    new = LARGE[::-1]
    folder.write("x", LARGE)
    seen: list[Request] = []

    def change(request: Request) -> None:
        if request.operation == "GetObject":
            seen.append(request)
            if len(seen) == 3:
                server.client.put_object(Bucket=server.bucket, Key="set/x", Body=new)

    server.faults = change
    assert read_by_name(folder) == new
    assert seen[0].headers["if-match"] != seen[-1].headers["if-match"]


def test_an_object_that_keeps_changing_is_not_read(server: Server, folder: Folder) -> None:
    folder.write("x", LARGE)

    def change(request: Request) -> None:
        if request.operation == "GetObject":
            server.client.put_object(Bucket=server.bucket, Key="set/x", Body=os.urandom(400_000))

    server.faults = change
    assert "it changed while it was read, 3 times in a row" in refusal(lambda: folder.read("x"))


def test_an_object_deleted_while_it_is_read_is_not_found(server: Server, folder: Folder) -> None:
    folder.write("x", LARGE)

    def delete(request: Request) -> None:
        if request.operation == "GetObject":
            server.client.delete_object(Bucket=server.bucket, Key="set/x")

    server.faults = delete
    with pytest.raises(FileNotFoundError, match="s3://sounds/set/x"):
        folder.read("x")


def test_an_upload_aborted_by_another_process_begins_anew(server: Server, folder: Folder) -> None:
    aborted: list[str] = []

    def abort(request: Request) -> Fault | None:
        upload = request.query.get("uploadId")
        if request.operation == "UploadPart" and upload and not aborted:
            aborted.append(upload)
            server.client.abort_multipart_upload(Bucket=server.bucket, Key="set/x", UploadId=upload)
        return Fault("error", 404, "NoSuchUpload") if upload in aborted else None

    server.faults = abort
    write_by_name(folder, LARGE)
    assert aborted
    assert server.stored("set/x") == LARGE
    assert server.unfinished() == []


@pytest.fixture
def encrypting(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The bucket encrypts with a KMS key: ETags look like MD5s and are none."""
    rule = {"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "aws:kms"}}
    at = {"Bucket": server.bucket}
    server.client.put_bucket_encryption(**at, ServerSideEncryptionConfiguration={"Rules": [rule]})
    monkeypatch.setattr("moto.s3.models.FakeKey.etag", property(lambda key: f'"{md5(key.value + b"key").hexdigest()}"'))
    yield
    server.client.delete_bucket_encryption(**at)


@pytest.mark.usefixtures("encrypting")
@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_an_etag_that_is_no_checksum(server: Server, folder: Folder, data: bytes) -> None:
    folder.write("x", data)
    assert server.count("GetObject") > 0  # read back
    assert folder.read("x") == data
    server.faults = once(FLIP_STORED, "PutObject", "UploadPart")
    folder.write("x", data)
    assert server.stored("set/x") == data
    server.faults = always(FLIP_STORED, "PutObject", "UploadPart")
    assert "what S3 stored is not what was sent" in refusal(lambda: folder.write("x", data))
    assert server.stored("set/x") is None


def test_an_object_of_anothers_parts_is_read(server: Server, folder: Folder) -> None:
    """Its ETag is a checksum of parts of unknown size: the lengths are all there is to check."""
    at = {"Bucket": server.bucket, "Key": "set/x"}
    upload = at | {"UploadId": server.client.create_multipart_upload(**at)["UploadId"]}
    cuts = [0, 70_001, 300_000, len(LARGE)]
    parts = [
        {
            "PartNumber": i + 1,
            "ETag": server.client.upload_part(PartNumber=i + 1, Body=LARGE[cuts[i] : cuts[i + 1]], **upload)["ETag"],
        }
        for i in range(3)
    ]
    server.client.complete_multipart_upload(MultipartUpload={"Parts": parts}, **upload)
    assert folder.read("x") == LARGE
    server.faults = once(SHORT, "GetObject")
    assert folder.read("x") == LARGE
    server.faults = always(SHORT, "GetObject")
    assert "cut short" in refusal(lambda: folder.read("x"))


def test_discards_unfinished_uploads_of_this_folder_only(server: Server, folder: Folder) -> None:
    for key in ("set/x", "set/x", "set/deep/y", "set2/z"):
        server.client.create_multipart_upload(Bucket=server.bucket, Key=key)
    folder.write("x", SMALL)
    folder.discard_unfinished()
    assert server.unfinished() == ["set2/z"]
    assert folder.read("x") == SMALL


def test_a_bucket_that_does_not_exist(server: Server) -> None:
    folder = open_folder("s3://soundz/set", server.endpoint)
    actions: list[Callable[[], object]] = [
        folder.sizes,
        folder.discard_unfinished,
        lambda: folder.exists("x"),
        lambda: folder.read("x"),
        lambda: folder.write("x", SMALL),
        lambda: write_by_name(folder, LARGE),
        lambda: folder.delete("x"),
    ]
    for action in actions:
        with pytest.raises(UserError, match=r"^s3://soundz/set.* could not be .*: no such bucket"):
            action()


def test_no_credentials(server: Server, folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_clients()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "no credentials for S3: set AWS_ACCESS_KEY_ID" in refusal(lambda: folder.read("x"))
    assert server.requests == []
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    forget_clients()
    assert "nobody" in refusal(lambda: folder.write("x", b""))
    forget_clients()


def test_nobody_listens_at_the_endpoint(server: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    folder = open_folder(f"{server.bucket_url}/set", f"http://{address}")
    assert f"could not connect to {address}, {ATTEMPTS} times in a row" in refusal(folder.sizes, "")


def test_the_endpoint_comes_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    open_folder(f"{server.bucket_url}/set").write("x", SMALL)
    assert server.stored("set/x") == SMALL


def test_a_used_folder_travels_without_credentials(server: Server, folder: Folder) -> None:
    folder.write("x", SMALL)
    sent = pickle.dumps(folder)
    assert SECRET.encode() not in sent
    assert b"test-key" not in sent
    assert len(sent) < 300
    assert SECRET not in repr(folder)
    arrived = pickle.loads(sent)
    assert arrived == S3Folder(f"{server.bucket_url}/set", server.endpoint)
    assert arrived.read("x") == SMALL


def test_threads_share_a_folder(folder: Folder) -> None:
    def there_and_back(i: int) -> bytes:
        folder.write(f"{i}", bytes([i]) * 200_000)
        return folder.read(f"{i}")

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(there_and_back, range(16))) == [bytes([i]) * 200_000 for i in range(16)]


def _read_to(pipe: Connection, folder: Folder) -> None:
    pipe.send(folder.read("x"))


def test_works_in_a_forked_process(folder: Folder) -> None:
    folder.write("x", LARGE)  # the parent's connections are open
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_read_to, args=(there, folder))
    child.start()
    try:
        assert here.poll(60)
        assert here.recv() == LARGE
    finally:
        child.kill()
        child.join()
    assert folder.read("x") == LARGE


class FullDisk(io.BytesIO):
    def write(self, data: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_stays_an_oserror(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write("x", LARGE)
    monkeypatch.setattr("tempfile.TemporaryFile", FullDisk)
    with pytest.raises(OSError, match="No space left") as error:
        read_by_name(folder)
    assert not isinstance(error.value, UserError)
