"""Executables of differently fused graphs against transformers in float32: which fusions there are must not matter."""

from collections.abc import Sequence
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import pytest
import torch

import nemoc
from nemoc.passes import Pass, preset, print_pipeline
from support.checkpoints import write_checkpoint

BOUND = 1e-4
"""‖found − expected‖ / ‖expected‖ of logits; what the project promises for whole models in float32."""

PRESET = preset("cpu", "prefill")
FUSIONS = tuple(p for p in PRESET if p.name.startswith("fuse-"))
OTHERS = tuple(p for p in PRESET if p not in FUSIONS)


def with_fusions(fusions: Sequence[Pass]) -> str:
    """The preset with other fusions, or in another order."""
    return print_pipeline((*OTHERS[:-1], *fusions, OTHERS[-1]))


ORDERS = {
    "none": (),
    "c a b": (2, 0, 1),
    "d b a": (3, 1, 0),
    "a d c": (0, 3, 2),
    "b c d": (1, 2, 3),
}
"""Which fusions run, in which order. Of any two, somewhere both are on, each is on alone, and none is; where both are
on, each comes first somewhere. So what two fusions do to each other is seen without compiling all 65 orders."""

PIPELINES = {name: with_fusions([FUSIONS[i] for i in order]) for name, order in ORDERS.items()} | {
    "before the weights are laid out": print_pipeline((*FUSIONS, *OTHERS)),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """All four mixers, with biases, a latent space and groups of experts."""
    folder = tmp_path_factory.mktemp("checkpoint")
    changes = {
        "use_bias": True,
        "mlp_bias": True,
        "moe_latent_size": 22,
        "n_routed_experts": 12,
        "n_group": 4,
        "topk_group": 2,
    }
    return folder, write_checkpoint(folder, seed=40, **changes)


@torch.inference_mode()
@pytest.mark.parametrize("pipeline", PIPELINES.values(), ids=list(PIPELINES))
def test_logits_equal_transformers(checkpoint: tuple[Path, Any], pipeline: str) -> None:
    folder, reference = checkpoint
    executable = nemoc.compile(
        str(folder), target="cpu", pipeline=pipeline, max_batch=2, max_context=32
    )
    ids = torch.randint(0, 97, (2, 21), generator=torch.Generator().manual_seed(9))
    expected = reference(ids).logits
    state = executable.new_state(2)
    parts = [
        executable.prefill(ids[:, a:b], state, all_logits=True) for a, b in pairwise((0, 11, 13))
    ]
    parts += [executable.decode(ids[:, i], state)[:, None] for i in range(13, 21)]
    assert relative_error(torch.cat(parts, dim=1), expected) <= BOUND
    unequal = executable.prefill(ids, executable.new_state(2), lengths=torch.tensor([21, 8]))
    ends = torch.stack([expected[0, 20], expected[1, 7]])
    assert relative_error(unequal, ends) <= BOUND


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_any_two_fusions_meet_in_both_orders_and_apart() -> None:
    for pair in permutations(range(len(FUSIONS)), 2):
        seen = [tuple(i for i in order if i in pair) for order in ORDERS.values()]
        assert {(), pair[:1], pair} <= set(seen)


@torch.inference_mode()
def test_a_latent_space_of_one_number_is_no_other_case(tmp_path: Path) -> None:
    """Whose rows are as wide as what a sum along them leaves."""
    changes = {"hybrid_override_pattern": "ME*", "moe_latent_size": 1}
    reference = write_checkpoint(tmp_path, seed=4, **changes)
    executable = nemoc.compile(str(tmp_path), target="cpu", max_context=16)
    ids = torch.randint(0, 97, (1, 9), generator=torch.Generator().manual_seed(2))
    logits = executable.prefill(ids, executable.new_state(), all_logits=True)
    expected = reference(ids).logits
    assert float((logits - expected).norm() / expected.norm()) <= BOUND
