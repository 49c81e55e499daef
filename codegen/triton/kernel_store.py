"""Compiled kernels on disk, so that what was compiled once is not compiled again.

An entry is a file named by its key, which stands for everything that the code depends on. Its first line is the SHA-256
of the rest, the rest is JSON. Anyone may have written there, so that an entry is read as what it claims to be only
where the sum and every field are right; whatever else lies there counts as absent.
"""

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nemoc.codegen.triton.binary import Binary

_SUFFIX = ".kernel"


@dataclass(frozen=True)
class KernelStore:
    """A folder of compiled kernels, which several processes may use at once.

    A folder that cannot be written to, or whose disk is full, costs time but nothing else: it is then as if nothing had
    been stored.

    Attributes:
        folder: where; made when the first kernel is stored.
        bytes: how large the folder may grow; beyond, what was not used for longest goes.
    """

    folder: Path
    bytes: int = 2 << 30

    def get(self, key: str) -> Binary | None:
        """The kernel of a key; none where there is no entry, or a damaged one."""
        path = self._path(key)
        try:
            checksum, _, content = path.read_bytes().partition(b"\n")
            if checksum.decode() != hashlib.sha256(content).hexdigest():
                return None
            entry = json.loads(content)
            if not isinstance(entry, dict) or entry.get("key") != key:
                return None
            binary = Binary.from_record(entry.get("binary"))
            os.utime(path)
        except (OSError, ValueError, RecursionError):
            return None
        return binary

    def put(self, key: str, binary: Binary) -> None:
        """Store the kernel of a key."""
        content = json.dumps({"key": key, "binary": binary.record()}).encode()
        checksum = hashlib.sha256(content).hexdigest().encode()
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(checksum + b"\n" + content)
                os.replace(name, self._path(key))
            except OSError:
                os.unlink(name)

    def prune(self) -> None:
        """Remove the oldest files until the folder is as small as it must be."""
        with suppress(OSError):
            found = [(entry.stat(), entry.path) for entry in os.scandir(self.folder)]
            found = [(stat, path) for stat, path in found if path.endswith((_SUFFIX, ".tmp"))]
            excess = sum(stat.st_size for stat, _ in found) - self.bytes
            for stat, path in sorted(found, key=lambda item: item[0].st_mtime_ns):
                if excess <= 0:
                    break
                os.unlink(path)
                excess -= stat.st_size

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{_SUFFIX}"
