"""Candidates in child processes: good ones are checked and timed, and what is wrong with the others is named."""

import dataclasses
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nemoc.codegen.bench import Finding
from nemoc.codegen.plan import Plan, Site, View, kernel_name
from nemoc.codegen.tunables import Choices
from nemoc.codegen.tvm.emit import emit
from nemoc.codegen.tvm.laboratory import WORKERS, Laboratory, Subject
from nemoc.codegen.tvm.target import cpu_target
from nemoc.ir.dims import B
from nemoc.ir.dtypes import DType
from nemoc.ir.ops import Linear
from nemoc.ir.types import TensorType
from support.kernels import value

SIZES = {"B": 7, "L": 1, "C": 1}
TARGET = cpu_target()
SITE = Site.dense(
    Linear(value(DType.F32, B, 48), value(DType.BF16, 2, 48, 32), interleave=32, features=64)
)
DEFAULT = emit(SITE, TARGET)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    limits = dataclasses.replace(WORKERS, jobs=1, seconds=60.0, bytes=2 << 30)
    folder, store = (tmp_path_factory.mktemp(name) for name in ("lab", "store"))
    with Laboratory(TARGET, 2, folder, store, 1e-5, limits) as made:
        yield made


@pytest.fixture(scope="module")
def subject(laboratory: Laboratory) -> Subject:
    generator = torch.Generator().manual_seed(3)
    operands = (
        torch.randn(7, 48, generator=generator),
        torch.randn(2, 48, 32, generator=generator).bfloat16(),
    )
    made = laboratory.subject(SITE, DEFAULT, operands, SIZES, [True, False])
    assert made.compile([DEFAULT]) == {}
    return made


def sabotaged(statement: str) -> Plan:
    """The default with a statement before its end."""
    (stage,) = DEFAULT.stages
    source = stage.kernel.source
    head, end, _ = source.rpartition("        return 0")
    assert end
    name = kernel_name("sabotaged", statement)
    text = f"{head}        {statement}\n{end}\n".replace(stage.kernel.name, name)
    kernel = dataclasses.replace(stage.kernel, name=name, source=text)
    return dataclasses.replace(DEFAULT, stages=(dataclasses.replace(stage, kernel=kernel),))


def fault_of(subject: Subject, plan: Plan) -> Finding:
    assert subject.compile([plan]) == {}
    return subject.check(plan)


def test_candidate_is_compared_with_float64_and_with_the_default(subject: Subject) -> None:
    other = emit(dataclasses.replace(SITE, choices=Choices({"sums": 16})), TARGET)
    same = emit(dataclasses.replace(SITE, choices=Choices({"ahead": 0})), TARGET)
    assert subject.compile([other, same]) == {}
    for plan in (DEFAULT, same, other):
        found = subject.check(plan)
        assert found.outcome == "ok" and 0.0 < found.error < 1e-6
        assert found.equal == (plan is not other)


def test_times_are_of_every_candidate_in_every_round(subject: Subject) -> None:
    same = emit(dataclasses.replace(SITE, choices=Choices({"ahead": 0})), TARGET)
    assert subject.compile([same]) == {}
    times = subject.time([DEFAULT, same], rounds=3, seed=1)
    assert isinstance(times, list) and [len(t) for t in times] == [3, 3]
    assert all(s > 0.0 for seconds in times for s in seconds)


def test_no_threads_but_those_of_kernels_work_where_they_are_timed(subject: Subject) -> None:
    """Others go on spinning for a while on the processors that the next kernel needs."""
    script = (
        "import torch; from nemoc.codegen.tvm import trial_worker; "
        "trial_worker._start({'threads': 2}); print(torch.get_num_threads())"
    )
    command = (*WORKERS.command[:2], "-c", script)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]
    flushed = subject.laboratory._flush()
    assert isinstance(flushed, Path) and flushed.is_file()


def test_wrong_result_is_found(subject: Subject) -> None:
    fault = fault_of(subject, sabotaged("y[0, 0] = y[0, 0] * T.float32(1.5)"))
    assert fault.outcome == "wrong" and "relative error" in fault.message


def test_writing_outside_is_found(subject: Subject) -> None:
    fault = fault_of(subject, sabotaged("y[B, 3] = T.float32(0)"))
    assert fault.outcome == "wrong" and fault.message == "result0: written where it must not be"


def test_crash_is_named_with_its_signal(subject: Subject) -> None:
    fault = fault_of(subject, sabotaged('T.evaluate(T.call_extern("int32", "abort"))'))
    assert fault.outcome == "crash" and signal.SIGABRT.name in fault.message


def test_hang_ends_at_the_limit(tmp_path: Path) -> None:
    limits = dataclasses.replace(WORKERS, jobs=1, seconds=10.0)
    operands = (torch.randn(7, 48), torch.randn(2, 48, 32).bfloat16())
    (tmp_path / "lab").mkdir()
    with Laboratory(TARGET, 2, tmp_path / "lab", tmp_path / "store", 1e-5, limits) as laboratory:
        subject = laboratory.subject(SITE, DEFAULT, operands, SIZES, [True, False])
        hanging = sabotaged('T.evaluate(T.call_extern("int32", "pause"))')
        assert subject.compile([DEFAULT, hanging]) == {}
        subject.check(DEFAULT)  # whose process is up by then
        fault = subject.check(hanging)
        assert fault.outcome == "hang"
        assert "did not answer within 10 s" in fault.message


def test_what_needs_too_much_memory_is_named(subject: Subject) -> None:
    huge = View.dense(TensorType(DType.F32, (1 << 30,)))
    (stage,) = DEFAULT.stages
    fault = fault_of(subject, dataclasses.replace(DEFAULT, scratch=(huge,)))
    assert fault.outcome == "memory" and stage.kernel.name in DEFAULT.name


def test_source_that_does_not_compile_is_named_and_the_others_do(subject: Subject) -> None:
    broken, other = sabotaged("y[0, 0] = nothing_like_it"), sabotaged("y[0, 1] = y[0, 1]")
    faults = subject.compile([broken, other])
    assert list(faults) == [broken.name]
    assert (
        faults[broken.name].outcome == "compile"
        and "nothing_like_it" in faults[broken.name].message
    )


def test_kernel_at_other_sizes_is_another_subject(laboratory: Laboratory, subject: Subject) -> None:
    operands = (torch.randn(2, 48), torch.randn(2, 48, 32).bfloat16())
    other = laboratory.subject(SITE, DEFAULT, operands, SIZES | {"B": 2}, [True, False])
    assert other.folder != subject.folder
    assert other.compile([DEFAULT]) == {}
    assert other.check(DEFAULT).outcome == "ok"
