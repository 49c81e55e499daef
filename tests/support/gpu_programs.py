"""Programs for GPU targets, without weights: what their launches are, and their kernels compiled."""

import functools

from nemoc import compiler
from nemoc.codegen.lower import Program, corner_sizes
from nemoc.codegen.storage import bind_weights, weight_layout
from nemoc.gpu import lower_gpu
from nemoc.runtime import Bounds

BOUNDS = Bounds(4, 4096, compiler.GPU_STEP_TOKENS)


@functools.cache
def program(
    source: str, target: str, dtype: str | None = None, quantize: str | None = None
) -> Program:
    """The launches of a model's functions for a target; a preset's name will do."""
    found = compiler.functions(source, target, dtype=dtype, quantize=quantize)
    graphs, weights = bind_weights(found.graphs)
    corners = corner_sizes(BOUNDS.max_batch, BOUNDS.max_tokens, BOUNDS.max_context)
    return lower_gpu(graphs, weight_layout(weights), corners, target)
