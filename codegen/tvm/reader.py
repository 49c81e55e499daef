"""Reading kernel text: the part of TVMScript that kernels are written in, executed as Python on TVM's builder.

TVM's own parser takes any TVMScript and walks it node by node. Expressions of this dialect are plain Python, so
rewriting its few kinds of statements into builder calls and running them does the same in a fifth of the time. A
test holds the two to equal modules.
"""

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

_COMPARISONS = {
    ast.Eq: tirx.EQ,
    ast.NotEq: tirx.NE,
    ast.Lt: tirx.LT,
    ast.LtE: tirx.LE,
    ast.Gt: tirx.GT,
    ast.GtE: tirx.GE,
}


def read_module(source: str) -> tvm.IRModule:
    """The module that a text describes: one class of functions.

    Where the text has no function of that name, a call `Module.name(...)` is of the C function: a kernel whose text is
    elsewhere.
    """
    (module,) = ast.parse(source).body
    assert isinstance(module, ast.ClassDef)
    functions = [node for node in module.body if isinstance(node, ast.FunctionDef)]
    names = {node.name: tvm.ir.GlobalVar(node.name) for node in functions}
    env = {"T": T, "build": _Builder, module.name: _Callees(names)}
    return tvm.IRModule({names[node.name]: _read_function(node, env) for node in functions})


def _read_function(node: ast.FunctionDef, env: dict[str, Any]) -> tirx.PrimFunc:
    options = {}
    for decorator in node.decorator_list:
        assert isinstance(decorator, ast.Call)
        options = {
            k.arg: k.value.value for k in decorator.keywords if isinstance(k.value, ast.Constant)
        }
    body = _Rewriter().statements(node.body)
    code = ast.fix_missing_locations(ast.Module(body, []))
    with IRBuilder() as builder, T.prim_func(is_private=options.get("private", False), s_tir=True):
        T.func_name(node.name)
        local = {}
        for arg in node.args.args:
            assert isinstance(arg.annotation, ast.Attribute)
            local[arg.arg] = T.arg(arg.arg, getattr(T, arg.annotation.attr)())
        if isinstance(node.returns, ast.Attribute):
            T.func_ret(getattr(T, node.returns.attr)().ty)
        exec(compile(code, node.name, "exec"), {**env, **local})
    return builder.get()


class _Callees:
    """What `Module` is in an expression: its attributes make calls."""

    def __init__(self, variables: Mapping[str, tvm.ir.GlobalVar]) -> None:
        self._variables = variables

    def __getattr__(self, name: str) -> Callable[..., tvm.ir.Call]:
        def call(*args: Any) -> tvm.ir.Call:
            if name not in self._variables:
                return T.call_extern("int32", name, *args)
            return tvm.ir.Call(self._variables[name], args, ret_ty=tvm.ir.PrimType("int32"))

        return call


class _Builder:
    """What rewritten statements call, under the name `build`."""

    @staticmethod
    def named(name: str, value: Any) -> Any:
        """Give a variable or a buffer its name."""
        IRBuilder.name(name, value)
        return value

    @staticmethod
    def scalar(name: str, dtype: str, value: Any) -> Any:
        """Declare a variable that may be assigned again; returns the expression that reads it."""
        cell = T.local_scalar(dtype=dtype).scalar
        IRBuilder.name(name, cell.source)
        T.buffer_store(cell.source, value, [0])
        return cell

    @staticmethod
    def assign(cell: Any, value: Any) -> None:
        """Assign to a variable again."""
        T.buffer_store(cell.source, value, [0])

    @staticmethod
    def store(buffer: Any, value: Any, *index: Any) -> None:
        """Store to a buffer."""
        T.buffer_store(buffer, value, list(index))

    @staticmethod
    @contextmanager
    def loop(name: str, frame: Any) -> Iterator[Any]:
        """A loop whose variable has a name."""
        with frame as variable:
            IRBuilder.name(name, variable)
            yield variable

    @staticmethod
    def compare(kind: str, a: Any, b: Any) -> Any:
        """A comparison, by the name of its TIR node; scalars go with vectors."""
        return getattr(tirx, kind)(_matched(a, b), _matched(b, a))


