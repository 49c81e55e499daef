"""Compiled GPU kernels on disk, so that what was compiled once is not compiled again.

An entry is JSON in an `ObjectStore`. Anyone may have written there, so that it is read as what it claims to be only
where every field is right; whatever else lies there counts as absent.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from nemoc.codegen.object_store import ObjectStore
from nemoc.codegen.triton.binary import Binary


@dataclass(frozen=True)
class KernelStore:
    """A folder of compiled kernels, which several processes may use at once.

    Attributes:
        folder: where; made when the first kernel is stored.
        bytes: how large the folder may grow; beyond, what was not used for longest goes.
    """

    folder: Path
    bytes: int = 2 << 30

    @property
    def _objects(self) -> ObjectStore:
        return ObjectStore(self.folder, self.bytes)

    def get(self, key: str) -> Binary | None:
        """The kernel of a key; none where there is no entry, or a damaged one."""
        content = self._objects.get(key)
        if content is None:
            return None
        try:
            return Binary.from_record(json.loads(content))
        except (ValueError, RecursionError):
            return None

    def put(self, key: str, binary: Binary) -> None:
        """Store the kernel of a key."""
        self._objects.put(key, json.dumps(binary.record()).encode())

    def prune(self) -> None:
        """Remove the oldest files until the folder is as small as it must be."""
        self._objects.prune()
