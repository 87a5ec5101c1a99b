"""The clips of a run in memory that the workers of a node share: a file that each of them maps.

For AudioSet the columns take some 200 MB, and several times that while they are read. The first worker of a node reads
them and writes the file, the last one removes it; after a kill the file stays, and the next start of the run uses it.
"""

import ctypes
import dataclasses
import errno
import fcntl
import gc
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from erann_dist.data.manifest import MANIFEST, SHARDS, Manifest, SetInfo, Tar
from erann_dist.data.sources import MAX_LIST_BYTES, load_sources
from erann_dist.errors import UserError
from erann_dist.formats import strict_json
from erann_dist.recipe import DataSource
from erann_dist.storage.folder import Folder, open_folder
from erann_dist.storage.plain_file import read_plain_file

_VERSION = 1  # of the file
_TarFacts = tuple[str, str | None, str, int, str]  # folder, endpoint, name, bytes, content hash of its set
_NUMBERS = ("folds", "shards", "rows", "offsets", "sizes", "samples", "crc32s")


@contextmanager
def shared_clips(sources: list[DataSource]) -> Iterator[Manifest]:
    """The clips that load_sources returns. Raises what it raises."""
    try:
        path = _path(sources)
    except OSError:
        load_sources(sources)  # raises a UserError that names what is missing
        raise
    with _locked(path.with_suffix(".lock")):  # one worker of the node reads while the others wait
        try:
            file = _own(path, os.O_RDONLY)
            clips = _map(file)
        except (
            OSError,
            pa.ArrowException,
            ValueError,
            KeyError,
            TypeError,
        ):  # it is missing, or a power cut left it empty
            _write(load_sources(sources), path)
            _release_memory()
            file = _own(path, os.O_RDONLY)
            clips = _map(file)
        fcntl.flock(file, fcntl.LOCK_SH)  # as long as it is in use
    try:
        yield clips
    finally:
        file.close()
        _remove_unused(path)


def remove_unused(sources: list[DataSource]) -> None:
    """Remove the file that killed workers left on this machine, if there is one and no other process uses it."""
    with suppress(OSError, UserError):
        _remove_unused(_path(sources))


def _path(sources: list[DataSource]) -> Path:
    return Path(tempfile.gettempdir(), f"erann-{os.getuid()}-{_digest(sources)}.arrow")


def _remove_unused(path: Path) -> None:
    lock_path = path.with_suffix(".lock")
    with _locked(lock_path), suppress(BlockingIOError):  # another process still uses it
        with suppress(FileNotFoundError), _own(path, os.O_RDONLY) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        lock_path.unlink()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock on the node. The holder may remove the lock's file; processes that waited for that file try again."""
    while True:
        with _own(path, os.O_WRONLY | os.O_CREAT) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock.fileno()).st_nlink:
                yield
                return


def _own(path: Path, how: int) -> BinaryIO:
    """Open the file. In a world-writable folder another user may have created a file or a link of its name."""
    try:
        file = os.open(path, how | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EACCES):
            raise
    else:
        if os.fstat(file).st_uid == os.getuid():
            return os.fdopen(file, "rb" if how == os.O_RDONLY else "wb")
        os.close(file)
    raise UserError(f"{path}: another user's file is in the way; remove it, or set TMPDIR to another folder")


def _digest(sources: list[DataSource]) -> str:
    """A hash of everything that decides which clips there are."""
    facts: list[object] = [_VERSION]
    for source in sources:
        folder = open_folder(source.url)
        lists = [
            path and hashlib.sha256(read_plain_file(Path(path), MAX_LIST_BYTES)).hexdigest()
            for path in (source.keys, source.without)
        ]
        where = os.path.abspath(source.url) if "://" not in source.url else source.url
        facts += [where, source.model_dump(), lists, folder.version(MANIFEST), folder.version(SHARDS)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _write(clips: Manifest, path: Path) -> None:
    columns = {
        "key": clips.keys,
        "labels": pa.ListArray.from_arrays(pa.array(clips.label_offsets), pa.array(clips.label_values)),
        "split": clips.splits,
        **{name: getattr(clips, name) for name in _NUMBERS},
    }
    tars = [
        [tar.folder.url, getattr(tar.folder, "endpoint", None), tar.name, tar.size, tar.set_hash] for tar in clips.tars
    ]
    facts = {"info": json.dumps(dataclasses.asdict(clips.info)), "tars": json.dumps(tars)}
    table = pa.table(columns).combine_chunks().replace_schema_metadata(facts)
    part = path.with_suffix(".part")
    with (
        _own(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as file,
        pa.OSFile(f"/dev/fd/{file.fileno()}", "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    part.replace(path)


def _map(file: BinaryIO) -> Manifest:
    """Raises ArrowException, ValueError, KeyError and TypeError for an incomplete file."""
    table = pa.ipc.open_file(pa.memory_map(f"/dev/fd/{file.fileno()}")).read_all()
    table.validate(full=True)
    labels = table["labels"].chunk(0)
    folders: dict[tuple[str, str | None], Folder] = {}
    tars = []
    for url, endpoint, name, size, set_hash in strict_json.validate(list[_TarFacts], table.schema.metadata[b"tars"]):
        folders[url, endpoint] = folders.get((url, endpoint)) or open_folder(url, endpoint)
        tars.append(Tar(folders[url, endpoint], name, size, set_hash))
    return Manifest(
        info=strict_json.validate(SetInfo, table.schema.metadata[b"info"]),
        tars=tars,
        keys=table["key"],
        label_values=labels.values.to_numpy(),
        label_offsets=labels.offsets.to_numpy(),
        splits=table["split"],
        **{name: table[name].chunk(0).to_numpy() for name in _NUMBERS},
    )


def _release_memory() -> None:
    """Return the memory that reading took to the system; the C library and Arrow would keep it."""
    gc.collect()
    pa.default_memory_pool().release_unused()
    with suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
