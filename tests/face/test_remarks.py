"""What passes did, refused and saved, as text: grouped or site by site, in closed form and in numbers."""

from pathlib import Path

import pytest
import sympy

from nemoc.__main__ import main
from nemoc.ir.cost import Cost
from nemoc.ir.dims import B, C, Dim, L, T, symbol
from nemoc.passes import Remark
from nemoc.remarks import Saving, Shape, describe_saving, render_remarks

FUSED = Cost(flops=0, read=60 * B * L, written=36 * B * L)


def fused(site: str, saved: Cost = FUSED, launches: Dim = 1, message: str = "linear") -> Remark:
    return Remark("fuse", f"step/%{site}", message, saved, launches)


def refused(site: str, saved: Cost | None = None) -> Remark:
    message = f"add stays outside: its add needs %{site}.out"
    return Remark("fuse", f"step/%{site}", message, saved or Cost(), refused=True)


def lines(*said: Remark, passes: str = "fuse", by_site: bool = False) -> list[str]:
    return list(render_remarks(passes.split(","), said, Shape(), by_site))


def test_equal_remarks_are_one_group_and_changes_come_before_refusals() -> None:
    assert lines(refused("a"), fused("b"), refused("c"), fused("d"), refused("e")) == [
        "fuse: 2 changes, 3 refused",
        "       2 x linear",
        "           each saves 96*B*L bytes, 0 flops, 1 launch; at B=1 L=256 T=0: saves 24.6 kB, 1 launch",
        "       3 x refused: add stays outside: its add needs %_",
        "  in all saves 192*B*L bytes, 0 flops, 2 launches; at B=1 L=256 T=0: saves 49.2 kB, 2 launches",
    ]


def test_every_site_by_name() -> None:
    assert lines(refused("a"), fused("b"), fused("d", Cost(), 0), by_site=True) == [
        "fuse: 2 changes, 1 refused",
        "  step/%b: linear",
        "      saves 96*B*L bytes, 0 flops, 1 launch; at B=1 L=256 T=0: saves 24.6 kB, 1 launch",
        "  step/%d: linear",
        "  step/%a: refused: add stays outside: its add needs %a.out",
        "  in all saves 96*B*L bytes, 0 flops, 1 launch; at B=1 L=256 T=0: saves 24.6 kB, 1 launch",
    ]


@pytest.mark.parametrize(
    "other",
    [
        fused("b", Cost(read=96 * B)),
        fused("b", launches=2),
        fused("b", message="rows"),
        fused("b", Cost(1, FUSED.read, FUSED.written)),
    ],
)
def test_a_group_agrees_in_message_and_saving(other: Remark) -> None:
    groups = [line for line in lines(fused("a"), other, fused("c")) if " x " in line]
    assert groups == ["       2 x linear", f"       1 x {other.message}"]


def test_savings_that_add_up_to_nothing_are_said() -> None:
    back = Cost(read=-96 * B * L)
    total = lines(fused("a"), fused("b", back, launches=-1))[-1]
    assert total == "  in all saves 0 bytes, 0 flops, 0 launches"


def test_passes_are_in_order_and_none_is_lost() -> None:
    said = [Remark("cse", "g/%a", "is %b"), Remark("own", "g/%c", "done"), fused("d", Cost(), 0)]
    assert lines(*said, passes="fuse,cse,dce,cse") == [
        "fuse: 1 change",
        "       1 x linear",
        "cse (2 runs): 1 change",
        "       1 x is %_",
        "dce: 0 changes",
        "own: 1 change",
        "       1 x done",
    ]


def test_what_was_refused_would_have_saved_and_is_in_no_total() -> None:
    assert lines(refused("a", Cost(flops=-8 * B, read=4 * B)), fused("b", Cost(), 0)) == [
        "fuse: 1 change, 1 refused",
        "       1 x linear",
        "       1 x refused: add stays outside: its add needs %_",
        "           would save 4*B bytes, 0 launches, would cost 8*B flops; "
        "at B=1 L=256 T=0: would save 4 B, would cost 8 FLOP",
    ]


