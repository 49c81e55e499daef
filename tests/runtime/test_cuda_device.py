"""The cuda runtime on a real GPU: the driver, recordings, and tokens chosen there."""

import gc
import importlib.util
from typing import Any

import pytest
import torch

if torch.version.cuda is None or not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nemoc.codegen.storage import Layout
from nemoc.ir import DType, NemocError
from nemoc.ir.dims import B, C, L
from nemoc.ir.parser import Signature
from nemoc.ir.types import TensorType, Value
from nemoc.runtime import Bounds, Generation, Program, State
from nemoc.runtime.cuda import CudaBackend
from nemoc.runtime.cuda_device import CudaDevice, find_device
from nemoc.runtime.launches import Binary, FunctionLaunches, KernelLaunch, LaunchRecord, Pointer
from nemoc.runtime.placement import LaunchTable
from nemoc.runtime.sampling import Sampler

VOCAB = 32
STATES = (
    Value("lengths", TensorType(DType.I32, (B,))),
    Value("cache", TensorType(DType.F32, (B, C))),
)
PROGRAM_STATE = Layout.of((v.name, v.type) for v in STATES)


@triton.jit
def step(weights, lengths, tokens, logits, B, L, C):  # type: ignore[no-untyped-def]
    """logits[b] = weights[last token of b] + lengths[b] + B + C, after lengths[b] += L."""
    row = tl.program_id(0)
    length = tl.load(lengths + row) + L
    token = tl.load(tokens + row * L + L - 1)
    at = tl.arange(0, 32)
    tl.store(logits + row * 32 + at, tl.load(weights + token * 32 + at) + length + B + C)
    tl.store(lengths + row, length)


@triton.jit
def hand_on(source, result, B, L, C):  # type: ignore[no-untyped-def]
    """result = source + 1 by 256 numbers a program; some programs take much longer than others."""
    gdc_wait()
    gdc_launch_dependents()
    at = tl.program_id(0) * 256 + tl.arange(0, 256)
    value = tl.load(source + at)
    for _ in range(tl.program_id(0) % 5 * 200):
        value = tl.sqrt_rn(value * value)
    tl.store(result + at, value + 1)


def capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


def target() -> str:
    major, minor = capability()
    return f"cuda:sm_{major}{minor}"


def compiled(kernel: Any, *kinds: str) -> bytes:
    """A kernel of one warp, with pointers of these types."""
    major, minor = capability()
    types = (*kinds, "i32", "i32", "i32")
    source = ASTSource(kernel, dict(zip(kernel.arg_names, types, strict=True)))
    gpu = GPUTarget("cuda", 10 * major + minor, 32)
    made: bytes = triton.compile(source, target=gpu, options={"num_warps": 1}).asm["cubin"]
    return made


@pytest.fixture(scope="module")
def cubin() -> bytes:
    return compiled(step, "*fp32", "*i32", "*i64", "*fp32")


@pytest.fixture
def weights() -> torch.Tensor:
    values = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
    return values.view(torch.uint8).reshape(-1)


@pytest.fixture
def backend(cubin: bytes, weights: torch.Tensor) -> CudaBackend:
    names = ("prefill", "decode")
    inputs = (Value("tokens", TensorType(DType.I64, (B, L))),)
    launch = KernelLaunch(0, B, (Pointer(0, 0), Pointer(1, 0), Pointer(3, 0), Pointer(4, 0)))
    arenas = ("weights", "state", "scratch", "in0_tokens", "out0_logits")
    record = LaunchRecord(
        target(),
        0,
        (Binary("kernels/step.cubin", "step", 32, 0, 9, 4),),
        dict.fromkeys(names, FunctionLaunches(arenas, (launch,))),
    )
    program = Program(
        "model", target(), "", VOCAB, Bounds(4, 50, 64), Generation(), PROGRAM_STATE,
        frozenset(names),
    )  # fmt: skip
    signatures = dict.fromkeys(names, Signature(inputs, (), STATES))
    table = LaunchTable(record, program, signatures, weights.numel(), "launches.json")
    device = find_device(target(), "model")
    return CudaBackend(table, {"kernels/step.cubin": cubin}, program, weights, device)


def new_state(backend: CudaBackend, batch: int, capacity: int = 50) -> State:
    size = int(PROGRAM_STATE.at({"B": batch, "C": capacity}).bytes)
    return State(PROGRAM_STATE, "", batch, capacity, backend.allocate(size))


def expected(weights: torch.Tensor, tokens: torch.Tensor, state: State) -> torch.Tensor:
    """What a step that has just been made should have given."""
    table = weights.view(torch.float32).view(VOCAB, VOCAB)
    added = state.lengths.cpu() + tokens.shape[0] + state.capacity
    return table[tokens[:, -1]] + added.unsqueeze(1)


def run(
    backend: CudaBackend, weights: torch.Tensor, function: str, tokens: torch.Tensor, state: State
) -> None:
    valid = torch.ones(len(tokens), dtype=torch.int32)
    found = backend.run(function, tokens, valid, state)
    assert found.is_cuda
    assert torch.allclose(found.cpu(), expected(weights, tokens, state))


