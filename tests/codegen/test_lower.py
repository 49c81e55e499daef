"""Graphs lowered, compiled and run as steps, against the interpreter."""

import ctypes
import dataclasses
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import tvm_ffi

from nemoc.codegen.lower import arena_names, corner_sizes, describe, lower_program
from nemoc.codegen.plan import LayoutError, Plan, RegionError, Site
from nemoc.codegen.storage import Layout
from nemoc.codegen.tvm.compile import compile_program
from nemoc.codegen.tvm.emit import emit
from nemoc.codegen.tvm.target import CpuTarget, cpu_target
from nemoc.ir.builder import Builder
from nemoc.ir.dims import B, C, Dim, L, ceil_div, evaluate_dim
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import NemocError
from nemoc.ir.fusion import fuse
from nemoc.ir.graph import Graph
from nemoc.ir.interpreter import interpret
from nemoc.ir.ops import (
    Add,
    CausalConv,
    Div,
    Exp,
    Folded,
    Full,
    Interleave,
    Linear,
    Mul,
    Permute,
    Relu,
    Reshape,
    Scale,
    Slice,
    Sum,
    Unary,
)
from nemoc.ir.region import Fused

F32 = DType.F32
CORNERS = corner_sizes(2, 12, 8)
TARGET = cpu_target()


def emit_here(site: Site) -> Plan:
    return emit(site, TARGET)


def accumulate(b: Builder) -> Graph:
    """The next state is made in place, and read afterwards."""
    x, s = b.input("x", F32, (B, 4)), b.state("s", F32, (B, 4))
    after = b(Add(s, x))
    return b.finish([b(Scale(after, 2.0))], [after])


def old_value_read_later(b: Builder) -> Graph:
    x, s = b.input("x", F32, (B, 4)), b.state("s", F32, (B, 4))
    after = b(Add(s, x))
    return b.finish([b(Mul(s, after))], [after])


def old_value_is_output(b: Builder) -> Graph:
    x, s = b.input("x", F32, (B, 4)), b.state("s", F32, (B, 4))
    part = b(Slice(s, 1, 1, 3))
    return b.finish([part, s], [b(Add(s, x))])


def states_trade_places(b: Builder) -> Graph:
    x, s = b.input("x", F32, (B, 4)), b.state("s", F32, (B, 4))
    t, same = b.state("t", F32, (B, 4)), b.state("same", F32, (B, 3))
    return b.finish([b(Add(s, x))], [t, s, same])


def state_used_twice(b: Builder) -> Graph:
    """The old state may go only after both sums; the second of them may take its place."""
    x, s = b.input("x", F32, (B, 4)), b.state("s", F32, (B, 4))
    first, second = b(Add(s, x)), b(Add(s, s))
    return b.finish([first], [second])


def views(b: Builder) -> Graph:
    """Outputs that are views, of an input and of a value; the input itself; one value twice."""
    x = b.input("x", F32, (B, L, 6))
    y = b(Scale(x, 3.0))
    turned = b(Permute(y, (2, 0, 1)))
    return b.finish([b(Slice(x, 2, 2, 5)), turned, x, y, y])


def reshape_that_copies(b: Builder) -> Graph:
    x = b.input("x", F32, (B, L, 6))
    flat = b(Reshape(b(Permute(x, (2, 1, 0))), (6 * L, B)))
    return b.finish([b(Reshape(flat, (6, L * B)))])


def product_of_a_transposed_operand(b: Builder) -> Graph:
    """The rows of x have no common stride, so that the kernel asks for a copy."""
    x = b.input("x", F32, (L, 6, B))
    turned = b(Permute(x, (2, 0, 1)))
    w = b.param("w", DType.BF16, Interleave(_value(5, 6), 32).infer().shape)
    y = b(Linear(turned, w, interleave=32, features=5))
    return b.finish([b(Add(y, y))])


def _value(*shape: int) -> object:
    return Builder("w").param("w", DType.BF16, shape)


