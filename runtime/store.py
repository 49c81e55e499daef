"""Artifacts on disk: writing their files, checking them, copying them."""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

from nemoc.ir.errors import NemocError
from nemoc.runtime.files import replacing_directory
from nemoc.runtime.manifest import (
    MANIFEST,
    WEIGHTS,
    FileRecord,
    Manifest,
    is_manifest,
    read_manifest,
)
from nemoc.runtime.weights import PackedWeights

Verify = Literal["full", "headers"]
"""`full`: the digest of every byte. `headers`: of all but the data of weights, whose header and size are."""

_COPY = 4 << 20
"""Bytes copied or hashed at a time."""


class HashingFile:
    """A file being written that knows its size and digest."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes | memoryview) -> int:
        """Write all of the data."""
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)
        return len(data)

    @property
    def record(self) -> FileRecord:
        """What has been written so far."""
        return FileRecord(self._size, self._digest.hexdigest())


@contextmanager
def new_file(folder: Path, name: str) -> Iterator[HashingFile]:
    """A file of an artifact to write, made durable at the end; folders of its name are made.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as file:
        yield HashingFile(file)
        file.flush()
        os.fsync(file.fileno())


def write_content(folder: Path, name: str, content: Path | bytes | str) -> FileRecord:
    """Write a file of an artifact from text, bytes, or another file.

    Raises:
        OSError: it cannot be written, or the other file not be read.
    """
    with new_file(folder, name) as file:
        if isinstance(content, Path):
            with open(content, "rb") as source:
                while data := source.read(_COPY):
                    file.write(data)
        else:
            file.write(content.encode() if isinstance(content, str) else content)
    return file.record


def read_content(folder: Path, name: str, record: FileRecord) -> bytes:
    """A small file of an artifact, as it was written.

    Raises:
        NemocError: it is missing, cannot be read, or was altered.
    """
    path = checked_path(folder, name, record)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise NemocError(f"{path}: cannot be read: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != record.sha256:
        raise NemocError(f"{path}: was altered")
    return content


def is_artifact(path: Path) -> bool:
    """Whether a path is the directory of an artifact, of any version; links to one are not."""
    return not path.is_symlink() and path.is_dir() and is_manifest(path / MANIFEST)


def check_unreplaced(folder: Path, manifest: Manifest) -> None:
    """An artifact must still be the one that was loaded.

    Raises:
        NemocError: another one has its place, or none.
    """
    if read_manifest(folder).to_text() != manifest.to_text():
        raise NemocError(f"{folder}: has been replaced since it was loaded")


def copy_artifact(folder: Path, manifest: Manifest, destination: Path) -> None:
    """Copy an artifact, checking it on the way; see `replacing_directory` for what happens at the name.

    Raises:
        NemocError: it was replaced, a file was altered, or the copy cannot be written.
    """
    check_unreplaced(folder, manifest)
    with replacing_directory(destination, is_artifact) as target:
        for name, record in manifest.files.items():
            path = checked_path(folder, name, record)
            if write_content(target, name, path) != record:
                raise NemocError(f"{path}: was altered")
        write_content(target, MANIFEST, manifest.to_text())


def share_weights(folder: Path, manifest: Manifest, header: str, target: Path) -> FileRecord:
    """Put an artifact's weights into the folder of another: the same file, or a copy where there can be no link.

    Args:
        folder, manifest: of the artifact.
        header: the digest of the header that the weights must have.
        target: the other folder.

    Raises:
        NemocError: the artifact was replaced, or its weights are other ones.
        OSError: it cannot be written.
    """
    check_unreplaced(folder, manifest)
    record = manifest.files[WEIGHTS]
    path = checked_path(folder, WEIGHTS, record)
    if manifest.weights_header != header:
        raise NemocError(f"{path}: holds other weights than the executable needs")
    try:
        os.link(path, target / WEIGHTS)
    except OSError:
        if write_content(target, WEIGHTS, path) != record:
            raise NemocError(f"{path}: was altered") from None
    return record


def checked_path(folder: Path, name: str, record: FileRecord) -> Path:
    """The path of a file of an artifact: a regular file within it, of the recorded size.

    Raises:
        NemocError: it is missing, a link, outside, or of another size.
    """
    path = folder / name
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise NemocError(f"{path}: is missing from the artifact") from None
    except OSError as error:
        raise NemocError(f"{path}: cannot be read: {error.strerror}") from None
    inside = os.path.realpath(path) == os.path.join(os.path.realpath(folder), name)
    if not stat.S_ISREG(status.st_mode) or not inside:
        raise NemocError(f"{path}: is no regular file within the artifact")
    if status.st_size != record.size:
        raise NemocError(f"{path}: has {status.st_size} bytes, expected {record.size}")
    return path


def open_weights(
    folder: Path,
    manifest: Manifest,
    resident: bool = False,
    verify: Verify = "full",
    advance: Callable[[int], None] = lambda count: None,
) -> PackedWeights:
    """Check an artifact's files against its manifest and open its weights.

    Args:
        folder: the artifact.
        manifest: its manifest.
        resident: copy the weights into memory instead of mapping them.
        verify: whether to read all data of the weights to check its digest.
        advance: told the bytes of the weights checked so far.

    Raises:
        NemocError: a file is missing or altered.
    """
    for name, record in manifest.files.items():
        path = checked_path(folder, name, record)
        if name != WEIGHTS:
            _check_digest(path, hash_file(path), record.sha256)
    weights = PackedWeights(folder / WEIGHTS, resident)
    _check_digest(weights.path, weights.header_digest, manifest.weights_header)
    if verify == "full":
        _check_digest(weights.path, weights.digest(advance), manifest.files[WEIGHTS].sha256)
    return weights


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex.

    Raises:
        NemocError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise NemocError(f"{path}: cannot be read: {error.strerror}") from None


def _check_digest(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise NemocError(
            f"{path}: was altered: its SHA-256 is {found[:12]}, expected {expected[:12]}"
        )
