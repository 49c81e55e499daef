"""Regions around a state-space recurrence against their bodies in float64."""

import dataclasses
from collections.abc import Iterable

import pytest
import torch

from nemoc.codegen.plan import RegionError, Site, View
from nemoc.codegen.tvm.conv_scan import emit_conv_scan
from nemoc.codegen.tvm.target import cpu_target
from nemoc.compiler import functions
from nemoc.ir import Builder, DType, Graph, Node
from nemoc.ir.dims import B, L
from nemoc.ir.fusion import fuse
from nemoc.ir.ops import (
    CausalConv,
    Exp,
    Folded,
    Full,
    Fused,
    Gelu,
    Linear,
    Mul,
    Reshape,
    RmsNorm,
    Scale,
    Slice,
    SsdScan,
    SsdUpdate,
    Tanh,
)
from support.kernels import CompiledSite, KernelSuite, relative_error
from support.mixers import mixer_operands, mixer_region

HOST = cpu_target()
NARROW = dataclasses.replace(HOST, vector_bits=min(256, HOST.vector_bits), registers=16)
SUITE, NARROW_SUITE = KernelSuite(), KernelSuite(NARROW)
TOLERANCE = 2e-6


def add(region: Fused, suite: KernelSuite = SUITE) -> CompiledSite:
    return suite.add(Site.dense(region), emit_conv_scan)


def projected(region: Fused) -> Site:
    """The region on columns of one wide row, as in_proj leaves xbc, dt and z."""
    site = Site.dense(region)
    row = 1 + sum(int(v.shape[2]) for v in site.operands if v.rank == 3 and v.shape[1] in (1, L))
    operands = tuple(
        View(v.dtype, v.shape, (row * v.shape[1], row, 1))
        if v.rank == 3 and v.shape[1] in (1, L)
        else v
        for v in site.operands
    )
    return Site(region, operands, site.results)


SHAPES = {
    "mid's group": {"shape": (8, 64, 2, 128), "norms": 2},
    "columns of in_proj": {"shape": (4, 32, 2, 16)},
    "one group": {"shape": (4, 16, 1, 32), "norms": 1},
    "one group, several norms": {"shape": (8, 16, 1, 16), "norms": 4},
    "one norm over all groups": {"shape": (4, 16, 2, 16), "norms": 1},
    "tails, two taps": {"shape": (4, 20, 2, 24, 2), "activation": None, "norms": 2},
    "seven taps": {"shape": (6, 16, 2, 16, 7), "activation": Gelu, "bias": False},
    "bare": {"shape": (2, 16, 2, 16), "skip": False, "gate": False, "activation": Tanh},
    "narrow vectors": {"shape": (4, 24, 2, 40), "norms": 2},
}


def compile_all(decode: bool) -> dict[str, CompiledSite]:
    found = {}
    for name, options in SHAPES.items():
        shape, rest = options["shape"], {k: v for k, v in options.items() if k != "shape"}
        region = mixer_region(*shape, decode=decode, **rest)
        site = projected(region) if name == "columns of in_proj" else Site.dense(region)
        suite = NARROW_SUITE if name == "narrow vectors" else SUITE
        found[name] = suite.add(site, emit_conv_scan)
    return found


PREFILL, DECODE = compile_all(decode=False), compile_all(decode=True)


def around(graph: Graph, anchor: Node, norm: bool) -> list[Node]:
    """The nodes of a model's Mamba layer between the two projections."""
    chosen: dict[Node, None] = {}

    def take(node: Node) -> None:
        chosen[node] = None
        for value in node.op.operands():
            made = graph.producers.get(value)
            if made is None or made in chosen or isinstance(made.op, Folded | Full | Linear):
                continue
            if not (
                isinstance(made.op, Slice) and isinstance(graph.producers[made.op.x].op, Linear)
            ):
                take(made)

    node = anchor
    while not isinstance(node.op, Linear) and (norm or not isinstance(node.op, RmsNorm)):
        take(node)
        (node,) = graph.uses[node.results[0]]
    return list(chosen)


