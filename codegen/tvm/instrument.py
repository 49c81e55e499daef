"""Counting the bytes that kernels touch: kernels that keep a record of every load and store.

An instrumented kernel does what the kernel does, and wherever it loads from or stores to a tensor it also fills the
same elements of a *shadow* of that tensor with ones. Shadows lie at fixed distances behind the tensors, those of loads
at one distance and those of stores at twice that, so that the kernel needs no more pointers than before. How many
bytes of a shadow are not zero afterwards is how many distinct bytes of the tensor were touched, which is what a
closed-form cost counts (`nemoc.ir.cost`).

What counts is the kernel's text: both sides of a `T.Select` are loaded, one side of a `T.if_then_else` is, a prefetch
loads nothing, and loads that the compiler removes count all the same.
"""

import ast
import ctypes
import dataclasses
import functools
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from nemoc.codegen.lower import Program
from nemoc.codegen.plan import Arg, Kernel, Plan, Site, Stage
from nemoc.codegen.sites import RecordedSite, record_sites
from nemoc.codegen.storage import ALIGNMENT, Layout
from nemoc.codegen.tvm.emit import emit, expanded
from nemoc.codegen.tvm.harness import KernelSuite
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.ir.dims import Dim, evaluate_dim, substitute_dim
from nemoc.ir.graph import Graph
from nemoc.ir.ops.linear import GroupedLinear
from nemoc.ir.region import Region
from nemoc.ir.types import TensorType

_SHADOWS = ("loaded", "stored")
"""The shadows of a tensor: the first lies one distance behind it, the second two."""


@dataclass(frozen=True)
class Touched:
    """Distinct bytes of a piece of memory that were loaded and that were stored."""

    read: int = 0
    written: int = 0

    @property
    def bytes(self) -> int:
        """Both together."""
        return self.read + self.written

    def __add__(self, other: "Touched") -> "Touched":
        return Touched(self.read + other.read, self.written + other.written)


@dataclass(frozen=True)
class LaunchTraffic:
    """What one launch touched.

    Attributes:
        kernel: the name of the kernel.
        tensors: the tensors among its arguments.
    """

    kernel: str
    tensors: Mapping[Arg, Touched]

    @property
    def outer(self) -> Touched:
        """Of operands and results."""
        return sum((t for arg, t in self.tensors.items() if arg.kind != "scratch"), Touched())

    @property
    def scratch(self) -> Touched:
        """Of what only the launches of one plan know."""
        return sum((t for arg, t in self.tensors.items() if arg.kind == "scratch"), Touched())


@dataclass(frozen=True)
class SiteTraffic:
    """What the launches of a site's plan touched, one after the other.

    Attributes:
        site: the op and the views.
        launches: each launch by itself.
        tensors: what all of them together touched of each tensor; of an updated result, under the operand too.
        expected_reads: bytes of each operand by the op's closed form, for the routing at hand.
        expected_writes: the same of each result.
    """

    site: Site
    launches: tuple[LaunchTraffic, ...]
    tensors: Mapping[Arg, Touched]
    expected_reads: tuple[int, ...]
    expected_writes: tuple[int, ...]

    @property
    def reads(self) -> tuple[int, ...]:
        """Distinct bytes loaded of each operand."""
        return tuple(self.tensors[Arg("operand", i)].read for i in range(len(self.site.operands)))

    @property
    def writes(self) -> tuple[int, ...]:
        """Distinct bytes stored of each result."""
        return tuple(self.tensors[Arg("result", i)].written for i in range(len(self.site.results)))


@dataclass(frozen=True)
class Traffic:
    """What the kernels of a program touch.

    Attributes:
        program: the launches.
        sites: each distinct site.
    """

    program: Program
    sites: tuple[SiteTraffic, ...]

    @functools.cached_property
    def kernels(self) -> Mapping[str, LaunchTraffic]:
        """What a launch of each kernel touches, by the kernel's name."""
        return {n.kernel: n for site in self.sites for n in site.launches}

    @property
    def launches(self) -> Iterator[LaunchTraffic]:
        """What each launch of the program touches, in order."""
        for function in self.program.functions:
            for launch in function.launches:
                yield self.kernels[launch.kernel.name]


