"""A folder on a local or shared disk or in an S3 bucket, whose files are read and written atomically."""

import os
import secrets
import stat
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Union

from erann_dist.errors import UsageError, naming, require_no_credentials
from erann_dist.storage.stream_file import sequential_file

if TYPE_CHECKING:  # its libraries take longer to load than all the rest, and many runs need no S3
    from erann_dist.storage.s3 import S3Folder

_BLOCK = 1 << 20  # bytes copied at a time


@dataclass(frozen=True)
class LocalFolder:
    """A folder on a local or shared disk. Errors of the disk stay OSErrors."""

    url: str

    def __str__(self) -> str:
        return self.url

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """The files in and below the folder whose relative name starts with prefix: name -> bytes, sorted by name."""
        found = {}
        for path in self._files():
            name = path.relative_to(self.url).as_posix()
            with suppress(FileNotFoundError):  # removed meanwhile
                if path.suffix != ".part" and name.startswith(prefix) and stat.S_ISREG((status := path.stat()).st_mode):
                    found[name] = status.st_size
        return dict(sorted(found.items()))

    def is_empty(self) -> bool:
        """Whether it does not exist, or there is no file in or below it."""
        return all(path.suffix == ".part" for path in self._files())

    def exists(self, name: str) -> bool:
        return Path(self.url, name).is_file()

    def read(self, name: str) -> bytes:
        """The whole content. Raises FileNotFoundError."""
        return Path(self.url, name).read_bytes()

    def version(self, name: str) -> str:
        """A string that changes when the file does. Raises FileNotFoundError."""
        status = Path(self.url, name).stat()
        return f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"

    @contextmanager
    def reading(self, name: str) -> Iterator[BinaryIO]:
        """The file, open for reading. Raises FileNotFoundError."""
        with Path(self.url, name).open("rb") as file:
            yield file

    def stream(self, name: str, start: int = 0, end: int | None = None) -> BinaryIO:
        """Bytes start .. end of the file, for sequential reading, as a context manager. Raises FileNotFoundError.

        A shorter file ends earlier.
        """

        def read() -> Generator[bytes, None, None]:
            with Path(self.url, name).open("rb") as file:
                file.seek(start)
                yield b""  # so that opening the file fails here
                while data := file.read(_BLOCK if end is None else min(_BLOCK, end - file.tell())):
                    yield data

        pieces = read()
        next(pieces)
        return sequential_file(pieces, f"{self.url}/{name}")

    def fetch(self, name: str, file: BinaryIO, on_progress: Callable[[int], None] = lambda done: None) -> None:
        """Copy the content to an open file; on_progress gets the number of bytes copied so far, and may raise.

        Raises FileNotFoundError.
        """
        file.seek(0)
        file.truncate()
        with self.reading(name) as source:
            while data := source.read(_BLOCK):
                file.write(data)
                on_progress(file.tell())

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """A new file to write, read and seek in; it is named at the end, unless the body raises. Don't close it."""
        path = Path(self.url, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
        try:
            with naming(path), part.open("x+b") as file:  # a full disk
                yield file
                file.flush()
                os.fsync(file.fileno())  # after a power cut the name must not refer to an empty file
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def write(self, name: str, data: bytes) -> None:
        with self.writing(name) as file:
            file.write(data)

    def delete(self, name: str) -> None:
        """Delete a file, if it exists. As in S3, no empty folder is left."""
        path = Path(self.url, name)
        path.unlink(missing_ok=True)
        with suppress(OSError):
            while path != Path(self.url):
                path = path.parent
                path.rmdir()

    def discard_unfinished(self, prefix: str = "") -> None:
        """Remove what killed processes left of files whose name starts with prefix; a write still in progress fails."""
        for path in self._files():
            name = path.relative_to(self.url).as_posix()
            if path.suffix == ".part" and name.startswith(prefix):
                self.delete(name)

    def _files(self) -> Iterator[Path]:
        def fail(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise error

        for directory, _, names in os.walk(self.url, onerror=fail):
            yield from (Path(directory, name) for name in names)


Folder = Union[LocalFolder, "S3Folder"]


def open_folder(url: str, endpoint: str | None = None) -> Folder:
    """The folder at a path or at s3://bucket/prefix; no request is made yet. Raises UsageError for any other URL."""
    if not url:
        raise UsageError("the path is empty; a folder is needed")
    scheme, separator, rest = url.partition("://")
    if not separator:
        return LocalFolder(url.rstrip("/") or url[:1])
    require_no_credentials(url)
    if scheme != "s3":
        raise UsageError(f"{url}: a folder is a path or s3://bucket/prefix, not {scheme}://")
    if not rest.partition("/")[0]:
        raise UsageError(f"{url}: the bucket is missing: s3://bucket/prefix")
    if "//" in rest.rstrip("/"):
        raise UsageError(f"{url}: has an empty part between two slashes; s3://bucket/prefix has none")
    if endpoint and not endpoint.startswith(("http://", "https://")):
        raise UsageError("an S3 endpoint begins with http:// or https://")  # not shown: it may contain a password
    require_no_credentials(endpoint or "")
    from erann_dist.storage.s3 import S3Folder

    return S3Folder(url.rstrip("/"), endpoint)