def strided_state_updated_and_read(b: Builder) -> Graph:
    """The update happens on a dense copy, which the kernels must be planned for."""
    x, w = b.input("x", F32, (B, L, 4)), b.param("w", F32, (4, 4))
    s, valid = b.state("s", F32, (3, B, 4)), b(Full(4.0, DType.I32, (B,)))
    y, after = b.all(CausalConv(x, w, None, b(Permute(s, (1, 0, 2))), valid))
    return b.finish([y, s], [b(Permute(after, (1, 0, 2)))])


def two_chains(b: Builder) -> Graph:
    """Neither needs the other: they run side by side, on scratch of their own."""
    xs = [b.input(name, F32, (B, L, 6)) for name in ("x", "y")]
    sums = [b(Sum(b(Exp(b(Scale(x, 2.0)))), 1)) for x in xs]
    return b.finish([b(Mul(*sums))])


def zeros_of_both_signs(b: Builder) -> Graph:
    """Two ops whose attributes are equal numbers and different values."""
    x = b.input("x", F32, (B, 4))
    zeros = [b(Full(value, F32, (4,))) for value in (0.0, -0.0)]
    return b.finish([b(Div(x, zero)) for zero in zeros])


GRAPHS: list[Callable[[Builder], Graph]] = [
    accumulate,
    old_value_read_later,
    old_value_is_output,
    states_trade_places,
    state_used_twice,
    views,
    reshape_that_copies,
    product_of_a_transposed_operand,
    strided_state_updated_and_read,
    two_chains,
    zeros_of_both_signs,
]


