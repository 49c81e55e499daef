"""Checks of what users pass to an executable; each refusal is one line."""

import torch

from nemoc.ir.errors import NemocError
from nemoc.runtime.program import Program
from nemoc.runtime.state import State


def check_state(program: Program, state: State) -> None:
    """A state must belong to the program.

    Raises:
        NemocError: it is another model's.
    """
    if not isinstance(state, State):
        raise NemocError(f"state is a {type(state).__name__}, expected one from new_state()")
    if state.identity != program.identity:
        raise NemocError(
            f"state: belongs to model {state.identity[:12]}, this is {program.identity[:12]} "
            f"({program.name})"
        )


def check_ids(name: str, ids: torch.Tensor, rank: int, batch: int | None) -> None:
    """Token ids must be int64 of a rank, for a batch, on the CPU.

    Raises:
        NemocError: they are not.
    """
    shape = "[B]" if rank == 1 else "[B, L]"
    if not isinstance(ids, torch.Tensor):
        raise NemocError(f"{name} is a {type(ids).__name__}, expected an int64 tensor {shape}")
    if ids.dtype != torch.int64 or ids.dim() != rank or ids.numel() == 0:
        found = f"{str(ids.dtype).removeprefix('torch.')} {list(ids.shape)}"
        raise NemocError(f"{name} is {found}, expected int64 {shape}, not empty")
    if ids.device.type != "cpu":
        raise NemocError(f"{name} is on {ids.device}, expected on the CPU")
    if batch is not None and ids.shape[0] != batch:
        raise NemocError(f"{name} has {ids.shape[0]} rows, the state has {batch}")


def check_lengths(ids: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """How many tokens of each row count: int64 [B], given or all.

    Raises:
        NemocError: the lengths do not fit the ids.
    """
    rows, width = ids.shape
    if lengths is None:
        return torch.full((rows,), width, dtype=torch.int64, device="cpu")
    check_ids("lengths", lengths, 1, None)
    if lengths.shape[0] != rows:
        raise NemocError(f"lengths has {lengths.shape[0]} rows, ids has {rows}")
    wrong = ((lengths < 1) | (lengths > width)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise NemocError(f"lengths: row {row} is {int(lengths[row])}, expected 1 to {width}")
    return lengths


def check_vocabulary(program: Program, ids: torch.Tensor, lengths: torch.Tensor) -> None:
    """Every id of [B, L] that counts must be in the vocabulary.

    Raises:
        NemocError: one is not.
    """
    counts = torch.arange(ids.shape[1], device="cpu") < lengths.unsqueeze(1)
    wrong = (counts & ((ids < 0) | (ids >= program.vocab))).nonzero()
    if len(wrong):
        row, position = wrong[0].tolist()
        found = f"ids: row {row}, position {position}: token id {int(ids[row, position])}"
        raise _out_of_range(found, program)


def check_next(program: Program, state: State, next_ids: torch.Tensor) -> None:
    """Every id of [B] must be in the vocabulary, and the state have room for one more of each row.

    Raises:
        NemocError: one is not, or it has not.
    """
    # Plain integers: for a few rows ten times as fast as tensor operations, and this is in every step.
    for row, token in enumerate(next_ids.tolist()):
        if not 0 <= token < program.vocab:
            raise _out_of_range(f"next_ids: row {row}: token id {token}", program)
    for row, length in enumerate(state.lengths.tolist()):
        if length >= state.capacity:
            raise _full(row, length, 1, state)


def check_capacity(state: State, lengths: torch.Tensor) -> None:
    """A state must have room for more tokens of each row.

    Raises:
        NemocError: it has not.
    """
    for row, (cached, new) in enumerate(zip(state.lengths.tolist(), lengths.tolist(), strict=True)):
        if cached + new > state.capacity:
            raise _full(row, cached, new, state)


def _out_of_range(found: str, program: Program) -> NemocError:
    return NemocError(f"{found} is out of range, the vocabulary has {program.vocab} tokens")


def _full(row: int, cached: int, new: int, state: State) -> NemocError:
    return NemocError(
        f"row {row}: {cached} tokens so far and {new} more exceed the state's capacity of "
        f"{state.capacity} tokens"
    )
