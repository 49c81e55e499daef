"""Pipelines: text both ways, the driver, what it says when something is wrong, plugins."""

import importlib.metadata
import sys
import types
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemoc.ir import Graph, IRError, NemocError, Node, ops, parse
from nemoc.passes import (
    PASSES,
    Pass,
    PassContext,
    PassError,
    PassRun,
    load_entry_points,
    load_plugin,
    parse_pipeline,
    passes_by_name,
    preset,
    print_pipeline,
    run_pipeline,
)
from nemoc.passes.canonicalize import Canonicalize
from nemoc.passes.cse import Cse
from nemoc.passes.dce import Dce

GRAPH = """graph @g {
  input %x: f32[B, 4]

  %a = scale(%x) {factor=1.0} : f32[B, 4]
  %b = silu(%a) : f32[B, 4]
  %c = silu(%a) : f32[B, 4]
  %y = mul(%b, %c) : f32[B, 4]
  return %y
}
"""


@dataclass(frozen=True)
class EveryOption(Pass):
    """Has an option of each kind."""

    count: int = 3
    share: float = 0.5
    is_deep: bool = False
    scope: str = "experts"
    names: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (1, 2)
    limit: int | None = None
    label: str | None = None

    def run(self, graph: Graph, ctx: PassContext) -> Graph:
        return graph


@dataclass(frozen=True)
class BreakTypes(Pass):
    """Gives an op's result a type that it does not have."""

    def run(self, graph: Graph, ctx: PassContext) -> Graph:
        *kept, last = graph.nodes
        return replace(graph, nodes=(*kept, Node(ops.Sum(last.op.operands()[0], 1), last.results)))


@dataclass(frozen=True)
class Crash(Pass):
    """Raises what no pass should."""

    def run(self, graph: Graph, ctx: PassContext) -> Graph:
        raise KeyError("lost")


@dataclass(frozen=True)
class End(Pass):
    """Ends the process."""

    def run(self, graph: Graph, ctx: PassContext) -> Graph:
        sys.exit(0)


@given(
    st.builds(
        EveryOption,
        count=st.integers(),
        share=st.floats(allow_nan=False),
        is_deep=st.booleans(),
        scope=st.text(),
        names=st.lists(st.text(), max_size=3).map(tuple),
        sizes=st.lists(st.integers(), max_size=3).map(tuple),
        limit=st.none() | st.integers(),
        label=st.none() | st.text() | st.sampled_from(["none", "true", "a b", '"', "\\", "é", ""]),
    )
)
def test_options_round_trip(pass_: EveryOption) -> None:
    text = print_pipeline((pass_, Cse()))
    assert parse_pipeline(text, (EveryOption,)) == (pass_, Cse())
    assert "\n" not in text or "\n" in pass_.scope


@pytest.mark.parametrize("kind", ["reference", "cpu"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_presets_round_trip(kind: str, phase: str) -> None:
    passes = preset(kind, "prefill" if phase == "prefill" else "decode")
    assert parse_pipeline(print_pipeline(passes)) == passes


def test_registered_passes_have_defaults_and_round_trip() -> None:
    for cls in PASSES:
        assert parse_pipeline(cls.name) == (cls(),)
        assert print_pipeline((cls(),)) == cls.name


def test_pass_name_file_and_class_agree() -> None:
    for cls in PASSES:
        assert cls.__module__ == "nemoc.passes." + cls.name.replace("-", "_")
        assert "".join(part.capitalize() for part in cls.name.split("-")) == cls.__name__


def test_pass_documents_before_and_after() -> None:
    for cls in PASSES:
        assert cls.__doc__ and "Before::" in cls.__doc__ and "After" in cls.__doc__
        assert cls.summary().endswith(".")


def test_spaces_are_free_and_defaults_unprinted() -> None:
    passes = parse_pipeline("  cse , every-option { count = 3 ,sizes=[ 4,5 ] }", (EveryOption,))
    assert print_pipeline(passes) == "cse,every-option{sizes=[4, 5]}"
    assert parse_pipeline("") == ()


def test_a_word_stands_for_the_usual_passes() -> None:
    usual = (Cse(), EveryOption())
    assert parse_pipeline("preset", usual=usual) == usual
    assert parse_pipeline("cse,preset,cse", usual=usual) == (Cse(), *usual, Cse())
    assert parse_pipeline("preset,cse", usual=()) == (Cse(),)
    with pytest.raises(NemocError, match="unknown pass 'preset'"):
        parse_pipeline("preset")
    with pytest.raises(NemocError, match=r"found '\{', expected ','"):
        parse_pipeline("preset{level=1}", usual=usual)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("canonicalise", "unknown pass 'canonicalise', did you mean canonicalize?"),
        ("zzz", "unknown pass 'zzz', expected one of specialize-decode, canonicalize"),
        ("cse,,dce", "unknown pass ','"),
        ("cse,", "found the end, expected a pass"),
        ("cse dce", "found 'dce', expected ','"),
        ("cse{x=1}", "pass cse has no option 'x'"),
        ("interleave-weights{blok=4}", "has no option 'blok', did you mean block?"),
        ("interleave-weights{block=four}", "option block is 'four', expected an integer"),
        ("interleave-weights{block=}", "option block is '}', expected an integer"),
        ("interleave-weights{block 4}", "found '4', expected '='"),
        ("interleave-weights{block=4,block=5}", "option block is given twice"),
        ("interleave-weights{block=4", "found the end, expected ','"),
        ("interleave-weights{", "found the end, expected '}'"),
        ("canonicalize{without=[a b]}", "option without is 'b', expected ',' or ']'"),
        ("canonicalize{without=a}", "option without is 'a', expected a list in brackets"),
        (
            "canonicalize{without=[scale-by-on]}",
            "pass canonicalize: option without names no rule 'scale-by-on', "
            "did you mean scale-by-one",
        ),
        (
            "interleave-weights{block=-3}",
            "pass interleave-weights: option block is -3, expected at least 0",
        ),
        ("canonicalize{without=[a", "option without is the end, expected ',' or ']'"),
        ("cse;dce", "unexpected ';'"),
        ("every-option{is-deep=yes}", "option is-deep is 'yes', expected true or false"),
        ("every-option{share=[}", "option share is '[', expected a number"),
        ("every-option{scope=,}", "option scope is ',', expected a word"),
    ],
)
def test_bad_pipelines_are_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(NemocError) as caught:
        parse_pipeline(text, (EveryOption,))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_passes_of_one_name_are_refused() -> None:
    other = type("Cse", (Pass,), {})
    with pytest.raises(NemocError, match="two passes are called cse"):
        passes_by_name((other,))
    assert passes_by_name((Cse,))["cse"] is Cse


