"""Faults planted in lowerings: the kernel check finds each of them.

A fault is a change of the plan that an emitter makes, of its kernels' text or of a piece of an emitter. The same kernel
without it passes, on the same operands.
"""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch

from nemoc.codegen.guarded import KernelFault
from nemoc.codegen.mixer import Mixer
from nemoc.codegen.plan import Kernel, Plan, Site, Stage, View
from nemoc.codegen.tvm import norm
from nemoc.codegen.tvm.attention import emit_attention
from nemoc.codegen.tvm.cache import emit_cache_write
from nemoc.codegen.tvm.conv import Convolution
from nemoc.codegen.tvm.conv_scan import emit_conv_scan
from nemoc.codegen.tvm.harness import Emitter
from nemoc.codegen.tvm.linear import emit_linear
from nemoc.codegen.tvm.mixer_task import MixerTask
from nemoc.codegen.tvm.norm import emit_rms_norm
from nemoc.codegen.tvm.scan import _Scan
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.ir.dims import B, C, L, dim
from nemoc.ir.dtypes import DType
from nemoc.ir.ops import Attention, CacheWrite, GroupedLinear, Linear, RmsNorm
from support.kernels import CompiledSite, KernelSuite, value
from support.mixers import mixer_operands, mixer_region

F32, I32 = DType.F32, DType.I32
TOLERANCE = 1e-5
SIZES = {"B": 2, "L": 70, "C": 90}

Operands = Callable[[Site], list[torch.Tensor]]
Patch = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Case:
    """A kernel that can be broken.

    Attributes:
        site: what it computes.
        emit: its emitter.
        operands: what it is run on.
    """

    site: Site
    emit: Emitter
    operands: Operands


@dataclass(frozen=True)
class Fault:
    """Something wrong with a kernel.

    Attributes:
        case: the kernel, by its name in `CASES`.
        change: what happens to the plan.
        patch: what holds while it is emitted.
        emit: another emitter, which is wrong for the case.
    """

    case: str
    change: Callable[[Plan], Plan] = lambda plan: plan
    patch: Patch = nullcontext
    emit: Emitter | None = None


def drawn(**integers: list[int]) -> Operands:
    """Normal random numbers, and these integers for the operand fields of these names."""

    def draw(site: Site) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        fixed = {site.arg(name).index: v for name, v in integers.items()}
        found = []
        for i, view in enumerate(site.operands):
            shape = [n if isinstance(n, int) else _size(n) for n in view.shape]
            if i in fixed:
                found.append(torch.tensor(fixed[i], dtype=torch.int32))
            else:
                found.append(torch.randn(shape, generator=generator).to(view.dtype.torch))
        return found

    return draw


def _size(n: object) -> int:
    return SIZES[str(n)] if str(n) in SIZES else SIZES["B"] * SIZES["L"]


def mixed(valid: list[int]) -> Operands:
    return lambda site: mixer_operands(site, SIZES, valid, 1)


def sliced_norm() -> Site:
    """A norm of columns of wider rows."""
    site = Site.dense(RmsNorm(value(F32, B, L, 40), value(F32, 40), 1e-5))
    x = View(F32, (B, L, 40), (100 * L, 100, 1))
    return Site(site.op, (x, site.operands[1]), site.results)


def replace(old: str, new: str, stage: int = 0) -> Callable[[Plan], Plan]:
    """A change of a kernel's text, wherever it says `old`."""

    def change(plan: Plan) -> Plan:
        kernel = plan.stages[stage].kernel
        assert old in kernel.source, f"{old} is not in {kernel.name}: plant the fault anew"
        source = kernel.source.replace(old, new)
        return with_kernel(plan, stage, dataclasses.replace(kernel, source=source))

    return change


def fewer_tasks(plan: Plan) -> Plan:
    kernel = plan.stages[0].kernel
    return with_kernel(plan, 0, dataclasses.replace(kernel, tasks=dim(kernel.tasks - 1)))


def with_kernel(plan: Plan, number: int, kernel: Kernel) -> Plan:
    stages = list(plan.stages)
    stages[number] = Stage(kernel, stages[number].args)
    return dataclasses.replace(plan, stages=tuple(stages))


def reversed_stages(plan: Plan) -> Plan:
    return dataclasses.replace(plan, stages=plan.stages[::-1])


def dense_instead(site: Site, target: CpuTarget) -> Plan:
    return emit_rms_norm(Site.dense(site.op), target)


def patched(owner: object, name: str, new: Callable[..., Any]) -> Patch:
    """Hold `new` in an attribute's place; it is given what was there before its other arguments."""
    old = getattr(owner, name)
    return lambda: mock.patch.object(owner, name, lambda *args: new(old, *args))


def reload_state(old: Callable[..., None], self: Any, *args: str) -> None:
    """Every block of tokens begins with the state as it was before the first."""
    old(self, *args)
    with self._writer.loop("j", self._task.heads) as j:
        self._copy_state(j, inward=True)


