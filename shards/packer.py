"""Packs rows into a tar in a child process: a decoder that crashes or hangs costs one clip, not the shard."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import traceback
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, BinaryIO

from erann_dist.environment import KEEP_MEMORY, end_with_parent
from erann_dist.errors import UserError
from shards.clip import Packing, Rejected, pack_clip
from shards.sources.rows import SourceRow

_PATIENCE_SECONDS = 300.0  # without a sign of life; the network disk under a file may be slow
_IN_MEMORY_BYTES = 64 << 20  # a longer packed clip goes through a temporary file
_BLOCK = tarfile.BLOCKSIZE
# Errors that are no file's fault: an incompatible library version, or a bug in this program.
_OWN_FAULTS = (TypeError, AttributeError, NameError, ImportError, AssertionError)


@dataclass(frozen=True)
class RowsToPack:
    """The work of a packing process."""

    rows: list[SourceRow]
    label_ids: list[str]
    packing: Packing


def pack_rows(file: BinaryIO, work: RowsToPack) -> Iterator[dict[str, Any]]:
    """Append the rows' clips to the file as members of a tar, and yield each row's outcome, in order.

    An outcome is a dict with the manifest's columns except shard, or with the report's. Where further files of the row
    were tried, it has under "others" the report's columns for each of those that failed. The caller must not rely on
    the file's position meanwhile. Raises UserError when the process can't be started, OSError when the file can't be
    written or a disk fails.
    """
    end = file.seek(0, os.SEEK_END)
    todo = deque(work.rows)
    suspect: SourceRow | None = None
    failed: list[dict[str, Any]] = []  # the outcomes of the first row's files that ended a process
    while todo:
        with _Process(file, RowsToPack(list(todo), work.label_ids, work.packing)) as process:
            for message in process:
                if message is not None:
                    attempts, end = message
                    todo.popleft()
                    yield _outcome(failed + attempts)
                    failed = []
        if todo:
            # Undo the partial write; the next process continues from there.
            os.ftruncate(file.fileno(), end)
            os.lseek(file.fileno(), end, os.SEEK_SET)
            # The process may have been killed for another reason: only a second failure is the row's fault.
            if suspect is not todo[0]:
                suspect = todo[0]
                continue
            failed.append(_rejected(todo[0], "unreadable", process.end))
            if _next_file(todo[0], work.packing):
                todo[0] = todo[0].with_next_file()
            else:
                todo.popleft()
                yield _outcome(failed)
                failed = []


def _next_file(row: SourceRow, packing: Packing) -> bool:
    """Whether there is another file to try for a row that was rejected."""
    return bool(row.candidates) and row.reason is None and packing.tries == "all"


def _outcome(attempts: list[dict[str, Any]]) -> dict[str, Any]:
    """One row's outcome: that of the file that was packed, which was the last to be tried, or of the row's own file."""
    *failed, last = attempts
    chosen, others = (last, failed) if "size" in last else (attempts[0], attempts[1:])
    return chosen | ({"others": others} if others else {})


class _Process:
    """A child process that packs rows, and its messages until it finishes, dies or hangs."""

    def __init__(self, file: BinaryIO, work: RowsToPack) -> None:
        self.end = ""  # how the process failed, for the report
        self._connection, theirs = Pipe()
        path = os.pathsep.join(filter(None, sys.path))
        with theirs:
            numbers = theirs.fileno(), file.fileno()
            self._child = subprocess.Popen(
                [sys.executable, "-m", "shards.packer", *map(str, numbers)],
                pass_fds=numbers,
                # libsndfile's and FFmpeg's decoders print warnings of their own; what matters is in the report.
                stderr=subprocess.DEVNULL,
                env=os.environ | KEEP_MEMORY | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
        try:
            self._connection.send(work)
            self._connection.recv()
        except (EOFError, ConnectionError) as error:
            raise UserError(f"the packing process did not start ({_how(self._child.wait())})") from error

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._child.kill()
        self._child.wait()

    def __iter__(self) -> Iterator[Any]:
        try:
            while self._connection.poll(_PATIENCE_SECONDS):
                message = self._connection.recv()
                if isinstance(message, Exception):
                    raise message
                yield message
            self.end = f"the decoder made no progress for {_PATIENCE_SECONDS:g} s"
        except (EOFError, ConnectionError):
            self.end = f"the file ended the decoder: {_how(self._child.wait())}"


def _where(error: BaseException) -> str:
    """The file and line where an error was raised."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{os.path.basename(place.filename)}:{place.lineno}"