def count_traffic(
    graphs: Mapping[str, Graph],
    weights: Layout,
    arguments: Callable[[Graph], Mapping[str, torch.Tensor]],
    sizes: Mapping[str, int],
    target: CpuTarget,
) -> Traffic:
    """Run each distinct site of a program by itself on instrumented kernels.

    Args:
        graphs, weights, arguments, target: as for `record_sites`.
        sizes: B, L and C, and T for the closed forms: how many tokens the caches hold by `arguments`.
    """
    program, sites = record_sites(
        expanded(graphs), weights, arguments, sizes, functools.partial(emit, target=target)
    )
    return Traffic(program, tuple(count_sites(sites, sizes, target)))


def count_sites(
    sites: Iterable[RecordedSite], sizes: Mapping[str, int], target: CpuTarget
) -> Iterator[SiteTraffic]:
    """What each site touches at sizes B, L and C; T, for the closed forms, is how many tokens the caches hold."""
    placed = [(s, _Places.of(s.site, s.plan, sizes)) for s in sites]
    distance = max((places.bytes for _, places in placed), default=0)
    suite = KernelSuite(target)
    functions = [
        [_add(suite, recorded, stage, distance) for stage in recorded.plan.stages]
        for recorded, _ in placed
    ]
    memory = torch.empty(1 + len(_SHADOWS), distance, dtype=torch.uint8)
    for (recorded, places), names in zip(placed, functions, strict=True):
        places.fill(memory[0], recorded, sizes)
        pointers = places.pointers(memory[0])
        marks = memory[1:, : places.bytes]
        every = torch.zeros_like(marks)
        launches = []
        for stage, name in zip(recorded.plan.stages, names, strict=True):
            marks.zero_()
            suite.call(name, 2, *pointers, sizes["B"], sizes["L"], sizes["C"])
            every |= marks
            launches.append(LaunchTraffic(stage.kernel.name, places.touched(marks, stage.args)))
        yield SiteTraffic(
            recorded.site,
            tuple(launches),
            places.touched(every, places.ranges),
            _expected_reads(recorded, sizes),
            tuple(_at(d, sizes) for d in recorded.site.op.writes()),
        )


def _add(suite: KernelSuite, recorded: RecordedSite, stage: Stage, distance: int) -> str:
    """Put one instrumented launch into a suite; returns the name of its function."""
    kernel = instrument(stage.kernel, distance)
    alone = dataclasses.replace(recorded.plan, stages=(Stage(kernel, stage.args),))
    return suite.add(recorded.site, lambda site, target: alone).name


