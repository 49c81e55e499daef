"""How large the activations are that each weight multiplies, on text, and the static scales that follow.

Scales are ModelOpt's, amax / (6 · 448) for NVFP4 and amax / 448 for FP8: the largest magnitude that was seen becomes
the largest number that the format has. One holds for all experts of a layer, whose rows are quantized before they are
dealt out.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from nemoc.error_budget import calibration_tokens
from nemoc.ir import Graph, NemocError, Value, interpret
from nemoc.ir.dims import evaluate_dim
from nemoc.ir.graph import Node
from nemoc.ir.nvfp4 import DIALECTS, LARGEST_SCALE
from nemoc.ir.ops import GroupedLinear, Linear
from nemoc.ir.ops.fp8 import LARGEST
from nemoc.ir.params import LazyArguments
from nemoc.ir.scopes import read_scope
from nemoc.models import Model, build_step
from nemoc.models.dequantized import Dequantized
from nemoc.models.input_scales import stored_input_scales
from nemoc.passes import Pass
from nemoc.passes.quantize_fp8 import QuantizeFp8
from nemoc.passes.quantize_nvfp4 import QuantizeNvfp4
from nemoc.progress import Progress


def takes_scales(passes: Sequence[Pass]) -> bool:
    """Whether one of the passes quantizes activations and leaves their scales open."""
    return bool(_takers(passes))


def _takers(passes: Sequence[Pass]) -> list[QuantizeNvfp4 | QuantizeFp8]:
    return [
        p for p in passes if isinstance(p, QuantizeNvfp4 | QuantizeFp8) and p.takes_input_scales
    ]


def input_scales(
    model: Model,
    passes: Sequence[Pass],
    files: Sequence[str | Path] = (),
    progress: Progress | None = None,
) -> Mapping[str, float]:
    """The static scales for passes that quantize: measured on text, else those of the checkpoint, else none.

    Args:
        model: with weights.
        passes: what is to become of it.
        files: calibration text.
        progress: told what is being done.

    Returns:
        By the name of the weight that the activations are multiplied by.

    Raises:
        NemocError: there is text but nothing to scale, or as `measured_scales` and `stored_input_scales`.
    """
    if not takes_scales(passes):
        if files:
            raise NemocError(
                "calibration: found text, but no activations to scale; "
                "it goes with an error budget, nvfp4-w4a4, fp8-w8a8 or fp8-prompts"
            )
        return {}
    if files:
        return measured_scales(model, files, progress, passes)
    return stored_input_scales(model)


def measured_scales(
    model: Model,
    files: Sequence[str | Path],
    progress: Progress | None = None,
    passes: Sequence[Pass] = (),
) -> dict[str, float]:
    """The scale for each weight of a product, by the largest magnitude that it multiplies on text.

    All windows run as one batch in float32 through the interpreter, which holds one weight at a time.

    Args:
        model: with weights.
        files: calibration text.
        progress: told what is being done.
        passes: what quantizes activations: those of a weight are FP8 if such a pass is the first whose scope has it,
            else NVFP4.

    Raises:
        NemocError: the text cannot be read or is too short, or all that a weight multiplies is 0.
    """
    if progress is not None:
        progress("calibrate", 0, 1)
    largest = largest_inputs(model, calibration_tokens(model, files))
    scales = {}
    for name, amax in largest.items():
        if not 0 < amax < float("inf"):
            raise NemocError(
                f"calibration: what {name} multiplies is {amax:g} at most, expected a positive "
                "number: give other text"
            )
        first = next((p for p in _takers(passes) if read_scope(p.scope).match(name)), None)
        if isinstance(first, QuantizeFp8):
            scale = torch.tensor(amax) / LARGEST
        else:
            scale = DIALECTS["modelopt"].tensor_scale(torch.tensor(amax), LARGEST_SCALE)
        scales[name] = float(scale)
    return scales


def largest_inputs(model: Model, tokens: torch.Tensor) -> dict[str, float]:
    """The largest magnitude that the weight of each product multiplies, by its name.

    Args:
        model: with weights.
        tokens: int64 [B, L], every row from an empty state.
    """
    weights = Dequantized(model)
    graph = build_step(
        model.config, logits="all", weight_types=lambda name: weights.type_of(name).dtype
    )
    read_by: dict[Value, list[str]] = {}
    for node in graph.nodes:
        if isinstance(node.op, Linear | GroupedLinear):
            read_by.setdefault(node.op.x, []).append(node.op.w.name)
    found: dict[str, float] = {}

    def note(node: Node, results: Sequence[torch.Tensor]) -> None:
        for value, tensor in zip(node.results, results, strict=True):
            if value in read_by:
                low, high = (float(bound) for bound in tensor.aminmax())
                found.update(dict.fromkeys(read_by[value], max(-low, high)))

    body = _without_logits(graph)
    interpret(body, LazyArguments(body, weights, _empty_state(body, tokens)), observe=note)
    return found


def _without_logits(graph: Graph) -> Graph:
    """The graph up to what the head multiplies: of all tokens, logits would take more memory than all else."""
    nodes = (node for node in graph.nodes if set(graph.outputs).isdisjoint(node.results))
    return dataclasses.replace(graph, nodes=tuple(nodes), outputs=())


def _empty_state(graph: Graph, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Arguments of a step over tokens that come first."""
    batch, length = tokens.shape
    sizes = {"B": batch, "L": length, "C": length}
    states = {
        state.name: torch.zeros(
            [evaluate_dim(d, sizes) for d in state.shape], dtype=state.dtype.torch
        )
        for state in graph.states
    }
    valid = torch.full((batch,), length, dtype=torch.int32)
    return {"tokens": tokens, "valid": valid, **states}
