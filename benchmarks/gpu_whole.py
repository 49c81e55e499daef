"""The stages that run whole models: whether they are right, in every way of running them, and how fast they are."""

import functools
import importlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks.gpu_results import OWN, Status
from benchmarks.gpu_session import Outcome, Session, Task, source_digest
from benchmarks.gpu_values import DrawnWeights, Sizes, Values
from nemoc import compiler
from nemoc.codegen.lower import corner_sizes
from nemoc.codegen.storage import Weight, bind_weights, state_layout, weight_layout
from nemoc.codegen.triton.kernel_store import KernelStore
from nemoc.gpu import compiled_files, lower_gpu
from nemoc.ir import DType, Graph, NemocError
from nemoc.ir.dims import estimate
from nemoc.ir.parser import Signature
from nemoc.models import Model, ModelConfig, RandomSource, build_step, open_model, summarize
from nemoc.progress import Progress
from nemoc.runtime import Executable
from nemoc.runtime.cuda import CudaBackend
from nemoc.runtime.launches import LAUNCHES, LaunchRecord
from nemoc.runtime.placement import LaunchTable
from nemoc.runtime.program import DECODE, PREFILL, Bounds, Generation, Program
from nemoc.runtime.state import State
from nemoc.verification import (
    NARROW_BOUND,
    VerifyRow,
    model_rows,
    verify_artifact,
)

_TESTS = Path(__file__).parent.parent / "tests"

_TYPES = ("f32", "bf16")

ROUNDED_BOUND = 2 * NARROW_BOUND
"""Against graphs that round as the kernels do, where weights are larger than trained ones: they make more of a number
that is rounded the other way."""


@dataclass(frozen=True)
class ParityStage:
    """Small models on the device, in all ways of running them.

    Against eager PyTorch in float32; but where random models are rounded to bf16, or weights quantized, against their
    own graphs: rounding itself moves their logits by more than kernels may.

    Attributes:
        models: names of the sample and of the configurations that tests use.
        formats: those of the sample's weights that are checked in bf16 too.
    """

    models: tuple[str, ...]
    formats: tuple[str, ...] = ("nvfp4",)
    name: str = "parity"
    about: str = "logits in all ways of running models against eager PyTorch, or their own graphs"

    def case_names(self) -> tuple[str, ...]:
        """Each model in both types, and the sample quantized."""
        return tuple(self._ways())

    def tasks(self, session: Session) -> Iterator[Task]:
        """Each compiles its model when it runs."""
        for case, way in self._ways().items():
            measure = functools.partial(parity, *way, session)
            yield Task(case, session.digest(source_digest()), measure)

    def compile_ahead(
        self, model: Model, target: str, store: KernelStore, progress: Progress | None
    ) -> None:
        """Each of these; the store has to be the one of the options' cache."""
        for name, dtype, quantize in self._ways().values():
            _compile_small(small_model(name), target, dtype, quantize, progress)

    def _ways(self) -> dict[str, tuple[str, str, str | None]]:
        """Model, type and format by the case's name."""
        plain = {f"{m}, {t}": (m, t, None) for m in self.models for t in _TYPES}
        return plain | {f"sample, bf16, {f}": ("sample", "bf16", f) for f in self.formats}


def parity(model: str, dtype: str, quantize: str | None, session: Session) -> list[Outcome]:
    """A model's ways of running, each with its error."""
    opened = small_model(model)
    executable = _compile_small(opened, session.target, dtype, quantize, session.progress)
    if quantize or (dtype == "bf16" and model != "sample"):
        rows = verify_artifact(executable.folder).rows
        return [_outcome(row, max(row.bound, ROUNDED_BOUND)) for row in rows if row.name != "files"]
    return [_outcome(row, row.bound) for row in model_rows(executable, opened)]


def _compile_small(
    model: Model, target: str, dtype: str, quantize: str | None, progress: Progress | None
) -> Executable:
    """As large as checks need it; its kernels go into the store of the options' cache."""
    return compiler.compile(
        model,
        target,
        dtype=dtype,
        quantize=quantize,
        max_batch=2,
        max_context=64,
        progress=progress,
    )


def _outcome(row: VerifyRow, bound: float) -> Outcome:
    right = row.error <= bound
    status: Status = "checked" if right else "wrong"
    return Outcome(row.name, status, row.detail, error=row.error, bound=bound)


def small_model(name: str) -> Model:
    """The sample, or a configuration of the tests with random weights."""
    if name == "sample":
        return open_model(name)
    variants = _test_models().VARIANTS
    return open_model(
        _test_models().unusual_model(100 + list(variants).index(name), **variants[name])
    )