CASES = {
    "norm": Case(sliced_norm(), emit_rms_norm, drawn()),
    "ragged norm": Case(
        Site.dense(RmsNorm(value(F32, B, L, 45), value(F32, 45), 1e-5)), emit_rms_norm, drawn()
    ),
    "linear": Case(
        Site.dense(
            Linear(value(F32, B * L, 24), value(F32, 2, 24, 32), interleave=32, features=50)
        ),
        emit_linear,
        drawn(),
    ),
    "grouped": Case(
        Site.dense(
            GroupedLinear(
                value(F32, B * L, 24),
                value(F32, 3, 1, 24, 32),
                value(I32, 4),
                interleave=32,
                features=32,
            )
        ),
        emit_linear,
        drawn(offsets=[0, 61, 61, 140]),
    ),
    "cache": Case(
        Site.dense(CacheWrite(value(F32, B, C, 2, 20), value(F32, B, L, 2, 20), value(I32, B))),
        emit_cache_write,
        drawn(lengths=[0, 60]),
    ),
    "attention": Case(
        Site.dense(
            Attention(
                value(F32, B, L, 4, 16),
                value(F32, B, C, 2, 16),
                value(F32, B, C, 2, 16),
                value(I32, B),
                0.25,
            )
        ),
        emit_attention,
        drawn(lengths=[20, 3]),
    ),
    "decode attention": Case(
        Site.dense(
            Attention(
                value(F32, B, 1, 4, 16),
                value(F32, B, C, 2, 16),
                value(F32, B, C, 2, 16),
                value(I32, B),
                0.25,
            )
        ),
        emit_attention,
        drawn(lengths=[80, 3]),
    ),
    "mixer": Case(Site.dense(mixer_region(4, 16, 2, 16, norms=2)), emit_conv_scan, mixed([70, 41])),
    "mixer, tails": Case(
        Site.dense(mixer_region(4, 20, 2, 24, norms=2)), emit_conv_scan, mixed([33, 70])
    ),
    "mixer, one group": Case(
        Site.dense(mixer_region(4, 16, 1, 16, norms=1)), emit_conv_scan, mixed([70, 41])
    ),
    "decode mixer": Case(
        Site.dense(mixer_region(4, 16, 2, 16, decode=True)), emit_conv_scan, mixed([1, 0])
    ),
}

FAULTS = {
    "a padding token advances the state": Fault("mixer", replace("< live,", "<= live,")),
    "the state is lost between blocks": Fault(
        "mixer", patch=patched(_Scan, "_prepare_block", reload_state)
    ),
    "heads read another group": Fault("mixer", replace("T.bind(head // 2)", "T.bind(head // 4)")),
    "the first tokens see no history": Fault(
        "mixer, tails",
        patch=patched(
            Convolution,
            "for_each_token",
            lambda old, self, first, *args: old(self, f"{first} + 99", *args),
        ),
    ),
    "the history is not shifted": Fault(
        "decode mixer", patch=patched(MixerTask, "shift_history", lambda old, self: None)
    ),
    "tasks shift a history that others read": Fault(
        "mixer, one group", patch=patched(Mixer, "owns_history", lambda old, self, heads: True)
    ),
    "launches run in the wrong order": Fault("mixer, one group", reversed_stages),
    "the tail of a row is left out": Fault(
        "ragged norm",
        patch=patched(
            norm,
            "each_vector",
            lambda old, w, count, lanes, body: old(w, count // lanes * lanes, lanes, body),
        ),
    ),
    "strides of a dense operand": Fault("norm", emit=dense_instead),
    "the last panel is skipped": Fault("linear", fewer_tasks),
    "the last panel is stored whole": Fault("linear", replace("<= 50:", "<= 64:")),
    "the last row of a group is skipped": Fault("grouped", replace("+ 1] - ", "+ 1] - 1 - ")),
    "no guard at the capacity": Fault("cache", replace("if to < C:", "if to <= C:")),
    "a token sees the next one": Fault("attention", replace(") <= limits", ") - 1 <= limits")),
    "scratch that nobody wrote": Fault(
        "decode attention", replace("count = T.bind((", "count = T.bind(1 + (", stage=1)
    ),
}


def broken(case: Case, fault: Fault, number: int) -> Emitter:
    """The case's emitter with a fault, its kernels under names of their own."""

    def emit(site: Site, target: CpuTarget) -> Plan:
        with fault.patch():
            plan = fault.change((fault.emit or case.emit)(site, target))
        for i, stage in enumerate(plan.stages):
            name = f"{stage.kernel.name}_fault{number}"
            source = stage.kernel.source.replace(stage.kernel.name, name)
            kernel = dataclasses.replace(stage.kernel, name=name, source=source)
            plan = with_kernel(plan, i, kernel)
        return plan

    return emit


SUITE = KernelSuite()
WHOLE = {name: SUITE.add(case.site, case.emit) for name, case in CASES.items()}
BROKEN = {
    name: SUITE.add(CASES[fault.case].site, broken(CASES[fault.case], fault, number))
    for number, (name, fault) in enumerate(FAULTS.items())
}


def check(compiled: CompiledSite, case: Case) -> None:
    compiled.check(SIZES, *case.operands(case.site), tolerance=TOLERANCE, threads=(1,))


@pytest.mark.parametrize("name", CASES)
def test_without_faults_all_is_well(name: str) -> None:
    check(WHOLE[name], CASES[name])


@pytest.mark.parametrize("name", FAULTS)
def test_the_check_finds_the_fault(name: str) -> None:
    fault = FAULTS[name]
    changed = [s.kernel.source.partition("(")[2] for s in BROKEN[name].plan.stages]
    whole = [s.kernel.source.partition("(")[2] for s in WHOLE[fault.case].plan.stages]
    assert changed != whole or fault.change is fewer_tasks, "the fault changes nothing"
    with pytest.raises((AssertionError, KernelFault)):
        check(BROKEN[name], CASES[fault.case])


def test_out_of_bounds_is_told_apart_from_wrong() -> None:
    for name in ("the last panel is stored whole", "no guard at the capacity"):
        with pytest.raises(KernelFault, match="written where it must not be"):
            check(BROKEN[name], CASES[FAULTS[name].case])
