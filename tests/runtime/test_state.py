"""States: cloned, saved, restored; a file that is no state of the model is refused."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from nemoc.ir import NemocError
from nemoc.runtime import Bounds, Contents, Executable, State, build

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
NEXT = torch.tensor([13, 14])


@pytest.fixture
def state(exe: Executable) -> State:
    state = exe.new_state(2, capacity=10)
    exe.prefill(IDS, state, torch.tensor([4, 2]))
    return state


def test_tensors_are_aligned_views_of_one_block(state: State) -> None:
    end = 0
    for tensor in state.tensors.values():
        offset = tensor.data_ptr() - state.arena.data_ptr()
        assert offset % 64 == 0
        assert offset >= end
        end = offset + tensor.nbytes
    assert end <= state.bytes < end + 64


def test_a_clone_goes_its_own_way(exe: Executable, state: State) -> None:
    copy = state.clone()
    first = exe.decode(NEXT, state)
    exe.decode(NEXT, state)
    assert copy.lengths.tolist() == [4, 2]
    assert torch.equal(exe.decode(NEXT, copy), first)


def test_a_reset_state_is_new(exe: Executable, state: State) -> None:
    state.reset()
    assert state.lengths.tolist() == [0, 0]
    assert torch.equal(exe.prefill(IDS, state), exe.prefill(IDS, exe.new_state(2, capacity=10)))


def test_a_saved_state_goes_on_to_the_bit(exe: Executable, state: State, tmp_path: Path) -> None:
    state.save(tmp_path / "s.safetensors")
    restored = exe.load_state(tmp_path / "s.safetensors")
    assert (restored.batch, restored.capacity) == (2, 10)
    assert torch.equal(exe.decode(NEXT, restored), exe.decode(NEXT, state))
    assert os.listdir(tmp_path) == ["s.safetensors"]


def test_states_of_other_models_and_damaged_files_are_refused(
    exe: Executable, state: State, tmp_path: Path, contents: Callable[..., Contents]
) -> None:
    path = tmp_path / "s.safetensors"
    state.save(path)
    functions = dict(contents().functions)
    del functions["prefill_all"]
    other = build(contents(functions=functions))
    with pytest.raises(NemocError, match=r"s.safetensors: the state of model \w+, expected \w+"):
        other.load_state(path)
    small = build(contents(bounds=Bounds(2, 8, 8)))
    with pytest.raises(NemocError, match="capacity is '10', expected 1 to 8"):
        small.load_state(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(NemocError, match=r"s.safetensors: cannot be read as a state"):
        exe.load_state(path)
    with pytest.raises(NemocError, match=r"missing.safetensors: no such file"):
        exe.load_state(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    ("change", "metadata", "message"),
    [
        ({}, {"nemoc.state": None}, "holds no state of nemoc"),
        ({}, {"batch": "two"}, "batch is 'two', expected 1 to 3"),
        ({}, {"batch": "9" * 5000}, f"batch is '{'9' * 20}', expected 1 to 3"),
        ({}, {"batch": "٢"}, "batch is '٢', expected 1 to 3"),
        (
            {},
            {"capacity": "11"},
            r"layers.2.k is .* \[2, 10, 2, 14\], expected .* \[2, 11, 2, 14\]",
        ),
        ({"layers.0.ssm": None}, {}, "the tensor layers.0.ssm is missing"),
        (
            {"lengths": torch.tensor([11, 1]).int()},
            {},
            r"lengths \[11, 1\] exceed the capacity of 10",
        ),
        ({"lengths": torch.tensor([3, 1])}, {}, "lengths is torch.int64"),
    ],
)
def test_altered_states_are_refused(
    exe: Executable,
    state: State,
    tmp_path: Path,
    change: dict[str, torch.Tensor | None],
    metadata: dict[str, str | None],
    message: str,
) -> None:
    path = tmp_path / "s.safetensors"
    state.save(path)
    with safetensors.safe_open(path, "pt") as file:
        told = {**file.metadata(), **metadata}
    tensors = {**safetensors.torch.load_file(path), **change}
    safetensors.torch.save_file(
        {k: v for k, v in tensors.items() if v is not None},
        path,
        {k: v for k, v in told.items() if v is not None},
    )
    with pytest.raises(NemocError, match=message):
        exe.load_state(path)


def test_a_state_that_cannot_be_written_leaves_nothing(state: State, tmp_path: Path) -> None:
    with pytest.raises(NemocError, match=r"nowhere/s.safetensors: cannot be written: No such file"):
        state.save(tmp_path / "nowhere" / "s.safetensors")
    assert os.listdir(tmp_path) == []
