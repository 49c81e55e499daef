"""GPU kernels of regions around a state-space recurrence against their bodies in float64, in Triton's interpreter."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import pytest
import torch

from nemoc.codegen.mixer import take_apart
from nemoc.codegen.plan import Plan, RegionError, Site, View
from nemoc.codegen.regions import as_region
from nemoc.codegen.triton.conv_scan import ScanSchedule, default_scan_schedule, emit_conv_scan
from nemoc.codegen.triton.conv_update import UpdateSchedule, emit_conv_update
from nemoc.codegen.triton.emit import emit
from nemoc.codegen.triton.interpret import run_site
from nemoc.codegen.triton.target import GPUS, GpuTarget, gpu_target
from nemoc.ir import Builder, DType, Graph
from nemoc.ir.dims import B, Dim, L, evaluate_dim
from nemoc.ir.fusion import fuse
from nemoc.ir.op import Env, Op
from nemoc.ir.ops import (
    Add,
    CausalConv,
    Exp,
    Full,
    Fused,
    Gelu,
    Mul,
    Reshape,
    RmsNorm,
    Scale,
    Shift,
    Slice,
    SsdScan,
    SsdUpdate,
    Tanh,
)
from nemoc.ir.region import evaluate_op
from nemoc.models import build_step
from nemoc.passes import PassContext, parse_pipeline, run_pipeline
from nemoc.targets import target_info
from support.gpu_kernels import INTERPRETER, check_kernel
from support.kernels import relative_error, value
from support.mixers import mixer_operands, mixer_region
from support.models import SMALL

F32 = DType.F32
HOPPER = gpu_target("cuda:sm_90")
TOLERANCE = 1e-5

SHAPES = {
    "several heads, norms behind": {"shape": (6, 5, 2, 7), "norms": 2},
    "columns of in_proj": {"shape": (4, 16, 2, 16)},
    "one group, two taps": {"shape": (3, 20, 1, 24, 2), "activation": None},
    "six taps": {"shape": (2, 16, 2, 16, 6), "activation": Gelu, "bias": False},
    "bare": {"shape": (2, 4, 2, 16), "skip": False, "gate": False, "activation": Tanh},
}
"""H, P, G, N and K, and what is around the recurrence."""


@functools.cache
def region_site(name: str, decode: bool = False) -> Site:
    options = SHAPES[name]
    rest = {k: v for k, v in options.items() if k != "shape"}
    site = Site.dense(mixer_region(*options["shape"], decode=decode, **rest))
    return projected(site) if name == "columns of in_proj" else site


def projected(site: Site) -> Site:
    """The region on columns of one wide row, as in_proj leaves xbc, dt and z."""
    tokens = [v.rank == 3 and v.shape[1] in (1, L) for v in site.operands]
    row = 1 + sum(int(v.shape[2]) for v, t in zip(site.operands, tokens, strict=True) if t)
    operands = tuple(
        View(v.dtype, v.shape, (row * v.shape[1], row, 1)) if is_tokens else v
        for v, is_tokens in zip(site.operands, tokens, strict=True)
    )
    return Site(site.op, operands, site.results)


def small_chunks(site: Site, chunked: bool) -> ScanSchedule:
    """A schedule for one form alone, with small chunks and states in blocks of columns."""
    schedule = default_scan_schedule(take_apart(as_region(site)), INTERPRETER)
    limits = {"shortest": 1} if chunked else {"shortest": 1 << 20}
    return dataclasses.replace(
        schedule, chunk=32, single_chunk=16, part=32, depth=16, passed=64, ahead=2, **limits
    )


def one_form(site: Site, chunked: bool, schedule: ScanSchedule | None = None) -> Plan:
    """The launches of one form alone, for whatever the other one costs to interpret."""
    plan = emit_conv_scan(site, INTERPRETER, schedule or small_chunks(site, chunked))
    other = ("conv_scan",) if chunked else ("chunk_states", "pass_states", "chunk_outputs")
    stages = tuple(s for s in plan.stages if not s.kernel.name.startswith(other))
    return dataclasses.replace(plan, stages=stages)


@functools.cache
def scan_plan(name: str, chunked: bool) -> Plan:
    return one_form(region_site(name), chunked)


def check(
    site: Site, plan: Plan, length: int, valid: list[int], tolerance: float = TOLERANCE
) -> None:
    sizes = {"B": len(valid), "L": length}
    given = mixer_operands(site, sizes, valid, seed=1)
    check_kernel(site, sizes, *given, tolerance=tolerance, plan=plan)


FORMS = pytest.mark.parametrize("chunked", [False, True], ids=["single", "chunked"])


@FORMS
@pytest.mark.parametrize("name", SHAPES)
def test_prefill(name: str, chunked: bool) -> None:
    check(region_site(name), scan_plan(name, chunked), 37, [37, 20])


@FORMS
@pytest.mark.parametrize("name", ["several heads, norms behind", "six taps"])
@pytest.mark.parametrize(("length", "valid"), [(1, [1]), (2, [0, 2])])
def test_prefill_of_fewer_tokens_than_taps(
    name: str, chunked: bool, length: int, valid: list[int]
) -> None:
    check(region_site(name), scan_plan(name, chunked), length, valid)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("target", [INTERPRETER, HOPPER], ids=["groups", "heads"])
def test_decode(name: str, target: GpuTarget) -> None:
    site = region_site(name, decode=True)
    check(site, emit_conv_update(site, target), 1, [1, 0, 1])


def test_decode_in_rows_of_several_heads_and_part_of_one() -> None:
    site = region_site("several heads, norms behind", decode=True)
    for rows in (2, 8):
        check(site, emit_conv_update(site, INTERPRETER, UpdateSchedule(rows, 4)), 1, [1, 1])


@FORMS
def test_schedules_of_gpus(chunked: bool) -> None:
    """Their chunks are in parts, and their programs of the single form have one head."""
    site = Site.dense(mixer_region(2, 16, 1, 40))
    schedule = default_scan_schedule(take_apart(site), HOPPER)
    limit = 1 if chunked else 1 << 20
    plan = one_form(site, chunked, dataclasses.replace(schedule, shortest=limit))
    check(site, plan, 66, [66, 33])


def ops_alone() -> dict[str, Op]:
    valid, (heads, width, groups, size) = value(DType.I32, B), (4, 5, 2, 7)

    def recurrence(*tokens: Dim) -> list[object]:
        return [
            value(F32, *tokens, heads, width),
            value(F32, *tokens, heads),
            value(F32, heads),
            value(F32, *tokens, groups, size),
            value(F32, *tokens, groups, size),
            value(F32, heads),
            value(F32, B, heads, width, size),
        ]

    def conv(length: Dim, channels: int, taps: int) -> CausalConv:
        x, w = value(F32, B, length, channels), value(F32, channels, taps)
        return CausalConv(x, w, value(F32, channels), value(F32, B, taps - 1, channels), valid)

    return {
        "scan": SsdScan(*recurrence(B, L), valid),  # type: ignore[arg-type]
        "update": SsdUpdate(*recurrence(B)),  # type: ignore[arg-type]
        "convolution": conv(L, 21, 4),
        "convolution of blocks": conv(L, 700, 2),
        "convolution of one token": conv(1, 21, 3),
    }


ALONE = ops_alone()


def op_operands(op: Op, sizes: dict[str, int], valid: list[int]) -> list[torch.Tensor]:
    """Random operands; dt is positive and a negative."""
    generator = torch.Generator().manual_seed(2)
    env = Env({"B": 1, "L": 1, "C": 1} | sizes)
    rates, steps = getattr(op, "a", None), getattr(op, "dt", None)
    found = []
    for v in op.operands():
        values = torch.randn(env.shape(v.shape), generator=generator)
        if v is rates or v is steps:
            values = values.exp() * (-1.0 if v is rates else 0.1)
        found.append(torch.tensor(valid, dtype=torch.int32) if v.dtype == DType.I32 else values)
    return found


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize(("length", "valid"), [(1, [1, 0]), (3, [0, 2]), (40, [40, 33])])
def test_ops_alone(name: str, length: int, valid: list[int]) -> None:
    site, sizes = Site.dense(ALONE[name]), {"B": 2, "L": length}
    if L not in {d for v in site.operands for d in v.shape}:
        valid = [min(n, 1) for n in valid]
    given = op_operands(ALONE[name], sizes, valid)
    check_kernel(site, sizes, *given, tolerance=TOLERANCE, plan=emit(site, INTERPRETER))
    if name == "scan":
        plan = one_form(site, chunked=True)
        check_kernel(site, sizes, *given, tolerance=TOLERANCE, plan=plan)


@functools.cache
def model_region(decode: bool, dtype: DType) -> Site:
    """A Mamba layer as the pass leaves it."""
    first = "specialize-decode," if decode else ""
    pipeline = parse_pipeline(first + "canonicalize,cse,fold-constants,dce,fuse-conv-scan,dce")
    context = PassContext(target_info("cuda:sm_90", 132))
    graph = run_pipeline(build_step(SMALL, dtype=dtype), pipeline, context)
    regions = (n.op for n in graph.nodes if isinstance(n.op, Fused))
    anchors = (SsdScan, SsdUpdate)
    return Site.dense(
        next(op for op in regions if any(isinstance(n.op, anchors) for n in op.body.nodes))
    )


def typed_operands(site: Site, sizes: dict[str, int], valid: list[int]) -> list[torch.Tensor]:
    given = mixer_operands(site, sizes, valid, seed=3)
    return [
        t.to(v.dtype.torch) if v.dtype.is_float else t
        for v, t in zip(site.operands, given, strict=True)
    ]


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16], ids=str)
@pytest.mark.parametrize("form", ["decode", "single", "chunked"])
def test_regions_of_the_pass(dtype: DType, form: str) -> None:
    """In bf16 x, b and c are rounded behind the convolution, and the result in the end.

    Evaluation in float64 rounds nothing, so it is compared with evaluation in the region's own types: what differs is
    that f32 enters products as two numbers of 8 bits, 2⁻¹⁶ off, and that a result on the edge between two numbers of
    bf16 may be rounded to the other one, which few are.
    """
    site = model_region(form == "decode", dtype)
    length, valid = (1, [1, 1]) if form == "decode" else (35, [35, 21])
    sizes = {"B": 2, "L": length}
    decoding = form == "decode"
    plan = emit_conv_update(site, HOPPER) if decoding else one_form(site, form == "chunked")
    given = typed_operands(site, sizes, valid)
    if dtype == F32:
        check_kernel(site, sizes, *given, tolerance=TOLERANCE, plan=plan)
        return
    values = dict(zip(site.op.operands(), given, strict=True))
    expected = evaluate_op(site.op, Env({"C": 1} | sizes), values)
    for found, wanted in zip(run_site(site, plan, sizes, given), expected, strict=True):
        assert found.dtype == wanted.dtype
        limit = 1e-3 if wanted.dtype == torch.bfloat16 else 2e-5
        assert relative_error(found, wanted) < limit


def two_calls(site: Site, plan: Plan, whole: list[torch.Tensor], lengths: Sequence[int]) -> None:
    """Check that sequences cut in two, each elsewhere, give what they give in one call."""
    assert isinstance(site.op, Fused)
    body = site.op.body
    tokens = [i for i, v in enumerate(body.inputs) if v.type.rank == 3 and v.shape[1] == L]
    (valid,) = (i for i, v in enumerate(body.inputs) if v.dtype == DType.I32)
    cuts = [((0, n // 2 + row), (n // 2 + row, n)) for row, n in enumerate(lengths)]
    parts, given = [], list(whole)
    for call in (0, 1):
        ranges = [cut[call] for cut in cuts]
        length = max(stop - start for start, stop in ranges)
        for i in tokens:
            given[i] = torch.randn(len(lengths), length, whole[i].shape[2])
            for row, (start, stop) in enumerate(ranges):
                given[i][row, : stop - start] = whole[i][row, start:stop]
        given[valid] = torch.tensor([b - a for a, b in ranges], dtype=torch.int32)
        parts.append(run_site(site, plan, {"B": len(lengths), "L": length}, given))
        for result, operand in plan.updates:
            given[operand] = parts[-1][result]
    expected = run_site(site, plan, {"B": len(lengths), "L": max(lengths)}, whole)
    for result, _ in plan.updates:
        assert relative_error(parts[1][result], expected[result]) < TOLERANCE
    (y,) = {0, 1, 2} - {r for r, _ in plan.updates}
    for call, part in enumerate(parts):
        for row, cut in enumerate(cuts):
            start, stop = cut[call]
            found, wanted = part[y][row, : stop - start], expected[y][row, start:stop]
            assert relative_error(found, wanted) < TOLERANCE


@FORMS
def test_two_calls_equal_one(chunked: bool) -> None:
    site, plan = (
        region_site("several heads, norms behind"),
        scan_plan("several heads, norms behind", chunked),
    )
    whole = mixer_operands(site, {"B": 2, "L": 35}, [35, 28], seed=4)
    two_calls(site, plan, whole, (35, 28))


@FORMS
def test_rows_without_tokens_keep_their_states(chunked: bool) -> None:
    name = "six taps"
    site, plan = region_site(name), scan_plan(name, chunked)
    given = mixer_operands(site, {"B": 2, "L": 20}, [0, 20], seed=5)
    results = run_site(site, plan, {"B": 2, "L": 20}, given)
    for result, operand in plan.updates:
        assert torch.equal(results[result][0], given[operand][0])
        assert not torch.equal(results[result][1], given[operand][1])


def with_bias(site: Site, given: list[torch.Tensor], bias: torch.Tensor) -> list[torch.Tensor]:
    """Operands with another bias of dt, which is what is added to a value of H columns."""
    assert isinstance(site.op, Fused)
    body = site.op.body
    (heads,) = {n.op.a.shape[0] for n in body.nodes if isinstance(n.op, SsdScan)}
    (added,) = (n.op.b for n in body.nodes if isinstance(n.op, Add) and n.op.b.shape == (heads,))
    return [bias if v is added else t for v, t in zip(body.inputs, given, strict=True)]


@FORMS
@pytest.mark.parametrize("rate", [1.0, 16.0])
def test_steps_of_any_size(chunked: bool, rate: float) -> None:
    """From steps that hardly change the state to steps that leave nothing of it, as models have them side by side."""
    name = "several heads, norms behind"
    site, plan = region_site(name), scan_plan(name, chunked)
    sizes = {"B": 1, "L": 50}
    given = with_bias(site, mixer_operands(site, sizes, [50], seed=6), torch.linspace(-9, 1, 6))
    rates = {n.op.a for n in site.op.body.nodes if isinstance(n.op, SsdScan)}  # type: ignore[attr-defined]
    for i, v in enumerate(site.op.body.inputs):  # type: ignore[attr-defined]
        if v in rates:
            given[i] = torch.full((6,), -rate)
    check_kernel(site, sizes, *given, tolerance=TOLERANCE, plan=plan)


def test_large_exponents_above_the_diagonal_leave_no_trace() -> None:
    """Decays of e⁻²⁰⁰ a token: from one token to an earlier one they would be infinite."""
    site = Site.dense(ALONE["scan"])
    sizes = {"B": 1, "L": 20}
    given = op_operands(ALONE["scan"], sizes, [20])
    given[1].fill_(20.0)
    given[2].fill_(-10.0)
    for chunked in (False, True):
        plan = one_form(site, chunked)
        check_kernel(site, sizes, *given, tolerance=TOLERANCE, plan=plan)


def scan_graph(tamper: str) -> Graph:
    """A convolution and a scan with something in between that no such kernel does, or that any does."""
    b = Builder("layer")
    x, valid = b.input("x", F32, (B, L, 96)), b.input("valid", DType.I32, (B,))
    if tamper == "every token counts":
        valid = b(Full(3, DType.I32, (B,)))
    w, history = b.input("w", F32, (96, 4)), b.input("history", F32, (B, 3, 96))
    before = b(Shift(x, 0.5)) if tamper == "shifted before" else b(Scale(x, 0.5))
    convolved, following = b.all(CausalConv(before, w, None, history, valid))
    if tamper == "norm":
        convolved = b(RmsNorm(convolved, b.input("weight", F32, (96,)), 1e-5))
    if tamper == "scaled by channel":
        convolved = b(Mul(convolved, b.input("by", F32, (96,))))
    cut = convolved
    if tamper == "made of all columns":
        cut = b(Shift(convolved, 1.0))
    parts = [b(Reshape(b(Slice(cut, 2, at, at + 32)), (B, L, 2, 16))) for at in (64, 0, 32)]
    if tamper == "b from outside":
        parts[1] = b.input("b", F32, (B, L, 2, 16))
    dt = b(Exp(b.input("dt", F32, (B, L, 2))))
    a, state = b.input("a", F32, (2,)), b.input("state", F32, (B, 2, 16, 16))
    y, state = b.all(SsdScan(parts[0], dt, a, parts[1], parts[2], None, state, valid))
    outputs = [b(Scale(y, 2.0)), following, state]
    if tamper == "convolved escapes":
        outputs.append(convolved)
    if tamper == "states unread":
        outputs = outputs[:1]
    if tamper == "dt escapes":
        outputs.append(dt)
    if tamper == "scaled by token":
        outputs[0] = b(Mul(outputs[0], b.input("by", F32, (B, L, 1, 1))))
    return b.finish(tuple(outputs))


def tampered(name: str) -> Site:
    graph = scan_graph(name)
    (op,) = (n.op for n in fuse(graph, graph.nodes, "x").nodes if isinstance(n.op, Fused))
    return Site.dense(op)


OTHERS = (
    "scaled by channel",
    "shifted before",
    "made of all columns",
    "states unread",
    "dt escapes",
    "scaled by token",
    "every token counts",
)


@FORMS
@pytest.mark.parametrize("name", OTHERS)
def test_what_else_may_be_in_a_region(name: str, chunked: bool) -> None:
    site = tampered(name)
    plan = one_form(site, chunked)
    check(site, plan, 19, [19, 7])


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        ("norm", "x is not made from the convolution channel by channel"),
        ("b from outside", "b is not made"),
        ("convolved escapes", "causal_conv"),
    ],
)
def test_refusals_say_why(tamper: str, reason: str) -> None:
    with pytest.raises(RegionError, match=reason):
        emit_conv_scan(tampered(tamper), INTERPRETER)


def stems(plan: Plan) -> list[str]:
    return [stage.kernel.name.rpartition("_")[0] for stage in plan.stages]


def test_launches() -> None:
    both = ["conv_scan", "chunk_states", "pass_states", "chunk_outputs"]
    gated, normed = (region_site(n) for n in ("columns of in_proj", "several heads, norms behind"))
    assert stems(emit_conv_scan(gated, HOPPER)) == [*both, "history"]
    assert stems(emit_conv_scan(normed, HOPPER)) == [*both, "rows", "history"]
    assert stems(emit_conv_scan(tampered("states unread"), HOPPER)) == both
    gated, normed = (
        region_site(n, decode=True) for n in ("columns of in_proj", "several heads, norms behind")
    )
    assert stems(emit_conv_update(gated, HOPPER)) == ["conv_update", "history"]
    assert stems(emit_conv_update(gated, INTERPRETER)) == ["conv_update"]
    assert stems(emit_conv_update(normed, INTERPRETER)) == ["conv_update", "rows"]


def launched(plan: Plan, batch: int, length: int) -> set[str]:
    sizes = {"B": batch, "L": length, "C": 1}
    some = (s.kernel for s in plan.stages if evaluate_dim(s.kernel.tasks, sizes))
    return {kernel.name.rpartition("_")[0] for kernel in some}


def test_one_plan_has_both_forms_and_runs_one_of_them() -> None:
    plan = emit_conv_scan(region_site("columns of in_proj"), HOPPER)
    single = {"conv_scan", "history"}
    chunked = {"chunk_states", "pass_states", "chunk_outputs", "history"}
    many = 4 * HOPPER.multiprocessors // 4
    assert launched(plan, 1, 1) == launched(plan, 1, 320) == single
    assert launched(plan, 1, 321) == launched(plan, many - 1, 5000) == chunked
    assert launched(plan, many, 5000) == single


@pytest.mark.parametrize("name", sorted(GPUS))
def test_scratch_never_shrinks(name: str) -> None:
    """Memory is planned for the largest sizes: a plan that needed less there would run out of it elsewhere."""
    plan = emit(region_site("several heads, norms behind"), gpu_target(name))

    def needed(batch: int, length: int) -> int:
        return sum(evaluate_dim(v.span, {"B": batch, "L": length}) for v in plan.scratch)

    sizes = (1, 2, 63, 64, 65, 128, 129, 320, 321, 641, 1000)
    batches = (1, 2, 7, 8, 9, 500, 3000)
    for column in ([needed(b, n) for n in sizes] for b in batches):
        assert column == sorted(column)
    for row in ([needed(b, n) for b in batches] for n in sizes):
        assert row == sorted(row)


def only_y(region: Op) -> Site:
    """A region without its next states."""
    assert isinstance(region, Fused)
    stateful = (CausalConv, SsdScan, SsdUpdate)
    kept: Iterable[object] = (
        v for v in region.body.outputs if not isinstance(region.body.producers[v].op, stateful)
    )
    body = dataclasses.replace(region.body, outputs=tuple(kept))
    return Site.dense(Fused(region.args, body, region.kind))


def test_unread_states_are_not_written() -> None:
    site = only_y(mixer_region(4, 16, 2, 16, decode=True))
    plan = emit_conv_update(site, INTERPRETER)
    assert plan.updates == ()
    assert stems(plan) == ["conv_update"]
    check(site, plan, 1, [1, 0])
