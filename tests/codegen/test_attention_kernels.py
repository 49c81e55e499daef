"""Cache and attention kernels against the ops' evaluation; cached rows that were never written hold NaN."""

import dataclasses

import pytest
import torch

from nemoc.codegen.plan import Site, View
from nemoc.codegen.tvm.attention import KEYS_PER_SPLIT as LEAST
from nemoc.codegen.tvm.attention import SPLITS as MOST
from nemoc.codegen.tvm.attention import emit_attention
from nemoc.codegen.tvm.cache import emit_cache_write
from nemoc.codegen.tvm.target import cpu_target
from nemoc.ir.dims import B, C, Dim, L
from nemoc.ir.dtypes import DType
from nemoc.ir.ops import Attention, CacheWrite
from support.kernels import CompiledSite, KernelSuite, value

F32, BF16 = DType.F32, DType.BF16
LENGTHS = value(DType.I32, B)
HOST = cpu_target()
SPLITS, KEYS_PER_SPLIT = int(MOST.default), int(LEAST.default)
NARROW = dataclasses.replace(HOST, vector_bits=128, registers=16)
MIDDLE = dataclasses.replace(HOST, vector_bits=256, registers=16)
SUITE, NARROW_SUITE, MIDDLE_SUITE = KernelSuite(), KernelSuite(NARROW), KernelSuite(MIDDLE)


def attention(heads: int, kv_heads: int, width: int, dtype: DType, length: Dim) -> Site:
    k, v = (value(dtype, B, C, kv_heads, width) for _ in "kv")
    q = value(F32, B, length, heads, width)
    site = Site.dense(Attention(q, k, v, LENGTHS, width**-0.5))
    row = heads * width + 24  # queries are columns of a wider row
    view = View(F32, q.shape, (row * length, row, width, 1))
    return Site(site.op, (view, *site.operands[1:]), site.results)


def writing(heads: int, width: int, dtype: DType, row: int) -> Site:
    rows = value(dtype, B, L, heads, width)
    site = Site.dense(CacheWrite(value(dtype, B, C, heads, width), rows, LENGTHS))
    view = View(dtype, rows.shape, (row * L, row, width, 1))
    return Site(site.op, (site.operands[0], view, site.operands[2]), site.results)


SHAPES = {
    "mid's ratio": (16, 2, 64, F32),
    "nano's ratio, bf16": (32, 2, 24, BF16),
    "no sharing": (3, 3, 7, F32),
    "ratio no power of 2": (10, 2, 33, F32),
    "more heads than lanes": (34, 1, 8, BF16),
    "no sharing, whole vectors": (3, 3, 16, F32),
    "the sample's ratio": (4, 2, 64, F32),
    "five heads, bf16": (10, 2, 48, BF16),
    "four heads, wide": (8, 2, 256, F32),
}
PREFILL = {name: SUITE.add(attention(*shape, L), emit_attention) for name, shape in SHAPES.items()}
DECODE = {name: SUITE.add(attention(*shape, 1), emit_attention) for name, shape in SHAPES.items()}
FULL = SUITE.add(attention(16, 1, 8, F32, L), emit_attention)
for _cases, _length in ((PREFILL, L), (DECODE, 1)):
    _cases["narrow vectors"] = NARROW_SUITE.add(attention(72, 2, 20, BF16, _length), emit_attention)
    _cases["narrow, few"] = NARROW_SUITE.add(attention(4, 2, 12, BF16, _length), emit_attention)
    _cases["middle, few"] = MIDDLE_SUITE.add(attention(15, 3, 24, F32, _length), emit_attention)
WRITES = {
    "f32": SUITE.add(writing(2, 20, F32, 40), emit_cache_write),
    "bf16, strided": SUITE.add(writing(3, 39, BF16, 200), emit_cache_write),
}


def check(case: CompiledSite, length: int, capacity: int, cached: list[int]) -> None:
    """Compare on random operands; the keys grow along the cache, so that the running maximum moves."""
    generator = torch.Generator().manual_seed(capacity)
    batch = len(cached)
    _, _, heads, width = case.site.operands[0].shape
    view = case.site.operands[1]
    q = torch.randn([batch, length, int(heads), int(width)], generator=generator) * 3
    shape = [batch, capacity, *(int(n) for n in view.shape[2:])]
    k, v = (torch.randn(shape, generator=generator) for _ in "kv")
    k *= torch.linspace(0.2, 2, capacity)[:, None, None]
    for b, start in enumerate(cached):
        k[b, start + length :] = v[b, start + length :] = float("nan")
    caches = (t.to(view.dtype.torch) for t in (k, v))
    lengths = torch.tensor(cached, dtype=torch.int32)
    case.check({"B": batch, "L": length, "C": capacity}, q, *caches, lengths, tolerance=2e-6)


@pytest.mark.parametrize("name", PREFILL)
@pytest.mark.parametrize(
    ("length", "capacity", "cached"),
    [(1, 1, [0]), (2, 40, [0, 31]), (45, 200, [3, 128]), (9, 70, [67, 0])],
    ids=["one token", "short", "several blocks", "past the capacity"],
)
def test_prefill(name: str, length: int, capacity: int, cached: list[int]) -> None:
    check(PREFILL[name], length, capacity, cached)


def test_prefill_whose_tasks_have_all_their_tiles() -> None:
    check(FULL, 600, 640, [37])


@pytest.mark.parametrize("name", DECODE)
@pytest.mark.parametrize(
    ("capacity", "cached"),
    [
        (1, [0]),
        (KEYS_PER_SPLIT + 1, [KEYS_PER_SPLIT - 1, KEYS_PER_SPLIT, 5]),
        (3 * KEYS_PER_SPLIT, [2 * KEYS_PER_SPLIT + 17, 70]),
        (SPLITS * KEYS_PER_SPLIT + 300, [SPLITS * KEYS_PER_SPLIT + 290]),
        (40, [40, 39]),
    ],
    ids=["first token", "one or two parts", "some parts", "longer parts", "past the capacity"],
)
def test_decode(name: str, capacity: int, cached: list[int]) -> None:
    check(DECODE[name], 1, capacity, cached)


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize(
    ("length", "capacity", "cached"), [(1, 4, [3, 0]), (5, 9, [0, 4, 7]), (3, 2, [0, 2])]
)
def test_cache_write(name: str, length: int, capacity: int, cached: list[int]) -> None:
    case = WRITES[name]
    view = case.site.operands[0]
    generator = torch.Generator().manual_seed(length)
    cache, rows = (
        torch.randn(len(cached), n, *(int(d) for d in view.shape[2:]), generator=generator)
        for n in (capacity, length)
    )
    cache[:, -1] = rows[:, 0, 0, 0] = float("nan")
    lengths = torch.tensor(cached, dtype=torch.int32)
    typed = (t.to(view.dtype.torch) for t in (cache, rows))
    case.check({"B": len(cached), "L": length, "C": capacity}, *typed, lengths)
