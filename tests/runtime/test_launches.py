"""Records of launches: what is read is what was written, and anything else is refused in one line."""

import copy
import dataclasses
import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from nemoc.codegen.plan import Address, Kernel, Launch, StepFunction
from nemoc.codegen.storage import Layout
from nemoc.ir import DType, NemocError
from nemoc.ir.dims import B, C, Dim, L, T, ceil_div, dim, evaluate_dim, parse_dim
from nemoc.ir.errors import IRError
from nemoc.ir.parser import Signature
from nemoc.ir.types import TensorType, Value
from nemoc.runtime import Bounds, Generation, Program
from nemoc.runtime.dim_function import dim_function
from nemoc.runtime.launches import Binary, LaunchRecord, read_launches
from nemoc.runtime.placement import LaunchTable
from nemoc.runtime.recent import Recent

TYPES = {"cache": TensorType(DType.F32, (B, C, 16)), "lengths": TensorType(DType.I32, (B,))}
STATE = Layout.of(TYPES.items())
INPUTS = (
    Value("tokens", TensorType(DType.I64, (B, L))),
    Value("valid", TensorType(DType.I32, (B,))),
)
ARENAS = ("weights", "state", "scratch", "in0_tokens", "in1_valid", "out0_logits")
ADD = Binary("kernels/add.cubin", "add_1", 128, 0, 8, 3)
MIX = Binary("kernels/mix.cubin", "mix_2", 256, 90000, 7, 2, global_scratch=96, waits=True)


def step_function(name: str, length: Dim) -> StepFunction:
    """Two launches in two phases."""
    add = Kernel("add_1", "", dim(B * length))
    mix = Kernel("mix_2", "", ceil_div(dim(B * length - 1), 64))
    return StepFunction(
        name,
        ARENAS,
        (
            (
                Launch(
                    add, (Address("weights", 64), Address("in0_tokens"), Address("scratch", 128))
                ),
            ),
            (Launch(mix, (Address("state", STATE["lengths"].offset), Address("out0_logits"))),),
        ),
    )


def record() -> LaunchRecord:
    functions = [step_function(n, 1 if n == "decode" else L) for n in ("prefill", "decode")]
    return LaunchRecord.of("cuda:sm_90", 1 << 16, {"add_1": ADD, "mix_2": MIX}, functions)


def program(**changes: Any) -> Program:
    made = Program(
        name="model.nemoc",
        target="cuda:sm_90",
        identity="",
        vocab=50,
        bounds=Bounds(4, 100, 64),
        generation=Generation(),
        state=STATE,
        functions=frozenset({"prefill", "decode"}),
    )
    return dataclasses.replace(made, **changes)


def table(
    given: LaunchRecord, weights: int = 1000, inputs: tuple[Value, ...] = INPUTS, **changes: Any
) -> LaunchTable:
    signature = Signature(inputs, (), tuple(Value(n, t) for n, t in TYPES.items()))
    signatures = dict.fromkeys(("prefill", "decode"), signature)
    return LaunchTable(given, program(**changes), signatures, weights, "launches.json")


