"""The eager reference of an opened model, with its weights."""

import torch

from nemoc.ir.errors import NemocError
from nemoc.models.reference import NemotronH
from nemoc.models.source import Model


def eager_reference(model: Model, dtype: torch.dtype = torch.float32) -> NemotronH:
    """`NemotronH` holding the model's weights, for evaluation.

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
        name: model.parameters.read(name.removeprefix("backbone.")).to(dtype)
        for name in module.state_dict()
        if not (tied and name == "lm_head.weight")
    }
    if tied:
        weights["lm_head.weight"] = weights["backbone.embeddings.weight"]
    module.load_state_dict(weights, assign=True)
    return module.eval()
