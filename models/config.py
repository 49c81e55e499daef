"""What a checkpoint's `config.json` says about a Nemotron-H model, checked and in one spelling.

Released files spell the same facts in several ways: the layers as a pattern string (`"MEM*"`), as a
list in the old names (`"mamba"`, `"attention"`) or in those of transformers 5
(`"linear_attention"`, `"full_attention"`); infinity as a bare `Infinity` or as
`{"__float__": "Infinity"}`. Everything downstream sees one frozen `ModelConfig`.

Fields that no computation depends on (`expand`, `rope_theta`, `residual_in_fp32`,
`mamba_proj_bias`, dropout, ...) are tolerated and dropped: transformers reads none of them when it
computes logits. `use_bias` is the switch of the Mamba projections there, not `mamba_proj_bias`.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from nemoc.ir.json_file import read_json
from nemoc.models.config_fields import FieldReader

LayerKind = Literal["mamba", "moe", "attention", "mlp"]
Activation = Literal["relu2", "relu", "silu", "gelu", "gelu_pytorch_tanh"]

LAYER_LETTERS: dict[str, LayerKind] = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
LAYER_NAMES: dict[str, LayerKind] = {
    "mamba": "mamba",
    "linear_attention": "mamba",
    "moe": "moe",
    "attention": "attention",
    "full_attention": "attention",
    "mlp": "mlp",
}
_TRANSFORMERS_NAMES = {
    "mamba": "linear_attention",
    "moe": "moe",
    "attention": "full_attention",
    "mlp": "mlp",
}
_ACTIVATION_NAMES: dict[str, Activation] = {name: name for name in get_args(Activation)} | {
    "swish": "silu"
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape and the constants of one model; names follow Hugging Face's configuration.

    A width that belongs to a layer kind which the model lacks is 0.

    Attributes:
        layers: The mixer of each layer, first to last; no layer holds two.
        use_bias: Whether Mamba's `in_proj` and `out_proj` have a bias.
        attention_bias: Whether `q_proj`, `k_proj`, `v_proj` and `o_proj` have a bias.
        mlp_bias: Whether dense MLPs, shared experts and latent projections have one. Routed experts
            never do.
        chunk_size: Tokens in one chunk of the chunked scan; it does not change exact results.
        intermediate_size: Width of a dense MLP layer.
        moe_latent_size: Width in which routed experts work, None for `hidden_size`.
        n_group: Expert groups of the router; only the best `topk_group` of them are searched.
        mtp_layers: Layer kinds of the multi-token-prediction head, which nemoc does not build.
        max_position_embeddings: Only a limit on the context: no tensor depends on it.
        eos_token_ids: Every id that ends a generation; may be empty.
        dtype: Type of the stored weights as the file names it, for example `"bfloat16"`.
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[LayerKind, ...]
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 4096

    mamba_num_heads: int = 0
    mamba_head_dim: int = 0
    n_groups: int = 0
    ssm_state_size: int = 0
    conv_kernel: int = 0
    use_conv_bias: bool = True
    use_bias: bool = False
    mamba_hidden_act: Activation = "silu"
    chunk_size: int = 128

    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    attention_bias: bool = False

    intermediate_size: int = 0
    mlp_bias: bool = False
    mlp_hidden_act: Activation = "relu2"

    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    moe_shared_expert_intermediate_size: int = 0
    n_shared_experts: int = 1
    moe_latent_size: int | None = None
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    n_group: int = 1
    topk_group: int = 1

    num_nextn_predict_layers: int = 0
    mtp_layers: tuple[LayerKind, ...] = ()

    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)
    pad_token_id: int | None = 0
    dtype: str = "bfloat16"

    @property
    def mamba_inner_size(self) -> int:
        """Width of the Mamba mixer's x and z: heads × head dim (never `expand` × hidden)."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: x, B and C side by side."""
        return self.mamba_inner_size + 2 * self.n_groups * self.ssm_state_size

    @property
    def in_proj_rows(self) -> int:
        """Rows of Mamba's `in_proj`: z, then the convolution's channels, then one dt per head."""
        return self.mamba_inner_size + self.conv_dim + self.mamba_num_heads

    @property
    def expert_input_size(self) -> int:
        """Width of what a routed expert reads and writes."""
        return self.hidden_size if self.moe_latent_size is None else self.moe_latent_size

    @property
    def pattern(self) -> str:
        """The layers as a string of M, E, * and -, as `hybrid_override_pattern` spells them."""
        letters = {kind: letter for letter, kind in LAYER_LETTERS.items()}
        return "".join(letters[kind] for kind in self.layers)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Reads a `config.json`, or the one in the directory `path`.

        Raises:
            NemocError: The file cannot be read, is no JSON object, or `from_dict` refuses it.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        data = read_json(path)
        return cls.from_dict(data, source=str(path))

    @classmethod
    def from_dict(cls, data: dict[str, Any], source: str = "config.json") -> Self:
        """Checks a parsed `config.json` and brings it into one spelling.

        Args:
            data: The JSON object; it is not changed.
            source: What error messages call the file.

        Raises:
            NemocError: A field is missing, misspelt, of the wrong type or impossible; the message
                is one line naming source, field, what was found and what was expected.
        """
        return cls(**_parse(FieldReader(data, source, _FIELDS)))

    def to_dict(self) -> dict[str, Any]:
        """A `config.json` that transformers 5 and `from_dict` both read, in plain JSON types."""
        # Zero stands for "the model has no such layer", which a file says by leaving the field out.
        data = {
            name: getattr(self, name)
            for name, field in self.__dataclass_fields__.items()
            if field.type is bool or not field.default == 0 == getattr(self, name)
        }
        eos, mtp = data.pop("eos_token_ids"), data.pop("mtp_layers")
        del data["layers"]
        if mtp:
            data["mtp_layers_block_type"] = [_TRANSFORMERS_NAMES[kind] for kind in mtp]
        return data | {
            "architectures": ["NemotronHForCausalLM"],
            "model_type": "nemotron_h",
            "layers_block_type": [_TRANSFORMERS_NAMES[kind] for kind in self.layers],
            "num_hidden_layers": len(self.layers),
            "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        }


_FIELDS = frozenset(ModelConfig.__dataclass_fields__) | {
    "model_type",
    "layers_block_type",
    "hybrid_override_pattern",
    "num_hidden_layers",
    "mtp_layers_block_type",
    "mtp_hybrid_override_pattern",
    "eos_token_id",
    "time_step_limit",
}


def _parse(read: FieldReader) -> dict[str, Any]:
    if (model_type := read.text("model_type", "nemotron_h")) != "nemotron_h":
        read.fail("model_type", f"'{model_type}'", "'nemotron_h'")
    layers = _layers(read, "layers_block_type", "hybrid_override_pattern")
    if not layers:
        read.missing("layers_block_type", "a list of layer kinds (or hybrid_override_pattern)")
    count = read.integer("num_hidden_layers", len(layers))
    if count != len(layers):
        read.fail("num_hidden_layers", str(count), f"{len(layers)}, the number of layers listed")
    _check_time_step_limit(read)

    values: dict[str, Any] = {
        "layers": layers,
        "vocab_size": read.integer("vocab_size"),
        "hidden_size": read.integer("hidden_size"),
        "layer_norm_epsilon": read.number("layer_norm_epsilon", 1e-5),
        "tie_word_embeddings": read.flag("tie_word_embeddings", False),
        "max_position_embeddings": read.integer("max_position_embeddings", 4096),
        "mlp_bias": read.flag("mlp_bias", False),
        "mlp_hidden_act": _activation(read, "mlp_hidden_act", "relu2"),
        "mtp_layers": _layers(read, "mtp_layers_block_type", "mtp_hybrid_override_pattern"),
        "num_nextn_predict_layers": read.integer("num_nextn_predict_layers", 0, minimum=0),
        "bos_token_id": read.optional_integer("bos_token_id", 1),
        "eos_token_ids": read.integers("eos_token_id", (2,)),
        "pad_token_id": read.optional_integer("pad_token_id", 0),
        "dtype": read.text("dtype", "bfloat16"),
    }
    sections = {"mamba": _mamba, "attention": _attention, "mlp": _mlp, "moe": _moe}
    for kind, section in sections.items():
        if kind in layers:
            values |= section(read)
    read.check_unknown()
    return values


def _mamba(read: FieldReader) -> dict[str, Any]:
    values = {
        name: read.integer(name)
        for name in ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size")
    }
    heads, groups = values["mamba_num_heads"], values["n_groups"]
    if heads % groups:
        read.fail("mamba_num_heads", str(heads), f"a multiple of n_groups ({groups})")
    return values | {
        "conv_kernel": read.integer("conv_kernel", minimum=2),
        "use_conv_bias": read.flag("use_conv_bias", True),
        "use_bias": read.flag("use_bias", False),
        "mamba_hidden_act": _activation(read, "mamba_hidden_act", "silu"),
        "chunk_size": read.integer("chunk_size", 128),
    }


def _attention(read: FieldReader) -> dict[str, Any]:
    heads = read.integer("num_attention_heads")
    kv_heads = read.optional_integer("num_key_value_heads", heads, minimum=1) or heads
    if heads % kv_heads:
        read.fail(
            "num_attention_heads", str(heads), f"a multiple of num_key_value_heads ({kv_heads})"
        )
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": read.integer("head_dim"),
        "attention_bias": read.flag("attention_bias", False),
    }