def _aligned(size: int) -> torch.Tensor:
    memory = torch.full((size + 64,), 0xFF, dtype=torch.uint8)
    start = -memory.data_ptr() % 64
    return memory[start : start + size]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _block(layout: Layout, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    block = _aligned(int(layout.bytes))
    for slot in layout:
        data = _bytes(tensors[slot.name])
        block[int(slot.offset) : int(slot.offset) + len(data)] = data
    return block


def check_step(graph: Graph) -> None:
    """Compile a graph and hold a step of it against the interpreter."""
    weights = Layout.of((p.name, p.type) for p in graph.params)
    compiled = compile_program({"step": graph}, weights, CORNERS, TARGET)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.so"
        path.write_bytes(compiled.library)
        step = tvm_ffi.load_module(str(path))["step"]
    sizes = {"B": 2, "L": 5, "C": 8}
    generator = torch.Generator().manual_seed(0)
    arguments = {
        v.name: torch.randn([int(n) for n in at], generator=generator).to(v.dtype.torch)
        for v in graph.arguments
        for at in [v.type.substitute(sizes).shape]
    }
    expected = interpret(graph, arguments)
    state_layout = compiled.program.state.at(sizes)
    state = _block(state_layout, arguments)
    outputs = [torch.full_like(t, float("nan")).contiguous() for t in expected.outputs]
    memory = [
        _block(weights, arguments),
        state,
        _aligned(compiled.program.scratch_bytes),
        *(arguments[v.name] for v in graph.inputs),
        *outputs,
    ]
    step(*(ctypes.c_void_p(m.data_ptr()) for m in memory), *sizes.values(), 2, None)
    for found, wanted in zip(outputs, expected.outputs, strict=True):
        torch.testing.assert_close(found, wanted.contiguous(), rtol=1e-6, atol=1e-6)
    assert torch.equal(state, _block(state_layout, expected.states))


@pytest.mark.parametrize("build", GRAPHS, ids=lambda f: f.__name__)
def test_step_equals_interpreter(build: Callable[[Builder], Graph]) -> None:
    check_step(build(Builder("step")))


def test_a_state_is_updated_where_it_lies() -> None:
    graph = accumulate(Builder("step"))
    program = lower_program({"step": graph}, Layout((), 0), CORNERS, emit_here)
    first, second = program.functions[0].launches
    assert [a.arena for a in first.buffers] == ["state", "in0_x", "state"]
    assert [a.arena for a in second.buffers] == ["state", arena_names(graph)[-1]]
    assert program.scratch_bytes == 0


def test_equal_nodes_share_a_kernel() -> None:
    b = Builder("step")
    x = b.input("x", F32, (B, 4))
    for _ in range(5):
        x = b(Scale(x, 2.0))
    program = lower_program({"step": b.finish([x])}, Layout((), 0), CORNERS, emit_here)
    assert len(program.functions[0].launches) == 5
    assert len(program.kernels) == 1


def test_regions_with_other_bodies_do_not_share_a_plan() -> None:
    def site(op: type[Unary]) -> Site:
        body = Builder("body")
        x = body.input("x", F32, (4,))
        return Site.dense(Folded((x,), body.finish([body(op(x))])))

    assert site(Exp).key == site(Exp).key
    assert site(Exp).key != site(Relu).key


def test_launches_that_do_not_depend_on_each_other_share_a_phase() -> None:
    program = lower_program(
        {"step": two_chains(Builder("step"))}, Layout((), 0), CORNERS, emit_here
    )
    (step,) = program.functions
    assert [len(phase) for phase in step.phases] == [2, 2, 2, 1]
    first, second = (launch.buffers[-1] for launch in step.phases[0])
    assert first != second
    assert len(step.launches) == 7


def test_the_old_value_is_read_in_an_earlier_phase_than_it_is_overwritten() -> None:
    program = lower_program(
        {"step": state_used_twice(Builder("step"))}, Layout((), 0), CORNERS, emit_here
    )
    read, overwrite = (launch for (launch,) in program.functions[0].phases)
    assert "state" in {a.arena for a in read.buffers}
    assert overwrite.buffers[-1].arena == "state"


def refuse_regions(site: Site) -> Plan:
    """A backend without kernels for regions, that asks for dense operands before it looks at one."""
    if not isinstance(site.op, Fused):
        return emit_here(site)
    if not all(view.is_dense for view in site.operands):
        raise LayoutError("this region needs dense operands")
    raise RegionError("no kernels for this region")


def strided_operand_of_a_region(b: Builder) -> Graph:
    x = b.input("x", F32, (B, L, 6))
    turned = b(Permute(b(Exp(x)), (1, 0, 2)))
    return b.finish([b(Add(b(Relu(turned)), turned))])


REGIONS: list[tuple[Callable[[Builder], Graph], int]] = [
    *((build, 0) for build in GRAPHS),
    (strided_operand_of_a_region, 2),
    (accumulate, 1),
]
"""Graphs, and which node of each is the first of a region of it and all behind it."""


@pytest.mark.parametrize(("build", "first"), REGIONS)
def test_a_region_without_a_kernel_is_lowered_as_its_ops(
    build: Callable[[Builder], Graph], first: int
) -> None:
    graph = build(Builder("step"))
    region = fuse(graph, graph.nodes[first:], "test")
    weights = Layout.of((p.name, p.type) for p in graph.params)
    program = lower_program({"step": region}, weights, CORNERS, refuse_regions)
    plain = lower_program({"step": graph}, weights, CORNERS, emit_here)
    assert program.functions[0].phases == plain.functions[0].phases
    assert program.scratch_bytes == plain.scratch_bytes
    assert program.graphs == (graph,)
    assert len(region.nodes) == first + 1


def test_a_step_with_a_region_lowered_as_its_ops_equals_the_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(site: Site, target: CpuTarget) -> Plan:
        assert target is TARGET
        return refuse_regions(site)

    monkeypatch.setattr("nemoc.codegen.tvm.compile.emit", refuse)
    graph = strided_state_updated_and_read(Builder("step"))
    (conv,) = (n for n in graph.nodes if isinstance(n.op, CausalConv))
    check_step(fuse(graph, graph.nodes[graph.nodes.index(conv) :], "test"))


def test_only_regions_may_be_refused_for_being_regions() -> None:
    def refuse(site: Site) -> Plan:
        raise RegionError(f"no kernels for {site.op.mnemonic()}")

    with pytest.raises(RegionError, match="no kernels for add"):
        lower_program({"step": accumulate(Builder("step"))}, Layout((), 0), CORNERS, refuse)


def test_describes_launches_as_a_table() -> None:
    graphs = {"step": two_chains(Builder("step")), "empty": Builder("empty").finish([])}
    program = lower_program(graphs, Layout((), 0), CORNERS, emit_here)
    step, *launches, empty = describe(program.functions).splitlines()
    assert step.startswith("step(weights, state, scratch, in0_x, in1_y, out0_")
    assert step.endswith(", B, L, C): 7 launches in 4 phases")
    assert empty == "empty(weights, state, scratch, B, L, C): 0 launches in 0 phases"
    kernels = [line.partition("_")[0] for line in launches]
    assert kernels == ["  scale", "| scale", "  exp", "| exp", "  sum", "| sum", "  mul"]


def test_names_of_arenas_are_identifiers() -> None:
    b = Builder("step")
    x = b.input("in.put", F32, (B,))
    assert arena_names(b.finish([x])) == (
        "weights",
        "state",
        "scratch",
        "in0_in_put",
        "out0_in_put",
    )


def test_a_parameter_without_a_place_is_named() -> None:
    graph = product_of_a_transposed_operand(Builder("step"))
    with pytest.raises(NemocError, match="parameter %w is no stored weight"):
        lower_program({"step": graph}, Layout((), 0), CORNERS, emit_here)


def test_functions_with_other_states_are_named() -> None:
    graphs = {"one": accumulate(Builder("a")), "two": states_trade_places(Builder("b"))}
    with pytest.raises(NemocError, match="two: its states differ"):
        lower_program(graphs, Layout((), 0), CORNERS, emit_here)


@pytest.mark.parametrize(
    "size", [B * L, 3 * B + L, B * ceil_div(L, 128), B * C * ceil_div(B * L, 16), C]
)
@pytest.mark.parametrize(("batch", "tokens"), [(4, 512), (6, 40), (9, 5), (1, 7)])
def test_scratch_suffices_for_every_shape_within_the_bounds(
    size: Dim, batch: int, tokens: int
) -> None:
    corners = corner_sizes(batch, tokens, 7)
    enough = max(evaluate_dim(size, corner) for corner in corners)
    for b in range(1, batch + 1):
        for n in range(1, max(tokens // b, 1) + 1):
            assert evaluate_dim(size, {"B": b, "L": n, "C": 7}) <= enough


def test_corners_bound_tokens_and_leave_out_what_others_cover() -> None:
    assert [(c["B"], c["L"]) for c in corner_sizes(4, 10, 7)] == [(1, 10), (2, 5), (3, 4), (4, 3)]
    assert [(c["B"], c["L"]) for c in corner_sizes(64, 4, 7)] == [(1, 4), (3, 2), (64, 1)]


def test_launches_say_which_op_they_are_a_part_of() -> None:
    """The product, the copy that it asked for, and what uses it; the largest of its weights by name."""
    graph = product_of_a_transposed_operand(Builder("step"))
    weights = Layout.of((p.name, p.type) for p in graph.params)
    (step,) = lower_program({"step": graph}, weights, CORNERS, emit_here).functions
    jobs = [
        (step.jobs[launch.job].op.mnemonic(), step.jobs[launch.job].weight)
        for launch in step.launches
    ]
    assert jobs == [("cast", ""), ("linear", "w"), ("add", "")]
    assert step.jobs[1].op is graph.nodes[1].op


def test_launches_of_one_plan_are_parts_of_one_op() -> None:
    def twice(site: Site) -> Plan:
        plan = emit_here(site)
        return dataclasses.replace(plan, stages=plan.stages * 2)

    graph = two_chains(Builder("step"))
    (step,) = lower_program({"step": graph}, Layout.of(()), CORNERS, twice).functions
    parts = Counter(launch.job for launch in step.launches)
    assert parts == dict.fromkeys(range(len(graph.nodes)), 2)
