"""What CPU lowerings can choose: whatever is chosen, kernels are right, and where they say so, equal to the bit."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from nemoc.codegen.plan import Site
from nemoc.codegen.tunables import Choices, IllegalSchedule, Schedule, Tunable
from nemoc.codegen.tuned import tuned
from nemoc.codegen.tvm.emit import emit
from nemoc.codegen.tvm.target import cpu_target
from nemoc.ir import NemocError, parse
from nemoc.ir.graph import Node
from nemoc.ir.interpreter import interpret
from nemoc.ir.op import Env
from nemoc.ir.sample_inputs import sample_arguments
from support.kernels import CompiledSite, KernelSuite
from support.mixers import mixer_operands, mixer_region
from support.nvfp4 import codes_or_scales

FOLDER = Path(__file__).parent.parent / "golden" / "codegen"
SIZES = {"B": 2, "L": 45, "C": 150}
NAMES = (
    "attention",
    "attention-decode",
    "causal_conv",
    "fused-experts",
    "fused-int8",
    "fused-linear",
    "fused-nvfp4",
    "fused-rows",
    "linear",
    "ssd_scan",
)
SUITE = KernelSuite()


@dataclass(frozen=True)
class Case:
    """A site, and what it is run on."""

    site: Site
    operands: tuple[torch.Tensor, ...]


def from_golden(name: str) -> Case:
    text = (FOLDER / f"{name}.txt").read_text().partition("// ---\n")[0]
    graph = parse(text)
    op = graph.nodes[-1].op
    (rows, *_) = Env(SIZES).shape(op.result_types()[0].shape)
    given = {n: plausible(n, t, rows) for n, t in sample_arguments(graph, SIZES).items()}
    values = {v: given[v.name] for v in graph.arguments}

    def keep(node: Node, results: tuple[torch.Tensor, ...]) -> None:
        values.update(zip(node.results, results, strict=True))

    interpret(graph, given, observe=keep)
    return Case(Site.dense(op), tuple(values[v] for v in op.operands()))


def plausible(name: str, tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Operands as they are in models: offsets ascend to the number of rows, rates are negative, scales small."""
    if name == "offsets":
        tensor = tensor.sort().values
        tensor[0], tensor[-1] = 0, rows
    if name == "a":
        return -tensor.exp()
    if name == "dt":
        return tensor.abs()
    if name == "g":
        return tensor.abs() / 2688 + 1e-4
    return codes_or_scales(tensor, torch.Generator().manual_seed(rows))


def around_a_scan() -> Case:
    site = Site.dense(mixer_region(heads=4, width=24, groups=2, size=20, norms=2))
    return Case(site, tuple(mixer_operands(site, SIZES, [45, 31], seed=1)))


CASES = {name: from_golden(name) for name in NAMES} | {"around a scan": around_a_scan()}


def tunables_of(site: Site) -> list[Tunable]:
    choices = Choices()
    emit(dataclasses.replace(site, choices=choices), SUITE.target)
    return list(choices.asked.values())


def legal(site: Site, wanted: dict[str, int | str]) -> dict[str, int | str]:
    """As much of a schedule as is legal."""
    chosen: dict[str, int | str] = {}
    for name, value in wanted.items():
        try:
            choices = Choices(chosen | {name: value})
            emit(dataclasses.replace(site, choices=choices), SUITE.target)
        except IllegalSchedule:
            continue
        chosen[name] = value
    return chosen


def schedules(site: Site) -> Iterator[tuple[Schedule, bool]]:
    """The least and the greatest of what keeps bits, the greatest of everything; and whether bits are kept."""
    found = tunables_of(site)
    for keeps, end in ((True, 0), (True, -1), (False, -1)):
        some = [t for t in found if t.keeps_bits or not keeps]
        yield legal(site, {t.name: t.values[end] for t in some}), keeps


def compiled(case: Case, schedule: Schedule) -> CompiledSite:
    site = dataclasses.replace(case.site, choices=Choices(schedule))
    return SUITE.add(site, emit)


VARIANTS = {
    name: (compiled(case, {}), [(compiled(case, s), keeps) for s, keeps in schedules(case.site)])
    for name, case in CASES.items()
}


def test_every_choice_is_right_and_keeps_bits_where_it_says_so() -> None:
    """In one test, so that one process compiles all kernels together."""
    for name, (default, variants) in VARIANTS.items():
        operands = CASES[name].operands
        expected = default.run(SIZES, *operands)
        for variant, keeps in variants:
            variant.check(SIZES, *operands, tolerance=1e-5, threads=(2,))
            if keeps:
                found = variant.run(SIZES, *operands)
                assert all(map(torch.equal, found, expected)), f"{name}: {variant.plan.name}"


@pytest.mark.parametrize("name", CASES)
def test_choices_change_the_kernel(name: str) -> None:
    default, variants = VARIANTS[name]
    assert any(variant.plan.name != default.plan.name for variant, _ in variants)


def test_tile_that_does_not_fit_the_registers_is_illegal() -> None:
    narrow = dataclasses.replace(cpu_target(), registers=16)
    choices = Choices({"tile_rows": 8, "tile_vectors": 2})
    with pytest.raises(IllegalSchedule, match="8 rows by 2 vectors takes more than 16 registers"):
        emit(dataclasses.replace(CASES["linear"].site, choices=choices), narrow)


def test_schedule_is_taken_for_the_kernel_that_it_is_for() -> None:
    site = CASES["linear"].site
    default = emit(site, SUITE.target)
    lookup = {default.name: {"unroll": 4}}
    backend = tuned(lambda s: emit(s, SUITE.target), lambda name, *_: lookup.get(name, {}))
    assert backend(site).name != default.name
    other = CASES["fused-linear"].site
    assert backend(other).name == emit(other, SUITE.target).name


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"unroll": 3}, r"the schedule of linear_\w+: unroll is 3, expected one of 1, 2, 4"),
        ({"warps": 4}, r"the schedule of linear_\w+: no tunable is called 'warps'"),
    ],
)
def test_schedule_that_does_not_fit_is_one_line(schedule: Schedule, message: str) -> None:
    backend = tuned(lambda s: emit(s, SUITE.target), lambda *_: schedule)
    with pytest.raises(NemocError, match=message):
        backend(CASES["linear"].site)
