"""The graph against transformers' NemotronHForCausalLM in float32, through checkpoints that it wrote."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nemoc.ir import DType
from nemoc.models import Model, open_model, preset
from support.checkpoints import VARIANTS, unusual_model, write_checkpoint
from support.stepping import Stepper, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

BOUND = 1e-5
"""Ten times stricter than what the project promises for whole models; 1e-6 is usual."""

CAPACITY = 32


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda name: name.replace(" ", "-"))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Model]:
    """A transformers model and its checkpoint as nemoc opens it."""
    directory = tmp_path_factory.mktemp("checkpoint")
    seed = list(VARIANTS).index(request.param)
    reference = write_checkpoint(directory, seed=seed, **VARIANTS[request.param])
    return reference, open_model(directory)


def _tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_prefill_equals_transformers(pair: tuple[Any, Model]) -> None:
    reference, model = pair
    tokens = _tokens(1, 19)
    found = Stepper(model, 1, CAPACITY)(tokens)
    assert relative_error(found, reference(tokens).logits) < BOUND


def test_decode_after_prefill_equals_transformers(pair: tuple[Any, Model]) -> None:
    reference, model = pair
    tokens = _tokens(2, 17)
    step = Stepper(model, 2, CAPACITY)
    step(tokens[:, :12])
    out = reference(tokens[:, :12], use_cache=True)
    for at in range(12, 17):
        found = step(tokens[:, at : at + 1])
        out = reference(tokens[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
        assert relative_error(found, out.logits) < BOUND


def test_chunked_prefill_equals_whole_prefill(pair: tuple[Any, Model]) -> None:
    reference, model = pair
    tokens = _tokens(2, 20)
    step = Stepper(model, 2, CAPACITY)
    pieces = [step(tokens[:, a:b]) for a, b in ((0, 2), (2, 11), (11, 12), (12, 20))]
    assert relative_error(torch.cat(pieces, 1), reference(tokens).logits) < BOUND


def test_rows_of_unequal_length_equal_each_row_alone(pair: tuple[Any, Model]) -> None:
    reference, model = pair
    tokens = _tokens(3, 21)
    first, second, third = [9, 1, 6], [1, 7, 3], [4, 4, 1]
    step = Stepper(model, 3, CAPACITY)
    starts = [0, 0, 0]
    alone = [reference(row[None]).logits[0] for row in tokens]
    for valid in (first, second, third):
        width = max(valid)
        padded = torch.full((3, width), 96)
        for row, count in enumerate(valid):
            padded[row, :count] = tokens[row, starts[row] : starts[row] + count]
        found = step(padded, valid)
        for row, count in enumerate(valid):
            expected = alone[row][starts[row] : starts[row] + count]
            assert relative_error(found[row, :count], expected) < BOUND
        starts = [s + v for s, v in zip(starts, valid, strict=True)]
    assert step.states["lengths"].tolist() == starts


def test_bf16_weights_are_used_as_stored(tmp_path: Path) -> None:
    reference = write_checkpoint(tmp_path, seed=40, dtype=torch.bfloat16, shard="20KB")
    model = open_model(tmp_path)
    assert model.parameters is not None
    assert str(model.parameters.type_of("layers.0.mixer.in_proj.weight").dtype) == "bf16"
    tokens = _tokens(2, 11)
    found = Stepper(model, 2, CAPACITY)(tokens)
    assert relative_error(found, reference(tokens).logits) < BOUND


def test_transformers_model_in_memory_is_a_source() -> None:
    reference = unusual_model(seed=41, **VARIANTS["latent experts"])
    tokens = _tokens(1, 7)
    found = Stepper(open_model(reference), 1, CAPACITY)(tokens)
    assert relative_error(found, reference(tokens).logits) < BOUND


def test_bf16_compute_rounds_no_more_than_transformers_in_bf16(tmp_path: Path) -> None:
    # No MoE layer: rounding flips experts, and the error then says nothing.
    pattern = "M*-M"
    reference = write_checkpoint(
        tmp_path, seed=42, dtype=torch.bfloat16, hybrid_override_pattern=pattern
    )
    model = open_model(tmp_path)
    tokens = _tokens(2, 23)
    exact = reference(tokens).logits
    graph = model.build_step(dtype=DType.BF16, logits="all")
    found = Stepper(model, 2, CAPACITY, graph=graph)(tokens)
    theirs = reference.to(torch.bfloat16)(tokens).logits
    assert 1e-4 < relative_error(found, exact) < 1.2 * relative_error(theirs, exact)
    unrounded = Stepper(model, 2, CAPACITY, graph=graph, float64=True)(tokens)
    assert relative_error(unrounded, exact) < BOUND


@pytest.mark.slow
def test_layers_of_real_width_equal_transformers_over_several_chunks(tmp_path: Path) -> None:
    shape = preset("mid").to_dict()
    del shape["dtype"]
    shape |= {"vocab_size": 97, "layers_block_type": None, "hybrid_override_pattern": "ME*E"}
    shape |= {"moe_latent_size": 256, "n_group": 8, "topk_group": 4, "num_hidden_layers": 4}
    reference = write_checkpoint(tmp_path, seed=43, dtype=torch.bfloat16, **shape)
    model = open_model(tmp_path)
    tokens = _tokens(2, 300)
    step = Stepper(model, 2, 320)
    found = torch.cat([step(tokens[:, :170]), step(tokens[:, 170:])], 1)
    assert relative_error(found, reference(tokens).logits) < BOUND
