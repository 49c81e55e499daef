"""Compiled objects on disk, so that what was compiled once is not compiled again.

An entry is a file named by its key, which stands for everything that its content depends on. Its first line is the
SHA-256 of key and content, the rest is the content: a file that was damaged or renamed counts as absent.
"""

import hashlib
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_SUFFIX = ".object"


@dataclass(frozen=True)
class ObjectStore:
    """A folder of bytes by key, which several processes may use at once.

    A folder that cannot be written to, or whose disk is full, costs time but nothing else: it is then as if nothing had
    been stored.

    Attributes:
        folder: where; made when the first object is stored.
        limit: bytes to which the folder may grow; beyond, what was not used for longest goes.
    """

    folder: Path
    limit: int = 1 << 30

    def get(self, key: str) -> bytes | None:
        """The content of a key; none where there is no entry, or a damaged one."""
        path = self._path(key)
        try:
            checksum, _, content = path.read_bytes().partition(b"\n")
            if checksum != _checksum(key, content):
                return None
            os.utime(path)
        except OSError:
            return None
        return content

    def put(self, key: str, content: bytes) -> None:
        """Store the content of a key."""
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(_checksum(key, content) + b"\n" + content)
                os.replace(name, self._path(key))
            except OSError:
                os.unlink(name)

    def prune(self) -> None:
        """Remove the oldest files until the folder is as small as it must be."""
        with suppress(OSError):
            found = [(entry.stat(), entry.path) for entry in os.scandir(self.folder)]
            found = [(stat, path) for stat, path in found if path.endswith((_SUFFIX, ".tmp"))]
            excess = sum(stat.st_size for stat, _ in found) - self.limit
            for stat, path in sorted(found, key=lambda item: item[0].st_mtime_ns):
                if excess <= 0:
                    break
                os.unlink(path)
                excess -= stat.st_size

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{_SUFFIX}"


def _checksum(key: str, content: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\n" + content).hexdigest().encode()
