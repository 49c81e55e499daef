"""Bytes that kernels touch: counted on kernels written for the purpose, and against the closed forms of all ops."""

import dataclasses
from collections.abc import Callable, Mapping

import pytest
import torch

import support.models
from nemoc.codegen.plan import Arg, Plan, Site, Stage, View
from nemoc.codegen.sites import RecordedSite
from nemoc.codegen.storage import bind_weights, weight_layout
from nemoc.codegen.tvm.emit import emit
from nemoc.codegen.tvm.instrument import SiteTraffic, Touched, count_sites, count_traffic
from nemoc.codegen.tvm.target import cpu_target
from nemoc.codegen.tvm.vectors import prefetch
from nemoc.codegen.tvm.writer import KernelWriter
from nemoc.ir import Builder, DType, Graph, ops
from nemoc.ir.dims import B
from nemoc.ir.fusion import fuse
from nemoc.ir.sample_inputs import sample_arguments
from nemoc.ir.types import TensorType
from nemoc.models import RandomSource, build_step
from nemoc.models.config import LayerKind
from nemoc.passes import PassContext, TargetInfo, preset, run_pipeline
from nemoc.passes.presets import Phase
from support.kernels import value

F32, BF16, I32 = DType.F32, DType.BF16, DType.I32
U8, F8E4M3 = DType.U8, DType.F8E4M3
X, Y, TEMPORARY = Arg("operand", 0), Arg("result", 0), Arg("scratch", 0)
ROW = View.dense(TensorType(F32, (16,)))
TARGET = cpu_target()

Body = Callable[[KernelWriter, str, str], None]
"""Writes a kernel on an operand and a result of 16 elements each."""


def count(body: Body, dtype: DType = F32) -> tuple[Touched, Touched]:
    """What a kernel touches of its operand and of its result."""
    view = View.dense(TensorType(dtype, (16,)))
    writer = KernelWriter("planted")
    body(writer, writer.buffer("x", X, view), writer.buffer("y", Y, view))
    site = Site(ops.Relu(value(F32, 16)), (view,), (view,))
    recorded = RecordedSite(
        site, Plan((writer.finish(1),)), lambda: (torch.arange(16).to(dtype.torch),)
    )
    (found,) = count_sites([recorded], {"B": 1, "L": 1, "C": 1}, TARGET)
    return found.tensors[X], found.tensors[Y]


def scalars(w: KernelWriter, x: str, y: str) -> None:
    with w.loop("i", 5) as i:
        w.store(y, f"{i} + 3", w.load(x, i))


def vectors(w: KernelWriter, x: str, y: str) -> None:
    w.store(y, "8", f"{w.load(x, '0', 8)} + {w.load(x, '4', 8)}", 8)


def one_element_again_and_again(w: KernelWriter, x: str, y: str) -> None:
    with w.loop("i", 16):
        w.store(y, "2", f"{w.load(x, '1')} * {w.load(x, '1')}")


def result_read_back(w: KernelWriter, x: str, y: str) -> None:
    w.store(y, "0", w.load(x, "0"))
    w.store(y, "1", w.load(y, "0"))


def loads_that_choose_what_is_done(w: KernelWriter, x: str, y: str) -> None:
    with w.block(f"if {w.load(x, '2')} > T.float32(1):"):
        w.store(y, "0", "T.float32(0)")
    with w.block("else:"):
        w.store(y, "0", w.load(x, "5"))
        w.store(y, "1", w.load(x, "6"))


def loads_of_one_side(w: KernelWriter, x: str, y: str) -> None:
    """Elements 0 to 3 of the first branch, 8 to 11 of the second, whose own condition is element 15."""
    with w.loop("i", 8) as i:
        inner = f"T.if_then_else({w.load(x, '15')} > T.float32(1), {w.load(x, f'{i} + 4')}, {w.load(x, '14')})"
        w.store(y, i, f"T.if_then_else({i} < 4, {w.load(x, i)}, {inner})")


def loads_of_both_sides(w: KernelWriter, x: str, y: str) -> None:
    with w.loop("i", 4) as i:
        w.store(y, i, f"T.Select({i} < 2, {w.load(x, i)}, {w.load(x, f'{i} + 8')})")


def loads_until(w: KernelWriter, x: str, y: str) -> None:
    """x[i] = i, so that the loop ends when it has looked at element 4."""
    at = w.value("at", "0", dtype="int32")
    with w.block(f"while {w.load(x, at)} < T.float32(4):"):
        w.line(f"{at} = {at} + 1")
    w.store(y, "0", "T.float32(0)")


def prefetches(w: KernelWriter, x: str, y: str) -> None:
    prefetch(w, x, "4")
    w.store(y, "0", w.load(x, "0"))


def registers(w: KernelWriter, x: str, y: str) -> None:
    kept = w.local("kept", 8)
    with w.loop("i", 8) as i:
        w.line(f"{kept}[{i}] = T.float32(0)")
    w.store(y, "0", f"{kept}[3]")


