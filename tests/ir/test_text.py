"""The text form: what is written comes back equal, and what cannot be read is refused at its line."""

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemoc.ir import (
    Builder,
    DType,
    Graph,
    IRError,
    Op,
    TensorType,
    Value,
    ops,
    parse,
    print_graph,
    verify,
)
from nemoc.ir.dims import Dim, dim, format_dim, parse_dim, symbol
from support.graphs import graphs

BASE = """graph @g {
  input %x: f32[B, 4]
  param %w: f32[4]
  state %s: f32[B, 4]

  %y = mul(%x, %w) : f32[B, 4]
  %z = add(%y, %s) : f32[B, 4]
  return %z
  update %s = %y
}
"""


@given(graph=graphs())
def test_random_graphs_come_back_equal(graph: Graph) -> None:
    verify(graph)
    text = print_graph(graph)
    again = parse(text)
    assert again == graph and again.digest == graph.digest
    assert print_graph(again) == text


@pytest.mark.parametrize(
    ("old", "new", "line", "reason"),
    [
        ("graph @g {", "graph g {", 1, "found 'g', expected graph"),
        ("graph @g {", "module @g {", 1, "found 'module', expected 'graph'"),
        ("f32[B, 4]\n  param", "f33[B, 4]\n  param", 2, "unknown element type 'f33'"),
        ("%x: f32[B, 4]", "%x f32[B, 4]", 2, "found 'f32', expected ':'"),
        ("%x: f32[B, 4]", "%x: f32[B, 4", 3, "found '%w', expected a dimension"),
        ("%x: f32[B, 4]", "%x: f32[B ! 4]", 2, "unexpected character '!'"),
        ("%x: f32[B, 4]", "%x: f32[B B, 4]", 2, "dimension 'B B' cannot be read"),
        ("%x: f32[B, 4]", "%x: f32[B**9, 4]", 2, "power that is not a constant up to 8"),
        ("param %w: f32[4]", "param %x: f32[4]", 3, "%x is defined twice"),
        ("%y = mul(%x, %w)", "%y = mull(%x, %w)", 6, "unknown op 'mull'"),
        ("%y = mul(%x, %w)", "%y = mul(%x)", 6, "mul has 1 operands, expected 2 (a, b)"),
        ("%y = mul(%x, %w)", "%y = mul(%x, %v)", 6, "%v is not defined before its use"),
        ("%y = mul(%x, %w)", "%y = mul(%x, _)", 6, "operand b has the wrong form"),
        ("%y = mul(%x, %w)", "%y = mul(%x, [%w])", 6, "operand b has the wrong form"),
        ("%y = mul(%x, %w)", "%y = mul(%x, %w) {k=1}", 6, "mul has no attribute 'k'"),
        ("%y = mul(%x, %w)", "%x = mul(%x, %w)", 6, "%x is defined twice"),
        ("%y = mul(%x, %w)", "%y, %q = mul(%x, %w)", 6, "the text says 2 values of f32[B, 4]"),
        ("mul(%x, %w) : f32[B, 4]", "mul(%x, %w) : f32[B, 5]", 6, "mul gives f32[B, 4]"),
        ("mul(%x, %w) : f32[B, 4]", "mul(%x, %w)", 7, "expected ':'"),
        ("mul(%x, %w)", "scale(%x) {factor=true}", 6, "scale: factor is 'true', expected float"),
        ("mul(%x, %w)", "scale(%x)", 6, "scale lacks the attributes factor"),
        ("mul(%x, %w)", "scale(%x) {factor=1.0, factor=2.0}", 6, "factor is given twice"),
        ("mul(%x, %w)", "gelu(%x) {tanh=1}", 6, "gelu: tanh is '1', expected bool"),
        ("mul(%x, %w)", "cast(%x) {dtype=3}", 6, "cast: dtype is '3', expected DType"),
        (
            "mul(%x, %w)",
            'dequantize_nvfp4(%x, %x, %x) {dialect="\\q"}',
            6,
            "dequantize_nvfp4: dialect: Invalid",
        ),
        ("mul(%x, %w)", "sum(%x) {axis=1.5}", 6, "sum: axis is '1.5', expected int"),
        ("mul(%x, %w)", "permute(%x) {axes=1}", 6, "found '1', expected '['"),
        ("  return %z\n", "", 8, "found 'update', expected 'return'"),
        ("return %z", "return %q", 8, "%q is not defined before its use"),
        ("  update %s = %y\n", "", 9, "found '}', expected 'update'"),
        ("update %s = %y", "update %x = %y", 9, "found '%x', expected '%s'"),
        ("}\n", "}\n}\n", 11, "found '}', expected end of text"),
        ("}\n", "", 10, "found 'end of text', expected '}'"),
    ],
)
def test_errors_name_the_line(old: str, new: str, line: int, reason: str) -> None:
    text = BASE.replace(old, new, 1) if old != "}\n" else BASE.removesuffix(old) + new
    assert text != BASE
    with pytest.raises(IRError, match=re.escape(reason)) as caught:
        parse(text, "g.ir")
    assert str(caught.value).startswith(f"g.ir:{line}: ")
    assert "\n" not in str(caught.value)


