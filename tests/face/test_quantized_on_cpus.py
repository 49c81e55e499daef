"""Quantized models compiled for the CPU: what is stored, and that it is what the interpreter computes with."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import nemoc
from nemoc.compiler import functions
from nemoc.ir.ops import DequantizeNvfp4, Folded, Fused, GroupedLinear, Linear, RoundToInt8
from nemoc.verification import (
    MODEL_BOUND,
    NARROW_BOUND,
    TIED_BOUND,
    verify_artifact,
    verify_model,
)
from support.checkpoints import write_checkpoint
from support.quantized import WIDE
from support.stepping import relative_error

CAPACITY = 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(
        folder, seed=3, dtype=torch.bfloat16, **(WIDE | {"hybrid_override_pattern": "ME"})
    )
    return folder


def test_products_round_what_they_read_and_unpack_what_they_multiply_with(checkpoint: Path) -> None:
    found = functions(str(checkpoint), "cpu", quantize="nvfp4-w4a8")
    for graph in found.graphs.values():
        kinds = [
            {type(inner.op) for inner in node.op.body.nodes}
            if isinstance(node.op, Fused)
            else {type(node.op)}
            for node in graph.nodes
            if not isinstance(node.op, Folded)
        ]
        packed = [k for k in kinds if DequantizeNvfp4 in k]
        assert len(packed) >= 4
        assert all(RoundToInt8 in k and k & {Linear, GroupedLinear} for k in packed)
        assert sum(RoundToInt8 in k for k in kinds) == len(packed)


@pytest.mark.parametrize("quantize", ["fp8", "nvfp4", "nvfp4-w4a8"])
def test_the_executable_computes_what_the_interpreter_does(
    checkpoint: Path, tmp_path: Path, quantize: str
) -> None:
    options = {"quantize": quantize, "max_batch": 2, "max_context": CAPACITY}
    executables = [
        nemoc.compile(str(checkpoint), target=target, destination=tmp_path / target, **options)
        for target in ("cpu", "reference")
    ]
    ids = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(0))
    found, expected = [], []
    for executable, logits in zip(executables, (found, expected), strict=True):
        state = executable.new_state(2)
        logits.append(executable.prefill(ids, state, all_logits=True))
        logits += [executable.decode(ids[:, t], state)[:, None] for t in range(4)]
    # Rounded activations may go to the other neighbour where two computations differ in the last bit.
    bound = 5e-3 if quantize == "nvfp4-w4a8" else 1e-5
    assert relative_error(torch.cat(found, 1), torch.cat(expected, 1)) < bound

    rows = verify_artifact(tmp_path / "cpu").rows
    assert all(row.ok for row in rows)
    bounds = {row.bound for row in rows if row.name != "files"}
    rounded = {NARROW_BOUND, TIED_BOUND}
    assert bounds == (rounded if quantize == "nvfp4-w4a8" else {MODEL_BOUND})

    with safe_open(str(tmp_path / "cpu" / "weights.safetensors"), "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    wide = [
        n for n, s in slices.items() if s.get_dtype() in ("F32", "BF16") and len(s.get_shape()) > 2
    ]
    # the head, the embeddings and the routers, but no projection
    assert not [n for n in wide if "proj" in n]
    codes = "F8_E4M3" if quantize == "fp8" else "U8"
    assert sum(s.get_dtype() == codes for s in slices.values()) >= 6


def test_verify_holds_quantized_models_against_the_interpreter(
    checkpoint: Path, tmp_path: Path
) -> None:
    executable = nemoc.compile(
        str(checkpoint), target="reference", quantize="nvfp4", max_context=CAPACITY
    )
    found = verify_model(str(checkpoint), "reference", quantize="nvfp4", executable=executable)
    kinds = [row.kind for row in found.rows]
    assert "quantized" in kinds and "model" not in kinds
    assert any(row.name == "quantize-nvfp4" and row.error > 1e-3 for row in found.rows)
    assert found.ok