@pytest.mark.parametrize(
    ("body", "read", "written"),
    [
        (scalars, 5, 5),
        (vectors, 12, 8),
        (one_element_again_and_again, 1, 1),
        (result_read_back, 1, 2),
        (loads_that_choose_what_is_done, 1, 1),
        (loads_of_one_side, 9, 8),
        (loads_of_both_sides, 8, 4),
        (loads_until, 5, 1),
        (prefetches, 1, 1),
        (registers, 0, 1),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_distinct_elements_are_counted_where_they_are_touched(
    body: Body, read: int, written: int
) -> None:
    x, y = count(body)
    assert (x, y.written) == (Touched(4 * read), 4 * written)
    assert y.read == (4 if body is result_read_back else 0)


@pytest.mark.parametrize("dtype", [DType.U8, DType.BOOL, BF16, DType.F16, I32, DType.I64], ids=str)
def test_elements_of_any_width_are_counted(dtype: DType) -> None:
    def copy(w: KernelWriter, x: str, y: str) -> None:
        w.store(y, "1", w.load(x, "2", 4, raw=True), 4, raw=True)

    assert count(copy, dtype) == (Touched(4 * dtype.bytes), Touched(0, 4 * dtype.bytes))


def through_scratch(first: int, second: int) -> Plan:
    """Two launches that each copy some elements, by way of scratch."""

    def copy(source: Arg, target: Arg, size: int) -> Stage:
        w = KernelWriter("copy")
        x, y = w.buffer("x", source, ROW), w.buffer("y", target, ROW)
        with w.loop("i", size) as i:
            w.store(y, i, w.load(x, i))
        return w.finish(1)

    return Plan((copy(X, TEMPORARY, first), copy(TEMPORARY, Y, second)), scratch=(ROW,))


def test_launches_are_counted_one_by_one_and_scratch_apart() -> None:
    site = Site(ops.Relu(value(F32, 16)), (ROW,), (ROW,))
    recorded = RecordedSite(site, through_scratch(16, 10), lambda: (torch.ones(16),))
    (found,) = count_sites([recorded], {"B": 1, "L": 1, "C": 1}, TARGET)
    first, second = found.launches
    assert (first.outer, first.scratch) == (Touched(64, 0), Touched(0, 64))
    assert (second.outer, second.scratch) == (Touched(0, 40), Touched(40, 0))
    assert (found.reads, found.writes, found.tensors[TEMPORARY]) == ((64,), (40,), Touched(40, 64))


def op_traffic(op: ops.Op, sizes: Mapping[str, int], *operands: torch.Tensor) -> SiteTraffic:
    """What the backend's kernels of an op touch."""
    site = Site.dense(op)
    recorded = RecordedSite(site, emit(site, TARGET), lambda: operands)
    (found,) = count_sites([recorded], {"B": 1, "L": 1, "C": 1, "T": 0} | dict(sizes), TARGET)
    return found


def test_a_kernel_that_reads_too_much_is_found() -> None:
    """One that goes through a whole table where it needs some rows of it."""
    site = Site.dense(ops.TakeRows(value(F32, 16, 1), value(I32, 2)))
    w = KernelWriter("planted")
    table, index = (w.buffer("x", Arg("operand", i), site.operands[i]) for i in range(2))
    y = w.buffer("y", Y, site.results[0])
    with w.loop("i", 2) as i, w.loop("j", 16) as j:
        row = w.value("row", w.load(table, f"{j}, 0"))
        with w.block(f"if {w.load(index, i)} == {j}:"):
            w.store(y, f"{i}, 0", row)
    operands = (torch.ones(16, 1), torch.tensor([3, 9], dtype=torch.int32))
    recorded = RecordedSite(site, Plan((w.finish(1),)), lambda: operands)
    (found,) = count_sites([recorded], {"B": 1, "L": 1, "C": 1}, TARGET)
    assert (found.reads, found.expected_reads) == ((64, 8), (8, 8))
    assert found.writes == found.expected_writes == (8,)
    assert op_traffic(site.op, {}, *operands).reads == (8, 8)


def test_of_the_experts_those_that_the_routing_hits_are_read() -> None:
    op = ops.GroupedLinear(value(F32, B, 20), value(BF16, 4, 12, 20), value(I32, 5))
    offsets = torch.tensor([0, 0, 4, 4, 6], dtype=torch.int32)
    found = op_traffic(op, {"B": 6}, torch.randn(6, 20), torch.randn(4, 12, 20).bfloat16(), offsets)
    assert found.reads == found.expected_reads == (480, 2 * 12 * 20 * 2, 20)


def planted_region(
    graph: Graph, batch: int, given: Mapping[str, torch.Tensor]
) -> tuple[SiteTraffic, dict[str, int]]:
    """What a kernel in a graph's place touches that writes one element, and what it should read of each operand."""
    (region,) = fuse(graph, graph.nodes, "expert").nodes
    site = Site.dense(region.op)
    writer = KernelWriter("planted")
    writer.store(writer.buffer("y", Y, site.results[0]), "0, 0", "T.float32(0)")
    names = [v.name for v in region.op.operands()]
    operands = tuple(given[name] for name in names)
    recorded = RecordedSite(site, Plan((writer.finish(1),)), lambda: operands)
    (found,) = count_sites([recorded], {"B": batch, "L": 1, "C": 1}, TARGET)
    return found, dict(zip(names, found.expected_reads, strict=True))


def test_experts_within_a_region_are_expected_by_the_routing_too() -> None:
    b = Builder("g")
    x, w = b.input("x", F32, (B, 20)), b.param("w", BF16, (4, 12, 20))
    offsets = b.input("offsets", I32, (5,), 7)
    graph = b.finish([b(ops.Relu(b(ops.GroupedLinear(x, w, offsets))))])
    given = {
        "x": torch.ones(6, 20),
        "w": torch.ones(4, 12, 20).bfloat16(),
        "offsets": torch.tensor([0, 0, 6, 6, 6], dtype=torch.int32),
    }
    found, expected = planted_region(graph, 6, given)
    assert expected == {"x": 480, "w": 12 * 20 * 2, "offsets": 20}
    assert found.expected_writes == (288,)
    assert (found.reads, found.writes) == ((0, 0, 0), (4,))


def test_of_packed_experts_codes_and_scales_of_those_that_are_hit_are_expected() -> None:
    b = Builder("g")
    x, offsets = b.input("x", F32, (B, 32)), b.input("offsets", I32, (5,), 7)
    packed, scales = b.param("w.packed", U8, (4, 12, 16)), b.param("w.scales", F8E4M3, (4, 12, 2))
    w = b(ops.DequantizeNvfp4(packed, scales, b.param("w.global", F32, (4,))))
    graph = b.finish([b(ops.Relu(b(ops.GroupedLinear(x, w, offsets))))])
    given = {
        "x": torch.ones(6, 32),
        "w.packed": torch.ones(4, 12, 16, dtype=torch.uint8),
        "w.scales": torch.ones(4, 12, 2).to(torch.float8_e4m3fn),
        "w.global": torch.ones(4),
        "offsets": torch.tensor([0, 0, 4, 4, 6], dtype=torch.int32),
    }
    _, expected = planted_region(graph, 6, given)
    assert expected == {
        "x": 6 * 32 * 4,
        "w.packed": 2 * 12 * 16,
        "w.scales": 2 * 12 * 2,
        "w.global": 2 * 4,
        "offsets": 5 * 4,
    }


def test_an_updated_state_is_read_and_written_where_it_lies() -> None:
    op = ops.CacheWrite(value(F32, 2, 16, 1, 4), value(F32, 2, 3, 1, 4), value(I32, 2))
    lengths = torch.tensor([0, 5], dtype=torch.int32)
    found = op_traffic(op, {}, torch.zeros(2, 16, 1, 4), torch.ones(2, 3, 1, 4), lengths)
    assert (found.reads, found.writes) == ((0, 96, 8), (96,))


# So many words that no two tokens of a test are the same one.
SMALL = dataclasses.replace(support.models.SMALL, vocab_size=4001)


@pytest.mark.parametrize(
    ("phase", "layers", "tokens"),
    [("prefill", ("mamba", "moe", "attention"), 9), ("decode", ("mamba", "attention"), 1)],
    ids=["prefill", "decode"],
)
def test_every_kernel_of_a_model_touches_what_its_closed_form_says(
    phase: Phase, layers: tuple[LayerKind, ...], tokens: int
) -> None:
    config = dataclasses.replace(SMALL, layers=layers)
    context = PassContext(TargetInfo("cpu", linear_interleave=16), RandomSource(config, 0, BF16))
    graph = run_pipeline(build_step(config), preset("cpu", phase), context)
    graphs, weights = bind_weights({phase: graph})
    sizes = {"B": 2, "L": tokens, "C": 24, "T": 5}

    def arguments(graph: Graph) -> Mapping[str, torch.Tensor]:
        given = sample_arguments(graph, sizes)
        given["lengths"] = torch.full_like(given["lengths"], 5)
        return given | {"valid": torch.full((2,), tokens, dtype=torch.int32)}

    traffic = count_traffic(graphs, weight_layout(weights), arguments, sizes, TARGET)
    assert traffic.sites
    for site in traffic.sites:
        where = f"{site.site.op.mnemonic()} on {[str(v.type) for v in site.site.op.operands()]}"
        assert site.reads == pytest.approx(site.expected_reads, rel=0.05), where
        assert site.writes == pytest.approx(site.expected_writes, rel=0.05), where
    assert len(list(traffic.launches)) == len(traffic.program.functions[0].launches)
