"""Dimensions: integers, or sympy expressions over named positive integers.

Every dimension that passes through `dim` is in expanded form, so that two equal polynomials are equal objects
and compare with `==`; a constant is always a plain `int`.
"""

import ast
import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import sympy

from nemoc.ir.errors import IRError

Dim: TypeAlias = int | sympy.Expr
"""An integer, or an expression over dimension symbols."""


@functools.cache
def symbol(name: str) -> sympy.Symbol:
    """The dimension symbol of that name: a positive integer."""
    return sympy.Symbol(name, integer=True, positive=True)


B = symbol("B")
"""Rows of the batch."""
L = symbol("L")
"""New tokens of each row in this step."""
C = symbol("C")
"""Capacity of the KV cache in tokens."""
T = symbol("T")
"""Tokens already cached; differs by row, so it appears in costs only, never in a shape."""


def dim(value: Dim) -> Dim:
    """The normal form of a dimension: expanded, and a plain `int` when constant."""
    return int(value) if isinstance(value, int) else _normal(value)


@functools.lru_cache(maxsize=4096)
def _normal(value: sympy.Expr) -> Dim:
    expanded = sympy.expand(value)
    return int(expanded) if expanded.is_Integer else expanded


def dims(values: Iterable[Dim]) -> tuple[Dim, ...]:
    """Each value in normal form."""
    return tuple(dim(v) for v in values)


def product(values: Iterable[Dim]) -> Dim:
    """The product of dimensions, in normal form."""
    return _product(tuple(values))


@functools.lru_cache(maxsize=4096)
def _product(values: tuple[Dim, ...]) -> Dim:
    return dim(functools.reduce(operator.mul, values, 1))


def ceil_div(a: Dim, b: int) -> Dim:
    """⌈a / b⌉, in normal form."""
    if isinstance(a, int):
        return (a + b - 1) // b
    return dim(sympy.ceiling(a / sympy.Integer(b)))


def symbols_of(value: Dim) -> frozenset[str]:
    """The names of the symbols in a dimension."""
    return frozenset() if isinstance(value, int) else _symbols(value)


@functools.lru_cache(maxsize=4096)
def _symbols(value: sympy.Expr) -> frozenset[str]:
    return frozenset(s.name for s in value.free_symbols)


def evaluate_dim(value: Dim, env: Mapping[str, int]) -> int:
    """The integer that a dimension has when its symbols have the given values.

    Raises:
        IRError: a symbol has no value, or the result is not an integer.
    """
    if isinstance(value, int):
        return value
    return _evaluate(value, frozenset(env.items()))


def estimate(value: Dim, env: Mapping[str, int]) -> float:
    """A closed form at given sizes, in floating point: exact powers of a thousand digits would take minutes.

    Args:
        value: any of its symbols may stand in fractions and exponents.
        env: the values of the symbols.
    """
    known = {symbol(name): size for name, size in env.items()}
    return float(sympy.sympify(value).evalf(subs=known))


@functools.lru_cache(maxsize=4096)
def _evaluate(value: sympy.Expr, env: frozenset[tuple[str, int]]) -> int:
    result = value.subs({symbol(name): size for name, size in env})
    if not result.is_Integer:
        sizes = dict(sorted(env))
        raise IRError(f"dimension {format_dim(value)} is {result} when {sizes}")
    return int(result)


def substitute_dim(value: Dim, mapping: Mapping[str, Dim]) -> Dim:
    """The dimension with symbols replaced, in normal form."""
    if isinstance(value, int):
        return value
    return dim(value.subs({symbol(name): new for name, new in mapping.items()}))


@functools.lru_cache(maxsize=4096)
def format_dim(value: Dim) -> str:
    """The text of a dimension; `parse_dim` reads it back to an equal one."""
    return str(value)


def estimate_text(text: str, env: Mapping[str, int]) -> float:
    """What `estimate` gives for a closed form as `format_dim` prints it, read from anywhere and never as Python.

    Costs have powers with sizes in the exponent, which no dimension may have (`parse_dim`); as numbers they do no harm.

    Args:
        text: integers, symbols, + - * / **, floor, ceiling, Min, Max, sqrt, log, exp.
        env: the values of the symbols.

    Raises:
        IRError: the text is no such form, has another symbol, or has no finite value there.
    """
    tree = _expression(text, _LONGEST_FORM, "closed form")
    try:
        found = _number(tree, text, env)
    except (ArithmeticError, ValueError, RecursionError) as error:
        raise IRError(f"closed form {text[:60]!r} has no value: {error}") from None
    if not math.isfinite(found):
        raise IRError(f"closed form {text[:60]!r} is {found}, expected a finite number")
    return found


