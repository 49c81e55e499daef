"""Executables for the CPU against transformers in float32, through checkpoints that it wrote."""

from pathlib import Path

import pytest
import torch

import nemoc
from nemoc.passes.check import relative_error
from support.checkpoints import VARIANTS, write_checkpoint
from support.parity import BOUND, CAPACITY, Pair, ParityWithTransformers, expected_logits, tokens


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda name: name.replace(" ", "-"))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A transformers model, and its checkpoint compiled for the CPU."""
    folder = tmp_path_factory.mktemp("checkpoint")
    seed = 100 + list(VARIANTS).index(request.param)
    reference = write_checkpoint(folder, seed=seed, **VARIANTS[request.param])
    executable = nemoc.compile(str(folder), target="cpu", max_batch=3, max_context=CAPACITY)
    return reference, executable


class TestOnTheCpu(ParityWithTransformers):
    """Every variant, compiled for the CPU."""


def test_bf16_weights_are_computed_with_as_stored(tmp_path: Path) -> None:
    reference = write_checkpoint(tmp_path, seed=7, dtype=torch.bfloat16)
    executable = nemoc.compile(str(tmp_path), target="cpu", max_context=CAPACITY)
    ids = tokens(1, 12)
    found = executable.prefill(ids, executable.new_state(), all_logits=True)
    assert relative_error(found, expected_logits(reference, ids)) <= BOUND