SAVINGS = {
    "only costs": (
        Saving(-4096, -4096 * B * L, 0),
        "costs 4096 bytes, 4096*B*L flops, 0 launches; at B=2 L=100 T=7: costs 4.10 kB, 819 kFLOP",
    ),
    "more launches": (
        Saving(B * L, 0, -1),
        "saves B*L bytes, 0 flops, costs 1 launch; at B=2 L=100 T=7: saves 200 B, costs 1 launch",
    ),
    "terms of both signs": (
        Saving(1024 * B - 4096, 0, 1),
        "saves 1024*B - 4096 bytes, 0 flops, 1 launch; "
        "at B=2 L=100 T=7: saves 1 launch, costs 2.05 kB",
    ),
    "cache": (
        Saving(B * C, B * T, 0),
        "saves B*C bytes, B*T flops, 0 launches; at B=2 L=100 T=7: saves 214 B, 14 FLOP",
    ),
    "nothing at this shape": (
        Saving(B * L - 200, 0, 0),
        "saves B*L - 200 bytes, 0 flops, 0 launches; at B=2 L=100 T=7: saves 0 B",
    ),
    "ceilings": (
        Saving(0, 0, sympy.ceiling(L / 16) - 1),
        "saves 0 bytes, 0 flops, ceiling(L/16) - 1 launches; at B=2 L=100 T=7: saves 6 launches",
    ),
    "powers": (
        Saving(1000 * B - 1000 * B * sympy.Rational(63, 64) ** (6 * B * L), 0, 0),
        "saves -1000*(63/64)**(6*B*L)*B + 1000*B bytes, 0 flops, 0 launches; "
        "at B=2 L=100 T=7: saves 2.00 kB",
    ),
    "a symbol of the graph's own": (
        Saving(B * symbol("N"), 3, 0),
        "saves B*N bytes, 3 flops, 0 launches; at B=2 L=100 T=7: depends on N",
    ),
}


@pytest.mark.parametrize(("saving", "text"), SAVINGS.values(), ids=SAVINGS.keys())
def test_a_saving_in_closed_form_and_numbers(saving: Saving, text: str) -> None:
    assert describe_saving(saving, Shape(2, 100, 7)) == text


def test_numbers_at_a_long_context() -> None:
    power = sympy.Rational(63, 64) ** (6 * B * L)
    saving = Saving(B * L * (1 - power), B * L * T, C).at(Shape(8, 1 << 20, 1 << 20))
    assert saving == Saving(1 << 23, 1 << 43, 1 << 21)


GRAPH = """graph @twice {
  input %x: f32[B, L, 4]
  param %w: f32[8, 4]

  %y = linear(%x, %w) : f32[B, L, 8]
  %z = relu(%y) : f32[B, L, 8]
  %v = linear(%x, %w) : f32[B, L, 8]
  return %z, %v
}
"""


@pytest.fixture
def graph_file(tmp_path: Path) -> str:
    path = tmp_path / "twice.ir"
    path.write_text(GRAPH)
    return str(path)


def remarks(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    code = main(("ir", *arguments, "--remarks", "--target", "cpu"))
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    return captured.out.splitlines()


def test_command_says_what_a_pipeline_saves(
    capsys: pytest.CaptureFixture[str], graph_file: str
) -> None:
    shape = ("--batch", "2", "--tokens", "10", "--cached", "3")
    arguments = (graph_file, "--pipeline", "dce,fuse-epilogues", *shape)
    out = remarks(capsys, *arguments)
    numbers = "saves 64*B*L bytes, 0 flops, 1 launch; at B=2 L=10 T=3: saves 1.28 kB, 1 launch"
    assert out == [
        "dce: 0 changes",
        "fuse-epilogues: 1 change",
        "       1 x linear of linear, relu",
        f"           {numbers}",
        f"  in all {numbers}",
    ]
    assert remarks(capsys, *arguments, "--sites")[2] == "  twice/%z: linear of linear, relu"


def test_decode_has_one_token(capsys: pytest.CaptureFixture[str], graph_file: str) -> None:
    arguments = ("--function", "decode", "--tokens", "10", "--cached", "3")
    out = remarks(capsys, graph_file, "--pipeline", "fuse-epilogues", *arguments)
    assert out[-1].endswith("at B=1 L=1 T=3: saves 64 B, 1 launch")
