"""The eager reference of an opened model, with its weights."""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from nemoc.ir.builder import Builder
from nemoc.ir.errors import NemocError
from nemoc.ir.interpreter import interpret
from nemoc.ir.params import LazyArguments, ParameterSource
from nemoc.models.names import is_stack
from nemoc.models.reference import NemotronH
from nemoc.models.source import Model


def eager_reference(model: Model, dtype: torch.dtype = torch.float32) -> NemotronH:
    """`NemotronH` holding the model's weights, for evaluation; quantized ones as the numbers that they stand for.

    Args:
        model: with weights, all of which have to fit into memory in `dtype`.
        dtype: of weights and arithmetic; float32 or float64.

    Raises:
        NemocError: the model has no weights, or a tensor is missing.
    """
    if model.parameters is None:
        raise NemocError(f"{model.name} has no weights")
    with torch.device("meta"):
        module = NemotronH(model.config)
    tied = module.lm_head.weight is module.backbone.embeddings.weight
    weights = {
        name: _read(model, model.parameters, name.removeprefix("backbone."), value.shape, dtype)
        for name, value in module.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    if tied:
        weights["lm_head.weight"] = weights["backbone.embeddings.weight"]
    module.load_state_dict(weights, assign=True)
    return module.eval()


def eager_path(name: str) -> str:
    """The name that a parameter of graphs has in `NemotronH`."""
    return name if name.startswith("lm_head.") else f"backbone.{name}"


def change_rows(
    module: NemotronH, name: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> RemovableHandle:
    """Have every product with a weight read its rows as `change` makes them.

    Args:
        module: the model.
        name: of the weight in graphs: of a linear layer, or of a layer's stack of experts.
        change: given rows [..., K], what takes their place, of the same shape; the rows of a stack may come in parts.

    Returns:
        What undoes it: by `remove`, or as a context manager.
    """

    def before(_: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        return change(inputs[0])

    path = eager_path(name)
    reader = f"{path.removesuffix('_proj')}_rows" if is_stack(name) else path.rpartition(".")[0]
    return module.get_submodule(reader).register_forward_pre_hook(before)


def _read(
    model: Model, source: ParameterSource, name: str, shape: torch.Size, dtype: torch.dtype
) -> torch.Tensor:
    """A weight in `dtype`, de-quantized by the ops that the graph has for it."""
    stored, types = model.quantization.formats.get(name), model.weight_types
    if stored is None or types is None:
        return source.read(name).to(dtype)
    build = Builder("weight")
    graph = build.finish([stored.append(build, name, tuple(shape), types)])
    arguments = LazyArguments(graph, source, {})
    (weight,) = interpret(graph, arguments, float64=dtype is torch.float64).outputs
    return weight
