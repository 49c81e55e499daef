"""The benchmarks on GPUs as users run them: what is listed, measured, kept and printed, and whole models."""

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import compile_gpu, gpu, gpu_stages, gpu_whole
from benchmarks.gpu_results import Journal, Line, quartiles, table
from benchmarks.gpu_session import LostDeviceError, Outcome, Session, Task, find_target
from benchmarks.gpu_stages import Case
from benchmarks.gpu_values import Sizes
from benchmarks.gpu_whole import WholeStage, fitting_layers
from click.testing import CliRunner, Result

import nemoc.codegen.triton.build
import nemoc.gpu
from nemoc.autotune.gpu_clock import in_turns, measure_roofs
from nemoc.autotune.measure import Roofs
from nemoc.codegen.triton.binary import Binary as CompiledKernel
from nemoc.codegen.triton.kernel_store import KernelStore
from nemoc.ir import NemocError
from nemoc.models import preset
from nemoc.runtime.launches import LAUNCHES
from support.fake_cuda import FakeDevice, FakeLibrary
from support.gpu_benchmark import (
    MACHINE,
    MINI,
    TARGET,
    CountingClock,
    SecondsClock,
    images_of,
    interpreted,
    model_of,
    quiet,
    session_on,
    small,
)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(gpu.main, arguments)


def test_list_prints_stages_and_cases() -> None:
    result = invoke("--list")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines if not line.startswith(" ")] == [
        "parity",
        "matmul",
        "nvfp4",
        "fp8",
        "scan",
        "update",
        "moe",
        "moe-quantized",
        "attention",
        "whole",
    ]
    for case in (
        "sample, bf16",
        "in_proj 1 x 8192",
        "expert up 2 x 1",
        "scan 1 x 32768",
        "moe, nvfp4, decode 64 x 1",
        "moe, nvfp4-fp8-prompts 1 x 2048",
        "decode 64 x 1 behind 1024",
    ):
        assert f"  {case}" in lines
    assert len(lines) == len(set(lines))


def test_list_of_a_stage_prints_no_other() -> None:
    result = invoke("--list", "--stage", "update")
    assert result.stdout.splitlines()[1:] == [f"  update {n} x 1" for n in (1, 4, 16, 64, 256)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((), "no NVIDIA GPU is at hand"), (("--stage", "none"), "no stage 'none', expected one of")],
)
def test_what_cannot_run_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


@pytest.mark.parametrize(
    ("capability", "target"),
    [
        ((9, 0), "cuda:sm_90"),
        ((8, 0), "cuda:sm_80"),
        ((8, 6), "cuda:sm_80"),
        ((10, 0), "cuda:sm_100"),
    ],
)
def test_the_target_is_the_device_s(capability: tuple[int, int], target: str) -> None:
    assert find_target(capability) == target


@pytest.mark.parametrize("capability", [(7, 5), (9, 9), (11, 0)])
def test_devices_without_a_target_are_refused(capability: tuple[int, int]) -> None:
    with pytest.raises(NemocError, match="no target for devices"):
        find_target(capability)


@dataclass
class CountedStage:
    """Two cases; notes which were measured."""

    codes: tuple[str, str] = ("a", "b")
    name: str = "counted"
    about: str = "nothing"
    measured: list[str] = field(default_factory=list)
    error: Exception | None = None

    def case_names(self) -> tuple[str, ...]:
        return ("first", "second")

    def tasks(self, session: Session) -> Iterator[Task]:
        for case, code in zip(self.case_names(), self.codes, strict=True):
            yield Task(case, code, lambda case=case: self._measure(case))  # type: ignore[misc]

    def _measure(self, case: str) -> list[Outcome]:
        self.measured.append(case)
        if self.error is not None:
            raise self.error
        return [
            Outcome("nemoc", "measured", "", (1e-3, 2e-3, 3e-3), 1e9, 1e9, error=1e-3, bound=1e-2),
            Outcome("peer", "measured", "", (3e-3, 4e-3, 5e-3), 1e9, 1e9, error=2e-3, bound=2e-2),
            Outcome("other", "unavailable", "is not installed"),
        ]


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    path, library = tmp_path / "deep" / "gpu.jsonl", FakeLibrary({})
    stage, told = CountedStage(), list[str]()
    assert session_on(library, Journal(path)).run(stage, told.append)
    assert stage.measured == ["first", "second"]
    assert told == ["counted: first", "counted: second"]
    assert session_on(library, Journal(path)).run(stage, told.append)
    assert stage.measured == ["first", "second"]
    changed = CountedStage(codes=("a", "changed"))
    session_on(library, Journal(path)).run(changed, told.append)
    assert changed.measured == ["second"]
    again = CountedStage()
    session_on(library, Journal(path), again=True).run(again, told.append)
    assert again.measured == ["first", "second"]
    assert len(path.read_text().splitlines()) == 5 * 3


