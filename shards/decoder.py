"""Clips are packed in a process of their own: a decoder that crashes or hangs costs the clip, not the shard."""

import os
import signal
import subprocess
import sys
import tempfile
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import BinaryIO

from shards.clip import PackedSound, Packing, Rejected, pack_clip
from shards.sources.rows import SourceRow

_PATIENCE_SECONDS = 300.0  # without a sign of life; the network disk under a file may be slow


class ClipDecoder:
    """pack_clip in a child process, which is started again when a clip ends it. Use as a context."""

    def __init__(self, packing: Packing) -> None:
        self._packing = packing
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "ClipDecoder":
        # The last clip. The child writes it, so nothing of it may be held in a buffer here.
        self.file: BinaryIO = tempfile.TemporaryFile(buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self.file.close()

    def pack(self, row: SourceRow) -> PackedSound:
        """Pack a clip into self.file. Raises Rejected; OSError when the file can't be written."""
        if self._process is None:
            self._start()
        try:
            self._connection.send((row, self._packing))
            while self._connection.poll(_PATIENCE_SECONDS):
                answer = self._connection.recv()
                if isinstance(answer, Exception):
                    raise answer
                if answer is not None:
                    return answer
        except (EOFError, ConnectionError):
            how = _end_of(self._end())
            raise Rejected("unreadable", f"the decoder was ended by it: {how}") from None
        self._end()
        raise Rejected("unreadable", f"the decoder stood still for {_PATIENCE_SECONDS:.0f} s")

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            numbers = theirs.fileno(), self.file.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "shards.decoder", *map(str, numbers)],
                pass_fds=numbers,
                # libsndfile's and FFmpeg's decoders write warnings of their own, which the report holds in one line.
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
            )

    def _end(self) -> int:
        """The child's exit status; it is killed if it is still there."""
        if self._process is None:
            return 0
        self._connection.close()
        self._process.kill()
        status = self._process.wait()
        self._process = None
        return status


def _end_of(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit code {status}"


def serve(connection: Connection, file: BinaryIO) -> None:
    """Pack the clips that are asked for, until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    while True:
        try:
            row, packing = connection.recv()
        except EOFError:
            return
        answer: PackedSound | Exception
        try:
            answer = pack_clip(row, packing, file, alive=lambda: connection.send(None))
        except (Rejected, OSError) as error:
            answer = error
        except Exception as error:  # whatever a strange file brings the libraries to costs that clip only
            answer = Rejected("unreadable", f"{type(error).__name__}: {error}")
        connection.send(answer)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), os.fdopen(int(sys.argv[2]), "r+b", buffering=0))
