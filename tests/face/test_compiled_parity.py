"""Executables for the CPU against transformers in float32, through checkpoints that it wrote."""

from typing import Any

import pytest
import torch

import nemoc
from support.checkpoints import VARIANTS, write_checkpoint
from support.parity import CAPACITY, Pair, ParityWithTransformers

SETUPS: dict[str, tuple[str, ...]] = {
    "as released": ("latent experts", "biases", "grouped routing"),
    "few": ("gelu experts", "one group of B and C", "two taps", "raw weights of all experts"),
    "many": ("silu experts", "a group for each head", "seven taps without bias"),
    "others": ("tanh gelu and relu", "large epsilon"),
    "attention only": ("attention only",),
    "base in bf16": ("base",),
}
"""Variants that one model has together, since compiling takes long. What a kernel does follows from its own op and the
ops in its region, so that variants about different layers do not meet in one; every variant is held by itself against
transformers in `tests/models/test_parity.py`, in the interpreter."""


def merged(names: tuple[str, ...]) -> dict[str, Any]:
    """The changes of several variants, which agree where they are about the same."""
    changes: dict[str, Any] = {}
    for name in names:
        for key, value in VARIANTS[name].items():
            assert changes.setdefault(key, value) == value, f"{names} contradict on {key}"
    return changes


@pytest.fixture(scope="module", params=SETUPS, ids=lambda name: name.replace(" ", "-"))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A transformers model, and its checkpoint compiled for the CPU."""
    folder = tmp_path_factory.mktemp("checkpoint")
    reference = write_checkpoint(
        folder,
        seed=100 + list(SETUPS).index(request.param),
        dtype=torch.bfloat16 if request.param.endswith("bf16") else torch.float32,
        **merged(SETUPS[request.param]),
    )
    executable = nemoc.compile(str(folder), target="cpu", max_batch=3, max_context=CAPACITY)
    return reference, executable


class TestOnTheCpu(ParityWithTransformers):
    """Every setup, compiled for the CPU; bf16 weights are computed with as stored."""


def test_every_variant_is_in_a_setup() -> None:
    assert {name for names in SETUPS.values() for name in names} == set(VARIANTS)
