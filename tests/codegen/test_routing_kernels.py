"""Routing kernels against the ops' evaluation: integers and scores are equal, ties included."""

import pytest
import torch

from nemoc.codegen.plan import Site, View
from nemoc.codegen.tvm.routing import emit_group_by, emit_group_limit, emit_top_k
from nemoc.ir.dims import B, L
from nemoc.ir.dtypes import DType
from nemoc.ir.ops import GroupBy, GroupLimit, TopK
from support.kernels import CompiledSite, KernelSuite, value

F32, I32 = DType.F32, DType.I32
ROWS = [(1, 1), (2, 17)]

SUITE = KernelSuite()


def scores(rows: int, width: int) -> dict[str, torch.Tensor]:
    """Rows of scores: all different, many equal, all equal, with zeros of both signs and infinities."""
    generator = torch.Generator().manual_seed(width)
    some = torch.randn(rows, width, generator=generator)
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, float("-inf"), float("inf"), 1e-40, -1e-40])
    chosen = torch.randint(0, len(special), (rows, width), generator=generator)
    return {
        "different": some,
        "equal": (some * 2).round(),
        "all equal": torch.full((rows, width), -0.5),
        "special": special[chosen],
        "hardly any": torch.where(some > 1, some, float("-inf")),
    }


TOP = {
    (width, k): SUITE.add(Site.dense(TopK(value(F32, B * L, width), k)), emit_top_k)
    for width, k in ((128, 6), (512, 22), (512, 1), (100, 7), (16, 16), (5, 3), (1, 1))
}
_TOP = TopK(value(F32, B, 72), 6)
TOP_STRIDED = [
    SUITE.add(Site(_TOP, (View(F32, (B, 72), (1, B)),), (View(I32, (B, 6), (9, 1)),)), emit_top_k),
    SUITE.add(Site(_TOP, (View(F32, (B, 72), (80, 1)),), (View(I32, (B, 6), (1, B)),)), emit_top_k),
]


@pytest.mark.parametrize(("width", "k"), TOP)
@pytest.mark.parametrize(("b", "n"), ROWS)
def test_selects_the_largest(width: int, k: int, b: int, n: int) -> None:
    for x in scores(b * n, width).values():
        TOP[width, k].check({"B": b, "L": n}, x)


@pytest.mark.parametrize("case", TOP_STRIDED, ids=["columns", "rows"])
def test_selects_from_strided_rows(case: CompiledSite) -> None:
    for x in scores(5, 72).values():
        case.check({"B": 5}, x)


def limited(width: int, groups: int, keep: int, fill: float = 0.0) -> CompiledSite:
    op = GroupLimit(value(F32, B * L, width), groups, keep, fill)
    return SUITE.add(Site.dense(op), emit_group_limit)


_LIMIT = GroupLimit(value(F32, B, 40), 4, 2)
LIMITS = {
    "wide": limited(512, 8, 4),
    "odd": limited(77, 7, 3, fill=-1.5),
    "pairs": limited(16, 8, 1, fill=float("-inf")),
    "one group": limited(33, 1, 1),
    "all kept": limited(64, 4, 4),
}
LIMIT_STRIDED = SUITE.add(
    Site(_LIMIT, (View(F32, (B, 40), (1, B)),), (View(F32, (B, 40), (50, 1)),)), emit_group_limit
)


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize(("b", "n"), ROWS)
def test_keeps_the_best_groups(name: str, b: int, n: int) -> None:
    case = LIMITS[name]
    width = case.site.operands[0].shape[1]
    assert isinstance(width, int)
    for kind, x in scores(b * n, width).items():
        if kind != "special":  # inf − inf has no merit
            case.check({"B": b, "L": n}, x)
            case.check({"B": b, "L": n}, x, threads=(2,), in_place=True)


def test_limits_strided_rows() -> None:
    LIMIT_STRIDED.check({"B": 3}, scores(3, 40)["equal"])


BY = {
    (k, groups): SUITE.add(Site.dense(GroupBy(value(I32, B * L, k), groups)), emit_group_by)
    for k, groups in ((6, 128), (22, 512), (1, 3), (2, 1))
}
_BY = GroupBy(value(I32, B, 4), 9)
BY_STRIDED = SUITE.add(
    Site(
        _BY,
        (View(I32, (B, 4), (1, B)),),
        (View(I32, (4 * B,), (2,)), View(I32, (4 * B,), (3,)), View(I32, (10,), (2,))),
    ),
    emit_group_by,
)


@pytest.mark.parametrize(("k", "groups"), BY)
@pytest.mark.parametrize(("b", "n"), [(1, 1), (3, 170)])
def test_sorts_slots_by_group(k: int, groups: int, b: int, n: int) -> None:
    generator = torch.Generator().manual_seed(k)
    index = torch.randint(0, groups, (b * n, k), generator=generator, dtype=torch.int32)
    BY[k, groups].check({"B": b, "L": n}, index)
    BY[k, groups].check({"B": b, "L": n}, torch.full_like(index, groups - 1))


def test_sorts_strided_slots() -> None:
    index = torch.tensor([[8, 0, 3, 8], [3, 3, 0, 7]], dtype=torch.int32)
    BY_STRIDED.check({"B": 2}, index)