_LONGEST_FORM = 4000
"""Characters of the longest closed form that is read."""

_NUMERIC: dict[str, tuple[Callable[..., float], range]] = {
    "floor": (math.floor, range(1, 2)),
    "ceiling": (math.ceil, range(1, 2)),
    "Min": (min, range(2, 5)),
    "Max": (max, range(2, 5)),
    "sqrt": (math.sqrt, range(1, 2)),
    "log": (math.log, range(1, 2)),
    "exp": (math.exp, range(1, 2)),
}
"""Functions of closed forms, and with how many arguments."""


def _number(node: ast.expr, text: str, env: Mapping[str, int]) -> float:
    match node:
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            return float(number)
        case ast.Name(id=name) if name in env:
            return float(env[name])
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(operand, text, env)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            found = _OPERATORS[type(op)](*(_number(n, text, env) for n in (left, right)))
            if isinstance(found, complex):
                raise IRError(f"closed form {text[:60]!r} has no real value")
            return float(found)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _NUMERIC:
            function, arity = _NUMERIC[name]
            if len(args) in arity:
                return float(function(*(_number(a, text, env) for a in args)))
    raise IRError(f"closed form {text[:60]!r} cannot be read")


_OPERATORS: dict[type[ast.operator], Callable[[float, float], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda a, b: sympy.sympify(a) / sympy.sympify(b),
    ast.Pow: operator.pow,
}
_FUNCTIONS: dict[str, tuple[Callable[..., Any], range]] = {
    "floor": (sympy.floor, range(1, 2)),
    "ceiling": (sympy.ceiling, range(1, 2)),
    "Min": (sympy.Min, range(2, 5)),
    "Max": (sympy.Max, range(2, 5)),
}
"""Functions that may be called, and with how many arguments."""


@functools.lru_cache(maxsize=4096)
def parse_dim(text: str) -> Dim:
    """Read a dimension: integers, names, + - * / ** and floor, ceiling, Min, Max.

    Text comes from files, so it is read through a fixed grammar and never evaluated as Python.

    Raises:
        IRError: the text is no dimension.
    """
    tree = _expression(text, _LONGEST, "dimension")
    _check_size(tree, text)
    value = dim(_from_ast(tree, text))
    if not isinstance(value, int) and not value.free_symbols:
        raise IRError(f"dimension {text!r} is {value}, expected an integer")
    return value


_LONGEST = 400
"""Characters of the longest dimension that is read; beyond, nesting could exhaust the parser."""


@functools.lru_cache(maxsize=1024)
def _expression(text: str, longest: int, what: str) -> ast.expr:
    """The syntax tree of text from anywhere; `what` is what messages call it."""
    if len(text) > longest:
        raise IRError(f"{what} {text[:20]!r}... cannot be read: it has {len(text)} characters")
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise IRError(f"{what} {text[:_LONGEST]!r} cannot be read") from None


def _from_ast(node: ast.expr, text: str) -> Any:
    match node:
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            return number
        case ast.Name(id=name):
            return symbol(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_from_ast(operand, text)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            if isinstance(op, ast.Pow) and not _is_small_power(left, right):
                raise IRError(f"dimension {text!r} has a power that is not a constant up to 8")
            return _BINARY[type(op)](_from_ast(left, text), _from_ast(right, text))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            function, arity = _FUNCTIONS[name]
            if len(args) in arity:
                return function(*(_from_ast(a, text) for a in args))
    raise IRError(f"dimension {text!r} cannot be read")


_MOST_NODES, _MOST_SUMS_MULTIPLIED = 96, 6
"""Limits of a dimension's expression: multiplying out n sums may give 2ⁿ terms."""


def _check_size(tree: ast.expr, text: str) -> None:
    """Refuse an expression whose normal form could be huge."""
    nodes = list(ast.walk(tree))
    multiplied = any(
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Mult | ast.Pow)
        and any(isinstance(inner, ast.Add | ast.Sub) for inner in ast.walk(node))
        for node in nodes
    )
    sums = sum(isinstance(node, ast.Add | ast.Sub) for node in nodes)
    if len(nodes) > _MOST_NODES or (multiplied and sums > _MOST_SUMS_MULTIPLIED):
        raise IRError(f"dimension {text!r} is too large")


def _is_small_power(base: ast.expr, exponent: ast.expr) -> bool:
    """Whether a power is one of a name, a number or a call without powers to a constant of at most 8."""
    inside = (
        isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) for node in ast.walk(base)
    )
    return (
        isinstance(base, ast.Name | ast.Constant | ast.Call)
        and not any(inside)
        and isinstance(exponent, ast.Constant)
        and isinstance(exponent.value, int)
        and 0 <= exponent.value <= 8
    )
