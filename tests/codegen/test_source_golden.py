"""Golden tests of generated source: for each op a small graph, and the plan of its last node, as text.

`tests/golden/codegen/<op>.txt` holds a graph, a line `// ---`, and the expected plan for a CPU with AVX2;
`tests/golden/triton/` has those of a few regions for a GPU. A refactoring leaves these files alone; after a change of
kernels `pytest --bless` writes them, and the difference shows what changed.
"""

from pathlib import Path

import pytest

from nemoc.codegen.plan import Plan, Site
from nemoc.codegen.triton.emit import emit as emit_gpu
from nemoc.codegen.triton.target import gpu_target
from nemoc.codegen.triton.writer import GpuKernel
from nemoc.codegen.tvm.emit import EMITTERS, emit
from nemoc.codegen.tvm.target import cpu_target
from nemoc.ir import parse

FOLDER = Path(__file__).parent.parent / "golden" / "codegen"
CASES = sorted(FOLDER.glob("*.txt"))
GPU_CASES = sorted((FOLDER.parent / "triton").glob("*.txt"))
SEPARATOR = "// ---\n"
TARGET = "cpu:x86-64-v3"
GPU = "cuda:sm_90"


def text_of(plan: Plan) -> str:
    """A plan as text: its launches, its memory, then its kernels."""
    lines = []
    for stage in plan.stages:
        args = ", ".join(map(str, stage.args))
        line = f"launch {stage.kernel.name}({args}): {stage.kernel.tasks} tasks"
        if isinstance(stage.kernel, GpuKernel):
            line += f", {stage.kernel.warps} warps, {stage.kernel.stages} stages"
        lines.append(line)
    for i, view in enumerate(plan.scratch):
        lines.append(f"scratch{i}: {view.dtype}{list(view.shape)}, strides {list(view.strides)}")
    for kind, pairs in (("in place", plan.in_place), ("update", plan.updates)):
        lines += [f"{kind}: result{r} in operand{o}" for r, o in pairs]
    kernels = dict.fromkeys(stage.kernel.source for stage in plan.stages)
    return "\n".join([*lines, "", *kernels])


@pytest.mark.parametrize("case", CASES, ids=lambda p: p.stem)
def test_golden(case: Path, bless: bool) -> None:
    given, _, expected = case.read_text().partition(SEPARATOR)
    op = parse(given, case.name).nodes[-1].op
    assert op.mnemonic() == case.stem.partition("-")[0]
    found = text_of(emit(Site.dense(op), cpu_target(TARGET)))
    if bless:
        case.write_text(given + SEPARATOR + found)
    else:
        assert found == expected


@pytest.mark.parametrize("case", GPU_CASES, ids=lambda p: p.stem)
def test_golden_of_a_gpu(case: Path, bless: bool) -> None:
    given, _, expected = case.read_text().partition(SEPARATOR)
    op = parse(given, case.name).nodes[-1].op
    found = text_of(emit_gpu(Site.dense(op), gpu_target(GPU)))
    if bless:
        case.write_text(given + SEPARATOR + found)
    else:
        assert found == expected


def test_every_op_has_a_case() -> None:
    missing = {op.mnemonic() for op in EMITTERS} - {case.stem.partition("-")[0] for case in CASES}
    assert not missing, f"no tests/golden/codegen/*.txt for {sorted(missing)}"


def test_equal_sites_give_equal_text() -> None:
    given, _, _ = (FOLDER / "rms_norm.txt").read_text().partition(SEPARATOR)
    target = cpu_target(TARGET)
    texts = {text_of(emit(Site.dense(parse(given).nodes[-1].op), target)) for _ in range(2)}
    assert len(texts) == 1