def _mlp(read: FieldReader) -> dict[str, Any]:
    return {"intermediate_size": read.integer("intermediate_size")}


_MOST_EXPERTS = 1 << 16
"""Routed experts of a layer at most: each is a module that a map of formats may name."""


def _moe(read: FieldReader) -> dict[str, Any]:
    experts, top_k = read.integer("n_routed_experts"), read.integer("num_experts_per_tok")
    groups, top_groups = read.integer("n_group", 1), read.integer("topk_group", 1)
    if experts > _MOST_EXPERTS:
        read.fail("n_routed_experts", str(experts), f"at most {_MOST_EXPERTS}")
    if experts % groups:
        read.fail("n_routed_experts", str(experts), f"a multiple of n_group ({groups})")
    if groups > 1 and experts // groups < 2:
        # A group is scored by the sum of its two best experts.
        read.fail("n_group", str(groups), f"at most {experts // 2}: two experts or more per group")
    if top_groups > groups:
        read.fail("topk_group", str(top_groups), f"at most n_group ({groups})")
    if top_k > (limit := experts // groups * top_groups):
        read.fail("num_experts_per_tok", str(top_k), f"at most {limit}, the experts to choose from")
    return {
        "n_routed_experts": experts,
        "num_experts_per_tok": top_k,
        "n_group": groups,
        "topk_group": top_groups,
        "moe_intermediate_size": read.integer("moe_intermediate_size"),
        "moe_shared_expert_intermediate_size": read.integer("moe_shared_expert_intermediate_size"),
        "n_shared_experts": read.integer("n_shared_experts", 1),
        "moe_latent_size": read.optional_integer("moe_latent_size", None, minimum=1),
        "routed_scaling_factor": read.number("routed_scaling_factor", 1.0),
        "norm_topk_prob": read.flag("norm_topk_prob", True),
    }


def _layers(read: FieldReader, list_name: str, pattern_name: str) -> tuple[LayerKind, ...]:
    names, pattern = read.strings(list_name), read.text(pattern_name, "")
    for name in names:
        if name not in LAYER_NAMES:
            read.fail(list_name, f"layer kind '{name}'", "mamba, moe, attention or mlp")
    for position, letter in enumerate(pattern):
        if letter not in LAYER_LETTERS:
            read.fail(pattern_name, f"letter '{letter}' at position {position}", "M, E, * or -")
    from_names = tuple(LAYER_NAMES[name] for name in names)
    from_pattern = tuple(LAYER_LETTERS[letter] for letter in pattern)
    if from_names and from_pattern and from_names != from_pattern:
        read.fail(pattern_name, f"'{pattern}'", f"the same layers as {list_name}")
    return from_names or from_pattern


def _activation(read: FieldReader, name: str, default: Activation) -> Activation:
    found = read.text(name, default)
    if found not in _ACTIVATION_NAMES:
        read.fail(name, f"'{found}'", f"one of {', '.join(_ACTIVATION_NAMES)}")
    return _ACTIVATION_NAMES[found]


def _check_time_step_limit(read: FieldReader) -> None:
    """No released model clamps dt; a file that asks for it would be computed wrongly, so refuse."""
    limits = read.numbers("time_step_limit", (0.0, math.inf))
    if limits != (0.0, math.inf):
        read.fail("time_step_limit", str(list(limits)), "[0, Infinity]: dt is never clamped")