def _how(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit code {status}"


def _rejected(row: SourceRow, reason: str, detail: str | None) -> dict[str, Any]:
    return _about(row) | {"reason": reason, "detail": detail}


def _about(row: SourceRow) -> dict[str, Any]:
    return {"key": row.key, "labels": row.labels, "source": row.source, "split": row.split, "fold": row.fold}


def serve(connection: Connection, file: BinaryIO) -> None:
    """The child process: pack rows until all are done or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    end_with_parent()
    work: RowsToPack = connection.recv()
    connection.send(None)
    try:
        for row in work.rows:
            attempts = list(_attempts(row, work, file, connection))
            file.flush()
            connection.send((attempts, file.tell()))
    except ConnectionError:
        return
    except (OSError, UserError) as error:
        connection.send(error)


def _attempts(row: SourceRow, work: RowsToPack, file: BinaryIO, connection: Connection) -> Iterator[dict[str, Any]]:
    """The outcome of each of the row's files that is tried: until one is packed. Raises what _pack_row raises."""
    while True:
        try:
            yield _pack_row(row, work, file, connection)
            return
        except Rejected as rejection:
            yield _rejected(row, *rejection.args)
        if not _next_file(row, work.packing):
            return
        row = row.with_next_file()


def _pack_row(row: SourceRow, work: RowsToPack, file: BinaryIO, connection: Connection) -> dict[str, Any]:
    """Raises Rejected; OSError when the file can't be written or the disk fails; UserError."""
    with tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES) as clip:
        try:
            packed = pack_clip(row, work.packing, clip, alive=lambda: connection.send(None))
        except (Rejected, OSError, UserError):  # the clip's, the disk's, the machine's fault
            raise
        except _OWN_FAULTS as error:
            raise UserError(
                f"{row.source}: {type(error).__name__}: {' '.join(str(error).split())[:300]}, in {_where(error)}; this "
                "is a bug in the program, not in the file; please report it, with the versions of erann --version"
            ) from error
        except Exception as error:  # what a strange file causes in the libraries costs only that clip
            raise Rejected("unreadable", f"{type(error).__name__}: {error}") from error
        size = clip.seek(0, os.SEEK_END)
        crc = 0
        offset = _begin_member(file, f"{row.key}.{work.packing.codec}", size)
        clip.seek(0)
        while data := clip.read(_IN_MEMORY_BYTES):
            crc = zlib.crc32(data, crc)
            file.write(data)
    _pad(file, size)
    description = {
        "key": row.key,
        "labels": [work.label_ids[i] for i in row.labels],
        "split": row.split,
        "fold": row.fold,
        "source": row.source,
        "samples": packed.samples,
        "sample_rate": work.packing.sample_rate,
    }
    text = json.dumps(description).encode()
    _begin_member(file, f"{row.key}.json", len(text))
    file.write(text)
    _pad(file, len(text))
    return _about(row) | asdict(packed) | {"offset": offset, "size": size, "crc32": crc}


def _begin_member(file: BinaryIO, name: str, size: int) -> int:
    """Write a member's header and return its end. Without owner and time, the same clips give the same bytes."""
    member = tarfile.TarInfo(name)
    member.size = size
    file.write(member.tobuf())
    return file.tell()


def _pad(file: BinaryIO, size: int) -> None:
    file.write(bytes(-size % _BLOCK))


def end_tar(file: BinaryIO) -> None:
    """Write the two empty blocks at a tar's end, padded to a whole record as tar itself does."""
    size = file.seek(0, os.SEEK_END) + 2 * _BLOCK
    file.write(bytes(2 * _BLOCK + -size % tarfile.RECORDSIZE))


if __name__ == "__main__":
    with os.fdopen(int(sys.argv[2]), "r+b") as shared:
        serve(Connection(int(sys.argv[1])), shared)
