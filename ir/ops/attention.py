"""Attention over a cache of keys and values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import sympy
import torch

from nemoc.ir.dims import Dim, T, dim
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import expect
from nemoc.ir.op import Env, Op
from nemoc.ir.ops.checks import expect_form, expect_shapes
from nemoc.ir.types import TensorType, Value


@dataclass(frozen=True)
class CacheWrite(Op):
    """The cache with new rows behind the cached ones: result[b, lengths[b] + t] = rows[b, t].

    cache [B, C, H, D], rows [B, L, H, D] of the same element type, lengths i32 [B]; rows past the capacity are
    dropped. Padding tokens are written too, so that whatever reads them finds finite numbers: they lie
    behind the row's length and the next step overwrites them. The result is like the cache; a plan updates it in place.
    """

    updates: ClassVar[Mapping[int, str]] = {0: "cache"}

    cache: Value
    rows: Value
    lengths: Value

    def infer(self) -> TensorType:
        expect(
            self.cache.type.rank == 4, f"cache_write: cache is {self.cache.type}, expected rank 4"
        )
        expect(self.rows.type.rank == 4, f"cache_write: rows is {self.rows.type}, expected rank 4")
        batch, _, heads, width = self.cache.shape
        expect_shapes(self, self.cache.dtype, rows=(batch, self.rows.shape[1], heads, width))
        expect_shapes(self, DType.I32, lengths=(batch,))
        return self.cache.type

    def evaluate(
        self, env: Env, cache: torch.Tensor, rows: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        cache = cache.clone()
        for b, start in enumerate(lengths.tolist()):
            cache[b, start : start + rows.shape[1]] = rows[b, : cache.shape[1] - start]
        return cache

    def reads(self) -> tuple[Dim, Dim, Dim]:
        return 0, self.rows.type.bytes, self.lengths.type.bytes

    def writes(self) -> tuple[Dim]:
        return (self.rows.type.bytes,)


@dataclass(frozen=True)
class Attention(Op):
    """Causal grouped-query attention of new tokens over the cache, softmax in the accumulator type.

    q f32 [B, L, Hq, D], k and v [B, C, Hk, D] (a narrower float is widened), lengths i32 [B]: the tokens cached
    before this step. Token t of row b attends to cache rows 0 to lengths[b] + t, clipped to the
    capacity; query head h reads head h // (Hq / Hk). The result is f32 like q.
    """

    q: Value
    k: Value
    v: Value
    lengths: Value
    scale: float

    def infer(self) -> TensorType:
        expect_form(self, "q", DType.F32, 4)
        expect(self.k.type.rank == 4, f"attention: k is {self.k.type}, expected rank 4")
        batch, _, heads, width = self.q.shape
        _, capacity, kv_heads, _ = self.k.shape
        cached = (batch, capacity, kv_heads, width)
        expect_shapes(self, self.k.dtype, k=cached, v=cached)
        expect(
            isinstance(heads, int)
            and isinstance(kv_heads, int)
            and kv_heads > 0
            and heads % kv_heads == 0,
            f"attention: {heads} query heads do not divide over {kv_heads} key heads",
        )
        expect_shapes(self, DType.I32, lengths=(batch,))
        return self.q.type

    def evaluate(
        self,
        env: Env,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lengths: torch.Tensor,
    ) -> torch.Tensor:
        new = q.shape[1]
        reach = min(int(lengths.max()) + new, k.shape[1])  # nothing attends past it
        keys = k[:, :reach].to(q.dtype).repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        values = v[:, :reach].to(q.dtype).repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        last = lengths.unsqueeze(1) + torch.arange(new)
        seen = torch.arange(reach) <= last.unsqueeze(-1)  # [B, L, reach]
        # Unwritten cache rows may hold anything, NaN included: they are removed, not multiplied by 0.
        written = torch.arange(reach) < (lengths + new).unsqueeze(1)
        keys = torch.where(written[..., None, None], keys, 0.0)
        values = torch.where(written[..., None, None], values, 0.0)
        scores = torch.einsum("bthd,bshd->bhts", q, keys) * self.scale
        scores = scores.masked_fill(~seen.unsqueeze(1), float("-inf"))
        return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), values)

    def _attended(self) -> Dim:
        """Cache rows that one row's new tokens attend to, summed over the tokens."""
        new = self.q.shape[1]
        return new * T + new * (new + 1) / sympy.Integer(2)

    def flops(self) -> Dim:
        batch, _, heads, width = self.q.shape
        return dim(4 * batch * heads * width * self._attended())

    def reads(self) -> tuple[Dim, Dim, Dim, Dim]:
        batch, new, _, _ = self.q.shape
        _, _, kv_heads, width = self.k.shape
        cached = dim(batch * (T + new) * kv_heads * width * self.k.dtype.bytes)
        return self.q.type.bytes, cached, cached, self.lengths.type.bytes
