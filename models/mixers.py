"""The mixers of the eager reference, with the state that they keep between calls.

Shapes use B batch, L new tokens, T cached tokens, H hidden, I Mamba's inner width, N state, G groups
of B and C, R heads per group, P head width, K taps of the convolution, E experts, F their width, X
what they read and write.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemoc.models.config import Activation, LayerKind, ModelConfig

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu2": lambda x: F.relu(x).square(),
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass
class MambaState:
    """What a Mamba layer remembers.

    Attributes:
        conv: The last K-1 inputs of the convolution, oldest first, [B, K-1, I + 2·G·N].
        ssm: The state, float32, [B, heads, P, N].
    """

    conv: Tensor
    ssm: Tensor


@dataclass
class KeysValues:
    """What an attention layer remembers: both [B, T, KV heads, head dim]; T covers the longest row."""

    keys: Tensor
    values: Tensor


@dataclass
class Cache:
    """The state of a batch between calls of `NemotronH.forward`, which updates it in place.

    Attributes:
        lengths: Tokens seen so far in each row, int64 [B]; None before the first call.
        layers: State by layer index; MoE and MLP layers have none.
    """

    lengths: Tensor | None = None
    layers: dict[int, MambaState | KeysValues] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """One forward call: the cache if any, and how many of each row's L new tokens are real."""

    cache: Cache | None
    lengths: Tensor | None


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last axis, the weight multiplied before rounding."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        full = wide(x)
        normed = full * torch.rsqrt(full.square().mean(-1, keepdim=True) + self.eps)
        return (normed * wide(self.weight)).to(x.dtype)


class GatedRMSNorm(RMSNorm):
    """Mamba's norm: gate first, then rms over each of G groups of the width."""

    def __init__(self, width: int, groups: int, eps: float) -> None:
        super().__init__(width, eps)
        self.groups = groups

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        gated: Tensor = (wide(x) * F.silu(wide(gate))).unflatten(-1, (self.groups, -1))
        normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + self.eps)
        return normed.flatten(-2) * wide(self.weight)


class CausalConv(nn.Module):
    """Depthwise causal convolution over time, then the activation."""

    def __init__(self, channels: int, taps: int, bias: bool, activation: Activation) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        self.activation = ACTIVATIONS[activation]

    def forward(self, padded: Tensor) -> Tensor:
        """padded [B, K-1 + L, channels], earlier inputs first -> [B, L, channels]."""
        taps = self.weight[:, 0].unbind(-1)
        length = padded.shape[1] - len(taps) + 1
        total = sum(padded[:, k : k + length] * tap for k, tap in enumerate(taps))
        assert isinstance(total, Tensor)
        return self.activation(total if self.bias is None else total + self.bias)


class MambaMixer(nn.Module):
    """Mamba-2: project, convolve, scan, gate and norm, project."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        heads, inner = config.mamba_num_heads, config.mamba_inner_size
        self.in_proj = nn.Linear(config.hidden_size, config.in_proj_rows, bias=config.use_bias)
        self.conv1d = CausalConv(
            config.conv_dim, config.conv_kernel, config.use_conv_bias, config.mamba_hidden_act
        )
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.norm = GatedRMSNorm(inner, config.n_groups, config.layer_norm_epsilon)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=config.use_bias)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        c = self.config
        state = self._state(x, call)
        z, xbc, dt = self.in_proj(x).split([c.mamba_inner_size, c.conv_dim, c.mamba_num_heads], -1)
        padded = torch.cat([state.conv.to(xbc.dtype), xbc], 1)
        grouped = c.n_groups * c.ssm_state_size
        inputs, b, keys = self.conv1d(padded).split([c.mamba_inner_size, grouped, grouped], -1)
        steps = F.softplus(wide(dt) + wide(self.dt_bias))
        if call.lengths is not None:
            # A step of length zero leaves the state as it is: padding is not seen.
            real = torch.arange(x.shape[1], device=x.device) < call.lengths[:, None]
            steps = steps * real[..., None]
        y, ssm = chunked_scan(
            inputs.unflatten(-1, (c.n_groups, -1, c.mamba_head_dim)),
            steps.unflatten(-1, (c.n_groups, -1)),
            -torch.exp(wide(self.A_log)).unflatten(-1, (c.n_groups, -1)),
            b.unflatten(-1, (c.n_groups, -1)),
            keys.unflatten(-1, (c.n_groups, -1)),
            state.ssm.unflatten(1, (c.n_groups, -1)),
            min(c.chunk_size, x.shape[1]),
        )
        y = y.flatten(2, 3) + wide(self.D)[:, None] * inputs.unflatten(-1, (-1, c.mamba_head_dim))
        if call.cache is not None:
            call.cache.layers[self.index] = MambaState(
                _last(padded, call.lengths, c), ssm.flatten(1, 2)
            )
        normed: Tensor = self.norm(y.flatten(2), z)
        projected: Tensor = self.out_proj(normed.to(x.dtype))
        return projected

    def _state(self, x: Tensor, call: Call) -> MambaState:
        if call.cache is not None and self.index in call.cache.layers:
            state = call.cache.layers[self.index]
            assert isinstance(state, MambaState)
            return state
        c, batch = self.config, x.shape[0]
        shape = (batch, c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size)
        return MambaState(
            x.new_zeros(batch, c.conv_kernel - 1, c.conv_dim),
            wide(x.new_zeros(())).expand(shape),
        )


def _last(padded: Tensor, lengths: Tensor | None, c: ModelConfig) -> Tensor:
    """The K-1 convolution inputs before each row's end; `padded` is [B, K-1 + L, channels]."""
    kept = c.conv_kernel - 1
    if lengths is None:
        return padded[:, padded.shape[1] - kept :]
    index = lengths[:, None, None] + torch.arange(kept, device=padded.device)[:, None]
    return padded.gather(1, index.expand(-1, -1, padded.shape[2]))