def _expected_reads(recorded: RecordedSite, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The closed form, with the groups that the operands' values hit instead of how many random ones would."""
    op = recorded.site.op
    reads = [_at(d, sizes) for d in op.reads()]
    inside = op.body.inputs if isinstance(op, Region) else op.operands()
    nodes = op.body.nodes if isinstance(op, Region) else ()
    decoded = {n.results[0]: n.op for n in nodes if n.op.is_unpacking}
    for product in [node.op for node in nodes] or [op]:
        if isinstance(product, GroupedLinear) and product.offsets in inside:
            hit = int(recorded.operands[inside.index(product.offsets)].diff().count_nonzero())
            source = decoded.get(product.w)
            for value in source.operands() if source else (product.w,):
                if value in inside and value.type.rank and value.shape[0] == product.w.shape[0]:
                    group = TensorType(value.dtype, value.shape[1:]).bytes
                    reads[inside.index(value)] = hit * _at(group, sizes)
    return tuple(reads)


def _at(amount: Dim, sizes: Mapping[str, int]) -> int:
    """A closed form in numbers; expectations are rounded."""
    return round(float(substitute_dim(amount, dict(sizes))))


@dataclass(frozen=True)
class _Places:
    """Where the tensors of a plan lie in a row of memory.

    Attributes:
        ranges: the bytes of each, in the order in which a suite's functions take them; an updated result has those of
            its operand.
    """

    ranges: Mapping[Arg, range]

    @classmethod
    def of(cls, site: Site, plan: Plan, sizes: Mapping[str, int]) -> "_Places":
        """One behind the other, aligned."""
        updated = {Arg("result", r): Arg("operand", o) for r, o in plan.updates}
        ranges: dict[Arg, range] = {}
        end = 0
        tensors = {
            **{Arg("operand", i): view for i, view in enumerate(site.operands)},
            **{Arg("result", i): view for i, view in enumerate(site.results)},
            **{Arg("scratch", i): view for i, view in enumerate(plan.scratch)},
        }
        for arg, view in tensors.items():
            if arg in updated:
                ranges[arg] = ranges[updated[arg]]
            else:
                ranges[arg] = range(end, end + evaluate_dim(view.span, sizes))
                end += -(-len(ranges[arg]) // ALIGNMENT) * ALIGNMENT
        return cls(ranges)

    @property
    def bytes(self) -> int:
        """How much memory they take, rounded up."""
        last = max((r.stop for r in self.ranges.values()), default=0)
        return -(-last // ALIGNMENT) * ALIGNMENT

    def fill(self, row: torch.Tensor, recorded: RecordedSite, sizes: Mapping[str, int]) -> None:
        """Give the operands their values."""
        views = recorded.site.operands
        for i, (view, values) in enumerate(zip(views, recorded.operands, strict=True)):
            at = self.ranges[Arg("operand", i)]
            elements = row[at.start : at.stop].view(view.dtype.torch)
            shape, strides = (
                [evaluate_dim(d, sizes) for d in dims] for dims in (view.shape, view.strides)
            )
            once = tuple(slice(0, 1) if s == 0 else slice(None) for s in strides)
            elements.as_strided(shape, strides)[once] = values[once]

    def pointers(self, row: torch.Tensor) -> list[ctypes.c_void_p]:
        """The addresses of the tensors."""
        return [ctypes.c_void_p(row.data_ptr() + r.start) for r in self.ranges.values()]

    def touched(self, marks: torch.Tensor, args: Iterable[Arg]) -> dict[Arg, Touched]:
        """Marked bytes of tensors."""
        found = {}
        for arg in args:
            at = self.ranges[arg]
            loaded, stored = marks[:, at.start : at.stop].count_nonzero(dim=1).tolist()
            found[arg] = Touched(loaded, stored)
        return found


def instrument(kernel: Kernel, distance: int) -> Kernel:
    """The kernel under another name, with marks.

    Args:
        kernel: a kernel as `KernelWriter` writes it.
        distance: bytes from a tensor to the shadow of what is loaded of it, and from there to that of what is stored.
    """
    (function,) = ast.parse(textwrap.dedent(kernel.source)).body
    assert isinstance(function, ast.FunctionDef)
    function.name = f"{kernel.name}_counted"
    function.body = _Marker(distance).statements(function.body)
    text = ast.unparse(ast.fix_missing_locations(function))
    return dataclasses.replace(
        kernel, name=function.name, source=textwrap.indent(text, "    ") + "\n"
    )


class _Marker:
    """Adds marks to the statements of a kernel.

    Args:
        distance: as for `instrument`.
    """

    def __init__(self, distance: int) -> None:
        self._distance = distance
        self._bits: dict[str, str] = {}  # of an element, for each buffer that is a tensor's

    def statements(self, nodes: Iterable[ast.stmt]) -> list[ast.stmt]:
        """Each statement, behind the marks of what it loads and with those of what it stores."""
        return [found for node in nodes for found in self._statement(node)]

    def _statement(self, node: ast.stmt) -> Iterator[ast.stmt]:
        match node:
            case ast.Assign([ast.Name(name)], ast.Call(ast.Attribute(attr="decl_buffer")) as call):
                yield node
                if not _is_local(call):
                    yield from self._shadows(name, call)
            case ast.Assign([target], value):
                yield from self._loads(value)
                if isinstance(target, ast.Subscript):
                    yield from self._loads(target.slice)
                    yield from self._mark(target, "stored")
                yield node
            case ast.For(_, source):
                yield from self._loads(source)
                node.body = self.statements(node.body)
                yield node
            case ast.While(test):
                again = list(self._loads(test))
                node.body = [*self.statements(node.body), *again]
                yield from again
                yield node
            case ast.If(test):
                yield from self._loads(test)
                node.body, node.orelse = self.statements(node.body), self.statements(node.orelse)
                yield node
            case ast.With():
                node.body = self.statements(node.body)
                yield node
            case _:
                yield from self._loads(node)
                yield node

    def _shadows(self, name: str, declaration: ast.Call) -> Iterator[ast.stmt]:
        """The buffers that stand for the shadows of one: the same layout at other addresses."""
        shape, dtype = declaration.args
        options = {str(k.arg): ast.unparse(k.value) for k in declaration.keywords}
        assert isinstance(dtype, ast.Constant)
        self._bits[name] = str(dtype.value).lstrip("abcdefghijklmnopqrstuvwxyz")
        for number, what in enumerate(_SHADOWS, start=1):
            offset = f"T.int64({number * self._distance})"
            yield from ast.parse(
                f"{name}_{what}_at = T.bind(T.handle_add_byte_offset({options['data']}, {offset}))\n"
                f"{name}_{what} = T.decl_buffer({ast.unparse(shape)}, 'int{self._bits[name]}', "
                f"data={name}_{what}_at, strides={options['strides']})"
            ).body

    def _loads(self, node: ast.AST) -> Iterator[ast.stmt]:
        """Marks for the loads of an expression, each under the conditions under which it happens."""
        match node:
            case ast.Call(ast.Attribute(attr="if_then_else"), [condition, then, other]):
                yield from self._loads(condition)
                for test, value in ((condition, then), (_not(condition), other)):
                    if marks := list(self._loads(value)):
                        yield ast.If(test, marks, [])
            case ast.Call(ast.Attribute(attr="address_of"), [ast.Subscript(slice=index)]):
                yield from self._loads(index)
            case _:
                for child in ast.iter_child_nodes(node):
                    yield from self._loads(child)
                if isinstance(node, ast.Subscript):
                    yield from self._mark(node, "loaded")

    def _mark(self, element: ast.Subscript, what: str) -> Iterator[ast.stmt]:
        """The statement that fills a shadow's elements; none for buffers that are no tensor's."""
        assert isinstance(element.value, ast.Name)
        name = element.value.id
        if name in self._bits:
            index = ast.unparse(element.slice)
            yield from ast.parse(f"{name}_{what}[{index}] = {self._ones(name, element)}").body

    def _ones(self, name: str, element: ast.Subscript) -> str:
        """All bits set, in as many lanes as the elements have."""
        one = f"T.int{self._bits[name]}(-1)"
        index = element.slice
        last = index.elts[-1] if isinstance(index, ast.Tuple) else index
        match last:
            case ast.Call(ast.Attribute(attr="Ramp"), [_, _, lanes]):
                return f"T.Broadcast({one}, {ast.unparse(lanes)})"
        return one


def _is_local(declaration: ast.Call) -> bool:
    """Whether a buffer shows a local array: its memory is the field of that, not a pointer."""
    return any(k.arg == "data" and isinstance(k.value, ast.Attribute) for k in declaration.keywords)


def _not(condition: ast.expr) -> ast.expr:
    return ast.Call(ast.Attribute(ast.Name("T", ast.Load()), "Not", ast.Load()), [condition], [])
