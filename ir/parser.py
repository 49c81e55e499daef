"""Reading the text form of graphs (see `nemoc.ir.printer` for its look).

Every error names file and line. Types written in the text are held against type inference, so a text
that parses is well typed.
"""

import json
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nemoc.ir.dims import Dim, parse_dim
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import IRError
from nemoc.ir.graph import Graph, Node
from nemoc.ir.op import (
    BODY,
    Op,
    Operand,
    attribute_defaults,
    attribute_fields,
    field_types,
    operand_fields,
)
from nemoc.ir.ops import by_mnemonic
from nemoc.ir.types import NAME, TensorType, Value

_TOKEN = re.compile(
    rf"""(?P<space>[ \t]+|//[^\n]*)
      | (?P<newline>\n)
      | (?P<value>%{NAME.pattern})
      | (?P<graph>@{NAME.pattern})
      | (?P<string>"(?:[^"\\\n]|\\.)*")
      | (?P<number>-?(?:inf|nan|\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)(?![A-Za-z0-9_]))
      | (?P<word>[A-Za-z_][A-Za-z0-9_]*)
      | (?P<sign>\*\*|[{{}}()\[\]:=,<*+/\-])""",
    re.VERBOSE,
)


_BODY = re.compile(rf"^[ \t]*(?:%{NAME.pattern}|return\b)", re.MULTILINE)
"""The first statement of a graph that is no argument, up to its first token."""

_LONGEST_NUMBER, _DEEPEST = 400, 32
"""Limits of text from files: digits of a number, regions within regions."""


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    line: int


def parse(text: str, source: str = "<text>", extra_ops: tuple[type[Op], ...] = ()) -> Graph:
    """Read one graph.

    Args:
        text: what `print_graph` wrote, or a person.
        source: what errors call the text, usually a file name.
        extra_ops: op classes beside those of the IR.

    Raises:
        IRError: the text is not a well-typed graph; the message starts with `source:line`.
    """
    parser = _Parser(_tokens(text, source), source, by_mnemonic(extra_ops))
    graph = parser.graph()
    parser.end()
    return graph


@dataclass(frozen=True)
class Signature:
    """What a graph is given: the first part of its text."""

    inputs: tuple[Value, ...]
    params: tuple[Value, ...]
    states: tuple[Value, ...]


def parse_signature(text: str, source: str = "<text>") -> Signature:
    """Read what a graph is given, and none of what it does: its ops need not be known.

    Args:
        text: what `print_graph` wrote, with each statement on a line of its own.
        source: what errors call the text, usually a file name.

    Raises:
        IRError: the first part of the text is not that of a graph.
    """
    body = _BODY.search(text)
    parser = _Parser(_tokens(text[: body.end() if body else None], source), source, {})
    return parser.signature()


def _tokens(text: str, source: str) -> list[_Token]:
    found: list[_Token] = []
    line, at = 1, 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise IRError(f"unexpected character {text[at]!r}", f"{source}:{line}")
        kind = match.lastgroup or ""
        if kind == "newline":
            line += 1
        elif kind != "space":
            found.append(_Token(kind, match.group(), line))
        at = match.end()
    found.append(_Token("end", "end of text", line))
    return found