def parity_models() -> tuple[str, ...]:
    """The sample and the configurations that tests use; these alone where transformers is not installed."""
    try:
        return ("sample", *_test_models().VARIANTS)
    except ImportError:
        return ("sample",)


def _test_models() -> Any:
    """`tests/support/checkpoints.py`, which is in no package."""
    if str(_TESTS) not in sys.path:
        sys.path.append(str(_TESTS))
    return importlib.import_module("support.checkpoints")


_STEP_TOKENS = 8192
"""Tokens that one prefill step takes at most."""

_CACHED = 1024
"""Tokens behind which decodes are timed."""

_STEPS = 32
"""Tokens decoded in one timed run."""

_ROUNDS = 5
"""Timed runs of a whole model."""

_SPARE = 6 << 30
"""Bytes of the device left for states, logits, scratch and others."""


@dataclass(frozen=True)
class WholeStage:
    """A whole model with random weights: decode and prefill as users run them, launches and all."""

    name: str = "whole"
    about: str = (
        "the whole model: decode against the bandwidth of a copy, prefill against bf16 products"
    )
    batches: tuple[int, ...] = (1, 4, 16, 64)
    prompts: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384, 32768)

    @property
    def bounds(self) -> Bounds:
        """What the model is compiled for."""
        return Bounds(max(self.batches), max(self.prompts), _STEP_TOKENS)

    def case_names(self) -> tuple[str, ...]:
        """Decodes first."""
        decodes = (f"decode {b} x 1 behind {_CACHED}" for b in self.batches)
        return (*decodes, *(f"prefill 1 x {n}" for n in self.prompts))

    def tasks(self, session: Session) -> Iterator[Task]:
        """One for each case; the model is made when the first of them runs."""

        @functools.cache
        def runner() -> Runner:
            return Runner(session, self.bounds)

        code = session.digest(source_digest())
        decodes = (functools.partial(_decode, batch=b) for b in self.batches)
        prefills = (functools.partial(_prefill, length=n) for n in self.prompts)
        for name, measure in zip(self.case_names(), (*decodes, *prefills), strict=True):
            yield Task(name, code, functools.partial(_measured, runner, measure, session))

    def compile_ahead(
        self, model: Model, target: str, store: KernelStore, progress: Progress | None
    ) -> None:
        """All layers."""
        compile_model(model, target, self.bounds, store, progress)


def _measured(
    runner: Callable[[], "Runner"],
    measure: Callable[["Runner", Session], Outcome],
    session: Session,
) -> list[Outcome]:
    return [measure(runner(), session)]


@dataclass(frozen=True)
class CompiledModel:
    """A model's steps for a GPU.

    Attributes:
        graphs: by function.
        weights: in the order of their block.
        files: of an artifact that hold machine code and launches.
    """

    graphs: dict[str, Graph]
    weights: tuple[Weight, ...]
    files: dict[str, bytes | str]


def compile_model(
    model: Model, target: str, bounds: Bounds, store: KernelStore | None, progress: Progress | None
) -> CompiledModel:
    """Compile prefill and decode in bf16."""
    found = compiler.functions(model, target, dtype="bf16", which=(PREFILL, DECODE))
    graphs, weights = bind_weights(found.graphs)
    corners = corner_sizes(bounds.max_batch, bounds.max_tokens, bounds.max_context)
    lowered = lower_gpu(graphs, weight_layout(weights), corners, target)
    return CompiledModel(graphs, weights, compiled_files(lowered, target, store, progress))


