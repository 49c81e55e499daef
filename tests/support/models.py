"""Configurations of models that are small in every way."""

from nemoc.models import ModelConfig

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
