"""What a compiled model has to do as transformers does, whatever it was compiled for."""

from itertools import pairwise
from typing import Any

import torch

import nemoc
from nemoc.passes.check import relative_error

BOUND = 1e-4
"""‖found − expected‖ / ‖expected‖ of logits; what the project promises for whole models in float32."""

CAPACITY = 32

Pair = tuple[Any, nemoc.Executable]
"""A transformers model in float32, and its checkpoint compiled for batches of 3 and `CAPACITY` tokens."""


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random tokens of the variants' vocabulary, int64 [batch, length]."""
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def expected_logits(reference: Any, ids: torch.Tensor) -> torch.Tensor:
    """transformers' logits, float32 [B, L, V]."""
    logits: torch.Tensor = reference(ids).logits
    return logits


class ParityWithTransformers:
    """Tests for a subclass in a file with a fixture `pair`."""

    def test_prefill_equals_transformers(self, pair: Pair) -> None:
        reference, executable = pair
        ids = tokens(2, 19)
        expected = expected_logits(reference, ids)
        every = executable.prefill(ids, executable.new_state(2), all_logits=True)
        assert relative_error(every, expected) <= BOUND
        last = executable.prefill(ids, executable.new_state(2))
        assert relative_error(last, expected[:, -1]) <= BOUND

    def test_decode_after_prefill_equals_transformers(self, pair: Pair) -> None:
        reference, executable = pair
        ids = tokens(2, 20, seed=1)
        state = executable.new_state(2)
        executable.prefill(ids[:, :7], state)
        found = [executable.decode(ids[:, i], state) for i in range(7, 20)]
        expected = expected_logits(reference, ids)[:, 7:]
        assert relative_error(torch.stack(found, dim=1), expected) <= BOUND

    def test_chunked_prefill_equals_transformers(self, pair: Pair) -> None:
        reference, executable = pair
        ids = tokens(2, 23, seed=2)
        state = executable.new_state(2)
        cuts = (0, 1, 3, 11, 23)
        parts = [executable.prefill(ids[:, a:b], state, all_logits=True) for a, b in pairwise(cuts)]
        assert relative_error(torch.cat(parts, dim=1), expected_logits(reference, ids)) <= BOUND

    def test_rows_of_unequal_length_equal_each_row_alone(self, pair: Pair) -> None:
        reference, executable = pair
        ids, lengths = tokens(3, 17, seed=3), [17, 1, 8]
        state = executable.new_state(3)
        first = executable.prefill(ids, state, lengths=torch.tensor(lengths))
        after = executable.decode(ids[:, 0], state)
        for row, length in enumerate(lengths):
            alone = torch.cat([ids[row, :length], ids[row, :1]])[None]
            expected = expected_logits(reference, alone)[0]
            assert relative_error(first[row], expected[length - 1]) <= BOUND
            assert relative_error(after[row], expected[length]) <= BOUND