def one_line(caught: pytest.ExceptionInfo[NemocError]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 700
    return text


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "launches.json"
    path.write_text(record().to_text())
    assert read_launches(path) == record()
    data = json.loads(path.read_text())
    assert data["functions"]["prefill"]["launches"][1] == {
        "binary": 1,
        "tasks": "ceiling(B*L/64 - 1/64)",
        "pointers": [[1, "64*B*C"], [5, "0"]],
    }


def test_a_record_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "launches.json"
    for content in ("", "[1]", '{"a": ' * 100000, '{"format": ' + "1" * 5000 + "}"):
        path.write_text(content)
        with pytest.raises(NemocError, match=r"launches.json: ") as caught:
            read_launches(path)
        one_line(caught)


def launch_of(data: Any) -> Any:
    return data["functions"]["prefill"]["launches"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=1), "format is 1, this nemoc reads 2; compile the model again"),
        (lambda d: d.update(format=3), "format is 3, this nemoc reads 2; compile the model again"),
        (lambda d: d.update(format=2.0), "format is 2.0, expected an integer"),
        (lambda d: d.pop("scratch"), "the field scratch is missing"),
        (lambda d: d.update(more=1), "there is no use for a field 'more'"),
        (lambda d: d.update(target=5), "target is 5, expected text"),
        (lambda d: d.update(scratch=-1), "scratch is -1, expected an integer from 0 to"),
        (lambda d: d.update(scratch=True), "scratch is True, expected an integer"),
        (lambda d: d.update(scratch=1.0), "scratch is 1.0, expected an integer"),
        (lambda d: d.update(binaries={}), "binaries is {}, expected a list"),
        (lambda d: d.update(functions=[]), "functions is [], expected an object"),
        (
            lambda d: d["binaries"].append(None),
            "binaries[2] is None, expected an object",
        ),
        (lambda d: d["binaries"][0].pop("file"), "the field binaries[0].file is missing"),
        (
            lambda d: d["binaries"][0].update(x=1),
            "there is no use for a field 'x' in binaries[0]",
        ),
        (lambda d: d["binaries"][1].pop("waits"), "the field binaries[1].waits is missing"),
        (
            lambda d: d["binaries"][1].update(waits=1),
            "binaries[1].waits is 1, expected true or false",
        ),
        (lambda d: d["binaries"][0].update(symbol=""), "binaries[0].symbol is '', expected text"),
        (
            lambda d: d["binaries"][1].update(threads=2048),
            "binaries[1].threads is 2048, expected an integer from 1 to 1024",
        ),
        (
            lambda d: d["binaries"][1].update(parameters=5),
            "binaries[1].parameters is 5, expected an integer from 6 to 7",
        ),
        (
            lambda d: d["binaries"][0].update(parameters=9),
            "binaries[0].parameters is 9, expected an integer from 6 to 8",
        ),
        (
            lambda d: d["binaries"][1].update(global_scratch_align=48),
            "binaries[1].global_scratch_align is 48, expected a power of 2",
        ),
        (
            lambda d: d["functions"]["decode"].update(arenas=["state"]),
            "functions.decode.arenas is ['state'], expected weights, state, scratch first",
        ),
        (
            lambda d: launch_of(d).update(binary=2),
            "functions.prefill.launches[0].binary is 2, expected an integer from 0 to 1",
        ),
        (
            lambda d: launch_of(d)["pointers"].pop(),
            "expected 3 pointers, as the kernel has",
        ),
        (
            lambda d: launch_of(d)["pointers"].append([0]),
            "expected 3 pointers, as the kernel has",
        ),
        (
            lambda d: launch_of(d).update(pointers=[[0], [0, "0"], [0, "0"]]),
            "functions.prefill.launches[0].pointers[0] is [0], expected an arena and an offset",
        ),
        (
            lambda d: launch_of(d).update(pointers=[[6, "0"], [0, "0"], [0, "0"]]),
            "launches[0].pointers[0][0] is 6, expected an integer from 0 to 5",
        ),
        (lambda d: launch_of(d).update(tasks=5), "launches[0].tasks is 5, expected text"),
        (
            lambda d: launch_of(d).update(tasks="T + 1"),
            "functions.prefill.launches[0].tasks has the unknown size 'T'",
        ),
        (
            lambda d: launch_of(d).update(tasks="__import__('os')"),
            "launches[0].tasks: dimension \"__import__('os')\" cannot be read",
        ),
        (lambda d: launch_of(d).update(tasks="B/0"), "launches[0].tasks: dimension 'B/0'"),
        (lambda d: launch_of(d).update(tasks="B" * 500), "it has 500 characters"),
    ],
)
def test_fields_of_the_wrong_kind_are_refused(change: Callable[[Any], Any], message: str) -> None:
    data = json.loads(record().to_text())
    change(data)
    with pytest.raises(NemocError, match=r"^launches.json: ") as caught:
        LaunchRecord.from_json(data, "launches.json")
    assert message in one_line(caught)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything within JSON data."""
    items = (
        data.items()
        if isinstance(data, dict)
        else enumerate(data)
        if isinstance(data, list)
        else ()
    )
    return [path, *(inner for key, value in items for inner in places(value, (*path, key)))]


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        ["B", "C/B", "L - B", "T", "ceiling(B/3)", "C**8", "-1", "1/(B - 1)", "kernels"]
    ),
    st.just([]),
    st.just({}),
    st.just([[0, "0"]]),
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(places(json.loads(record().to_text()))), JUNK)
def test_whatever_is_in_a_record_ends_in_launches_or_one_line(
    place: tuple[Any, ...], junk: Any
) -> None:
    data = json.loads(record().to_text())
    target = {"": data}
    inner: Any = target
    path = ("", *place)
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = copy.deepcopy(junk)
    try:
        found = table(LaunchRecord.from_json(target[""], "launches.json"))
        for sizes in ((1, 1, 1), (3, 5, 77)):
            found.at("prefill", sizes)
            found.at("decode", (sizes[0], 1, sizes[2]))
    except NemocError as error:
        assert re.match("launches.json: ", str(error))
        assert "\n" not in str(error)


LEAVES = st.one_of(st.sampled_from([B, L, C]), st.integers(-9, 130).map(sympy.Integer))


def combine(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    pairs = st.tuples(inner, inner)
    divided = st.tuples(inner, st.integers(1, 64)).map(lambda p: p[0] / sympy.Integer(p[1]))
    return st.one_of(
        pairs.map(lambda p: p[0] + p[1]),
        pairs.map(lambda p: p[0] * p[1]),
        pairs.map(lambda p: sympy.Min(*p)),
        pairs.map(lambda p: sympy.Max(*p)),
        divided,
        divided.map(sympy.floor),
        divided.map(sympy.ceiling),
        st.tuples(inner, st.sampled_from([B, C])).map(lambda p: sympy.ceiling(p[0] / p[1])),
        inner.map(lambda x: x**2),
    )


@settings(max_examples=250, deadline=None)
@given(
    st.recursive(LEAVES, combine, max_leaves=8),
    st.tuples(st.integers(1, 9), st.integers(1, 600), st.integers(1, 5000)),
)
def test_functions_give_what_substitution_gives(
    expression: sympy.Expr, sizes: tuple[int, int, int]
) -> None:
    value = dim(expression)
    env = dict(zip("BLC", sizes, strict=True))
    try:
        expected = evaluate_dim(value, env)
    except IRError:
        with pytest.raises(IRError):
            dim_function(value)(sizes)
        return
    found = dim_function(value)(sizes)
    assert (type(found), found) == (int, expected)


@pytest.mark.parametrize(
    ("text", "sizes", "message"),
    [
        ("L/4", (1, 6, 1), "dimension L/4 is 3/2 when {'B': 1, 'L': 6, 'C': 1}"),
        ("L/(B - 1)", (1, 6, 1), "divides by 0 when {'B': 1"),
        ("floor(L/(B - 2))", (2, 6, 1), "divides by 0 when {'B': 2"),
    ],
)
def test_what_is_no_integer_is_refused(
    text: str, sizes: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(IRError, match=re.escape(message)):
        dim_function(parse_dim(text))(sizes)


def test_unknown_sizes_and_functions_are_refused() -> None:
    for value in (dim(T + 1), dim(sympy.sin(B)), dim(sympy.sqrt(B)), dim(2**B)):
        with pytest.raises(IRError, match="cannot be computed: it has"):
            dim_function(value)


def test_powers_of_powers_do_not_fill_the_memory() -> None:
    value = sympy.Max(B, 2)
    for _ in range(12):
        value = sympy.Max(value**8, 2)
    started = time.monotonic()
    with pytest.raises(IRError, match=r"is too large when \{'B': 9"):
        dim_function(dim(value))((9, 9, 9))
    assert time.monotonic() - started < 10


def test_launches_are_placed_for_any_sizes() -> None:
    found = table(record())
    placed = found.at("prefill", (3, 50, 20))
    add, mix = placed.launches
    assert (add.binary, add.tasks, add.pointers) == (0, 150, ((0, 64), (3, 0), (2, 128)))
    assert (mix.binary, mix.tasks, mix.pointers) == (1, 3, ((1, 64 * 3 * 20), (5, 0)))
    assert placed.hidden == (3 * 96, 0)
    assert found.at("decode", (1, 1, 9)).launches[0].tasks == 1
    assert found.inputs == {"prefill": ["tokens", "valid"], "decode": ["tokens", "valid"]}


def test_launches_without_tasks_are_left_out() -> None:
    placed = table(record()).at("decode", (1, 1, 20))
    assert [launch.binary for launch in placed.launches] == [0]
    assert placed.hidden == (0, 0)


def test_places_are_computed_once_and_kept_for_the_sizes_used_last() -> None:
    found = table(record())
    first = found.at("prefill", (1, 7, 20))
    for length in range(8, 30):
        found.at("prefill", (1, length, 20))
        assert found.at("prefill", (1, 7, 20)) is first
    for length in range(8, 60):
        found.at("prefill", (1, length, 20))
    assert found.at("prefill", (1, 7, 20)) is not first


@pytest.mark.parametrize(
    ("place", "offset", "message"),
    [
        (0, "1000", "a pointer to byte 1000 of weights, which has 1000, when B = 2, L = 3, C = 5"),
        (0, "B - 3", "a pointer to byte -1 of weights"),
        (1, "64*B*C + 64", "a pointer to byte 704 of state, which has 704"),
        (2, "65536", "a pointer to byte 65536 of scratch, which has 65536"),
        (3, "8*B*L", "a pointer to byte 48 of in0_tokens, which has 48"),
        (4, "4*B", "a pointer to byte 8 of in1_valid, which has 8"),
        (5, "B*200", "a pointer to byte 400 of out0_logits, which has 400"),
    ],
)
def test_addresses_outside_their_memory_are_refused(place: int, offset: str, message: str) -> None:
    data = json.loads(record().to_text())
    launch_of(data)["pointers"][1] = [place, offset]
    with pytest.raises(
        NemocError, match=r"launches.json: prefill, launch 0 of 'add_1': has"
    ) as caught:
        table(LaunchRecord.from_json(data, "launches.json")).at("prefill", (2, 3, 5))
    assert message in one_line(caught)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("B - 3", "launch 0 of 'add_1': has -1 tasks, expected 0 to 2147483647"),
        ("C**4", "launch 0 of 'add_1': has 62500000000 tasks, expected 0 to 2147483647"),
        ("B/3", "prefill: dimension B/3 is 2/3 when"),
    ],
)
def test_numbers_of_tasks_that_are_none_are_refused(tasks: str, message: str) -> None:
    data = json.loads(record().to_text())
    launch_of(data)["tasks"] = tasks
    with pytest.raises(NemocError, match=re.escape(message)) as caught:
        table(LaunchRecord.from_json(data, "launches.json")).at("prefill", (2, 3, 500))
    one_line(caught)


def test_a_record_of_something_else_is_refused() -> None:
    with pytest.raises(NemocError, match="target is 'cuda:sm_90', expected 'cuda:sm_80'"):
        table(record(), target="cuda:sm_80")
    every = frozenset({"prefill", "decode", "prefill_all"})
    with pytest.raises(NemocError, match="the function 'prefill_all' is missing"):
        table(record(), functions=every)
    with pytest.raises(NemocError, match="the function 'prefill' is none of the program's"):
        table(record(), functions=frozenset({"decode"}))
    with pytest.raises(NemocError, match="prefill works on 6 pieces of memory, expected 5"):
        table(record(), inputs=INPUTS[:1])


def test_the_logits_of_all_tokens_are_larger() -> None:
    both = {n: step_function(n, L) for n in ("prefill", "prefill_all")}
    for name, size in (("prefill", 3 * 200), ("prefill_all", 3 * 7 * 200)):
        made = LaunchRecord.of("cuda:sm_90", 1 << 16, {"add_1": ADD, "mix_2": MIX}, both.values())
        data = json.loads(made.to_text())
        signatures = dict.fromkeys(both, Signature(INPUTS, (), ()))
        for offset in (size - 4, size):
            data["functions"][name]["launches"][1]["pointers"][1] = [5, str(offset)]
            given = LaunchRecord.from_json(data, "x")
            found = LaunchTable(given, program(functions=frozenset(both)), signatures, 1000, "x")
            if offset < size:
                found.at(name, (3, 7, 5))
            else:
                with pytest.raises(NemocError, match="of out0_logits, which has"):
                    found.at(name, (3, 7, 5))


def test_a_kernel_gets_pointers_then_sizes_then_what_its_compiler_added() -> None:
    hidden = (0x1000, 0x2000)
    assert ADD.arguments((1, 2, 3), (4, 5, 6), hidden) == (1, 2, 3, 4, 5, 6, 0, 0)
    assert MIX.arguments((1, 2), (4, 5, 6), hidden) == (1, 2, 4, 5, 6, 0x1000, 0)
    both = dataclasses.replace(MIX, profile_scratch=1)
    assert both.arguments((1, 2), (4, 5, 6), hidden) == (1, 2, 4, 5, 6, 0x1000, 0x2000)
    plain = dataclasses.replace(ADD, parameters=6)
    assert plain.arguments((1, 2, 3), (4, 5, 6), hidden) == (1, 2, 3, 4, 5, 6)


def test_what_was_used_last_is_kept() -> None:
    recent: Recent[str, int] = Recent(2)
    for name, value in (("a", 1), ("b", 2)):
        recent.put(name, value)
    assert recent.get("a") == 1
    recent.put("c", 3)
    assert [recent.get(name) for name in "abc"] == [1, None, 3]
    recent.discard("a")
    recent.discard("never there")
    assert len(recent) == 1
    recent.clear()
    assert len(recent) == 0


def test_states_of_models_have_sizes_that_functions_give(
    contents: Callable[..., Any],
) -> None:
    functions: Mapping[str, Any] = contents().functions
    layout = Layout.of((s.name, s.type) for s in functions["prefill"].states)
    for sizes in ((1, 1, 1), (3, 1, 199), (2, 1, 64)):
        at = layout.at(dict(zip("BLC", sizes, strict=True)))
        for slot, fixed in zip(layout, at, strict=True):
            again = parse_dim(str(slot.offset))
            assert dim_function(again)(sizes) == fixed.offset
        assert dim_function(layout.bytes)(sizes) == at.bytes