def chunked_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """S ← exp(dt·A)·S + dt·x ⊗ B; y = S·C, token by token, computed in chunks (Mamba-2, section 6).

    Args:
        x: [B, L, G, R, P].
        dt: Step sizes, [B, L, G, R], at least 0.
        a: [G, R], negative.
        b: [B, L, G, N], shared by the R heads of a group.
        c: [B, L, G, N].
        state: S before the first token, [B, G, R, P, N].
        chunk: Tokens per chunk; the result depends on it only by rounding.

    Returns:
        y [B, L, G, R, P] and S after the last token, both float32 (float64 if an input is).
    """
    length = x.shape[1]
    # Padded steps have size zero, and so leave the state alone.
    x, dt, b, c = (_chunks(wide(value), chunk) for value in (x, dt, b, c))
    # From here: axes [B, chunk, G, R, token, ...], and [B, chunk, G, token, ...] for b and c.
    x, dt = x.permute(0, 1, 3, 4, 2, 5), dt.permute(0, 1, 3, 4, 2)
    b, c = b.transpose(2, 3), c.transpose(2, 3)
    log_decay = (dt * a[..., None]).cumsum(-1)
    x = x * dt[..., None]

    # Within a chunk: token l hears token s ≤ l through C_l·B_s, faded by the steps between.
    fade = torch.exp(_lower(log_decay[..., :, None] - log_decay[..., None, :]))
    y = ((c @ b.mT)[:, :, :, None] * fade) @ x

    # Between chunks: what each adds to the state, then the state at the start of each.
    to_end = torch.exp(log_decay[..., -1:] - log_decay)
    added = (x * to_end[..., None]).mT @ b[:, :, :, None]
    total = F.pad(log_decay[..., -1].movedim(1, -1), (1, 0)).cumsum(-1)
    carry = torch.exp(_lower(total[..., :, None] - total[..., None, :]))
    stacked = torch.cat([wide(state)[:, None], added], 1).movedim(1, 3)
    states = (carry @ stacked.flatten(-2)).unflatten(-1, state.shape[-2:]).movedim(3, 1)
    y = y + torch.exp(log_decay)[..., None] * (c[:, :, :, None] @ states[:, :-1].mT)
    return y.permute(0, 1, 4, 2, 3, 5).flatten(1, 2)[:, :length], wide(states[:, -1])


def _chunks(value: Tensor, chunk: int) -> Tensor:
    """[B, L, ...] -> [B, chunks, chunk, ...], zeros after the end."""
    missing = -value.shape[1] % chunk
    padded = F.pad(value, (0, 0) * (value.dim() - 2) + (0, missing))
    return padded.view(value.shape[0], -1, chunk, *value.shape[2:])


def _lower(value: Tensor) -> Tensor:
    """Minus infinity above the diagonal of the last two axes."""
    keep = torch.ones(value.shape[-2:], dtype=torch.bool, device=value.device).tril()
    return value.masked_fill(~keep, -math.inf)