def of_model() -> dict[str, CompiledSite]:
    """The sample's first Mamba layer as the pipelines leave it."""
    passes = "specialize-decode,canonicalize,cse,dce,interleave-weights,fold-constants"
    graphs = functions("sample", "cpu", passes, which=("prefill", "decode")).graphs
    found = {}
    for name, graph in graphs.items():
        anchor = next(n for n in graph.nodes if isinstance(n.op, SsdScan | SsdUpdate))
        for norm in (False, True):
            fused = fuse(graph, around(graph, anchor, norm), "conv-scan")
            region = next(n.op for n in fused.nodes if isinstance(n.op, Fused))
            found[f"{name}, {'normed' if norm else 'gated'}"] = add(region)
    return found


MODEL = of_model()


def check(case: CompiledSite, length: int, valid: list[int], seed: int = 1) -> None:
    sizes = {"B": len(valid), "L": length}
    given = mixer_operands(case.site, sizes, valid, seed)
    case.check(sizes, *given, tolerance=TOLERANCE)


@pytest.mark.parametrize("name", PREFILL)
@pytest.mark.parametrize(
    ("length", "valid"),
    [(1, [1]), (2, [0, 2]), (31, [30, 31]), (33, [33, 1]), (70, [70, 0]), (70, [69, 32])],
)
def test_prefill(name: str, length: int, valid: list[int]) -> None:
    check(PREFILL[name], length, valid)


@pytest.mark.parametrize("name", DECODE)
@pytest.mark.parametrize("valid", [[1], [1, 0, 1]])
def test_decode(name: str, valid: list[int]) -> None:
    check(DECODE[name], 1, valid)


@pytest.mark.parametrize("name", MODEL)
def test_layers_of_the_sample_model(name: str) -> None:
    check(MODEL[name], 1 if "decode" in name else 45, [1, 1])


def test_a_layer_is_one_launch() -> None:
    for case in (*MODEL.values(), PREFILL["mid's group"], DECODE["mid's group"]):
        assert len(case.plan.stages) == 1
        assert not case.plan.scratch
        assert len(case.plan.updates) == 2


def test_divided_groups_write_their_history_behind_everyone() -> None:
    case = PREFILL["one group"]
    stems = [s.kernel.name.rpartition("_")[0] for s in case.plan.stages]
    assert stems == ["conv_scan", "from_y", "conv_state"]
    assert case.plan.stages[0].kernel.tasks == 2 * B


def test_two_calls_equal_one() -> None:
    """Rows of unequal length, cut at different tokens: states carry over, padding leaves no trace."""
    case = PREFILL["mid's group"]
    body = case.site.op.body
    sizes = {"B": 2, "L": 60}
    whole = mixer_operands(case.site, sizes, [60, 47], 3)
    cuts = ((0, 33), (0, 20)), ((33, 60), (20, 47))
    tokens = [i for i, v in enumerate(body.inputs) if v.type.rank == 3 and v.shape[1] == L]
    (valid,) = (i for i, v in enumerate(body.inputs) if v.dtype == DType.I32)
    parts, given = [], list(whole)
    for ranges in cuts:
        length = max(stop - start for start, stop in ranges)
        for i in tokens:
            given[i] = torch.randn(2, length, whole[i].shape[2])
            for row, (start, stop) in enumerate(ranges):
                given[i][row, : stop - start] = whole[i][row, start:stop]
        given[valid] = torch.tensor([b - a for a, b in ranges], dtype=torch.int32)
        results = case.run({"B": 2, "L": length}, *given)
        for result, operand in case.plan.updates:
            given[operand] = results[result]
        parts.append(results)
    expected = case.run(sizes, *whole)
    for result, _ in case.plan.updates:
        assert relative_error(parts[1][result], expected[result]) < 1e-6
    (y,) = {0, 1, 2} - {r for r, _ in case.plan.updates}
    for (part, ranges), row in ((p, r) for p in zip(parts, cuts, strict=True) for r in (0, 1)):
        start, stop = ranges[row]
        found, wanted = part[y][row, : stop - start], expected[y][row, start:stop]
        assert relative_error(found, wanted) < 1e-6


