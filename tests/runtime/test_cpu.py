"""The cpu target against the interpreter: same artifact format, same states, same logits."""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nemoc.codegen.lower import corner_sizes
from nemoc.codegen.storage import weight_layout
from nemoc.ir import NemocError
from nemoc.runtime import LIBRARY, Contents, Executable, Machine, build, kernel_record, load
from nemoc.runtime.costs import COSTS, CostRecord

if importlib.util.find_spec("tvm") is None:
    pytest.skip("needs apache-tvm", allow_module_level=True)

from nemoc.codegen.tvm.compile import compile_program
from nemoc.codegen.tvm.target import cpu_target

IDS = torch.randint(3, 97, (3, 80), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor(
    [80, 5, 67]
)  # three rows take 64 tokens a step: rows end in different chunks
NEXT = torch.tensor([5, 6, 7])


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def cpu_contents(contents: Callable[..., Contents]) -> Contents:
    given = contents()
    bounds = given.bounds
    corners = corner_sizes(bounds.max_batch, bounds.max_tokens, bounds.max_context)
    layout = weight_layout(given.weights)
    compiled = compile_program(given.functions, layout, corners, cpu_target())
    return dataclasses.replace(
        given,
        target="cpu",
        machine=Machine.host(),
        kernels=kernel_record(compiled.program.scratch_bytes),
        files={
            LIBRARY: compiled.library,
            "kernels/step.py": compiled.source,
            COSTS: CostRecord.of(compiled.program.functions).to_text(),
        },
    )


@pytest.fixture(scope="module")
def saved(cpu_contents: Contents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cpu") / "model.nemoc"
    build(cpu_contents, path)
    return path


@pytest.fixture(scope="module")
def cpu(saved: Path) -> Executable:
    return load(saved, threads=2)


def test_logits_and_states_are_those_of_the_interpreter(cpu: Executable, exe: Executable) -> None:
    mine, theirs = cpu.new_state(3), exe.new_state(3)
    found = cpu.prefill(IDS, mine, LENGTHS, all_logits=True)
    assert error(found, exe.prefill(IDS, theirs, LENGTHS, all_logits=True)) < 1e-5
    for _ in range(3):
        assert error(cpu.decode(NEXT, mine), exe.decode(NEXT, theirs)) < 1e-5
    assert error(cpu.prefill(IDS[:, :3], mine), exe.prefill(IDS[:, :3], theirs)) < 1e-5
    assert torch.equal(mine.lengths, theirs.lengths)
    for name, tensor in theirs.tensors.items():
        if name.endswith((".conv", ".ssm")):
            assert error(mine.tensors[name], tensor) < 1e-5, name


def test_steps_say_how_long_their_launches_took(cpu: Executable) -> None:
    costs = cpu.costs
    assert costs is not None
    state = cpu.new_state(3)
    with cpu.timed() as steps:
        found = cpu.prefill(IDS, state, LENGTHS)
        cpu.decode(NEXT, state)
    assert [(s.function, s.sizes) for s in steps] == [
        ("prefill", (3, 64, 200)),
        ("prefill", (3, 16, 200)),
        ("decode", (3, 1, 200)),
    ]
    for step in steps:
        assert len(step.launches) == len(costs.functions[step.function].launches)
        assert min(step.launches) >= 0.0
        assert 0.0 < sum(step.launches) <= step.seconds
        assert 0.0 <= step.waiting <= step.seconds
    again = cpu.new_state(3)
    assert torch.equal(cpu.prefill(IDS, again, LENGTHS), found)
    assert len(steps) == 3


def test_ops_behind_launches_have_costs_at_any_size(cpu: Executable) -> None:
    costs = cpu.costs
    assert costs is not None
    for name in ("prefill", "decode"):
        function = costs.functions[name]
        sizes = {"B": 2, "L": 1 if name == "decode" else 9, "C": 200, "T": 5}
        found = [cost for op in function.ops if (cost := op.at(sizes)) is not None]
        assert len(found) == len(function.ops)
        assert all(flops >= 0.0 and moved > 0.0 for flops, moved in found)
        assert any(op.weight.startswith("layers.0.mixer.in_proj") for op in function.ops)


def test_a_damaged_record_of_costs_is_refused(saved: Path, tmp_path: Path) -> None:
    exe = load(shutil.copytree(saved, tmp_path / "model.nemoc"))
    (exe.folder / COSTS).write_text("{}")
    with pytest.raises(NemocError, match=r"costs\.json: has 2 bytes"):
        _ = exe.costs


def test_a_record_of_other_functions_is_refused(cpu_contents: Contents, tmp_path: Path) -> None:
    files = dict(cpu_contents.files)
    record = json.loads(str(files[COSTS]))
    del record["functions"]["decode"]
    files[COSTS] = json.dumps(record)
    exe = build(dataclasses.replace(cpu_contents, files=files), tmp_path / "model.nemoc")
    with pytest.raises(NemocError, match=r"functions are prefill, prefill_all, expected decode, "):
        _ = exe.costs


def test_launches_are_timed_once_at_a_time(cpu: Executable) -> None:
    with cpu.timed():
        with pytest.raises(NemocError, match="being timed already"), cpu.timed():
            pass
        cpu.decode(NEXT, cpu.new_state(3))
    with cpu.timed() as steps:
        cpu.decode(NEXT, cpu.new_state(3))
    assert len(steps) == 1


def test_an_artifact_without_launches_has_no_times(exe: Executable) -> None:
    assert exe.costs is None
    with pytest.raises(NemocError, match=r"not timed on reference"), exe.timed():
        pass


def test_rows_of_unequal_length_equal_each_row_alone(cpu: Executable) -> None:
    state = cpu.new_state(3)
    together = cpu.prefill(IDS, state, LENGTHS)
    following = cpu.decode(NEXT, state)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = cpu.new_state(1)
        logits = cpu.prefill(IDS[row : row + 1, :length], alone)
        assert error(together[row : row + 1], logits) < 1e-5
        assert error(following[row : row + 1], cpu.decode(NEXT[row : row + 1], alone)) < 1e-5


def test_a_row_without_tokens_keeps_its_state_to_the_bit(cpu: Executable) -> None:
    state = cpu.new_state(2, capacity=20)
    cpu.prefill(IDS[:2, :12], state)
    before = state.clone()
    cpu._backend.run("prefill", IDS[:2, :9].contiguous(), torch.tensor([0, 8]).int(), state)
    assert state.lengths.tolist() == [12, 20]
    for name, tensor in state.tensors.items():
        kept = slice(0, 12) if name.endswith((".k", ".v")) else slice(None)
        was = before.tensors[name]
        same = tensor[0] == was[0] if tensor.dim() == 1 else tensor[0, kept] == was[0, kept]
        assert bool(same.all()), name


def test_steps_are_repeatable_whatever_memory_held(cpu: Executable, saved: Path) -> None:
    other = load(saved, threads=1, resident=True)
    results = []
    for exe in (cpu, cpu, other):
        state = exe.new_state(2)
        state.arena.view(torch.uint8)[:] = 0
        for name, tensor in state.tensors.items():
            if name.endswith((".k", ".v")):
                tensor.fill_(torch.nan)  # what is not cached yet must not matter
        results.append(torch.stack([exe.prefill(IDS[:2], state), exe.decode(NEXT[:2], state)]))
    assert results[0].isfinite().all()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_generation_is_that_of_the_interpreter(cpu: Executable, exe: Executable) -> None:
    assert torch.equal(cpu.generate(IDS, 8, lengths=LENGTHS), exe.generate(IDS, 8, lengths=LENGTHS))


def test_states_move_between_loads(cpu: Executable, saved: Path, tmp_path: Path) -> None:
    state = cpu.new_state(1)
    cpu.prefill(IDS[:1], state)
    state.save(tmp_path / "s")
    other = load(saved)
    restored = other.load_state(tmp_path / "s")
    assert torch.equal(other.decode(NEXT[:1], restored), cpu.decode(NEXT[:1], state))


def test_loading_and_running_never_imports_the_compiler(saved: Path) -> None:
    code = (
        "import sys, torch, nemoc.runtime as r\n"
        f"exe = r.load({str(saved)!r}, threads=1)\n"
        "exe.generate(torch.tensor([[5, 6]]), 3)\n"
        "assert 'tvm' not in sys.modules\n"
        "assert 'libtvm_compiler' not in open('/proc/self/maps').read()"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.parametrize("given", [None, "7"])
def test_threads_without_work_soon_sleep_unless_told_otherwise(
    saved: Path, given: str | None
) -> None:
    """TVM's own number of yields takes minutes where others keep the cores busy; a process waits for that."""
    code = (
        "import os, torch, nemoc.runtime as r\n"
        f"r.load({str(saved)!r}).generate(torch.tensor([[5, 6]]), 2)\n"
        "print(os.environ['TVM_THREAD_POOL_SPIN_COUNT'])"
    )
    name = "TVM_THREAD_POOL_SPIN_COUNT"
    environ = {key: value for key, value in os.environ.items() if key != name}
    environ |= {name: given} if given else {}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == int(given or 1000)


def test_a_library_that_is_none_is_refused(
    cpu_contents: Contents, saved: Path, tmp_path: Path
) -> None:
    broken = dataclasses.replace(cpu_contents, files={LIBRARY: b"no library"})
    with pytest.raises(NemocError, match=rf"{LIBRARY}: cannot be loaded: ") as caught:
        build(broken, tmp_path / "broken.nemoc")
    assert "\n" not in str(caught.value)
    copy = Path(shutil.copytree(saved, tmp_path / "copy.nemoc"))
    data = bytearray((copy / LIBRARY).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / LIBRARY).write_bytes(data)
    with pytest.raises(NemocError, match=r"step.so: was altered: its SHA-256 is"):
        load(copy)


def test_there_are_no_more_threads_than_processors(cpu: Executable, saved: Path) -> None:
    results = []
    for exe in (cpu, load(saved, threads=1 << 32)):
        results.append(exe.prefill(IDS[:2], exe.new_state(2)))
    assert torch.equal(*results)


def test_no_threads_are_refused(saved: Path) -> None:
    with pytest.raises(NemocError, match="threads is 0, expected at least 1"):
        load(saved, threads=0)


def test_a_fork_after_the_first_step_is_refused_and_does_not_hang(saved: Path) -> None:
    code = (
        "import os, sys, torch, nemoc.runtime as r\n"
        "from nemoc.ir import NemocError\n"
        f"exe = r.load({str(saved)!r}, threads=2)\n"
        "ids = torch.tensor([[5, 6]])\n"
        "def child(run):\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        try:\n"
        "            run()\n"
        "        except NemocError as error:\n"
        "            print(error, flush=True)\n"
        "        os._exit(0)\n"
        "    assert os.waitpid(pid, 0)[1] == 0\n"
        "child(lambda: print(exe.generate(ids, 2).shape, flush=True))\n"
        "exe.generate(ids, 2)\n"
        "child(lambda: exe.generate(ids, 2))\n"
        f"child(lambda: r.load({str(saved)!r}).generate(ids, 2))\n"
        "exe.generate(ids, 2)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    first, *refusals = done.stdout.splitlines()
    assert first.startswith("torch.Size([1, ")
    assert len(refusals) == 2
    assert set(refusals) == {
        "the cpu target ran before this process was forked, and its threads are not in the fork; "
        "load the artifact in a process that is started anew (spawn)"
    }


@pytest.mark.parametrize("scratch", [-1, 1.5, True, "64", None])
def test_a_size_of_scratch_that_is_none_is_refused(
    cpu_contents: Contents, tmp_path: Path, scratch: object
) -> None:
    broken = dataclasses.replace(cpu_contents, kernels={"scratch": scratch})
    with pytest.raises(NemocError, match="expected the size of scratch"):
        build(broken, tmp_path / "broken.nemoc")
