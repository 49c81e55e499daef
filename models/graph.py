"""The model as one graph: `step(tokens, state) -> (logits, state)`, from a configuration alone.

Parameters carry the names that checkpoints have on disk, without the prefix `backbone.`; routed
experts are stacked. Their element types are those of the checkpoint, so a graph says what it
converts: a weight that takes part in a matrix product is read as it is stored, every other one is
widened to f32 by a `cast`. A quantized weight is several parameters, and ops that make f32 of them
(`nemoc.models.formats`).

Between ops values have the compute type. Where that is narrower than f32, arithmetic happens in f32
and is rounded by a `cast` where the published implementations round: the output of each projection,
norm, activation and residual sum. The Mamba recurrence, the convolution's input history and the
router stay in f32 throughout, and so do the logits. With f32 nothing is rounded.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from nemoc.ir import ops
from nemoc.ir.builder import Builder
from nemoc.ir.dims import B, C, Dim, L, product
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import NemocError
from nemoc.ir.graph import Graph
from nemoc.ir.op import Op
from nemoc.ir.types import Value
from nemoc.models.config import Activation, ModelConfig
from nemoc.models.formats import Format, WeightTypes

COMPUTE_TYPES = (DType.F32, DType.BF16, DType.F16)
"""Element types that activations and the KV cache may have."""

_CONFIG_TYPES = {"float32": DType.F32, "bfloat16": DType.BF16, "float16": DType.F16}


def default_weight_types(config: ModelConfig) -> WeightTypes:
    """What a checkpoint of this configuration usually stores: `config.dtype`, and f32 for the correction bias.

    Scales of FP8 weights are f32 too.

    Raises:
        NemocError: `config.dtype` names no type that weights may have.
    """
    if config.dtype not in _CONFIG_TYPES:
        raise NemocError(
            f"config: dtype: found '{config.dtype}', expected one of {', '.join(_CONFIG_TYPES)}"
        )
    usual = _CONFIG_TYPES[config.dtype]
    wide = ("e_score_correction_bias", ".weight_scale")
    return lambda name: DType.F32 if name.endswith(wide) else usual


def build_step(
    config: ModelConfig,
    *,
    dtype: DType = DType.F32,
    logits: Literal["last", "all"] = "last",
    weight_types: WeightTypes | None = None,
    formats: Mapping[str, Format] | None = None,
) -> Graph:
    """The graph of one step, for any batch `B`, number of new tokens `L` and cache capacity `C`.

    Inputs are `tokens` i64[B, L] and `valid` i32[B], the number of real tokens (0 to L) of each
    right-padded row; a row with none keeps its state, and its logits mean nothing. States are
    `lengths` i32[B], and for each layer N that needs them `layers.N.conv` f32[B, K-1, channels],
    `layers.N.ssm` f32[B, heads, P, N], `layers.N.k` and `layers.N.v` [B, C, KV heads, head dim] of
    the compute type. The output is f32 logits: [B, V] of each row's last real token, or [B, L, V]
    of all (at padding they mean nothing).

    Args:
        config: the model.
        dtype: the compute type of activations and of the KV cache.
        logits: after which tokens to compute them.
        weight_types: the stored type of each parameter; None for `default_weight_types`.
        formats: how each quantized matrix is stored, by its name; types of their parameters follow from that.

    Raises:
        NemocError: the compute type is not one of `COMPUTE_TYPES`, a parameter has no type, or a matrix does not fit
            its format.
    """
    if dtype not in COMPUTE_TYPES:
        raise NemocError(
            f"compute type {dtype}, expected one of {', '.join(map(str, COMPUTE_TYPES))}"
        )
    builder = Builder("step")
    tokens = builder.input("tokens", DType.I64, (B, L), bound=config.vocab_size)
    valid = builder.input("valid", DType.I32, (B,), bound=L + 1)
    types = weight_types or default_weight_types(config)
    whole = _Scope(builder, "", dtype, types, formats or {})
    lengths = whole.state("lengths", DType.I32, (B,), bound=C - L + 1)
    whole.update(whole(ops.Add(lengths, valid), "lengths.next"))

    table = whole.matrix("embeddings.weight", config.vocab_size, config.hidden_size)
    h = whole.cast(whole(ops.TakeRows(table, tokens), "embedded"), dtype)
    for index, kind in enumerate(config.layers):
        layer = _Layer(config, whole.inside(f"layers.{index}."), valid, lengths)
        h = layer.residual(h, kind)
    if logits == "last":
        h = whole(ops.TakeLast(h, valid), "last")
    h = whole.norm(h, "norm_f", config.layer_norm_epsilon)
    if not config.tie_word_embeddings:
        table = whole.matrix("lm_head.weight", config.vocab_size, config.hidden_size)
    return builder.finish([whole.product(h, table, "logits")], whole.following)


@dataclass(frozen=True)
class _Scope:
    """A builder with a name prefix, and the types of activations and weights.

    Attributes:
        following: the next value of each state declared so far, shared by all scopes of a graph.
        widened: f32 casts made so far by their operand, shared likewise.
    """

    builder: Builder
    prefix: str
    dtype: DType
    weight_types: WeightTypes
    formats: Mapping[str, Format]
    following: list[Value] = field(default_factory=list)
    widened: dict[Value, Value] = field(default_factory=dict)

    def inside(self, prefix: str) -> "_Scope":
        """The same graph under a longer prefix."""
        return replace(self, prefix=self.prefix + prefix)

    def __call__(self, op: Op, hint: str) -> Value:
        """Append an op with one result."""
        return self.builder(op, self.prefix + hint)

    def all(self, op: Op, *hints: str) -> tuple[Value, ...]:
        """Append an op with several results."""
        return self.builder.all(op, *(self.prefix + hint for hint in hints))

    def param(self, name: str, *shape: Dim) -> Value:
        """A parameter as it is stored."""
        name = self.prefix + name
        return self.builder.param(name, self.weight_types(name), shape)

    def matrix(self, name: str, *shape: int) -> Value:
        """A weight [..., N, K] as products read it: as it is stored, or f32 where it is quantized."""
        stored = self.formats.get(self.prefix + name)
        if stored is None:
            return self.param(name, *shape)
        return stored.append(self.builder, self.prefix + name, shape, self.weight_types)

    def vector(self, name: str, *shape: Dim) -> Value:
        """A parameter that arithmetic reads: widened to f32."""
        return self.wide(self.param(name, *shape))

    def state(
        self, name: str, dtype: DType, shape: tuple[Dim, ...], bound: Dim | None = None
    ) -> Value:
        """A state; call `update` before declaring the next."""
        return self.builder.state(self.prefix + name, dtype, shape, bound)

    def update(self, *following: Value) -> None:
        """The next values of the states declared last, in their order."""
        self.following.extend(following)

    def cast(self, x: Value, dtype: DType) -> Value:
        """x in another element type; x itself when it has that already."""
        return x if x.dtype == dtype else self.builder(ops.Cast(x, dtype), f"{x.name}.{dtype}")

    def wide(self, x: Value) -> Value:
        """x in f32."""
        if x not in self.widened:
            self.widened[x] = self.cast(x, DType.F32)
        return self.widened[x]

    def round(self, x: Value) -> Value:
        """x in the compute type."""
        return self.cast(x, self.dtype)

    def reshape(self, x: Value, *shape: Dim) -> Value:
        """The same elements under another shape."""
        return self.builder(ops.Reshape(x, tuple(product((d,)) for d in shape)), f"{x.name}.view")

    def split(self, x: Value, /, **widths: int) -> list[Value]:
        """Consecutive parts of the last axis, by name."""
        axis, parts, start = x.type.rank - 1, [], 0
        for name, width in widths.items():
            parts.append(self(ops.Slice(x, axis, start, start + width), name))
            start += width
        return parts

    def product(self, x: Value, weight: Value, hint: str) -> Value:
        """x · weightᵀ in f32."""
        return self(ops.Linear(x, self.beside(x, weight)), hint)

    def beside(self, x: Value, weight: Value) -> Value:
        """A weight as products with x read it: rounded if it is stored in a wider type than x's.

        What a quantized weight stands for is not rounded: kernels make it of its codes as they read them.
        """
        if weight.dtype.bytes > x.dtype.bytes and self.builder.is_argument(weight):
            return self.cast(weight, x.dtype)
        return weight

    def linear(self, x: Value, name: str, rows: int, bias: bool = False) -> Value:
        """The projection whose tensors are `name`.weight and .bias, in the compute type."""
        hint = name.removeprefix("mixer.")
        y = self.product(x, self.matrix(f"{name}.weight", rows, int(x.shape[-1])), hint)
        if bias:
            y = self(ops.Add(y, self.vector(f"{name}.bias", rows)), f"{hint}.biased")
        return self.round(y)

    def norm(self, x: Value, name: str, eps: float) -> Value:
        """The RMS norm whose weight is `name`.weight, in the compute type."""
        weight = self.vector(f"{name}.weight", x.shape[-1])
        return self.round(self(ops.RmsNorm(self.wide(x), weight, eps), f"{name}.out"))

    def activate(self, x: Value, kind: Activation) -> Value:
        """The activation of an f32 value, in the compute type."""
        match kind:
            case "relu2":
                y = self(ops.Square(self(ops.Relu(x), "relu")), "relu2")
            case "relu":
                y = self(ops.Relu(x), "relu")
            case "silu":
                y = self(ops.Silu(x), "silu")
            case "gelu":
                y = self(ops.Gelu(x), "gelu")
            case "gelu_pytorch_tanh":
                y = self(ops.Gelu(x, tanh=True), "gelu")
        return self.round(y)

    def add(self, a: Value, b: Value, hint: str) -> Value:
        """a + b, in the compute type."""
        return self.round(self(ops.Add(self.wide(a), self.wide(b)), hint))


@dataclass(frozen=True)
class _Layer:
    """Builds one layer. Activations are [B, L, hidden] of the compute type."""

    config: ModelConfig
    s: _Scope
    valid: Value
    lengths: Value

    def residual(self, h: Value, kind: str) -> Value:
        """h + mixer(norm(h))."""
        x = self.s.norm(h, "norm", self.config.layer_norm_epsilon)
        mixer = {"mamba": self.mamba, "attention": self.attention, "moe": self.moe, "mlp": self.mlp}
        return self.s.add(h, mixer[kind](x), "residual")

    def mamba(self, x: Value) -> Value:
        """Mamba-2: project, convolve, scan, gate and norm, project (nemotron_h's Mamba2 mixer)."""
        c, s = self.config, self.s
        rows = s.linear(x, "mixer.in_proj", c.in_proj_rows, c.use_bias)
        z, xbc, dt = s.split(rows, z=c.mamba_inner_size, xbc=c.conv_dim, dt=c.mamba_num_heads)
        y = self.scan(self.convolve(xbc), dt)
        gated = s(ops.Mul(y, s(ops.Silu(s.wide(z)), "gate")), "gated")
        weight = s.vector("mixer.norm.weight", c.mamba_inner_size)
        normed = s(ops.RmsNorm(gated, weight, c.layer_norm_epsilon, c.n_groups), "mixer.norm.out")
        return s.linear(s.round(normed), "mixer.out_proj", c.hidden_size, c.use_bias)

    def convolve(self, xbc: Value) -> Value:
        """The causal convolution of x, B and C, then the activation."""
        c, s = self.config, self.s
        history = s.state("conv", DType.F32, (B, c.conv_kernel - 1, c.conv_dim))
        stored = s.vector("mixer.conv1d.weight", c.conv_dim, 1, c.conv_kernel)
        taps = s.reshape(stored, c.conv_dim, c.conv_kernel)
        bias = s.vector("mixer.conv1d.bias", c.conv_dim) if c.use_conv_bias else None
        op = ops.CausalConv(s.wide(xbc), taps, bias, history, self.valid)
        y, following = s.all(op, "convolved", "conv.next")
        s.update(following)
        return s.activate(y, c.mamba_hidden_act)

    def scan(self, xbc: Value, dt: Value) -> Value:
        """The recurrence over the convolved x, B and C; f32 [B, L, inner]."""
        c, s = self.config, self.s
        heads, groups, size = c.mamba_num_heads, c.n_groups, c.ssm_state_size
        state = s.state("ssm", DType.F32, (B, heads, c.mamba_head_dim, size))
        x, b, keys = s.split(s.wide(xbc), x=c.mamba_inner_size, b=groups * size, c=groups * size)
        shifted = s(ops.Add(s.wide(dt), s.vector("mixer.dt_bias", heads)), "dt.biased")
        a = s(ops.Scale(s(ops.Exp(s.vector("mixer.A_log", heads)), "exp_a"), -1.0), "a")
        op = ops.SsdScan(
            x=s.reshape(x, B, L, heads, c.mamba_head_dim),
            dt=s(ops.Softplus(shifted), "dt.step"),
            a=a,
            b=s.reshape(b, B, L, groups, size),
            c=s.reshape(keys, B, L, groups, size),
            d=s.vector("mixer.D", heads),
            state=state,
            valid=self.valid,
        )
        y, following = s.all(op, "scanned", "ssm.next")
        s.update(following)
        return s.reshape(y, B, L, c.mamba_inner_size)

    def attention(self, x: Value) -> Value:
        """Grouped-query attention over the cache; there is no position encoding."""
        c, s = self.config, self.s
        width = c.head_dim
        q = s.linear(x, "mixer.q_proj", c.num_attention_heads * width, c.attention_bias)
        q = s.reshape(s.wide(q), B, L, c.num_attention_heads, width)
        keys, values = (self.cached(x, name) for name in ("k", "v"))
        op = ops.Attention(q, keys, values, self.lengths, scale=width**-0.5)
        y = s(op, "attended")
        y = s.round(s.reshape(y, B, L, c.num_attention_heads * width))
        return s.linear(y, "mixer.o_proj", c.hidden_size, c.attention_bias)

    def cached(self, x: Value, name: str) -> Value:
        """The cache `name`, k or v, with the projections of the new tokens behind the old ones."""
        c, s = self.config, self.s
        heads, width = c.num_key_value_heads, c.head_dim
        cache = s.state(name, s.dtype, (B, C, heads, width))
        rows = s.linear(x, f"mixer.{name}_proj", heads * width, c.attention_bias)
        rows = s.reshape(rows, B, L, heads, width)
        following = s(ops.CacheWrite(cache, rows, self.lengths), f"{name}.next")
        s.update(following)
        return following

    def mlp(self, x: Value) -> Value:
        """down(activation(up x)): a dense layer."""
        return self.feed_forward(x, "mixer", self.config.intermediate_size)

    def feed_forward(self, x: Value, name: str, width: int) -> Value:
        """down(activation(up x)) with the tensors of the module `name`."""
        c, s = self.config, self.s
        up = s.linear(x, f"{name}.up_proj", width, c.mlp_bias)
        active = s.activate(s.wide(up), c.mlp_hidden_act)
        return s.linear(active, f"{name}.down_proj", c.hidden_size, c.mlp_bias)

    def moe(self, x: Value) -> Value:
        """Routed experts, in a latent space if the model has one, plus the shared expert."""
        c, s = self.config, self.s
        tokens = s.reshape(x, B * L, c.hidden_size)
        chosen, weights = self.route(tokens)
        inputs = tokens
        if c.moe_latent_size is not None:
            inputs = s.linear(tokens, "mixer.fc1_latent_proj", c.moe_latent_size, c.mlp_bias)
        routed = self.experts(inputs, chosen, weights)
        if c.moe_latent_size is not None:
            routed = s.linear(routed, "mixer.fc2_latent_proj", c.hidden_size, c.mlp_bias)
        width = c.moe_shared_expert_intermediate_size
        shared = self.feed_forward(x, "mixer.shared_experts", width)
        return s.add(s.reshape(routed, B, L, c.hidden_size), shared, "moe")

    def route(self, tokens: Value) -> tuple[Value, Value]:
        """Each token's experts i32 [B·L, k], chosen by biased scores, and their unbiased f32 weights."""
        c, s = self.config, self.s
        gate = s.matrix("mixer.gate.weight", c.n_routed_experts, c.hidden_size)
        scores = s(ops.Sigmoid(s.product(s.wide(tokens), gate, "gate.logits")), "scores")
        bias = s.vector("mixer.gate.e_score_correction_bias", c.n_routed_experts)
        choice = s(ops.Add(scores, bias), "choice")
        if c.n_group > 1:
            limit = ops.GroupLimit(choice, c.n_group, c.topk_group, fill=float("-inf"))
            choice = s(limit, "choice.limited")
        chosen = s(ops.TopK(choice, c.num_experts_per_tok), "chosen")
        weights = s(ops.TakeAlong(scores, chosen), "weights")
        if c.norm_topk_prob:
            total = s.reshape(s(ops.Sum(weights, axis=1), "total"), B * L, 1)
            weights = s(
                ops.Div(weights, s(ops.Shift(total, 1e-20), "total.safe")), "weights.normed"
            )
        return chosen, s(ops.Scale(weights, c.routed_scaling_factor), "weights.scaled")

    def experts(self, x: Value, chosen: Value, weights: Value) -> Value:
        """The weighted sum of each token's experts: tokens sorted by expert, so that each weight is read once."""
        c, s = self.config, self.s
        count, inner, top_k = c.n_routed_experts, c.moe_intermediate_size, c.num_experts_per_tok
        sort = ops.GroupBy(chosen, count)
        order, position, offsets = s.all(sort, "order", "position", "offsets")
        rows = s(ops.TakeRows(x, s(ops.FloorDiv(order, top_k), "token")), "rows")
        outer = c.expert_input_size
        up = self.expert_product(rows, "up_proj", (count, inner, outer), offsets)
        active = s.activate(s.wide(up), c.mlp_hidden_act)
        down = self.expert_product(active, "down_proj", (count, outer, inner), offsets)
        slots = s.wide(s(ops.TakeRows(down, position), "slots"))
        slots = s.reshape(slots, B * L, top_k, outer)
        weighted = s(ops.Mul(slots, s.reshape(weights, B * L, top_k, 1)), "slots.weighted")
        return s.round(s(ops.Sum(weighted, axis=1), "routed"))

    def expert_product(
        self, rows: Value, name: str, shape: tuple[int, int, int], offsets: Value
    ) -> Value:
        """Rows sorted by expert times each expert's weight, in the compute type."""
        s = self.s
        weight = s.beside(rows, s.matrix(f"mixer.experts.{name}", *shape))
        return s.round(s(ops.GroupedLinear(rows, weight, offsets), f"experts.{name}.out"))
