"""The graph of a step: its text, its arguments, and its meaning against the eager reference."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemoc.ir import DType, NemocError, parse, print_graph, verify
from nemoc.ir.dims import B, C, L
from nemoc.ir.ops import Cast, GroupLimit, Linear, Square, TopK
from nemoc.models import (
    PRESETS,
    Generation,
    Model,
    ModelConfig,
    RandomSource,
    build_step,
    default_weight_types,
    preset,
)
from nemoc.models.reference import NemotronH
from support.stepping import Stepper, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ModelConfig(
    vocab_size=61,
    hidden_size=20,
    layers=("mamba", "moe", "attention", "mlp"),
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
    moe_intermediate_size=11,
    moe_shared_expert_intermediate_size=13,
)


def _model(config: ModelConfig, seed: int = 0, dtype: DType = DType.F32) -> Model:
    return Model("random", config, RandomSource(config, seed, dtype), Generation((), None, None))


def _reference(model: Model) -> NemotronH:
    """The eager model with the same weights, in float32."""
    reference = NemotronH(model.config).eval()
    assert model.parameters is not None
    names = (p.name for p in model.build_step().params)
    tensors = {n: model.parameters.read(n).float() for n in names}
    on_disk = {n if n.startswith("lm_head.") else f"backbone.{n}": t for n, t in tensors.items()}
    if model.config.tie_word_embeddings:
        on_disk["lm_head.weight"] = on_disk["backbone.embeddings.weight"]
    reference.load_state_dict(on_disk)
    return reference


def _first_of_each_kind(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, layers=tuple(dict.fromkeys(config.layers)))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_every_preset_verifies_and_survives_its_text(name: str, dtype: DType) -> None:
    for logits in ("last", "all"):
        graph = build_step(_first_of_each_kind(preset(name)), dtype=dtype, logits=logits)
        verify(graph)
        assert parse(print_graph(graph)) == graph


def test_the_largest_preset_builds_within_seconds() -> None:
    start = time.perf_counter()
    graph = build_step(preset("ultra"), dtype=DType.BF16)
    assert time.perf_counter() - start < 5
    assert len(graph.states) == 1 + 2 * 48 + 2 * 12


def test_arguments_have_the_documented_names_and_types() -> None:
    graph = build_step(SMALL)
    assert {v.name: (str(v.type), v.bound) for v in graph.inputs} == {
        "tokens": ("i64[B, L]", 61),
        "valid": ("i32[B]", L + 1),
    }
    assert {v.name: (str(v.type), v.bound) for v in graph.states} == {
        "lengths": ("i32[B]", C - L + 1),
        "layers.0.conv": ("f32[B, 3, 58]", None),
        "layers.0.ssm": ("f32[B, 6, 5, 7]", None),
        "layers.2.k": ("f32[B, C, 2, 6]", None),
        "layers.2.v": ("f32[B, C, 2, 6]", None),
    }
    types = {v.name: str(v.type) for v in graph.params}
    assert types["layers.0.mixer.conv1d.weight"] == "bf16[58, 1, 4]"
    assert types["layers.1.mixer.experts.up_proj"] == "bf16[6, 11, 20]"
    assert types["layers.1.mixer.experts.down_proj"] == "bf16[6, 20, 11]"
    assert types["layers.1.mixer.gate.e_score_correction_bias"] == "f32[6]"
    assert graph.outputs[0].shape == (B, 61)
    assert build_step(SMALL, logits="all").outputs[0].shape == (B, L, 61)


def test_tied_embeddings_leave_no_head() -> None:
    graph = build_step(dataclasses.replace(SMALL, tie_word_embeddings=True))
    assert "lm_head.weight" not in {p.name for p in graph.params}


def test_only_a_router_with_groups_limits_them() -> None:
    def ops(config: ModelConfig) -> set[type]:
        return {type(node.op) for node in build_step(config).nodes}

    assert GroupLimit not in ops(SMALL)
    assert {GroupLimit, TopK} <= ops(dataclasses.replace(SMALL, n_group=2))


def test_float32_compute_rounds_nothing() -> None:
    graph = build_step(SMALL)
    casts = [node.op for node in graph.nodes if isinstance(node.op, Cast)]
    assert {op.dtype for op in casts} == {DType.F32}


def test_bf16_compute_feeds_every_product_but_the_router_with_bf16() -> None:
    graph = build_step(SMALL, dtype=DType.BF16)
    linear = [node for node in graph.nodes if isinstance(node.op, Linear)]
    wide = [
        n.results[0].name for n in linear if isinstance(n.op, Linear) and n.op.x.dtype != DType.BF16
    ]
    assert wide == ["layers.1.gate.logits"]
    assert {s.dtype for s in graph.states if s.name.endswith((".k", ".v"))} == {DType.BF16}
    assert {s.dtype for s in graph.states if s.name.endswith((".conv", ".ssm"))} == {DType.F32}


def test_weights_wider_than_the_compute_type_are_rounded_to_it() -> None:
    model = _model(SMALL)
    graph = model.build_step(dtype=DType.BF16)
    verify(graph)
    assert {p.dtype for p in graph.params} == {DType.F32}
    tokens = torch.randint(0, 61, (1, 4))
    assert Stepper(model, 1, 8, graph=graph)(tokens).isfinite().all()


def test_an_activation_changes_only_its_own_ops() -> None:
    graph = build_step(dataclasses.replace(SMALL, mlp_hidden_act="gelu"))
    assert not any(isinstance(node.op, Square) for node in graph.nodes)
    assert len(graph.nodes) < len(build_step(SMALL).nodes)


def test_compute_types_other_than_float_are_refused() -> None:
    with pytest.raises(NemocError, match=r"^compute type i8, expected one of f32, bf16, f16$"):
        build_step(SMALL, dtype=DType.I8)


def test_unknown_weight_type_in_the_configuration_is_refused() -> None:
    with pytest.raises(NemocError, match=r"^config: dtype: found 'float8', expected one of"):
        default_weight_types(dataclasses.replace(SMALL, dtype="float8"))


def test_last_logits_are_those_of_each_rows_last_real_token() -> None:
    model = _model(SMALL)
    tokens, valid = torch.randint(0, 61, (3, 6)), [6, 1, 4]
    every = Stepper(model, 3, 8)(tokens, valid)
    last = Stepper(model, 3, 8, graph=model.build_step())(tokens, valid)
    expected = every[torch.arange(3), torch.tensor(valid) - 1]
    assert relative_error(last, expected) < 1e-6


def test_a_row_without_new_tokens_keeps_its_state() -> None:
    model = _model(SMALL)
    tokens = torch.randint(0, 61, (2, 5))
    step = Stepper(model, 2, 12)
    step(tokens)
    before = step.states
    step(tokens[:, :3], [3, 0])
    assert step.states["lengths"].tolist() == [8, 5]
    for name, state in step.states.items():
        if name == "lengths":
            continue
        real = slice(5) if name.endswith((".k", ".v")) else slice(None)
        assert torch.equal(state[1, real], before[name][1, real]), name


def _changes(draw: st.DrawFn) -> Mapping[str, Any]:
    groups = draw(st.integers(1, 3))
    experts = 2 * draw(st.integers(2, 4))
    n_group = draw(st.sampled_from([1, 2, experts // 2]))
    topk_group = draw(st.integers(1, n_group))
    kv_heads = draw(st.integers(1, 3))
    acts = st.sampled_from(["relu2", "relu", "silu", "gelu", "gelu_pytorch_tanh"])
    kinds = st.sampled_from(["mamba", "moe", "attention", "mlp"])
    return {
        "layers": tuple(draw(st.lists(kinds, min_size=1, max_size=5))),
        "hidden_size": draw(st.integers(1, 33)),
        "tie_word_embeddings": draw(st.booleans()),
        "mamba_num_heads": groups * draw(st.integers(1, 3)),
        "mamba_head_dim": draw(st.integers(1, 9)),
        "n_groups": groups,
        "ssm_state_size": draw(st.integers(1, 9)),
        "conv_kernel": draw(st.integers(2, 6)),
        "use_conv_bias": draw(st.booleans()),
        "use_bias": draw(st.booleans()),
        "mamba_hidden_act": draw(acts),
        "chunk_size": draw(st.integers(1, 9)),
        "num_attention_heads": kv_heads * draw(st.integers(1, 3)),
        "num_key_value_heads": kv_heads,
        "head_dim": draw(st.integers(1, 9)),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "mlp_hidden_act": draw(acts),
        "n_routed_experts": experts,
        "n_group": n_group,
        "topk_group": topk_group,
        "num_experts_per_tok": draw(st.integers(1, experts // n_group * topk_group)),
        "moe_latent_size": draw(st.sampled_from([None, 8, 17])),
        "norm_topk_prob": draw(st.booleans()),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
    }


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Small models of any shape that the family allows."""
    return dataclasses.replace(SMALL, **_changes(draw))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(config=configs(), seed=st.integers(0, 99))
def test_any_configuration_means_what_the_eager_reference_computes(
    config: ModelConfig, seed: int
) -> None:
    model = _model(config, seed)
    graph = model.build_step(logits="all")
    verify(graph)
    assert parse(print_graph(graph)) == graph
    tokens = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(seed))
    step = Stepper(model, 2, 12, graph=graph, float64=True)
    found = torch.cat([step(tokens[:, :5]), step(tokens[:, 5:])], 1)
    expected = _reference(model).double()(tokens)
    assert relative_error(found, expected) < 1e-9