def test_only_cases_that_match_are_measured(tmp_path: Path) -> None:
    stage = CountedStage()
    journal = Journal(tmp_path / "gpu.jsonl")
    session_on(FakeLibrary({}), journal, cases=re.compile("^sec")).run(stage, quiet)
    assert stage.measured == ["second"]


def test_what_was_compiled_ahead_is_not_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMOC_CACHE", str(tmp_path))
    stage = small(gpu_stages.matmul_stage(MINI), Case("o, decode", Sizes(1, 1)))
    monkeypatch.setattr(gpu, "stages", lambda: (stage,))
    ahead = invoke("--ahead", TARGET)
    assert ahead.exit_code == 0, ahead.output
    asked = list[str]()

    def compiled(variants: Iterable[Any], *others: Any, **options: Any) -> dict[Any, Any]:
        asked.extend(v.kernel.name for v in variants)
        return try_compiling(variants, *others, **options)

    try_compiling = nemoc.gpu.compile_variants
    monkeypatch.setattr(nemoc.gpu, "compile_variants", compiled)
    monkeypatch.setattr(nemoc.codegen.triton.build, "answers", None)  # nothing is to be compiled
    assert invoke("--ahead", TARGET).exit_code == 0
    assert asked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cases", "("), "--cases is '(', no regular expression"),
        (("--ahead", "cuda:sm_10"), "cuda:sm_10"),
    ],
)
def test_options_that_mean_nothing_end_with_one_line(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") <= 2


@pytest.mark.parametrize(("seconds", "measured"), [(-1, 0), (100, 0), (200, 2)])
def test_no_case_is_begun_without_time_for_it(tmp_path: Path, seconds: int, measured: int) -> None:
    stage = CountedStage()
    deadline = time.monotonic() + seconds
    session = session_on(FakeLibrary({}), Journal(tmp_path / "gpu.jsonl"), deadline=deadline)
    assert session.run(stage, quiet) == bool(measured)
    assert len(stage.measured) == measured


def test_a_case_that_fails_is_noted_and_the_next_measured(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "gpu.jsonl")
    stage = CountedStage(error=RuntimeError("broken\nin many lines"))
    assert session_on(FakeLibrary({}), journal).run(stage, quiet)
    assert stage.measured == ["first", "second"]
    assert [(x.status, x.note) for x in journal.lines] == [("failed", "RuntimeError: broken")] * 2


def test_a_lost_device_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, stage = Journal(tmp_path / "gpu.jsonl"), CountedStage()
    session = session_on(FakeLibrary({}), journal)

    def lose(self: FakeDevice) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(FakeDevice, "synchronize", lose)
    with pytest.raises(LostDeviceError, match="counted: first: RuntimeError: CUDA error"):
        session.run(stage, quiet)
    assert stage.measured == ["first"]
    assert {line.case for line in journal.lines} == {"first"}


def test_lines_survive_the_file_and_other_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    journal = Journal(path)
    session_on(FakeLibrary({}), journal).run(CountedStage(), quiet)
    assert Journal(path).lines == journal.lines
    path.write_text(path.read_text() + json.dumps({"format": 0}) + "\n")
    assert Journal(path).lines == journal.lines
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(NemocError, match="line 8 is no line of results"):
        Journal(path)


def test_a_table_has_ratios_to_ours(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "gpu.jsonl")
    session_on(FakeLibrary({}), journal).run(CountedStage(), quiet)
    lines = table(journal.newest("Fake GPU", "counted")).splitlines()
    assert len(lines) == 1 + 2 * 3
    assert lines[1].split() == [
        "first",
        "nemoc",
        "2.0000",
        "1.5000",
        "to",
        "2.5000",
        "1.00",
        "50.0%",
        "1.0e-03",
    ]
    assert lines[2].split() == [
        "peer",
        "4.0000",
        "3.5000",
        "to",
        "4.5000",
        "2.00",
        "25.0%",
        "2.0e-03",
    ]
    assert lines[3].split() == ["other", "unavailable", "is", "not", "installed"]
    assert lines[4].startswith("second")


def test_a_table_shows_what_was_measured_last(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "gpu.jsonl")
    for codes in (("a", "b"), ("a", "changed")):
        session_on(FakeLibrary({}), journal).run(CountedStage(codes), quiet)
    found = {(line.case, line.code) for line in journal.newest("Fake GPU", "counted")}
    assert found == {("first", "a"), ("second", "changed")}
    assert journal.newest("another", "counted") == []


def test_tokens_per_second_stand_in_tables_of_whole_models() -> None:
    line = Line(MACHINE, "a", "whole", "decode", "nemoc", "measured", ms=(1.0, 2.0, 3.0), tokens=8)
    head, row = table([line]).splitlines()
    assert head.endswith("tok/s")
    assert row.endswith(" 4000.0")


def test_stages_are_measured_and_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = Journal(tmp_path / "gpu.jsonl")
    session = session_on(FakeLibrary({}), journal)
    assert gpu.measure(session, journal, [CountedStage()]) == 0
    out, err = capsys.readouterr()
    expected = (
        "Fake GPU, CUDA 12.4, for cuda:sm_90: 1000 GB/s in a copy, 100 TFLOP/s in a product of bf16"
    )
    assert out.splitlines()[0] == expected
    assert "\ncounted: nothing\n" in out
    assert "] counted: second" in err
    late = session_on(FakeLibrary({}), Journal(tmp_path / "other.jsonl"), deadline=0.0)
    assert gpu.measure(late, journal, [CountedStage()]) == 0
    assert "time is over" in capsys.readouterr().err


def test_contenders_take_turns() -> None:
    clock = CountingClock()
    runs = {"a": lambda: None, "b": lambda: None}
    found = in_turns(runs, clock, budget=0.0, fewest=3)
    assert found == {"a": (3.0, 5.0, 7.0), "b": (4.0, 6.0, 8.0)}
    assert clock.ran == [runs["a"], runs["b"]] * 4
    assert quartiles(found["a"]) == (4e3, 5e3, 6e3)
    assert quartiles((1.0,)) == (1e3, 1e3, 1e3)


def test_roofs_are_the_best_of_the_runs() -> None:
    found = measure_roofs(SecondsClock(), "cpu", copied=1 << 10, side=8)
    assert found == Roofs(2.0 * (1 << 10), 2.0 * 8**3)
    assert Roofs(10.0, 100.0).seconds(20.0, 100.0) == 2.0
    assert Roofs(10.0, 100.0).seconds(20.0, 1000.0) == 10.0


def test_as_many_layers_are_run_as_there_is_room_for() -> None:
    config = preset("nano")
    assert fitting_layers(config, 64 * 10**9) == 52
    assert fitting_layers(config, 63 * 10**9) == 51
    assert 10 < fitting_layers(config, 20 * 10**9) < 20
    with pytest.raises(NemocError, match="fewer than one layer needs"):
        fitting_layers(config, 10**9)


def fake_files(
    found: list[FakeLibrary],
) -> Callable[..., dict[str, bytes | str]]:
    """`compiled_files` with kernels that are interpreted; the driver that does so is appended."""

    def compiled(program: Any, *_: object) -> dict[str, bytes | str]:
        record, library = interpreted(program.functions)
        found.append(library)
        record = replace(record, scratch=program.scratch_bytes)
        return {LAUNCHES: record.to_text(), **images_of(record)}

    return compiled


def test_a_whole_model_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries: list[FakeLibrary] = []
    monkeypatch.setattr(gpu_whole, "compiled_files", fake_files(libraries))
    for name, value in {"_CACHED": 6, "_STEPS": 2, "_ROUNDS": 1, "_STEP_TOKENS": 8}.items():
        monkeypatch.setattr(gpu_whole, name, value)
    monkeypatch.setattr(Session, "free_bytes", lambda self: 1 << 34)
    config = replace(MINI, layers=("attention",), vocab_size=32, hidden_size=16)
    journal = Journal(tmp_path / "gpu.jsonl")
    session = session_on(FakeLibrary({}), journal, model_of(config))
    monkeypatch.setattr(session, "open_device", lambda: FakeDevice(libraries[-1], 1 << 32))
    stage = WholeStage(batches=(2,), prompts=(12,))
    assert session.run(stage, quiet)
    assert [line.case for line in journal.lines] == list(stage.case_names())
    for line, tokens in zip(journal.lines, (4, 12), strict=True):
        assert line.status == "measured", line.note
        assert line.note.startswith("1 of 1 layers, random weights")
        assert (line.tokens, line.rounds) == (tokens, 1)
        assert line.share > 0
    assert len(libraries) == 1


def test_what_the_first_compilation_stored_is_not_compiled_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored: list[str] = []
    put = KernelStore.put

    def noted(store: KernelStore, key: str, binary: CompiledKernel) -> None:
        stored.append(key)
        put(store, key, binary)

    monkeypatch.setattr(KernelStore, "put", noted)
    config = replace(MINI, layers=("attention",), vocab_size=32, hidden_size=16)
    found = compile_gpu.measure(model_of(config), TARGET)
    assert len(stored) == len(set(stored)) == found["kernels"]
    assert found["spilled_bytes"] == 0 < found["most_registers"]


def test_logits_that_are_no_numbers_are_not_timed() -> None:
    nan = torch.full((1, 3), math.nan)
    found = gpu_whole._timed(None, lambda: nan, "small", (1.0, 1.0), 1)  # type: ignore[arg-type]
    assert (found.status, found.note, found.seconds) == (
        "wrong",
        "small; logits are not finite",
        (),
    )


def test_parity_is_of_the_models_of_the_tests() -> None:
    assert gpu_whole.parity_models()[:2] == ("sample", "base")
    assert gpu_whole.small_model("base").config.vocab_size == 97
