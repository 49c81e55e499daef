"""Files as tensors: mapped read-only, or copied into memory that the kernel backs with huge pages."""

import mmap
import os
import warnings
from pathlib import Path

import torch

from nemoc.ir.errors import NemocError

_COPY = 16 << 20
"""Bytes copied at a time."""


def map_file(path: Path, resident: bool = False) -> torch.Tensor:
    """A file's bytes: uint8, page-aligned, never to be written to.

    Args:
        path: a file that is not empty.
        resident: copy it into anonymous memory in huge pages where the system has them; otherwise pages are read
            on first use and shared with other processes.

    Raises:
        NemocError: the file cannot be read, or is empty.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise NemocError(f"{path}: is empty")
            if not resident:
                return _tensor(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)
            into = memoryview(memory)
            done = 0
            while count := file.readinto(into[done : done + _COPY]):
                done += count
            if done != size:
                raise NemocError(f"{path}: changed while it was read")
            return _tensor(memory)
    except OSError as error:
        raise NemocError(f"{path}: cannot be read: {error.strerror}") from None


def _tensor(memory: mmap.mmap) -> torch.Tensor:
    """A tensor that keeps the mapping alive."""
    with warnings.catch_warnings():
        # torch has no read-only tensors and says so; nothing here writes, and a stray write would fault.
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(memory, dtype=torch.uint8)
