"""Mamba-2: the causal convolution and the selective state-space recurrence (Dao and Gu, arXiv 2405.21060).

Rows of a batch may differ in length: only the first `valid[b]` of the L new tokens of row b count. State is
left as if the others did not exist.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from nemoc.ir.dims import Dim, product
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import expect
from nemoc.ir.op import Env, Op
from nemoc.ir.ops.checks import expect_form, expect_shapes
from nemoc.ir.types import TensorType, Value

_CHUNK = 64
"""Tokens evaluated at once by `SsdScan.evaluate`; the meaning does not depend on it."""


@dataclass(frozen=True)
class CausalConv(Op):
    """Depthwise causal convolution over time, continued from its state.

    x f32 [B, L, D], w f32 [D, K], bias f32 [D] or none, state f32 [B, K − 1, D] (the K − 1 inputs before this
    step, oldest first), valid i32 [B]. With X the state and x joined along time:
    y[b, t, d] = bias[d] + Σⱼ w[d, j] · X[b, t + j, d]. Results: y like x; the state after the valid tokens.
    """

    updates: ClassVar[Mapping[int, str]] = {1: "state"}

    x: Value
    w: Value
    bias: Value | None
    state: Value
    valid: Value

    def infer(self) -> tuple[TensorType, TensorType]:
        name = self.mnemonic()
        expect_form(self, "x", DType.F32, 3)
        batch, _, width = self.x.shape
        expect(self.w.type.rank == 2, f"{name}: w is {self.w.type}, expected rank 2")
        taps = self.w.shape[1]
        expect(
            isinstance(taps, int) and taps >= 2, f"{name}: w has {taps} taps, expected at least 2"
        )
        expect_shapes(
            self, DType.F32, w=(width, taps), bias=(width,), state=(batch, taps - 1, width)
        )
        expect_shapes(self, DType.I32, valid=(batch,))
        return self.x.type, self.state.type

    def evaluate(
        self,
        env: Env,
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        state: torch.Tensor,
        valid: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        joined = torch.cat([state, x], dim=1)
        y = F.conv1d(joined.mT, w.unsqueeze(1), bias, groups=w.shape[0]).mT
        last = valid.long().unsqueeze(1) + torch.arange(state.shape[1])
        return y, joined[torch.arange(x.shape[0]).unsqueeze(1), last]

    def flops(self) -> Dim:
        return product((2, *self.x.shape, self.w.shape[1]))


@dataclass(frozen=True)
class SsdScan(Op):
    """The state-space recurrence over L tokens, continued from its state.

    x f32 [B, L, H, P], dt f32 [B, L, H] (after softplus), a f32 [H] (negative), b and c f32 [B, L, G, N], d f32 [H]
    or none, state f32 [B, H, P, N], valid i32 [B]; head h reads group h // (H / G). For each token
    t < valid[b]: S ← exp(dt·a)·S + (dt·x) ⊗ b. For every token: y = S·c + d·x, S being the state after it.
    Results: y like x; S after the valid tokens.
    """

    updates: ClassVar[Mapping[int, str]] = {1: "state"}

    x: Value
    dt: Value
    a: Value
    b: Value
    c: Value
    d: Value | None
    state: Value
    valid: Value

    def infer(self) -> tuple[TensorType, TensorType]:
        _check_recurrence(self, rank=4)
        expect_shapes(self, DType.I32, valid=self.x.shape[:1])
        return self.x.type, self.state.type

    def evaluate(
        self,
        env: Env,
        x: torch.Tensor,
        dt: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        d: torch.Tensor | None,
        state: torch.Tensor,
        valid: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        length = x.shape[1]
        live = torch.arange(length) < valid.unsqueeze(1)
        step = torch.where(live.unsqueeze(-1), dt, torch.zeros_like(dt))
        parts = []
        for start in range(0, length, _CHUNK):
            cut = slice(start, start + _CHUNK)
            y, state = _scan_chunk(x[:, cut], step[:, cut], a, b[:, cut], c[:, cut], state)
            parts.append(y)
        y = torch.cat(parts, dim=1)
        return y if d is None else y + x * d.unsqueeze(-1), state

    def flops(self) -> Dim:
        batch, length, heads, width = self.x.shape
        return product((5, batch, length, heads, width, self.b.shape[3]))


def _check_recurrence(op: "SsdScan | SsdUpdate", rank: int) -> None:
    """The types of all operands but `valid`; x and b have `rank` axes, those of the tokens first."""
    expect_form(op, "x", DType.F32, rank)
    expect_form(op, "b", DType.F32, rank)
    *tokens, heads, width = op.x.shape
    groups, size = op.b.shape[-2:]
    expect(
        isinstance(heads, int) and isinstance(groups, int) and groups > 0 and heads % groups == 0,
        f"{op.mnemonic()}: {heads} heads do not divide into {groups} groups",
    )
    expect_shapes(
        op,
        DType.F32,
        dt=(*tokens, heads),
        a=(heads,),
        b=(*tokens, groups, size),
        c=(*tokens, groups, size),
        d=(heads,),
        state=(tokens[0], heads, width, size),
    )


def _scan_chunk(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One chunk of the recurrence as matrix products: the state-space dual form, section 6 of the paper."""
    per_group = x.shape[2] // b.shape[2]
    b = b.repeat_interleave(per_group, dim=2)
    c = c.repeat_interleave(per_group, dim=2)
    log_decay = (dt * a).cumsum(1)  # [B, L, H]: decay from the chunk's start to after each token
    between = log_decay.unsqueeze(2) - log_decay.unsqueeze(1)  # [B, t, s, H]
    causal = torch.ones(between.shape[1:3], dtype=torch.bool).tril()
    # Masked before exp: above the diagonal the exponent is positive and may overflow.
    mask = between.masked_fill(~causal.unsqueeze(-1), float("-inf")).exp()
    scores = torch.einsum("bthn,bshn->btsh", c, b) * mask
    driven = x * dt.unsqueeze(-1)
    y = torch.einsum("btsh,bshp->bthp", scores, driven)
    y = y + torch.einsum("bthn,bhpn,bth->bthp", c, state, log_decay.exp())
    to_end = (log_decay[:, -1:] - log_decay).exp()
    added = torch.einsum("bthp,bthn,bth->bhpn", driven, b, to_end)
    return y, state * log_decay[:, -1].exp()[..., None, None] + added