def test_error_inside_a_body_names_its_line() -> None:
    text = """graph @g {
      param %w: bf16[4]
      %y = folded([%w]) : f32[4] {
        input %p: bf16[4]
        %q = exp(%p) : bf16[4]
        return %q
      }
      return %y
    }"""
    with pytest.raises(IRError, match="x is bf16") as caught:
        parse(text, "g.ir")
    assert caught.value.location == "g.ir:5"


@given(st.text(alphabet="graph @{}%x:=f32[B,4]input()\n +", max_size=60))
def test_noise_is_refused_with_an_ir_error(noise: str) -> None:
    with pytest.raises(IRError):
        parse(noise)


@given(st.integers(0, len(BASE) - 2), st.sampled_from(["", "%", "}", "[", "7", "B", ",", '"', "é"]))
def test_damaged_text_is_read_or_refused_never_crashes(at: int, piece: str) -> None:
    try:
        verify(parse(BASE[:at] + piece + BASE[at + 1 :]))
    except IRError as error:
        assert "\n" not in str(error)


def test_comments_and_layout_do_not_count() -> None:
    lines = [f"{line}  // note" for line in BASE.splitlines()]
    assert parse("\n\n".join(lines).replace("  ", "\t")) == parse(BASE)


def test_names_of_local_values_do_not_count_and_others_do() -> None:
    graph = parse(BASE)
    assert parse(BASE.replace("%y", "%other")) == graph
    assert parse(BASE.replace("%y", "%other")).digest == graph.digest
    assert parse(BASE.replace("%w", "%weight")) != graph
    assert parse(BASE.replace("mul", "sub")) != graph
    assert graph != "no graph"


def test_bodies_compare_by_structure() -> None:
    text = """graph @g {{
      param %w: bf16[4]
      %y = folded([%w]) : f32[4] {{
        input %p: bf16[4]
        %{name} = {op}(%p) {{dtype=f32}} : f32[4]
        return %{name}
      }}
      return %y
    }}"""
    a, b = (parse(text.format(name=name, op="cast")) for name in ("a", "b"))
    assert a == b
    assert a.nodes[0].op.attributes()["body"] == b.nodes[0].op.attributes()["body"]


def test_attribute_values_come_back() -> None:
    builder = Builder("g")
    x = builder.input("x", DType.F32, (3,))
    values = [float("inf"), float("-inf"), 1e-20, -0.0, 1.5e300, 0.1]
    last = x
    for value in values:
        last = builder(ops.Scale(last, value))
    again = parse(str(builder.finish([last])))
    assert [repr(n.op.attributes()["factor"]) for n in again.nodes] == [repr(v) for v in values]


@pytest.mark.parametrize(
    "build",
    [
        lambda x: ops.Full(1, DType.F32),
        lambda x: ops.Full(-3, DType.I32),
        lambda x: ops.Full(True, DType.BOOL),
        lambda x: ops.Full(np.float64(0.1), DType.F32),
        lambda x: ops.Slice(x, True, np.int64(1), 3),
        lambda x: ops.Permute(x, (np.int64(1), False)),
    ],
)
def test_numbers_of_other_kinds_come_back(build: Callable[[Value], Op]) -> None:
    b = Builder("g")
    graph = b.finish([b(build(b.input("x", DType.F32, (4, 4))))])
    again = parse(print_graph(graph))
    assert again == graph and print_graph(again) == print_graph(graph)


def test_attributes_that_are_no_numbers_are_refused() -> None:
    x = Value("x", TensorType(DType.F32, (4,)))
    with pytest.raises(IRError, match="scale: factor does not fit: could not convert"):
        ops.Scale(x, "much")
    with pytest.raises(IRError, match="scale: factor does not fit: int too large"):
        ops.Scale(x, 10**400)
    with pytest.raises(IRError, match="slice: start does not fit: 'float' object"):
        ops.Slice(x, 0, 1.5, 3)


