"""The cuda targets without a GPU: a driver in Python runs kernels that are the interpreter, on the CPU's memory."""

import contextlib
import dataclasses
import gc
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nemoc.codegen.plan import Address, Job, Kernel, Launch, StepFunction
from nemoc.codegen.storage import Layout, weight_layout
from nemoc.ir import Graph, NemocError
from nemoc.ir.dims import B, L, dim
from nemoc.ir.interpreter import interpret
from nemoc.ir.params import InMemory, LazyArguments
from nemoc.runtime import Contents, Executable, build, cuda, cuda_device, load
from nemoc.runtime.backend import Backend, BackendFactory, Opened
from nemoc.runtime.costs import COSTS, CostRecord
from nemoc.runtime.cuda import CudaBackend, Recordings, read_kernels
from nemoc.runtime.cuda_device import CudaDevice
from nemoc.runtime.cuda_driver import CudaDriver, DriverError
from nemoc.runtime.launches import LAUNCHES, Binary, LaunchRecord
from support.fake_cuda import FakeDevice, FakeKernel, FakeLaunch, FakeLibrary, tensor_at

IDS = torch.randint(3, 97, (3, 80), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([80, 5, 67])
NEXT = torch.tensor([5, 6, 7])
TARGET = "cuda:sm_90"
CUBIN = b"\x7fELF a kernel"


def keep_tokens(launch: FakeLaunch) -> None:
    """Scratch takes the tokens, [B, L]; one task for each."""
    rows, length, _ = launch.sizes
    assert launch.tasks == rows * length
    tokens, scratch = (tensor_at(p, torch.int64, (rows, length)) for p in launch.pointers)
    scratch.copy_(tokens)


def step(graph: Graph, weights: Layout) -> Callable[[FakeLaunch], None]:
    """What a graph does, on memory: weights, state, tokens, valid if it is an input, logits."""
    states = Layout.of((s.name, s.type) for s in graph.states)

    def run(launch: FakeLaunch) -> None:
        at_weights, at_state, *inputs, at_logits = launch.pointers
        sizes = dict(zip("BLC", launch.sizes, strict=True))
        slots = {s.name: _tensor(s, at_weights) for s in weights}
        state = {s.name: _tensor(s, at_state) for s in states.at(sizes)}
        rows, length, _ = launch.sizes
        given = {"tokens": tensor_at(inputs[0], torch.int64, (rows, length))}
        if len(inputs) > 1:
            given["valid"] = tensor_at(inputs[1], torch.int32, (rows,))
        result = interpret(graph, LazyArguments(graph, InMemory(slots), {**given, **state}))
        for name, tensor in {n: t.clone() for n, t in result.states.items()}.items():
            state[name].copy_(tensor)
        logits = result.outputs[0]
        tensor_at(at_logits, torch.float32, logits.shape).copy_(logits)

    return run


def _tensor(slot: Any, start: int) -> torch.Tensor:
    shape = [int(d) for d in slot.type.shape]
    return tensor_at(start + int(slot.offset), slot.type.dtype.torch, shape)


def step_function(name: str, graph: Graph) -> StepFunction:
    """First the tokens go to scratch, then everything happens, all as one job."""
    inputs = [f"in{i}_{v.name}" for i, v in enumerate(graph.inputs)]
    length = 1 if name == "decode" else L
    keep = Launch(
        Kernel("keep_tokens", "", dim(B * length)), (Address(inputs[0]), Address("scratch", 64))
    )
    places = ["weights", "state", "scratch", *inputs[1:], "out0_logits"]
    offsets = {"scratch": 64}
    buffers = tuple(Address(place, offsets.get(place, 0)) for place in places)
    main = Launch(Kernel(f"step_{name}", "", dim(2 * B)), buffers)
    idle = Launch(Kernel("keep_tokens", "", 0), (Address(inputs[0]), Address("scratch", 64)))
    arenas = ("weights", "state", "scratch", *inputs, "out0_logits")
    return StepFunction(name, arenas, ((keep, idle), (main,)), (Job(graph.nodes[0].op),))


def record_of(contents: Contents) -> LaunchRecord:
    binaries = {"keep_tokens": Binary("kernels/keep.cubin", "keep_tokens", 32, 0, 7, 2)}
    for name, graph in contents.functions.items():
        pointers = 3 + len(graph.inputs)
        binaries[f"step_{name}"] = Binary(
            f"kernels/{name}.cubin",
            f"step_{name}",
            128,
            100_000,
            pointers + 5,
            pointers,
            global_scratch=256,
            global_scratch_align=128,
            waits=True,
        )
    plans = [step_function(n, g) for n, g in contents.functions.items()]
    scratch = 64 + 8 * contents.bounds.max_tokens
    return LaunchRecord.of(TARGET, scratch, binaries, plans)


def library_of(contents: Contents) -> FakeLibrary:
    layout = weight_layout(contents.weights)
    kernels = {"keep_tokens": FakeKernel(2, keep_tokens)}
    for name, graph in contents.functions.items():
        kernels[f"step_{name}"] = FakeKernel(3 + len(graph.inputs), step(graph, layout))
    return FakeLibrary(kernels)


def on(device: FakeDevice) -> dict[str, BackendFactory]:
    """Run cuda targets on a fake device."""

    def make(opened: Opened) -> CudaBackend:
        table, images = read_kernels(opened)
        return CudaBackend(table, images, opened.program, opened.weights.data, device)

    return {"cuda": make}


@pytest.fixture(scope="module")
def cuda_contents(contents: Callable[..., Contents]) -> Contents:
    given = contents()
    record = record_of(given)
    kernels = {binary.file: CUBIN for binary in record.binaries}
    costs = CostRecord.of(step_function(n, g) for n, g in given.functions.items())
    files = {LAUNCHES: record.to_text(), COSTS: costs.to_text(), **kernels}
    return dataclasses.replace(given, target=TARGET, files=files)


@pytest.fixture(scope="module")
def saved(cuda_contents: Contents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cuda") / "model.nemoc"
    build(cuda_contents, path)
    return path


@pytest.fixture
def device(cuda_contents: Contents) -> FakeDevice:
    return FakeDevice(library_of(cuda_contents))


@pytest.fixture
def gpu(saved: Path, device: FakeDevice) -> Executable:
    return load(saved, backends=on(device))


def changed(contents: Contents, change: Callable[[Any], Any]) -> Contents:
    """Contents whose record says something else."""
    data = json.loads(str(contents.files[LAUNCHES]))
    change(data)
    return dataclasses.replace(contents, files={**contents.files, LAUNCHES: json.dumps(data)})


def refused(contents: Contents, path: Path, message: str) -> None:
    with pytest.raises(NemocError, match=re.escape(message)) as caught:
        build(contents, path)
    assert "\n" not in str(caught.value)


def test_logits_and_states_are_those_of_the_kernels(gpu: Executable, exe: Executable) -> None:
    mine, theirs = gpu.new_state(3), exe.new_state(3)
    found = gpu.prefill(IDS, mine, LENGTHS, all_logits=True)
    assert torch.equal(found, exe.prefill(IDS, theirs, LENGTHS, all_logits=True))
    for _ in range(4):
        assert torch.equal(gpu.decode(NEXT, mine), exe.decode(NEXT, theirs))
    for length in (1, 3, 5):
        ids = IDS[:, :length]
        assert torch.equal(gpu.prefill(ids, mine), exe.prefill(ids, theirs))
    assert torch.equal(mine.arena, theirs.arena)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_generation_is_that_of_any_other_target(
    gpu: Executable, exe: Executable, temperature: float
) -> None:
    options: dict[str, Any] = {"temperature": temperature, "top_p": 0.9, "seed": 5}
    expected = exe.generate(IDS, 8, lengths=LENGTHS, stop=[9], **options)
    assert torch.equal(gpu.generate(IDS, 8, lengths=LENGTHS, stop=[9], **options), expected)


def test_a_state_is_zeroed_and_logits_belong_to_the_caller(gpu: Executable) -> None:
    state = gpu.new_state(2)
    assert not state.arena.any()
    first = gpu.prefill(IDS[:2], state)
    kept = first.clone()
    second = gpu.decode(NEXT[:2], state)
    again = second.clone()
    gpu.decode(NEXT[1:], state)
    gpu.prefill(IDS[1:], state)
    assert torch.equal(first, kept)
    assert torch.equal(second, again)


def test_the_second_decode_of_a_state_is_recorded(gpu: Executable, device: FakeDevice) -> None:
    state = gpu.new_state(1)
    launches = device.library.calls.count
    gpu.prefill(IDS[:1, :4], state)
    assert launches("cuLaunchKernelEx") == 2
    counts = []
    for _ in range(5):
        gpu.decode(NEXT[:1], state)
        counts.append((launches("cuLaunchKernelEx"), device.recorded))
    assert counts == [(4, 0), (6, 1), (6, 1), (6, 1), (6, 1)]
    assert len(device.library.launches) == 2 + 5 * 2


def test_steps_say_how_long_their_launches_took(gpu: Executable, device: FakeDevice) -> None:
    """One by one, also of a decode that is recorded; what has no tasks takes no time."""
    state, other = gpu.new_state(3), gpu.new_state(3)
    gpu.prefill(IDS[:, :3], state)
    for _ in range(2):
        gpu.decode(NEXT, state)
    before = device.lapped
    with gpu.timed() as steps:
        logits = gpu.prefill(IDS[:, :3], other)
        decoded = [gpu.decode(NEXT, other) for _ in range(3)]
    assert before == 0
    assert [(s.function, s.sizes) for s in steps] == [
        ("prefill", (3, 3, 200)),
        *[("decode", (3, 1, 200))] * 3,
    ]
    assert [s.launches for s in steps] == [(1, 0, 2), (3, 0, 4), (5, 0, 6), (7, 0, 8)]
    assert [(s.seconds, s.waiting) for s in steps] == [(3, 0), (7, 0), (11, 0), (15, 0)]
    assert device.disordered == 0
    again = gpu.new_state(3)
    assert torch.equal(gpu.prefill(IDS[:, :3], again), logits)
    for expected in decoded:
        assert torch.equal(gpu.decode(NEXT, again), expected)
    assert device.lapped == 8


def test_each_state_has_a_recording_of_its_own(
    gpu: Executable, exe: Executable, device: FakeDevice
) -> None:
    pairs = [(gpu.new_state(b, c), exe.new_state(b, c)) for b, c in ((1, 20), (1, 20), (2, 9))]
    for turn in range(4):
        for mine, theirs in pairs:
            ids = NEXT[: mine.batch] + turn
            assert torch.equal(gpu.decode(ids, mine), exe.decode(ids, theirs))
    assert device.recorded == 3
    copy = pairs[0][0].clone()
    assert torch.equal(gpu.decode(NEXT[:1], copy), gpu.decode(NEXT[:1], pairs[0][0]))
    assert torch.equal(copy.arena, pairs[0][0].arena)


def test_a_recording_goes_with_its_state(gpu: Executable) -> None:
    recordings = gpu._backend._recordings  # type: ignore[attr-defined]
    state, other = gpu.new_state(1), gpu.new_state(1)
    for _ in range(3):
        gpu.decode(NEXT[:1], state)
    gpu.decode(NEXT[:1], other)
    assert len(recordings) == 2
    del state
    gc.collect()
    assert len(recordings) == 1


def test_there_are_never_more_recordings_than_are_kept(gpu: Executable, device: FakeDevice) -> None:
    states = [gpu.new_state(1, 40) for _ in range(10)]
    for state in states:
        for _ in range(2):
            gpu.decode(NEXT[:1], state)
    assert device.recorded == 10
    recordings = gpu._backend._recordings  # type: ignore[attr-defined]
    assert len(recordings) == 8
    gpu.decode(NEXT[:1], states[2])
    gpu.decode(NEXT[:1], states[0])  # its recording was dropped, so it begins anew
    gpu.decode(NEXT[:1], states[2])
    assert device.recorded == 10
    gpu.decode(NEXT[:1], states[0])
    assert (device.recorded, len(recordings)) == (11, 8)


def test_where_nothing_can_be_recorded_steps_run_launch_by_launch(
    gpu: Executable, exe: Executable, device: FakeDevice
) -> None:
    device.can_record = False
    mine, theirs = gpu.new_state(1), exe.new_state(1)
    for turn in range(4):
        assert torch.equal(gpu.decode(NEXT[:1] + turn, mine), exe.decode(NEXT[:1] + turn, theirs))
    assert device.library.calls.count("cuLaunchKernelEx") == 8
    device.can_record = True
    gpu.decode(NEXT[:1], mine)
    assert device.recorded == 0


def test_recordings_hold_no_state(device: FakeDevice, gpu: Executable) -> None:
    recordings = Recordings(device, most=2)
    state = gpu.new_state(1)
    done: list[str] = []
    for _ in range(3):
        recordings.run(state, lambda: done.append("work"))
    assert done == ["work", "work"]  # the second time while it was recorded
    arena = state.arena
    holders = sys.getrefcount(arena)
    gpu.decode(NEXT[:1], state)
    gpu.decode(NEXT[:1], state)
    assert sys.getrefcount(arena) == holders


def test_kernels_get_shared_memory_and_scratch_that_they_ask_for(
    gpu: Executable, device: FakeDevice
) -> None:
    large = {name for name, *_ in device.library.attributes}
    assert large == {"step_prefill", "step_prefill_all", "step_decode"}
    assert {(a, v) for _, a, v in device.library.attributes} == {(8, 100_000)}
    state = gpu.new_state(3)
    gpu.prefill(IDS[:, :2], state)
    keep, main = device.library.launches
    assert (keep.threads, keep.shared, keep.hidden) == (32, 0, (0, 0))
    assert (main.threads, main.shared, main.tasks) == (128, 100_000, 6)
    assert main.hidden[0] % 16 == 0
    assert main.hidden[1] == 0
    one = gpu.new_state(1)
    gpu.prefill(IDS[:1, :2], one)
    assert device.library.launches[-1].hidden == main.hidden


@pytest.mark.parametrize(
    ("ahead", "version", "expected"),
    [(True, 12030, True), (True, 13010, True), (True, 12020, False), (False, 13010, False)],
)
def test_kernels_that_wait_are_launched_ahead_where_the_driver_records_that(
    saved: Path, cuda_contents: Contents, ahead: bool, version: int, expected: bool
) -> None:
    library = library_of(cuda_contents)
    library.version = version
    gpu = load(saved, backends=on(FakeDevice(library, ahead=ahead)))
    state = gpu.new_state(1)
    for _ in range(3):  # launched, recorded, replayed
        gpu.decode(NEXT[:1], state)
    assert [(n.symbol, n.ahead) for n in library.launches] == 3 * [
        ("keep_tokens", False),
        ("step_decode", expected),
    ]


def test_weights_are_copied_piece_by_piece(
    saved: Path, device: FakeDevice, exe: Executable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_PIECE", 1000)
    gpu = load(saved, backends=on(device))
    assert device.staged == 1000
    assert torch.equal(gpu.generate(IDS[:1], 4), exe.generate(IDS[:1], 4))


def test_a_model_that_does_not_fit_the_device_is_refused(
    saved: Path, cuda_contents: Contents
) -> None:
    small = FakeDevice(library_of(cuda_contents), memory=10_000)
    with pytest.raises(NemocError, match="bytes of GPU memory cannot be allocated"):
        load(saved, backends=on(small))
    gc.collect()
    assert not small.library.modules


def test_kernels_go_with_the_executable(saved: Path, device: FakeDevice) -> None:
    gpu = load(saved, backends=on(device))
    gpu.generate(IDS[:1], 4)
    assert set(device.library.modules.values()) == {CUBIN}
    assert len(device.library.modules) == 4
    del gpu
    gc.collect()
    assert not device.library.modules
    assert device.library.calls[-1] == "cuDevicePrimaryCtxRelease_v2"


def test_a_state_elsewhere_is_refused(gpu: Executable) -> None:
    state = gpu.new_state(1)
    state.arena = state.arena.to("meta")
    with pytest.raises(NemocError, match=r"state: is on meta, .*model.nemoc is on cpu"):
        gpu._backend.run("decode", NEXT[:1, None], torch.ones(1).int(), state)


def test_a_full_state_is_refused_before_anything_runs(gpu: Executable, device: FakeDevice) -> None:
    state = gpu.new_state(1, 3)
    stream = gpu.stream(IDS[:1, :2], 2, state=state, stop=[])
    next(stream)
    gpu.decode(NEXT[:1], state)  # takes the room that generation had counted on
    launched = len(device.library.launches)
    with pytest.raises(NemocError, match="row 0: 3 tokens so far and 1 more exceed"):
        next(stream)
    assert len(device.library.launches) == launched


def test_a_fork_is_refused(
    gpu: Executable, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: 1)
        with pytest.raises(NemocError, match="the cuda target was loaded before this process was"):
            gpu.new_state(1)
        device.close()  # what the fork does when it ends
    assert len(device.library.modules) == 4


def test_torch_records_launches_on_a_stream_of_their_own(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    class Graph:
        def replay(self) -> None:
            told.append("replay")

    @contextlib.contextmanager
    def graph(*given: Any, **options: Any) -> Iterator[None]:
        bound = inspect.signature(real.__init__).bind(None, *given, **options)
        told.append((type(given[0]), bound.arguments["stream"]))
        yield
        told.append("end")

    real = torch.cuda.graph
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda place: f"stream on {place}")
    monkeypatch.setattr(torch.cuda, "graph", graph)
    replay = CudaDevice.record(device, lambda: told.append("work"))
    replay()
    assert told == [(Graph, "stream on cpu"), "work", "end", "replay"]


def test_steps_of_several_streams_wait_for_each_other(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    class Event:
        def record(self, stream: Any) -> None:
            told.append(f"{stream.name} done")

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_event(self, event: Any) -> None:
            assert isinstance(event, Event)
            told.append(f"{self.name} waits")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("first", "second"):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda place, name=name: Stream(name))
        with CudaDevice.in_order(device):
            told.append(f"{name} works")
    with pytest.raises(NemocError), CudaDevice.in_order(device):
        raise NemocError("a launch has failed")
    assert told == [
        "first works", "first done",
        "second waits", "second works", "second done",
        "second waits", "second done",
    ]  # fmt: skip


def test_all_that_touches_shared_memory_is_in_order(gpu: Executable, device: FakeDevice) -> None:
    state = gpu.new_state(1)
    gpu.prefill(IDS[:1, :4], state)
    for _ in range(3):
        gpu.decode(NEXT[:1], state)
    assert (device.ordered, device.disordered) == (5, 0)


def test_memory_that_is_not_there_is_one_line(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any, **options: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(torch, "empty", full)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: (100, 2000))
    with pytest.raises(
        NemocError,
        match=r"^Fake GPU: 500 bytes of GPU memory cannot be allocated, 100 of 2000 are free$",
    ):
        CudaDevice.allocate(device, 500)


def test_a_launch_that_fails_says_what_the_driver_says(gpu: Executable, device: FakeDevice) -> None:
    state = gpu.new_state(1)
    device.library.failures["cuLaunchKernelEx"] = 700
    with pytest.raises(
        NemocError, match=r"CUDA: cuLaunchKernelEx: failure number 700 \(error 700\)"
    ):
        gpu.decode(NEXT[:1], state)
    del device.library.failures["cuLaunchKernelEx"]
    gpu.decode(NEXT[:1], state)


@pytest.mark.parametrize(
    ("call", "code", "message"),
    [
        (
            "cuModuleLoadData",
            209,
            "cannot be loaded on Fake GPU: CUDA: cuModuleLoadData: no kernel image is available "
            "(error 209); the driver knows CUDA 12.4, a newer one may be needed",
        ),
        ("cuModuleLoadData", 2, "cuModuleLoadData: failure number 2 (error 2)"),
        ("cuModuleGetFunction", 500, "cuModuleGetFunction: failure number 500 (error 500)"),
        ("cuFuncSetAttribute", 1, "cuFuncSetAttribute: failure number 1 (error 1)"),
    ],
)
def test_a_kernel_that_cannot_be_loaded_is_refused(
    saved: Path, device: FakeDevice, call: str, code: int, message: str
) -> None:
    device.library.failures[call] = code
    with pytest.raises(NemocError, match=re.escape(message)) as caught:
        load(saved, backends=on(device))
    assert re.search(r"model.nemoc/kernels/\w+.cubin: cannot be loaded", str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_cubin_is_refused(
    cuda_contents: Contents, device: FakeDevice, tmp_path: Path
) -> None:
    files = {**cuda_contents.files, "kernels/keep.cubin": b"text"}
    path = tmp_path / "x.nemoc"
    build(dataclasses.replace(cuda_contents, files=files), path)
    with pytest.raises(NemocError, match=r"x.nemoc/kernels/keep.cubin: is no cubin"):
        load(path, backends=on(device))
    assert "cuModuleLoadData" not in device.library.calls


def test_what_a_record_lacks_is_refused_when_it_is_built(
    cuda_contents: Contents, tmp_path: Path
) -> None:
    path = tmp_path / "x.nemoc"
    files = dict(cuda_contents.files)
    del files["kernels/keep.cubin"]
    refused(
        dataclasses.replace(cuda_contents, files=files),
        path,
        "lists no file 'kernels/keep.cubin', which kernels/launches.json names",
    )
    refused(
        dataclasses.replace(cuda_contents, files={}), path, "lists no file kernels/launches.json"
    )
    for change, message in (
        (lambda d: d.update(target="cuda:sm_80"), "target is 'cuda:sm_80', expected 'cuda:sm_90'"),
        (lambda d: d["functions"].pop("decode"), "the function 'decode' is missing"),
        (lambda d: d.update(scratch=64), "a pointer to byte 64 of scratch, which has 64"),
        (lambda d: d["binaries"][0].update(file="../x"), "lists no file '../x'"),
        (lambda d: d["binaries"][0].update(threads=0), "binaries[0].threads is 0"),
    ):
        refused(changed(cuda_contents, change), path, message)


def test_an_artifact_is_built_where_it_cannot_run(
    cuda_contents: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_device, "_capabilities", lambda: {0: (8, 0)})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA A100")
    path = tmp_path / "x.nemoc"
    exe = build(cuda_contents, path)
    assert exe.program.target == TARGET
    message = (
        "x.nemoc: is for cuda:sm_90 and needs an NVIDIA GPU of compute capability 9.0, "
        "found 8.0 (NVIDIA A100)"
    )
    for use in (exe.new_state, lambda: exe.generate(IDS), lambda: load(path)):
        with pytest.raises(NemocError, match=re.escape(message)) as caught:
            use()
        assert "\n" not in str(caught.value)
    exe.save(tmp_path / "y.nemoc")
    assert (tmp_path / "y.nemoc" / LAUNCHES).is_file()


def test_a_built_artifact_runs_once_it_is_used(
    cuda_contents: Contents,
    device: FakeDevice,
    exe: Executable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(cuda, "find_device", lambda *given: asked.append(given[0]) or device)
    built = build(cuda_contents)
    assert not asked
    assert not device.library.modules
    assert torch.equal(built.generate(IDS[:1], 3), exe.generate(IDS[:1], 3))
    built.new_state(1)
    assert asked == [TARGET]


def test_targets_without_a_runtime_are_built_and_not_loaded(
    contents: Callable[..., Contents], tmp_path: Path
) -> None:
    path = tmp_path / "x.nemoc"
    exe = build(contents(target="hip:gfx942"), path)
    for use in (exe.new_state, lambda: load(path)):
        with pytest.raises(
            NemocError, match=r"x.nemoc: is for hip:gfx942; this version runs cuda targets only"
        ):
            use()
    refused(contents(target="triton-interpret"), path, "target 'triton-interpret' cannot be run by")


def test_further_targets_come_with_what_runs_them(
    contents: Callable[..., Contents], exe: Executable, tmp_path: Path
) -> None:
    seen: list[Opened] = []

    def make(opened: Opened) -> Backend:
        seen.append(opened)
        reference = load(copy)._backend
        assert opened.graphs().keys() == {"prefill", "prefill_all", "decode"}
        return reference

    copy = tmp_path / "reference.nemoc"
    build(contents(), copy)
    path = tmp_path / "x.nemoc"
    made = build(
        contents(target="triton-interpret"), path, backends={"triton-interpret": make}, threads=3
    )
    again = load(path, backends={"triton-interpret": make})
    assert [opened.folder for opened in seen] == [path, path]
    assert (seen[0].program.target, seen[0].threads) == ("triton-interpret", 3)
    for found in (made, again):
        assert torch.equal(found.generate(IDS[:1], 3), exe.generate(IDS[:1], 3))


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built with CUDA")
def test_a_torch_without_cuda_is_named(saved: Path) -> None:
    with pytest.raises(
        NemocError, match=r"of compute capability 9.0, found none: torch \S+ is built without CUDA"
    ):
        load(saved)


def test_a_driver_that_is_missing_or_old_is_named(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_library(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", no_library)
    with pytest.raises(NemocError, match="NVIDIA's driver is not installed: there is no libcuda"):
        CudaDriver()
    with pytest.raises(NemocError, match="NVIDIA's driver is too old: it lacks cuInit"):
        CudaDriver(object())
    device.library.failures["cuInit"] = 100
    with pytest.raises(DriverError, match=r"CUDA: cuInit: failure number 100 \(error 100\)"):
        CudaDriver(device.library)
    device.library.failures["cuGetErrorString"] = 1
    with pytest.raises(DriverError, match=r"CUDA: cuInit: unknown error \(error 100\)"):
        CudaDriver(device.library)