class _Parser:
    """Recursive descent over the tokens of one text."""

    def __init__(self, tokens: list[_Token], source: str, ops: dict[str, type[Op]]) -> None:
        self._tokens = tokens
        self._at = 0
        self._source = source
        self._ops = ops

    # -- tokens --

    @property
    def _next(self) -> _Token:
        return self._tokens[self._at]

    def _location(self, token: _Token | None = None) -> str:
        return f"{self._source}:{(token or self._next).line}"

    def _fail(self, expected: str) -> IRError:
        return IRError(f"found {self._next.text!r}, expected {expected}", self._location())

    def _take(self, kind: str, text: str | None = None) -> str:
        token = self._next
        if token.kind != kind or (text is not None and token.text != text):
            raise self._fail(repr(text) if text else kind)
        self._at += 1
        return token.text

    def _accept(self, text: str) -> bool:
        if self._next.text != text or self._next.kind in ("string", "end"):
            return False
        self._at += 1
        return True

    def _list(self, item: Callable[[], Any], close: str) -> list[Any]:
        """Items separated by commas up to a closing sign, which is taken."""
        items: list[Any] = []
        while not self._accept(close):
            if items:
                self._take("sign", ",")
            items.append(item())
        return items

    def end(self) -> None:
        """Nothing may follow."""
        if self._next.kind != "end":
            raise self._fail("end of text")

    # -- graphs --

    def graph(self) -> Graph:
        """`graph @name { ... }`."""
        return self._content(self._head())

    def signature(self) -> Signature:
        """A graph up to its first node or, if it has none, its end."""
        self._head()
        arguments = self._arguments({})
        if self._next.kind != "value" and self._next.text != "return":
            raise self._fail("an argument, a node or 'return'")
        return Signature(*(tuple(arguments[kind]) for kind in ("input", "param", "state")))

    def _head(self) -> str:
        self._take("word", "graph")
        name = self._take("graph")[1:]
        self._take("sign", "{")
        return name

    def _arguments(self, scope: dict[str, Value]) -> dict[str, list[Value]]:
        found: dict[str, list[Value]] = {"input": [], "param": [], "state": []}
        while self._next.kind == "word" and self._next.text in found:
            kind = self._take("word")
            found[kind].append(self._argument(scope))
        return found

    def _content(self, name: str, depth: int = 0) -> Graph:
        if depth > _DEEPEST:
            raise self._fail(f"at most {_DEEPEST} regions within each other")
        scope: dict[str, Value] = {}
        arguments = self._arguments(scope)
        nodes: list[Node] = []
        while self._next.kind == "value":
            nodes.append(self._node(scope, depth))
        self._take("word", "return")
        outputs = [self._use(scope)]
        while self._accept(","):
            outputs.append(self._use(scope))
        following = [self._update(scope, state) for state in arguments["state"]]
        self._take("sign", "}")
        return Graph(
            name=name,
            inputs=tuple(arguments["input"]),
            nodes=tuple(nodes),
            outputs=tuple(outputs),
            params=tuple(arguments["param"]),
            states=tuple(arguments["state"]),
            next_states=tuple(following),
        )

    def _argument(self, scope: dict[str, Value]) -> Value:
        token = self._next
        name = self._take("value")[1:]
        self._take("sign", ":")
        type_ = self._type()
        bound = self._dim_until_line_end(token.line) if self._accept("<") else None
        return self._define(scope, Value(name, type_, bound), token)

    def _update(self, scope: dict[str, Value], state: Value) -> Value:
        self._take("word", "update")
        self._take("value", f"%{state.name}")
        self._take("sign", "=")
        return self._use(scope)

    def _define(self, scope: dict[str, Value], value: Value, token: _Token) -> Value:
        if value.name in scope:
            raise IRError(f"%{value.name} is defined twice", self._location(token))
        scope[value.name] = value
        return value

    def _use(self, scope: dict[str, Value]) -> Value:
        token = self._next
        name = self._take("value")[1:]
        if name not in scope:
            raise IRError(f"%{name} is not defined before its use", self._location(token))
        return scope[name]

    # -- nodes --

    def _node(self, scope: dict[str, Value], depth: int) -> Node:
        start = self._next
        names = [self._take("value")[1:]]
        while self._accept(","):
            names.append(self._take("value")[1:])
        self._take("sign", "=")
        op_class = self._op_class()
        fields = self._operands(op_class, scope) | self._attributes(op_class)
        self._take("sign", ":")
        written = [self._type()]
        while self._accept(","):
            written.append(self._type())
        if BODY in attribute_fields(op_class):
            self._take("sign", "{")
            fields[BODY] = self._content(BODY, depth + 1)
        op, inferred = self._build(op_class, fields, start)
        if list(inferred) != written or len(names) != len(written):
            raise IRError(
                f"{op.mnemonic()} gives {', '.join(map(str, inferred))}, but the text says "
                f"{len(names)} values of {', '.join(map(str, written))}",
                self._location(start),
            )
        results = [Value(n, t) for n, t in zip(names, written, strict=True)]
        for value in results:
            self._define(scope, value, start)
        return Node(op, tuple(results), self._location(start))

    def _build(
        self, op_class: type[Op], fields: dict[str, Any], start: _Token
    ) -> tuple[Op, tuple[TensorType, ...]]:
        try:
            op = op_class(**fields)
            return op, op.result_types()
        except IRError as error:
            raise error.at(self._location(start)) from None
        except TypeError:
            missing = [
                f
                for f in attribute_fields(op_class)
                if f not in fields and _is_required(op_class, f)
            ]
            raise IRError(
                f"{op_class.mnemonic()} lacks the attributes {', '.join(missing)}",
                self._location(start),
            ) from None

    def _op_class(self) -> type[Op]:
        token = self._next
        name = self._take("word")
        if name not in self._ops:
            raise IRError(
                f"unknown op {name!r}, expected one of the IR or of a plugin", self._location(token)
            )
        return self._ops[name]

    def _operands(self, op_class: type[Op], scope: dict[str, Value]) -> dict[str, Operand]:
        token = self._next
        self._take("sign", "(")
        given = self._list(lambda: self._operand(scope), ")")
        names = operand_fields(op_class)
        if len(given) != len(names):
            raise IRError(
                f"{op_class.mnemonic()} has {len(given)} operands, expected {len(names)} "
                f"({', '.join(names)})",
                self._location(token),
            )
        kinds = field_types(op_class)
        for name, operand in zip(names, given, strict=True):
            fits = {
                Value: isinstance(operand, Value),
                Value | None: operand is None or isinstance(operand, Value),
                tuple[Value, ...]: isinstance(operand, tuple),
            }[kinds[name]]
            if not fits:
                raise IRError(
                    f"{op_class.mnemonic()}: operand {name} has the wrong form",
                    self._location(token),
                )
        return dict(zip(names, given, strict=True))

    def _operand(self, scope: dict[str, Value]) -> Operand:
        if self._accept("_"):
            return None
        if self._accept("["):
            return tuple(self._list(lambda: self._use(scope), "]"))
        return self._use(scope)

    def _attributes(self, op_class: type[Op]) -> dict[str, Any]:
        if not self._accept("{"):
            return {}
        known = field_types(op_class)
        found: dict[str, Any] = {}

        def one() -> None:
            token = self._next
            key = self._take("word")
            if key not in attribute_fields(op_class) or key == BODY:
                raise IRError(
                    f"{op_class.mnemonic()} has no attribute {key!r}", self._location(token)
                )
            if key in found:
                raise IRError(
                    f"{op_class.mnemonic()}: attribute {key} is given twice", self._location(token)
                )
            self._take("sign", "=")
            found[key] = self._attribute(known[key], f"{op_class.mnemonic()}: {key}")

        self._list(one, "}")
        return found

    # -- types and attributes --

    def _type(self) -> TensorType:
        location = self._location()
        try:
            dtype = DType.parse(self._take("word"))
            self._take("sign", "[")
            return TensorType.of(dtype, self._list(self._dim, "]"))
        except IRError as error:
            raise error.at(location) from None

    def _dim(self) -> Dim:
        """The tokens up to a comma or bracket that closes around it, read as a dimension."""
        location = self._location()
        depth, parts = 0, []
        while depth > 0 or self._next.text not in (",", "]", "}", ":"):
            if self._next.kind not in ("number", "word", "sign"):
                raise self._fail("a dimension")
            depth += {"(": 1, ")": -1}.get(self._next.text, 0)
            parts.append(self._next.text)
            self._at += 1
        return self._parse_dim(" ".join(parts), location)

    def _dim_until_line_end(self, line: int) -> Dim:
        location = self._location()
        parts = []
        while self._next.line == line and self._next.kind in ("number", "word", "sign"):
            parts.append(self._next.text)
            self._at += 1
        return self._parse_dim(" ".join(parts), location)

    def _parse_dim(self, text: str, location: str) -> Dim:
        try:
            return parse_dim(text)
        except IRError as error:
            raise error.at(location) from None

    def _attribute(self, hint: Any, what: str) -> Any:
        """Read an attribute's value by its declared type."""
        if isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint):
            if self._accept("none"):
                return None
            rest = [h for h in typing.get_args(hint) if h is not type(None)]
            return self._attribute(rest[0] if len(rest) == 1 else Dim, what)
        if typing.get_origin(hint) is tuple:
            self._take("sign", "[")
            inner = typing.get_args(hint)[0]
            return tuple(self._list(lambda: self._attribute(inner, what), "]"))
        if hint == Dim:
            return self._dim()
        return self._scalar(hint, what)

    def _scalar(self, hint: Any, what: str) -> Any:
        token = self._next
        self._at += 1
        wanted = {
            bool: token.text in ("true", "false"),
            int: token.kind == "number" and re.fullmatch(r"-?\d+", token.text) is not None,
            float: token.kind == "number",
            str: token.kind == "string",
            DType: token.kind == "word",
        }.get(hint)
        if wanted is None:
            raise IRError(
                f"{what}: attributes of type {hint} have no text form", self._location(token)
            )
        if not wanted:
            raise IRError(
                f"{what} is {token.text!r}, expected {hint.__name__}", self._location(token)
            )
        if hint is bool:
            return token.text == "true"
        if hint is str:
            try:
                return json.loads(token.text)
            except ValueError as error:
                raise IRError(f"{what}: {error}", self._location(token)) from None
        if hint is DType:
            return self._dtype(token)
        if len(token.text) > _LONGEST_NUMBER:
            raise IRError(f"{what}: a number of {len(token.text)} digits", self._location(token))
        return hint(token.text)

    def _dtype(self, token: _Token) -> DType:
        try:
            return DType.parse(token.text)
        except IRError as error:
            raise error.at(self._location(token)) from None


def _is_required(op_class: type[Op], field: str) -> bool:
    return field not in attribute_defaults(op_class)