def test_driver_tells_each_run_and_returns_the_last_graph() -> None:
    runs: list[PassRun] = []
    passes = parse_pipeline("canonicalize,cse,cse,dce")
    graph = parse(GRAPH)
    after = run_pipeline(graph, passes, PassContext(), on_pass=runs.append)
    assert [r.place for r in runs][1] == "pass 2 of 4 (cse)"
    assert runs[1].reproduces == "canonicalize,cse"
    assert [r.after is r.before for r in runs] == [False, False, True, True]
    assert all(a.after is b.before for a, b in pairwise(runs))
    assert runs[-1].after is after
    assert all(r.seconds >= 0 for r in runs)


def test_remarks_name_pass_and_site() -> None:
    ctx = PassContext()
    run_pipeline(parse(GRAPH), parse_pipeline("canonicalize,cse"), ctx)
    assert [(r.pass_name, r.site, r.message) for r in ctx.remarks] == [
        ("canonicalize", "g/%a", "scale-by-one"),
        ("cse", "g/%c", "the same as %b"),
    ]
    assert ctx.remarks[1].saved.bytes == 32 * parse(GRAPH).inputs[0].shape[0]


def test_nothing_to_do_returns_the_same_graph() -> None:
    graph = parse("graph @g {\n input %x: f32[B]\n %y = exp(%x) : f32[B]\n return %y\n}")
    assert run_pipeline(graph, tuple(cls() for cls in PASSES), PassContext()) is graph


def test_invalid_result_names_pass_position_and_pipeline() -> None:
    passes = (Canonicalize(without=("scale-by-one",)), Cse(), BreakTypes(), Dce())
    with pytest.raises(PassError) as caught:
        run_pipeline(parse(GRAPH), passes, PassContext())
    message = str(caught.value)
    assert message.startswith("pass 3 of 4 (break-types): g/%y: sum gives f32[B]")
    assert "--pipeline 'canonicalize{without=[scale-by-one]},cse,break-types'" in message


def test_crash_is_wrapped_with_its_cause() -> None:
    with pytest.raises(PassError, match=r"pass 2 of 2 \(crash\): KeyError: 'lost'") as caught:
        run_pipeline(parse(GRAPH), (Cse(), Crash()), PassContext())
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_pass_that_ends_the_process_has_failed() -> None:
    with pytest.raises(PassError, match=r"pass 1 of 1 \(end\): SystemExit: 0"):
        run_pipeline(parse(GRAPH), (End(),), PassContext())


def test_invalid_input_is_not_blamed_on_a_pass() -> None:
    graph = BreakTypes().run(parse(GRAPH), PassContext())
    with pytest.raises(IRError, match="sum gives"):
        run_pipeline(graph, (Cse(),), PassContext())
    assert run_pipeline(graph, (), PassContext(), verify=False) is graph


def test_plugin_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_passes.py").write_text(
        "from dataclasses import dataclass\n"
        "from nemoc.passes import Pass\n"
        "@dataclass(frozen=True)\n"
        "class MyPass(Pass):\n"
        "    '''Mine.'''\n"
        "    level: int = 1\n"
        "    def run(self, graph, ctx):\n"
        "        return graph\n"
        "NEMOC_PASSES = [MyPass]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (mine,) = load_plugin("my_passes")
    (pass_,) = parse_pipeline("my-pass{level=2}", (mine,))
    assert (pass_.name, print_pipeline((pass_,))) == ("my-pass", "my-pass{level=2}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("NEMOC_PASSES = [3]", "plugin broken_plugin: 3 is no pass class"),
        ("", "plugin broken_plugin has no list NEMOC_PASSES"),
        ("import nowhere_at_all", "plugin broken_plugin: ModuleNotFoundError"),
        ("raise SystemExit(0)", "plugin broken_plugin: SystemExit: 0"),
    ],
)
def test_broken_plugins(
    content: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_plugin.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_plugin", raising=False)
    with pytest.raises(NemocError, match=message):
        load_plugin("broken_plugin")


def test_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("announced")
    vars(module)["EveryOption"] = EveryOption
    monkeypatch.setitem(sys.modules, "announced", module)

    def announce(value: str) -> None:
        entry = importlib.metadata.EntryPoint("every", value, "nemoc.passes")
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry])

    announce("announced:EveryOption")
    assert load_entry_points() == (EveryOption,)
    announce("announced:Missing")
    with pytest.raises(NemocError, match="entry point every"):
        load_entry_points()


def test_unknown_target_kind_has_no_preset() -> None:
    with pytest.raises(NemocError, match="no preset for target 'tpu', expected one of reference"):
        preset("tpu", "prefill")
