"""Ops that choose experts and order tokens by them."""

from dataclasses import dataclass

import torch

from nemoc.ir.dims import product
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import expect
from nemoc.ir.op import Env, Op
from nemoc.ir.ops.checks import expect_form
from nemoc.ir.types import TensorType, Value


@dataclass(frozen=True)
class GroupLimit(Op):
    """Keep the scores of the best groups of experts and replace the others by `fill`.

    x is [R, E] in E / `groups` consecutive experts a group; a group's merit is the sum of its two highest
    scores; the `keep` groups of highest merit stay (ties: the lower index). DeepSeek-V3's node-limited routing
    (arXiv 2412.19437, section 2.1.2).
    """

    x: Value
    groups: int
    keep: int
    fill: float = 0.0

    def infer(self) -> TensorType:
        expect_form(self, "x", DType.F32, 2)
        experts = self.x.shape[1]
        expect(
            isinstance(experts, int)
            and self.groups >= 1
            and experts % self.groups == 0
            and experts // self.groups >= 2,
            f"group_limit: {experts} experts do not divide into {self.groups} groups of 2 or more",
        )
        expect(
            1 <= self.keep <= self.groups,
            f"group_limit: cannot keep {self.keep} of {self.groups} groups",
        )
        return self.x.type

    def evaluate(self, env: Env, x: torch.Tensor) -> torch.Tensor:
        parts: torch.Tensor = x.unflatten(-1, (self.groups, -1))
        merit = parts.topk(2, dim=-1).values.sum(-1)
        best = merit.argsort(dim=-1, descending=True, stable=True)[..., : self.keep]
        kept = torch.zeros_like(merit, dtype=torch.bool).scatter_(-1, best, True)
        limited = parts.masked_fill(~kept.unsqueeze(-1), self.fill)
        return limited.flatten(-2)


@dataclass(frozen=True)
class TopK(Op):
    """Indices of the k largest elements of each row, largest first, ties by lower index.

    x is f32 [R, E]; the result is i32 [R, k].
    """

    x: Value
    k: int

    def infer(self) -> TensorType:
        expect_form(self, "x", DType.F32, 2)
        width = self.x.shape[1]
        expect(
            isinstance(width, int) and 1 <= self.k <= width,
            f"top_k: k is {self.k} of {width} columns",
        )
        return TensorType(DType.I32, (self.x.shape[0], self.k))

    def evaluate(self, env: Env, x: torch.Tensor) -> torch.Tensor:
        return x.argsort(dim=-1, descending=True, stable=True)[..., : self.k].int()


@dataclass(frozen=True)
class GroupBy(Op):
    """A stable counting sort of slots by group.

    `index` is i32 [R, k] in [0, groups); slot s = r·k + j belongs to group index[r, j]. Results:
    `order` i32 [R·k], the slot at each sorted position; `position` i32 [R·k], the sorted position of each slot
    (the inverse of `order`); `offsets` i32 [groups + 1], where each group starts among the sorted positions.
    """

    index: Value
    groups: int

    def infer(self) -> tuple[TensorType, TensorType, TensorType]:
        expect_form(self, "index", DType.I32, 2)
        expect(self.groups >= 1, f"group_by: groups is {self.groups}, expected at least 1")
        slots = TensorType(DType.I32, (product(self.index.shape),))
        return slots, slots, TensorType(DType.I32, (self.groups + 1,))

    def evaluate(
        self, env: Env, index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        flat = index.flatten().long()
        order = flat.argsort(stable=True)
        position = torch.empty_like(order)
        position[order] = torch.arange(order.numel())
        counts = torch.bincount(flat, minlength=self.groups)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return order.int(), position.int(), offsets.int()