class Runner:
    """A model on the device: its weights are drawn there, and as many of its layers as there is room for.

    Args:
        session: the device, and what to compile for.
        bounds: how large steps and states become.

    Attributes:
        config: of what is run.
        note: what that is, in words.
    """

    def __init__(self, session: Session, bounds: Bounds) -> None:
        whole = session.model.config
        layers = fitting_layers(whole, session.free_bytes() - _SPARE)
        self.config = replace(whole, layers=whole.layers[:layers])
        self.note = f"{layers} of {len(whole.layers)} layers, random weights"
        self._bounds = bounds
        model = replace(
            session.model, config=self.config, parameters=RandomSource(self.config), name="random"
        )
        compiled = compile_model(model, session.target, bounds, session.store, session.progress)
        graphs, weights, files = compiled.graphs, compiled.weights, compiled.files
        record = LaunchRecord.from_json(json.loads(files[LAUNCHES]), LAUNCHES)
        images = {name: data for name, data in files.items() if isinstance(data, bytes)}
        given = {n: Signature(g.inputs, g.params, g.states) for n, g in graphs.items()}
        self._program = Program(
            name="random",
            target=session.target,
            identity="random",
            vocab=self.config.vocab_size,
            bounds=bounds,
            generation=Generation(),
            state=state_layout(graphs[DECODE]),
            functions=frozenset(graphs),
        )
        size = int(weight_layout(weights).bytes)
        table = LaunchTable(record, self._program, given, size, LAUNCHES)
        device = session.open_device()
        drawn = DrawnWeights(weights, Values(weights, model.parameters), device.place)
        # Reads pieces one after the other, which is all that a backend does with its weights.
        data = cast(torch.Tensor, drawn)
        self._backend = CudaBackend(table, images, self._program, data, device)
        self._random = torch.Generator().manual_seed(0)

    def state(self, batch: int, capacity: int) -> State:
        """An empty state."""
        size = int(self._program.state.at({"B": batch, "C": capacity}).bytes)
        memory = self._backend.allocate(size)
        return State(self._program.state, self._program.identity, batch, capacity, memory)

    def prefill(self, state: State, length: int) -> torch.Tensor:
        """Take in random tokens of each sequence, step by step; the last logits, on the device."""
        chunk = self._bounds.chunk(state.batch)
        for start in range(0, length, chunk):
            new = min(chunk, length - start)
            shape = (state.batch, new)
            tokens = torch.randint(self.config.vocab_size, shape, generator=self._random)
            valid = torch.full((state.batch,), new, dtype=torch.int32)
            logits = self._backend.run(PREFILL, tokens, valid, state)
        return logits

    def decode(self, state: State, steps: int) -> torch.Tensor:
        """Take in a token of each sequence and choose the likeliest next one, over and over; the last logits."""
        tokens = torch.zeros(state.batch, 1, dtype=torch.int64)
        valid = torch.ones(state.batch, dtype=torch.int32)
        for _ in range(steps):
            logits = self._backend.run(DECODE, tokens, valid, state)
            tokens = logits.argmax(-1, keepdim=True).cpu()
        return logits

    def steps(self, batch: int, length: int) -> list[Sizes]:
        """The sizes of each step of a prefill."""
        chunk = self._bounds.chunk(batch)
        starts = range(0, length, chunk)
        return [Sizes(batch, min(chunk, length - start), start) for start in starts]

    def least(self, steps: Sequence[Sizes]) -> tuple[float, float]:
        """Bytes and operations that steps take at least, by the model's closed forms."""
        work = summarize(self.config, DType.BF16).step
        parts = (work.weights, work.state)
        moved = sum(estimate(part, one.symbols) for one in steps for part in parts)
        return moved, sum(estimate(work.flops, one.symbols) for one in steps)


def fitting_layers(config: ModelConfig, room: int) -> int:
    """How many of a model's first layers have weights that fit into so many bytes, with all that is around them.

    Raises:
        NemocError: none.
    """
    left = room
    layers = [0] * len(config.layers)
    for param in build_step(config).params:
        kind, _, rest = param.name.partition(".")
        if kind == "layers":
            layers[int(rest.partition(".")[0])] += int(param.type.bytes)
        else:
            left -= int(param.type.bytes)
    fitting = sum(total <= left for total in itertools.accumulate(layers))
    if not fitting:
        raise NemocError(f"the device has {room} bytes for weights, fewer than one layer needs")
    return fitting


def _decode(runner: Runner, session: Session, batch: int) -> Outcome:
    runs = 1 + _ROUNDS
    state = runner.state(batch, _CACHED + runs * _STEPS)
    runner.prefill(state, _CACHED)
    middle = Sizes(batch, 1, _CACHED + runs * _STEPS // 2)
    note = f"{runner.note}; {_STEPS} tokens of each sequence a run"
    return _timed(
        session,
        lambda: runner.decode(state, _STEPS),
        note,
        runner.least([middle] * _STEPS),
        batch * _STEPS,
    )


def _prefill(runner: Runner, session: Session, length: int) -> Outcome:
    state = runner.state(1, length)

    def run() -> torch.Tensor:
        state.reset()
        return runner.prefill(state, length)

    return _timed(session, run, runner.note, runner.least(runner.steps(1, length)), length)


def _timed(
    session: Session,
    run: Callable[[], torch.Tensor],
    note: str,
    least: tuple[float, float],
    tokens: int,
) -> Outcome:
    """How long a run takes by the clock on the wall; its logits have to be numbers."""
    if not run().isfinite().all():
        return Outcome(OWN, "wrong", f"{note}; logits are not finite")
    seconds = session.wall(run, _ROUNDS)
    return Outcome(OWN, "measured", note, seconds, *least, tokens)