def test_rows_without_tokens_keep_their_states() -> None:
    case = PREFILL["seven taps"]
    given = mixer_operands(case.site, {"B": 2, "L": 40}, [0, 40], 4)
    results = case.run({"B": 2, "L": 40}, *given)
    for result, operand in case.plan.updates:
        assert torch.equal(results[result][0], given[operand][0])
        assert not torch.equal(results[result][1], given[operand][1])


def scan_graph(tamper: str) -> Graph:
    """A convolution and a scan with something in between that no such kernel does, or that any does."""
    b = Builder("layer")
    f32 = DType.F32
    x = b.input("x", f32, (B, L, 96))
    valid = b.input("valid", DType.I32, (B,))
    convolved, history = b.all(
        CausalConv(
            b(Scale(x, 0.5)),
            b.input("w", f32, (96, 4)),
            None,
            b.input("history", f32, (B, 3, 96)),
            valid,
        )
    )
    if tamper == "norm":
        convolved = b(RmsNorm(convolved, b.input("weight", f32, (96,)), 1e-5))
    if tamper == "scaled by channel":
        convolved = b(Mul(convolved, b.input("by", f32, (96,))))
    parts = [b(Reshape(b(Slice(convolved, 2, at, at + 32)), (B, L, 2, 16))) for at in (64, 0, 32)]
    if tamper == "b from outside":
        parts[1] = b.input("b", f32, (B, L, 2, 16))
    dt = b(Exp(b.input("dt", f32, (B, L, 2))))
    if tamper == "channels mixed":
        parts[0] = b(Mul(parts[0], parts[1]))
    y, following = b.all(
        SsdScan(
            parts[0],
            dt,
            b.input("a", f32, (2,)),
            parts[1],
            parts[2],
            None,
            b.input("state", f32, (B, 2, 16, 16)),
            valid,
        )
    )
    outputs = [b(Scale(y, 2.0)), history, following]
    if tamper == "convolved escapes":
        outputs.append(convolved)
    if tamper == "states unread":
        outputs = outputs[:1]
    if tamper == "dt escapes":
        outputs.append(dt)
    return b.finish(tuple(outputs))


def region_of(graph: Graph) -> Fused:
    return next(n.op for n in fuse(graph, graph.nodes, "x").nodes if isinstance(n.op, Fused))


OTHERS = {
    name: add(region_of(scan_graph(name)))
    for name in ("scaled by channel", "states unread", "dt escapes")
}


def only_y(region: Fused) -> Fused:
    """The region without its next states."""
    body = region.body
    y = next(v for v in body.outputs if not isinstance(body.producers[v].op, STATEFUL))
    return Fused(region.args, dataclasses.replace(body, outputs=(y,)), region.kind)


STATEFUL = (CausalConv, SsdScan, SsdUpdate)
PEEK = add(only_y(mixer_region(4, 16, 2, 16, decode=True)))


@pytest.mark.parametrize("name", OTHERS)
def test_what_else_may_be_in_a_region(name: str) -> None:
    check(OTHERS[name], 37, [37, 12])


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        ("norm", "x is not made from the convolution channel by channel"),
        ("b from outside", "b is not made"),
        ("channels mixed", "x is not made"),
        ("convolved escapes", "causal_conv"),
    ],
)
def test_refusals_say_why(tamper: str, reason: str) -> None:
    with pytest.raises(RegionError, match=reason):
        emit_conv_scan(Site.dense(region_of(scan_graph(tamper))), HOST)


def stems(cases: Iterable[CompiledSite]) -> set[str]:
    return {s.kernel.name.rpartition("_")[0] for case in cases for s in case.plan.stages}


def test_unread_states_are_not_written() -> None:
    for case, stem in ((OTHERS["states unread"], "conv_scan"), (PEEK, "conv_update")):
        assert case.plan.updates == ()
        assert stems([case]) == {stem}
    check(PEEK, 1, [1, 0])