def test_steps_of_any_size_run_and_decodes_are_recorded(
    backend: CudaBackend, weights: torch.Tensor
) -> None:
    states = [new_state(backend, 1), new_state(backend, 3, 20), new_state(backend, 3, 30)]
    for state in states:
        for length in (1, 7, 2):
            tokens = torch.randint(0, VOCAB, (state.batch, length))
            run(backend, weights, "prefill", tokens, state)
    for _ in range(4):
        for state in states:
            run(backend, weights, "decode", torch.randint(0, VOCAB, (state.batch, 1)), state)
    assert backend._recordings._possible
    assert len(backend._recordings) == 3
    assert [state.lengths.tolist() for state in states] == [[14], [14] * 3, [14] * 3]
    del state, states
    gc.collect()
    assert len(backend._recordings) == 0


def test_another_stream_can_be_current(backend: CudaBackend, weights: torch.Tensor) -> None:
    state = new_state(backend, 2)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(4):
            run(backend, weights, "decode", torch.randint(0, VOCAB, (2, 1)), state)


def test_steps_in_several_streams_do_not_meet(backend: CudaBackend, weights: torch.Tensor) -> None:
    states = [new_state(backend, 4) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    valid = torch.ones(4, dtype=torch.int32)
    for turn in range(20):
        found = []
        for state, stream in zip(states, streams, strict=True):
            tokens = torch.randint(0, VOCAB, (4, 1))
            with torch.cuda.stream(stream):
                torch.cuda._sleep(100_000)
                found.append((backend.run("decode", tokens, valid, state), tokens, state))
        torch.cuda.synchronize()
        for logits, tokens, state in found:
            assert torch.allclose(logits.cpu(), expected(weights, tokens, state)), turn


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (0.7, 0.8), (1.0, 1.0)])
def test_tokens_chosen_on_the_device_are_those_of_the_cpu(temperature: float, top_p: float) -> None:
    logits = 4 * torch.randn(6, 5000, generator=torch.Generator().manual_seed(2))
    here, there = (Sampler(6, temperature, top_p, seed=1) for _ in range(2))
    for turn in range(50):
        shifted = logits.roll(turn, -1)
        assert torch.equal(here.sample(shifted), there.sample(shifted.cuda()))
    logits[4, 7] = torch.nan
    with pytest.raises(NemocError, match="row 4: the model's logits are not finite numbers"):
        there.sample(logits.cuda())


@pytest.mark.skipif(capability() < (9, 0), reason="kernels cannot wait on such a device")
@pytest.mark.parametrize("ahead", [True, False])
def test_kernels_launched_ahead_see_what_former_ones_wrote(ahead: bool) -> None:
    device = CudaDevice(torch.cuda.current_device(), ahead=ahead)
    programs, launches = 500, 60
    with device.active():
        image = compiled(hand_on, "*fp32", "*fp32")
        kernel = device.load(Binary("x", "hand_on", 32, 0, 7, 2, waits=True), image, "x")
        one, other = (device.allocate(1024 * programs) for _ in range(2))
        one.zero_()

        def work() -> None:
            for turn in range(launches):
                pair = (one, other) if turn % 2 == 0 else (other, one)
                sizes = (1, 1, 1, 0, 0)
                device.launch(kernel, programs, (*(p.data_ptr() for p in pair), *sizes))

        work()
        replay = device.record(work)
        for turn in range(1, 4):
            numbers = one.view(torch.float32)
            assert (numbers == turn * launches).all()
            numbers += 1  # by a kernel that does not wait, between those that do
            numbers -= 1
            replay()
        assert (one.view(torch.float32) == 4 * launches).all()
    device.close()


def test_laps_are_those_of_the_work_that_took_them() -> None:
    """However many there are, more than a stream takes before the host has to wait for it."""
    device = CudaDevice(torch.cuda.current_device())
    long, x = range(50, 1200, 97), torch.zeros(1, device=device.place)

    def work(number: int) -> None:
        if number in long:
            torch.cuda._sleep(1_000_000)
        else:
            x.add_(1)

    with device.active():
        laps = device.laps([lambda n=n: work(n) for n in range(1200)])
    assert len(laps) == 1200
    longest = sorted(range(1200), key=laps.__getitem__)[-len(long) :]
    assert sorted(longest) == list(long)
    device.close()


def test_what_the_driver_refuses_is_one_line(cubin: bytes) -> None:
    device = CudaDevice(torch.cuda.current_device())
    with device.active():
        with pytest.raises(NemocError, match=r"x: cannot be loaded on .*: CUDA: cuModuleGetFunct"):
            device.load(Binary("x", "nothing", 32, 0, 9, 4), cubin, "x")
        with pytest.raises(NemocError, match=r"x: cannot be loaded on .*: CUDA: cuFuncSetAttrib"):
            device.load(Binary("x", "step", 32, 1 << 20, 9, 4), cubin, "x")
        with pytest.raises(NemocError, match="bytes of GPU memory cannot be allocated"):
            device.allocate(1 << 46)
    device.close()
