"""Configurations of models that are small in every way."""

import dataclasses
from itertools import pairwise

from nemoc.models import Model, ModelConfig, open_model

SMALL = ModelConfig(
    vocab_size=61,
    hidden_size=20,
    layers=("mamba", "moe", "attention", "mamba", "moe", "attention"),
    mamba_num_heads=6,
    mamba_head_dim=5,
    n_groups=2,
    ssm_state_size=7,
    conv_kernel=4,
    chunk_size=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    intermediate_size=26,
    n_routed_experts=6,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    moe_latent_size=8,
    moe_intermediate_size=11,
    moe_shared_expert_intermediate_size=13,
)
"""Two of each mixer, sizes that no vector or block divides."""


def shortened(source: str) -> Model:
    """A published model without most of its layers: every two kinds that follow each other in it still do.

    What passes make of a layer depends on it and on its neighbours, so that layers further on show nothing new.
    """
    model = open_model(source)
    layers = model.config.layers
    count = next(n for n in range(len(layers)) if {*pairwise(layers[:n])} == {*pairwise(layers)})
    config = dataclasses.replace(model.config, layers=(*layers[:count], *layers[-2:]))
    return dataclasses.replace(model, config=config)