class AttentionMixer(nn.Module):
    """Grouped-query causal attention without any position encoding."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        hidden, width, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * width, bias=bias)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * width, bias=bias)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * width, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * width, hidden, bias=bias)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        width = self.config.head_dim
        q, k, v = (
            project(x).unflatten(-1, (-1, width))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mask = None
        if call.cache is not None and call.cache.lengths is not None:
            k, v, mask = self._extend(k, v, call.cache, call.cache.lengths)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=True,
        )
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return projected

    def _extend(
        self, k: Tensor, v: Tensor, cache: Cache, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Writes k and v behind each row's tokens; the mask [B, 1, L, T] hides what follows a query."""
        position = lengths[:, None] + torch.arange(k.shape[1], device=k.device)
        capacity = int(lengths.max()) + k.shape[1]
        old = cache.layers.get(self.index, KeysValues(k[:, :0], v[:, :0]))
        assert isinstance(old, KeysValues)
        keys, values = (
            F.pad(
                before[:, :capacity], (0, 0, 0, 0, 0, max(0, capacity - before.shape[1]))
            ).scatter(1, position[..., None, None].expand_as(new), new)
            for before, new in ((old.keys, k), (old.values, v))
        )
        cache.layers[self.index] = KeysValues(keys, values)
        mask = torch.arange(capacity, device=k.device) <= position[..., None]
        return keys, values, mask[:, None]


class MLP(nn.Module):
    """down(activation(up x)): a dense layer, or the shared expert of a MoE layer."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.mlp_hidden_act]

    def forward(self, x: Tensor, call: Call | None = None) -> Tensor:
        projected: Tensor = self.down_proj(self.activation(self.up_proj(x)))
        return projected


class Router(nn.Module):
    """Chooses experts by biased sigmoid scores and weights them by the unbiased ones, in float32."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [tokens, H] -> experts int64 [tokens, k] and their weights float32 [tokens, k]."""
        c = self.config
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(wide(x), wide(self.weight)).sigmoid()
        choice = scores + self.e_score_correction_bias
        if c.n_group > 1:
            grouped = choice.unflatten(-1, (c.n_group, -1))
            best = grouped.topk(2, -1).values.sum(-1).topk(c.topk_group, -1).indices
            allowed = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, True)
            choice = grouped.masked_fill(~allowed[..., None], -math.inf).flatten(-2)
        experts = choice.topk(c.num_experts_per_tok, -1).indices
        weights = scores.gather(-1, experts)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return experts, weights * c.routed_scaling_factor


class Experts(nn.Module):
    """The routed experts; each computes only the tokens that chose it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        count, width, io = (
            config.n_routed_experts,
            config.moe_intermediate_size,
            config.expert_input_size,
        )
        self.up_proj = nn.Parameter(torch.empty(count, width, io))
        self.down_proj = nn.Parameter(torch.empty(count, io, width))
        self.activation = ACTIVATIONS[config.mlp_hidden_act]
        # What each product reads goes through a module, for hooks: products of stacks are none.
        self.up_rows, self.down_rows = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """x [tokens, X], experts and weights [tokens, k] -> [tokens, X] in the weights' dtype."""
        order = experts.flatten().argsort(stable=True)
        counts = experts.flatten().bincount(minlength=self.up_proj.shape[0]).tolist()
        rows = self.up_rows(x)[order // experts.shape[1]].split(counts)
        outputs = [
            F.linear(self.down_rows(self.activation(F.linear(part, up))), down)
            for part, up, down in zip(
                rows, self.up_proj.unbind(), self.down_proj.unbind(), strict=True
            )
            if len(part)
        ]
        chosen = torch.cat(outputs)[order.argsort()].view(*experts.shape, -1)
        return (chosen * weights[..., None]).sum(1)


class MoEMixer(nn.Module):
    """Routed experts, in a latent space if the model has one, plus the shared expert."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, latent, bias = config.hidden_size, config.moe_latent_size, config.mlp_bias
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = MLP(config, config.moe_shared_expert_intermediate_size)
        self.fc1_latent_proj = nn.Linear(hidden, latent, bias=bias) if latent else nn.Identity()
        self.fc2_latent_proj = nn.Linear(latent, hidden, bias=bias) if latent else nn.Identity()

    def forward(self, x: Tensor, call: Call) -> Tensor:
        flat = x.flatten(0, 1)
        routed = self.experts(self.fc1_latent_proj(flat), *self.gate(flat)).to(x.dtype)
        out: Tensor = self.fc2_latent_proj(routed).view_as(x) + self.shared_experts(x)
        return out


def build_mixer(config: ModelConfig, kind: LayerKind, index: int) -> nn.Module:
    match kind:
        case "mamba":
            return MambaMixer(config, index)
        case "attention":
            return AttentionMixer(config, index)
        case "moe":
            return MoEMixer(config)
        case "mlp":
            return MLP(config, config.intermediate_size)


def wide(value: Tensor) -> Tensor:
    """The value in float32 or, if it has more bits than that, as it is."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