def _matched(a: Any, b: Any) -> Any:
    """An operand in the other's type, if it is a number, and with the other's lanes, if it is a scalar."""
    if isinstance(a, int | float):
        kind = str(b.ty.dtype).partition("x")[0] if not isinstance(b, int | float) else "int32"
        a = tirx.const(a, kind)
    lanes = 1 if isinstance(b, int | float) else b.ty.dtype.lanes
    return tirx.Broadcast(a, lanes) if lanes > 1 and a.ty.dtype.lanes == 1 else a


class _Rewriter(ast.NodeTransformer):
    """Turns the statements of a kernel into calls of the builder; expressions stay as they are."""

    def __init__(self) -> None:
        self._cells: set[str] = set()

    def statements(self, nodes: Sequence[ast.stmt]) -> list[ast.stmt]:
        """Each statement rewritten; never empty."""
        return [self.visit(node) for node in nodes] or [ast.Pass()]

    def visit_Assign(self, node: ast.Assign) -> ast.stmt:
        (target,) = node.targets
        value = self.visit(node.value)
        if isinstance(target, ast.Subscript):
            index = target.slice.elts if isinstance(target.slice, ast.Tuple) else [target.slice]
            return _statement(_call("build.store", target.value, value, *map(self.visit, index)))
        assert isinstance(target, ast.Name)
        if target.id in self._cells:
            return _statement(_call("build.assign", ast.Name(target.id, ast.Load()), value))
        return ast.Assign([target], _call("build.named", ast.Constant(target.id), value))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt:
        assert isinstance(node.target, ast.Name) and isinstance(node.annotation, ast.Attribute)
        assert node.value is not None
        self._cells.add(node.target.id)
        names = ast.Constant(node.target.id), ast.Constant(node.annotation.attr)
        return ast.Assign([node.target], _call("build.scalar", *names, self.visit(node.value)))

    def visit_For(self, node: ast.For) -> ast.stmt:
        assert isinstance(node.target, ast.Name) and isinstance(node.iter, ast.Call)
        frame = self.visit(node.iter)
        if isinstance(frame.func, ast.Name):
            start = [] if len(frame.args) > 1 else [ast.Constant(0)]
            frame = _call("T.serial", *start, *frame.args)
        loop = _call("build.loop", ast.Constant(node.target.id), frame)
        return ast.With([ast.withitem(loop, node.target)], self.statements(node.body))

    def visit_While(self, node: ast.While) -> ast.stmt:
        return _with("T.While", [self.visit(node.test)], self.statements(node.body))

    def visit_If(self, node: ast.If) -> ast.stmt:
        branches: list[ast.stmt] = [_with("T.Then", [], self.statements(node.body))]
        if node.orelse:
            branches.append(_with("T.Else", [], self.statements(node.orelse)))
        return _with("T.If", [self.visit(node.test)], branches)

    def visit_With(self, node: ast.With) -> ast.stmt:
        return ast.With(node.items, self.statements(node.body))

    def visit_Return(self, node: ast.Return) -> ast.stmt:
        assert node.value is not None
        return _statement(_call("T.Return", node.value))

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        (op,), (right,) = node.ops, node.comparators
        kind = ast.Constant(_COMPARISONS[type(op)].__name__)
        return _call("build.compare", kind, self.visit(node.left), self.visit(right))

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        word = "T.And" if isinstance(node.op, ast.And) else "T.Or"
        value: ast.expr = self.visit(node.values[0])
        for other in node.values[1:]:
            value = _call(word, value, self.visit(other))
        return value


def _call(name: str, *args: ast.expr) -> ast.Call:
    head, _, attribute = name.partition(".")
    function = ast.Attribute(ast.Name(head, ast.Load()), attribute, ast.Load())
    return ast.Call(function, list(args), [])


def _statement(call: ast.Call) -> ast.Expr:
    return ast.Expr(call)


def _with(name: str, args: list[ast.expr], body: list[ast.stmt]) -> ast.With:
    return ast.With([ast.withitem(_call(name, *args))], body)