def test_negative_zero_is_printed_where_zero_is_the_default() -> None:
    b = Builder("g")
    x = b.input("x", DType.F32, (4, 4))
    graph = b.finish([b(ops.GroupLimit(x, 2, 1, -0.0))])
    again = parse(print_graph(graph))
    assert math.copysign(1.0, again.nodes[0].op.attributes()["fill"]) == -1.0
    assert graph != parse(print_graph(graph).replace(", fill=-0.0", ""))


@pytest.mark.parametrize(
    "text",
    [
        "floor()",
        "floor(B, L)",
        "Min(B)",
        "*".join(["(B + L + 1)"] * 9),
        "(B + L)**8",
        "floor(" * 3 + "9" + ")**8" * 3,
        "B" + "+B" * 60,
    ],
)
def test_dimensions_that_could_explode_are_refused(text: str) -> None:
    with pytest.raises(IRError, match="dimension"):
        parse_dim(text)


def test_endless_numbers_and_nesting_are_refused() -> None:
    digits = (
        "graph @g {\n  %v = full() {value=1" + "0" * 5000 + ", dtype=f32} : f32[]\n  return %v\n}"
    )
    with pytest.raises(IRError, match="5001 digits"):
        parse(digits)
    nested = "graph @g {\n" + "%v = folded([]) : f32[] {\n" * 2000
    with pytest.raises(IRError, match="regions within each other"):
        parse(nested)


def test_nan_attribute_comes_back() -> None:
    builder = Builder("g")
    graph = builder.finish([builder(ops.Full(float("nan"), DType.F32, (2,)))])
    assert parse(str(graph)) == graph


def test_users_own_ops_are_read_beside_the_others() -> None:
    class Doubled(ops.Scale):
        """2 · x · factor."""

    text = "graph @g {\n input %x: f32[2]\n %y = doubled(%x) {factor=2.0} : f32[2]\n return %y\n}"
    with pytest.raises(IRError, match="unknown op 'doubled'"):
        parse(text)
    assert isinstance(parse(text, extra_ops=(Doubled,)).nodes[0].op, Doubled)


_SYMBOLS = st.sampled_from([symbol(n) for n in "BLC"])


@st.composite
def _dims(draw: st.DrawFn) -> Dim:
    value: Dim = draw(_SYMBOLS | st.integers(1, 9))
    for _ in range(draw(st.integers(0, 4))):
        other = draw(_SYMBOLS | st.integers(1, 9))
        value = draw(st.sampled_from([value + other, value * other, value - other]))
    return dim(value)


@given(_dims())
def test_dimensions_come_back(value: Dim) -> None:
    assert parse_dim(format_dim(value)) == value


@pytest.mark.parametrize(
    "text",
    ["", "1.5", "B +", "True", "__import__('os')", "B.real", "B < 3", "f(B)", "-'a'", "(" * 500],
)
def test_what_is_no_dimension_is_refused(text: str) -> None:
    with pytest.raises(IRError, match="cannot be read"):
        parse_dim(text)


@pytest.mark.parametrize(
    "text",
    [
        "B/0",
        "1/0",
        "1/2",
        "B**9",
        "B**-1",
        "(B**8)**8",
        "2**B",
        "-" * 5000 + "B",
        "B" + "+B" * 5000,
    ],
)
def test_dimensions_that_are_no_sizes_are_refused(text: str) -> None:
    with pytest.raises(IRError, match="dimension"):
        parse_dim(text)


def test_negative_sizes_are_refused() -> None:
    text = (
        "graph @g {\n input %x: f32[6]\n %y = reshape(%x) {shape=[-2, -3]} : f32[6]\n return %y\n}"
    )
    with pytest.raises(IRError, match="<text>:3: -2 is no size of a tensor"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ceiling(L/16)**2", "ceiling(L/16)**2"),
        ("Min(L, C)", "Min(C, L)"),
        ("2*(B + 1)", "2*B + 2"),
    ],
)
def test_dimension_functions(text: str, expected: str) -> None:
    assert format_dim(parse_dim(text)) == expected
    assert parse_dim(expected) == parse_dim(text)


def test_printing_needs_no_arguments() -> None:
    assert print_graph(Graph("g", (), (), (Value("x", TensorType(DType.F32, ())),))) == (
        "graph @g {\n  return %x\n}\n"
    )


def test_ops_without_a_text_form_are_refused() -> None:
    class Odd(Op):
        """Has an attribute that text cannot say."""

    with pytest.raises(IRError, match="two ops are called cast"):
        ops.by_mnemonic((type("Cast", (Op,), {}),))
    assert ops.by_mnemonic((Odd,))["odd"] is Odd
