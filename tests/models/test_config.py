"""Configurations: every released spelling means the same, and bad ones get a one-line answer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import NemotronHConfig

from nemoc.ir.errors import NemocError
from nemoc.models.config import ModelConfig
from nemoc.models.presets import PRESETS, preset
from nemoc.models.reference import NemotronH

BASE: dict[str, Any] = {
    "model_type": "nemotron_h",
    "vocab_size": 64,
    "hidden_size": 32,
    "hybrid_override_pattern": "ME*-",
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 16,
    "conv_kernel": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
}


def changed(**changes: Any) -> dict[str, Any]:
    """BASE with some fields replaced; None leaves a field out."""
    return {name: value for name, value in (BASE | changes).items() if value is not None}


@pytest.mark.parametrize(
    "layers",
    [
        {"layers_block_type": ["mamba", "moe", "attention", "mlp"]},
        {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
        {"layer_types": ["linear_attention", "moe", "full_attention", "mlp"]},
    ],
)
def test_layer_lists_mean_the_same_as_the_pattern(layers: dict[str, Any]) -> None:
    spelled = changed(hybrid_override_pattern=None) | layers
    assert ModelConfig.from_dict(spelled) == ModelConfig.from_dict(BASE)
    assert ModelConfig.from_dict(spelled).pattern == "ME*-"


@pytest.mark.parametrize("infinity", ["Infinity", '{"__float__": "Infinity"}'])
def test_reads_both_spellings_of_infinity(infinity: str, tmp_path: Path) -> None:
    text = json.dumps(BASE)[:-1] + f', "time_step_limit": [0.0, {infinity}]}}'
    (tmp_path / "config.json").write_text(text)
    assert ModelConfig.from_file(tmp_path) == ModelConfig.from_dict(BASE)


@pytest.mark.parametrize(
    ("usual", "other"),
    [
        ("layer_norm_epsilon", "norm_eps"),
        ("dtype", "torch_dtype"),
        ("head_dim", "attention_head_dim"),
        ("n_routed_experts", "num_local_experts"),
        ("conv_kernel", "mamba_d_conv"),
        ("chunk_size", "mamba_chunk_size"),
    ],
)
def test_reads_other_names_of_a_field(usual: str, other: str) -> None:
    values: dict[str, Any] = BASE | {
        "layer_norm_epsilon": 1e-6,
        "dtype": "float32",
        "chunk_size": 32,
    }
    renamed = {other if name == usual else name: value for name, value in values.items()}
    assert ModelConfig.from_dict(renamed) == ModelConfig.from_dict(values)


@pytest.mark.parametrize(
    "mtp", [{"mtp_hybrid_override_pattern": "*E"}, {"mtp_layers_block_type": ["attention", "moe"]}]
)
def test_parses_multi_token_prediction(mtp: dict[str, Any]) -> None:
    config = ModelConfig.from_dict(BASE | mtp | {"num_nextn_predict_layers": 1})
    assert (config.num_nextn_predict_layers, config.mtp_layers) == (1, ("attention", "moe"))


def test_eos_may_be_one_id_several_or_none() -> None:
    assert ModelConfig.from_dict(changed(eos_token_id=[2, 11])).eos_token_ids == (2, 11)
    assert ModelConfig.from_dict(changed(eos_token_id=7)).eos_token_ids == (7,)
    assert ModelConfig.from_dict(BASE | {"eos_token_id": None}).eos_token_ids == ()


def test_missing_kv_heads_mean_as_many_as_query_heads() -> None:
    assert ModelConfig.from_dict(changed(num_key_value_heads=None)).num_key_value_heads == 4


def test_fields_of_absent_layer_kinds_are_not_required() -> None:
    config = ModelConfig.from_dict(
        {"vocab_size": 8, "hidden_size": 8, "hybrid_override_pattern": "-", "intermediate_size": 8}
    )
    assert (config.mamba_inner_size, config.n_routed_experts) == (0, 0)


def test_tolerates_what_released_files_carry_beside() -> None:
    extra = {
        "expand": 2,
        "rope_theta": 10000,
        "residual_in_fp32": False,
        "auto_map": {},
        "mamba_proj_bias": False,
        "quantization_config": {"quant_algo": "NVFP4"},
        "moe_shared_expert_overlap": True,
        "some_new_vendor_field": 3,
    }
    assert ModelConfig.from_dict(BASE | extra) == ModelConfig.from_dict(BASE)


@pytest.mark.parametrize("name", PRESETS)
def test_to_dict_reads_back_equal_here_and_in_transformers(name: str) -> None:
    config = preset(name)
    data = json.loads(json.dumps(config.to_dict()))
    assert ModelConfig.from_dict(data) == config
    theirs = NemotronHConfig(**data)
    assert ModelConfig.from_dict(theirs.to_dict()).layers == config.layers
    assert theirs.hidden_size == config.hidden_size


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("nano", 31_577_940_288),
        ("super", 120_668_707_840),
        ("ultra", 549_308_993_536),
        ("nano-9b-v2", 8_888_227_328),
        ("nemotron-h-8b", 8_100_852_736),
        ("nano-4b", 3_973_556_832),
    ],
)
def test_presets_have_the_published_parameter_counts(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = NemotronH(preset(name))
    assert sum(value.numel() for value in model.state_dict().values()) == parameters


def test_nano_has_the_published_widths() -> None:
    nano = preset("nano")
    assert (nano.mamba_inner_size, nano.conv_dim, nano.in_proj_rows) == (4096, 6144, 10304)
    assert preset("super").expert_input_size == 1024
    assert preset("lightning").mtp_layers == ("attention", "moe")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size: found nothing, expected an integer of at least 1"),
        (
            {"hidden_size": None, "hiden_size": 32},
            "hiden_size: found an unknown field, expected 'hidden_size'?",
        ),
        (
            {"hybrid_override_pattern": None, "hybrid_overide_pattern": "M"},
            "hybrid_overide_pattern: found an unknown field, expected 'hybrid_override_pattern'?",
        ),
        (
            {"routed_scalling_factor": 2.5},
            "routed_scalling_factor: found an unknown field, expected 'routed_scaling_factor'?",
        ),
        (
            {"hybrid_override_pattern": None},
            "layers_block_type: found nothing, expected a list of layer kinds "
            "(or hybrid_override_pattern)",
        ),
        (
            {"hybrid_override_pattern": "MEX*"},
            "hybrid_override_pattern: found letter 'X' at position 2, expected M, E, * or -",
        ),
        (
            {"layers_block_type": ["mamba", "conv"]},
            "layers_block_type: found layer kind 'conv', expected mamba, moe, attention or mlp",
        ),
        (
            {"layers_block_type": ["mamba"]},
            "hybrid_override_pattern: found 'ME*-', expected the same layers as layers_block_type",
        ),
        (
            {"num_hidden_layers": 5},
            "num_hidden_layers: found 5, expected 4, the number of layers listed",
        ),
        ({"hidden_size": "32"}, "hidden_size: found '32', expected an integer"),
        ({"hidden_size": True}, "hidden_size: found True, expected an integer"),
        ({"hidden_size": 0}, "hidden_size: found 0, expected an integer of at least 1"),
        ({"use_bias": 1}, "use_bias: found 1, expected true or false"),
        ({"norm_eps": "1e-5"}, "norm_eps: found '1e-5', expected a positive number"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id: found [2, 'x'], expected a token id or a list"),
        ({"mlp_hidden_act": "swiglu"}, "mlp_hidden_act: found 'swiglu', expected one of relu2,"),
        (
            {"mamba_num_heads": 5},
            "mamba_num_heads: found 5, expected a multiple of n_groups (2)",
        ),
        (
            {"num_attention_heads": 5},
            "num_attention_heads: found 5, expected a multiple of num_key_value_heads (2)",
        ),
        (
            {"num_experts_per_tok": 9},
            "num_experts_per_tok: found 9, expected at most 8, the experts to choose from",
        ),
        (
            {"n_group": 4, "topk_group": 5},
            "topk_group: found 5, expected at most n_group (4)",
        ),
        ({"n_routed_experts": 10**9}, "n_routed_experts: found 1000000000, expected at most 65536"),
        ({"n_group": 3}, "n_routed_experts: found 8, expected a multiple of n_group (3)"),
        (
            {"time_step_limit": [0.001, 0.1]},
            "time_step_limit: found [0.001, 0.1], expected [0, Infinity]: dt is never clamped",
        ),
        ({"time_step_limit": 3}, "time_step_limit: found 3, expected a list of numbers"),
        (
            {"model_type": "nemotron_h_puzzle"},
            "model_type: found 'nemotron_h_puzzle', expected 'nemotron_h'",
        ),
    ],
)
def test_names_file_field_found_and_expected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(NemocError) as error:
        ModelConfig.from_dict(changed(**changes), source="model/config.json")
    assert str(error.value).startswith(f"model/config.json: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        ("{'a': 1}", "is not JSON: Expecting property name"),
        ("[1]", "found a JSON list, expected an object"),
        ("null", "found a JSON null, expected an object"),
    ],
)
def test_unreadable_files_are_named(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(NemocError) as error:
        ModelConfig.from_file(path)
    assert str(error.value).startswith(f"{path}: {message}")
    assert "\n" not in str(error.value)


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(
        NemocError, match=r"^preset: found 'nanoo', expected one of nano, lightning"
    ):
        preset("nanoo")
