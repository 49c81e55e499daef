"""The state of a batch: everything that a model remembers of the tokens it has seen, in one block of memory."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from nemoc.codegen.storage import Layout
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import NemocError
from nemoc.runtime.files import as_path, replacing_file
from nemoc.runtime.program import LENGTHS, Program

_SIZE = re.compile(r"[1-9][0-9]{0,9}")


class State:
    """Named tensors over one block: convolution and SSM states, caches, lengths.

    A state belongs to one executable (or another load of the same artifact) and is changed by each of its steps.

    Attributes:
        identity: the digest of the program that it belongs to.
        batch: rows, B.
        capacity: the most tokens of a row, C.
        arena: the block, uint8, on the backend's device.
        tensors: views of the block by state name, in order of their offsets.
    """

    def __init__(
        self, layout: Layout, identity: str, batch: int, capacity: int, arena: torch.Tensor
    ) -> None:
        self.identity = identity
        self.batch = batch
        self.capacity = capacity
        self.arena = arena
        self._layout = layout
        self.tensors: Mapping[str, torch.Tensor] = {
            slot.name: _view(
                arena, int(slot.offset), slot.type.dtype, [int(d) for d in slot.type.shape]
            )
            for slot in layout.at({"B": batch, "C": capacity})
        }

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens seen by each row: int32 [B], a view."""
        return self.tensors[LENGTHS]

    @property
    def bytes(self) -> int:
        """Size of the block."""
        return self.arena.numel()

    def clone(self) -> "State":
        """An independent copy; steps on one do not change the other."""
        arena = torch.empty_like(self.arena)
        if arena.device.type == "cpu":
            arena.numpy()[:] = self.arena.numpy()  # on one thread, as in `_clear`
        else:
            arena.copy_(self.arena)
        return State(self._layout, self.identity, self.batch, self.capacity, arena)

    def reset(self) -> None:
        """Forget all tokens."""
        _clear(self.arena)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a safetensors file, whole or not at all.

        Raises:
            NemocError: the file cannot be written.
        """
        metadata = {
            "nemoc.state": "1",
            "identity": self.identity,
            "batch": str(self.batch),
            "capacity": str(self.capacity),
        }
        tensors = {name: tensor.cpu() for name, tensor in self.tensors.items()}
        data = safetensors.torch.save(tensors, metadata)
        with replacing_file(as_path(path)) as file:
            file.write(data)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        program: Program,
        allocate: Callable[[int], torch.Tensor],
    ) -> "State":
        """Read a state that `save` wrote.

        Args:
            path: the file.
            program: what the state must belong to and fit.
            allocate: memory for it, see `Backend.allocate`.

        Raises:
            NemocError: the file is missing or damaged, holds the state of another model, or a larger one than the
                program takes.
        """
        where = as_path(path)
        try:
            with safetensors.safe_open(where, framework="pt") as file:
                batch, capacity = _read_sizes(where, file.metadata() or {}, program)
                size = int(program.state.at({"B": batch, "C": capacity}).bytes)
                state = cls(program.state, program.identity, batch, capacity, allocate(size))
                state._fill(where, file)
        except FileNotFoundError:
            raise NemocError(f"{where}: no such file") from None
        except (OSError, safetensors.SafetensorError) as error:
            raise NemocError(f"{where}: cannot be read as a state: {error}") from None
        lengths = state.lengths
        if bool((lengths < 0).any()) or bool((lengths > capacity).any()):
            raise NemocError(
                f"{where}: lengths {lengths.tolist()} exceed the capacity of {capacity} tokens"
            )
        return state

    def _fill(self, path: Path, file: Any) -> None:
        """Copy every tensor from an open safetensors file."""
        present = set(file.keys())
        for name, into in self.tensors.items():
            if name not in present:
                raise NemocError(f"{path}: the tensor {name} is missing")
            found = file.get_tensor(name)
            if found.shape != into.shape or found.dtype != into.dtype:
                raise NemocError(
                    f"{path}: {name} is {found.dtype} {list(found.shape)}, "
                    f"expected {into.dtype} {list(into.shape)}"
                )
            into.copy_(found)


def _clear(memory: torch.Tensor) -> None:
    """Zero memory of any device. On the CPU one thread does it: torch's go on spinning for milliseconds after a
    function that they shared, and keep those of the next step from the processors."""
    if memory.device.type == "cpu":
        memory.numpy().fill(0)
    else:
        memory.zero_()


def _view(arena: torch.Tensor, offset: int, dtype: DType, shape: list[int]) -> torch.Tensor:
    size = dtype.bytes
    for extent in shape:
        size *= extent
    return arena[offset : offset + size].view(dtype.torch).view(shape)


def _read_sizes(path: Path, metadata: Mapping[str, str], program: Program) -> tuple[int, int]:
    """Batch and capacity of a saved state, after checking whose it is."""
    if "nemoc.state" not in metadata:
        raise NemocError(f"{path}: holds no state of nemoc")
    identity = metadata.get("identity", "")
    if identity != program.identity:
        raise NemocError(
            f"{path}: the state of model {identity[:12]}, expected {program.identity[:12]}"
        )
    sizes = []
    limits = {"batch": program.bounds.max_batch, "capacity": program.bounds.max_context}
    for name, limit in limits.items():
        text = metadata.get(name, "")
        if not _SIZE.fullmatch(text) or int(text) > limit:
            raise NemocError(f"{path}: {name} is {text[:20]!r}, expected 1 to {limit}")
        sizes.append(int(text))
    return sizes[0], sizes[1]