@dataclass(frozen=True)
class SsdUpdate(Op):
    """One token of the recurrence: `SsdScan` for L = 1 with every row valid.

    x f32 [B, H, P], dt f32 [B, H], a f32 [H], b and c f32 [B, G, N], d f32 [H] or none, state f32 [B, H, P, N].
    Results: y like x; the next state.
    """

    updates: ClassVar[Mapping[int, str]] = {1: "state"}

    x: Value
    dt: Value
    a: Value
    b: Value
    c: Value
    d: Value | None
    state: Value

    def infer(self) -> tuple[TensorType, TensorType]:
        _check_recurrence(self, rank=3)
        return self.x.type, self.state.type

    def evaluate(
        self,
        env: Env,
        x: torch.Tensor,
        dt: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        d: torch.Tensor | None,
        state: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        per_group = x.shape[1] // b.shape[1]
        b = b.repeat_interleave(per_group, dim=1)
        c = c.repeat_interleave(per_group, dim=1)
        decay = (dt * a).exp()[..., None, None]
        state = state * decay + (x * dt.unsqueeze(-1)).unsqueeze(-1) * b.unsqueeze(2)
        y = torch.einsum("bhpn,bhn->bhp", state, c)
        return y if d is None else y + x * d.unsqueeze(-1), state

    def flops(self) -> Dim:
        return product((5, *self.x.shape, self.b.shape[2]))
