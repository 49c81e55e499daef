"""Steps of an executable: any split of the tokens gives the same logits; bad input is refused in one line."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from nemoc.ir import NemocError
from nemoc.runtime import Bounds, Contents, Executable, build

VOCAB = 97


def prompts(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, width), generator=torch.Generator().manual_seed(seed))


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.fixture(scope="module")
def narrow(contents: Callable[..., Contents]) -> Executable:
    """The model with steps of at most 24 tokens over all rows."""
    return build(contents(bounds=Bounds(max_batch=3, max_context=200, max_tokens=24)))


def test_a_split_prompt_gives_the_logits_of_a_whole_one(
    exe: Executable, narrow: Executable
) -> None:
    ids = prompts(2, 50)
    whole, split = exe.new_state(2), narrow.new_state(2)
    expected = exe.prefill(ids, whole, all_logits=True)
    assert expected.shape == (2, 50, VOCAB)
    assert close(narrow.prefill(ids, split, all_logits=True), expected)
    for name, tensor in whole.tensors.items():
        assert torch.allclose(split.tensors[name].float(), tensor.float(), atol=1e-4), name


def test_the_last_logits_are_those_of_all_logits(exe: Executable) -> None:
    ids = prompts(2, 9)
    every = exe.prefill(ids, exe.new_state(2), all_logits=True)
    assert close(exe.prefill(ids, exe.new_state(2)), every[:, -1])


def test_decode_continues_prefill(exe: Executable) -> None:
    ids = prompts(2, 9)
    expected = exe.prefill(ids, exe.new_state(2), all_logits=True)
    state = exe.new_state(2, capacity=9)
    exe.prefill(ids[:, :5], state)
    exe.prefill(ids[:, 5:7], state)
    for position in (7, 8):
        assert close(exe.decode(ids[:, position], state), expected[:, position])
    assert state.lengths.tolist() == [9, 9]


@pytest.mark.parametrize("all_logits", [False, True])
def test_rows_of_unequal_length_equal_each_row_alone(narrow: Executable, all_logits: bool) -> None:
    ids, lengths = prompts(3, 30), torch.tensor([3, 30, 17])
    ids[0, 3:] = -100
    state = narrow.new_state(3)
    together = narrow.prefill(ids, state, lengths, all_logits)
    following = narrow.decode(torch.tensor([5, 6, 7]), state)
    assert state.lengths.tolist() == [4, 31, 18]
    for row, length in enumerate(lengths.tolist()):
        alone = narrow.new_state(1)
        logits = narrow.prefill(ids[row : row + 1, :length], alone, None, all_logits)
        found = together[row : row + 1, :length] if all_logits else together[row : row + 1]
        assert close(found, logits)
        if all_logits:
            assert not together[row, length:].any()
        assert close(following[row : row + 1], narrow.decode(torch.tensor([5 + row]), alone))


def test_a_row_may_fill_its_capacity_while_another_has_padding(exe: Executable) -> None:
    state = exe.new_state(2, capacity=12)
    exe.prefill(prompts(2, 12), state, torch.tensor([11, 4]))
    rest = prompts(2, 8, seed=1)
    logits = exe.prefill(rest, state, torch.tensor([1, 8]))
    alone = exe.new_state(1, capacity=12)
    exe.prefill(prompts(2, 12)[:1, :11], alone)
    assert close(logits[:1], exe.prefill(rest[:1, :1], alone))


def test_a_row_without_tokens_keeps_its_state_to_the_bit(exe: Executable) -> None:
    state = exe.new_state(2)
    exe.prefill(prompts(2, 5), state)
    before = state.clone()
    exe._backend.run("prefill", prompts(2, 7), torch.tensor([0, 7], dtype=torch.int32), state)
    assert state.lengths.tolist() == [5, 12]
    for name, tensor in state.tensors.items():
        kept = tensor[:1, :5] if name.endswith((".k", ".v")) else tensor[:1]
        was = before.tensors[name]
        assert torch.equal(kept, was[:1, :5] if name.endswith((".k", ".v")) else was[:1]), name


def test_input_tensors_are_not_changed(exe: Executable) -> None:
    ids, lengths = prompts(2, 6), torch.tensor([2, 6])
    kept = ids.clone(), lengths.clone()
    exe.prefill(ids, exe.new_state(2), lengths)
    assert torch.equal(ids, kept[0])
    assert torch.equal(lengths, kept[1])


def with_id(value: int) -> torch.Tensor:
    ids = prompts(2, 4)
    ids[1, 2] = value
    return ids


@pytest.mark.parametrize(
    ("ids", "lengths", "message"),
    [
        (
            with_id(97),
            None,
            "ids: row 1, position 2: token id 97 is out of range, the vocabulary has 97",
        ),
        (with_id(-1), None, "ids: row 1, position 2: token id -1 is out of range"),
        (prompts(1, 4), None, "ids has 1 rows, the state has 2"),
        (prompts(2, 4).int(), None, "ids is int32 [2, 4], expected int64 [B, L]"),
        (prompts(2, 4)[0], None, "ids is int64 [4], expected int64 [B, L]"),
        (prompts(2, 0), None, "ids is int64 [2, 0], expected int64 [B, L], not empty"),
        ([[1, 2]], None, "ids is a list, expected an int64 tensor [B, L]"),
        (
            prompts(2, 21),
            None,
            "row 0: 0 tokens so far and 21 more exceed the state's capacity of 20",
        ),
        (prompts(2, 4).to("meta"), None, "ids is on meta, expected on the CPU"),
        (prompts(2, 4), torch.tensor([4, 4]).to("meta"), "lengths is on meta, expected on the CPU"),
        (prompts(2, 4), torch.tensor([4, 5]), "lengths: row 1 is 5, expected 1 to 4"),
        (prompts(2, 4), torch.tensor([0, 4]), "lengths: row 0 is 0, expected 1 to 4"),
        (prompts(2, 4), torch.tensor([4]), "lengths has 1 rows, ids has 2"),
        (prompts(2, 4), torch.tensor([1.0, 1.0]), "lengths is float32 [2], expected int64 [B]"),
    ],
)
def test_bad_prompts_are_refused(
    exe: Executable, ids: torch.Tensor, lengths: torch.Tensor | None, message: str
) -> None:
    state = exe.new_state(2, capacity=20)
    with pytest.raises(NemocError, match=re.escape(message)) as caught:
        exe.prefill(ids, state, lengths)
    assert "\n" not in str(caught.value)
    assert not state.arena.any()


def test_bad_tokens_of_a_decode_are_refused(exe: Executable) -> None:
    state = exe.new_state(2, capacity=4)
    exe.prefill(prompts(2, 3), state)
    with pytest.raises(NemocError, match="next_ids: row 1: token id 1000 is out of"):
        exe.decode(torch.tensor([3, 1000]), state)
    with pytest.raises(NemocError, match=r"next_ids is int64 \[2, 1\], expected int64 \[B\]"):
        exe.decode(torch.tensor([[3], [4]]), state)
    exe.decode(torch.tensor([3, 4]), state)
    with pytest.raises(NemocError, match="row 0: 4 tokens so far and 1 more exceed"):
        exe.decode(torch.tensor([3, 4]), state)


@pytest.mark.parametrize(
    ("batch", "capacity", "message"),
    [
        (4, None, r"batch is 4, expected 1 to 3 \(max_batch\)"),
        (0, None, "batch is 0, expected 1 to 3"),
        (1, 201, r"capacity is 201 tokens, expected 1 to 200 \(max_context\)"),
        (1, 0, "capacity is 0 tokens"),
        ("1", None, "batch is '1', expected an integer"),
        (1.0, None, "batch is 1.0, expected an integer"),
        (1, True, "capacity is True, expected an integer"),
    ],
)
def test_states_past_the_bounds_are_refused(
    exe: Executable, batch: Any, capacity: Any, message: str
) -> None:
    with pytest.raises(NemocError, match=message):
        exe.new_state(batch, capacity)


def test_the_state_of_another_model_is_refused(
    exe: Executable, contents: Callable[..., Contents]
) -> None:
    functions = dict(contents().functions)
    del functions["prefill_all"]
    other = build(contents(functions=functions))
    with pytest.raises(NemocError, match="state: belongs to model"):
        exe.prefill(prompts(1, 3), other.new_state())
    with pytest.raises(NemocError, match="state is a dict"):
        exe.prefill(prompts(1, 3), {})  # type: ignore[arg-type]
    with pytest.raises(NemocError, match="was compiled without prefill_all"):
        other.prefill(prompts(1, 3), other.new_state(), all_logits=True)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((0, 1, 1), "max_batch is 0"),
        ((4, 9, 3), "max_tokens is 3, expected at least max_batch, 4"),
        ((1, "12", 1), "max_context is '12', expected an integer"),
        ((1.5, 12, 2), "max_batch is 1.5, expected an integer"),
        ((1, 2**31, 1), "max_context is 2147483648, expected at most 2147483647"),
        ((1, 1, 2**31), "max_tokens is 2147483648, expected at most 2147483647"),
    ],
)
def test_impossible_bounds_are_refused(bounds: tuple[Any, Any, Any], message: str) -> None:
    with pytest.raises(NemocError, match=message):
        Bounds(*bounds)


def test_integers_of_numpy_become_plain_ones(exe: Executable) -> None:
    bounds = Bounds(*(np.int64(n) for n in (1, 8, 4)))
    assert {type(value) for value in vars(bounds).values()} == {int}
    state = exe.new_state(np.int32(2), np.int64(5))
    assert (type(state.batch), state.capacity) == (int, 5)


def test_chunks_keep_the_chunks_of_the_scan_whole() -> None:
    bounds = Bounds(max_batch=8, max_context=100, max_tokens=500)
    assert [bounds.chunk(batch) for batch in (1, 2, 3, 8)] == [448, 192, 128, 62]
