"""Proof on the user's own model: each pass, each kernel, and the whole against eager PyTorch."""

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nemoc import compiler
from nemoc.codegen.check import CheckedBackend, check_kernels
from nemoc.codegen.storage import bind_weights, weight_layout
from nemoc.codegen.triton.target import GPUS
from nemoc.compiler import Functions, Pipeline, Plugins
from nemoc.gpu import runnable
from nemoc.graph_file import read_graph
from nemoc.ir import Graph, NemocError, Op
from nemoc.ir.ops import (
    Cast,
    Folded,
    Fused,
    QuantizeFp8,
    QuantizeNvfp4,
    RoundToInt8,
    TopK,
    own_ops,
)
from nemoc.ir.params import LazyArguments
from nemoc.ir.sample_inputs import sample_arguments
from nemoc.models import Model, eager_reference, open_model
from nemoc.passes import Effect, PassContext, PassRun
from nemoc.passes.check import CHECK_SIZES, Divergence, NumericCheck, relative_error, replay
from nemoc.passes.reproducer import Reproducer, read_reproducer
from nemoc.progress import Progress
from nemoc.quantizations import Quantize
from nemoc.runtime import Executable
from nemoc.runtime.manifest import read_manifest
from nemoc.runtime.reference import ReferenceBackend
from nemoc.runtime.store import open_weights
from nemoc.runtime.weights import WeightSource

MODEL_BOUND = 1e-4
"""‖executable − eager‖ / ‖eager‖ of the logits, both in float32."""

KERNEL_BOUND = 1e-5
"""‖kernel − op‖ / ‖op‖ of each result, the op evaluated in float64."""

NARROW_BOUND = 1e-2
"""Both, where activations are rounded: what lies near the middle between two numbers goes either way."""

TIED_BOUND = 0.5
"""Of the logits of any token, where activations are rounded and a router chooses; `NARROW_BOUND` is then for three
quarters of the tokens.

An expert whose score is nearly another's is chosen in its place or not, as rounding has it: of the sample model the
interpreter itself, once rounding and once in float64, has logits that differ by 0.12 for one token of 48, and by less
than 5e-3 for the middle one. A wrong state or position makes other logits of them, some 1 away.
"""

_MANY_TOKENS = 8
"""Tokens from which on three quarters of them are held to the bound of rounding."""

_SHORTEST = 10
"""Tokens that the ways of running a model need."""

_Pair = tuple[torch.Tensor, torch.Tensor]
"""What was found, and what was expected."""


@dataclass(frozen=True)
class _Expected:
    """What ways of running a model are held against.

    Attributes:
        prompt: tokens int64 [B, L] to the logits behind each, f32 [B, L, V], all of them a prompt.
        steps: the same, where so many of the tokens are a prompt and the others come one by one; None where that makes
            no difference.
    """

    prompt: Callable[[torch.Tensor], torch.Tensor]
    steps: Callable[[torch.Tensor, int], torch.Tensor] | None = None

    def behind(self, tokens: torch.Tensor, count: int) -> torch.Tensor:
        """The logits behind each token, of which the first `count` are a prompt."""
        return self.prompt(tokens) if self.steps is None else self.steps(tokens, count)


@dataclass(frozen=True)
class VerifyRow:
    """One thing proved, or not.

    Attributes:
        kind: "pass", "kernel", "model", "quantized" or "artifact".
        name: of the pass, the kernel, or the way of running the model.
        detail: function and declared effect, shapes, or what was compared.
        error: relative error; 0 means equal bits.
        bound: the largest error allowed.
        seconds: how long the check took.
    """

    kind: str
    name: str
    detail: str
    error: float
    bound: float
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether the error is within the bound; NaN is not."""
        return self.error <= self.bound


@dataclass(frozen=True)
class VerifyReport:
    """All rows, in the order in which a model flows."""

    rows: tuple[VerifyRow, ...]

    @property
    def ok(self) -> bool:
        """Whether every row is."""
        return all(row.ok for row in self.rows)


def verify_model(
    source: object,
    target: str | None = None,
    pipeline: Pipeline = None,
    dtype: str | None = None,
    quantize: Quantize = None,
    *,
    scope: str | None = None,
    plugins: Plugins = (),
    executable: Executable | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check every pass, every distinct kernel and the whole executable of a model.

    For a GPU that is not at hand, Triton's interpreter runs the kernels that were generated for it. What is quantized
    is another model than the source, so its executable is held against the interpreter of the same graphs: what
    quantizing changes is for the check of its pass, and for `nemoc eval`.

    Args:
        source, target, pipeline, dtype, quantize, scope, plugins, progress: as for `nemoc.compile`. The source needs
            weights.
        executable: compiled from them already, for two rows; None: compile one.

    Returns:
        The rows; a miss is a row that is not `ok`, not an exception.

    Raises:
        NemocError: the model cannot be compiled in the first place.
    """
    model = open_model(source)
    if model.parameters is None:
        raise NemocError(f"{model.name} has no weights to verify; try random:{model.name}")
    tell = progress or (lambda stage, done, total: None)
    rows: list[VerifyRow] = []
    tell("check passes", 0, 0)
    recorder = PassRecorder()
    # The passes of prefill_all are those of prefill; its kernels are not all the same.
    graphs = functools.partial(
        compiler.functions, model, target, pipeline, dtype, quantize, scope=scope, plugins=plugins
    )
    graphs(which=("prefill", "decode"), check=recorder)
    rows.extend(recorder.rows)
    tell("check kernels", 0, 0)
    found = graphs()
    own = own_ops(found.graphs.values())
    rows.extend(kernel_rows(found))
    if executable is None:
        executable = compiler.compile(
            model,
            target,
            pipeline=pipeline,
            dtype=dtype,
            quantize=quantize,
            scope=scope,
            plugins=plugins,
            max_batch=2,
            max_context=64,
            progress=progress,
        )
        executable = runnable(executable, own)
    if quantize is None:
        tell("check the model against eager PyTorch", 0, 0)
        rows.extend(model_rows(executable, model, own))
    else:
        tell("check the model against the interpreter", 0, 0)
        expected = _interpreted(executable, own)
        rows.extend(_way_rows("quantized", executable, expected, own))
    return VerifyReport(tuple(rows))


def _rounds(graphs: Mapping[str, Graph]) -> bool:
    """Whether steps round activations to less than float32."""
    return any(_is_rounding(op) for graph in graphs.values() for op in _ops(graph))


def _ops(graph: Graph) -> Iterator[Op]:
    """What a step computes, in fused regions too; not what parameters determine."""
    for node in graph.nodes:
        match node.op:
            case Folded():
                pass
            case Fused():
                yield from (inner.op for inner in node.op.body.nodes)
            case _:
                yield node.op


def _is_rounding(op: Op) -> bool:
    narrow = isinstance(op, Cast) and op.dtype.is_float and op.dtype.bytes < op.x.dtype.bytes
    return narrow or isinstance(op, QuantizeFp8 | QuantizeNvfp4 | RoundToInt8)


@dataclass
class PassRecorder:
    """A check for `run_pipeline` that keeps a row for each pass instead of stopping at a miss."""

    rows: list[VerifyRow] = field(default_factory=list)

    def __call__(self, run: PassRun, ctx: PassContext) -> None:
        """Measure one pass."""
        started = time.perf_counter()
        error = NumericCheck().error(run, ctx)
        effect = run.pass_.effect
        self.rows.append(
            VerifyRow(
                "pass",
                run.pass_.name,
                f"{run.after.name}: {'equal bits' if effect is Effect.EXACT else effect.value}",
                error,
                run.pass_.error_budget(),
                time.perf_counter() - started,
            )
        )


def kernel_rows(found: Functions) -> Iterator[VerifyRow]:
    """Each distinct kernel of compiled functions, alone; none for the interpreter."""
    if found.target == "reference" or found.model.parameters is None:
        return
    graphs, weights = bind_weights(found.graphs)
    packed = WeightSource(found.model.parameters, weights)
    checks = check_kernels(
        graphs,
        weight_layout(weights),
        lambda graph: LazyArguments(
            graph, packed, sample_arguments(graph, CHECK_SIZES, params=False)
        ),
        CHECK_SIZES,
        _checked_backend(found.target),
        relative_error,
    )
    bound = NARROW_BOUND if _rounds(found.graphs) else KERNEL_BOUND
    started = time.perf_counter()
    for check in checks:
        now = time.perf_counter()
        name = " + ".join(check.kernels)
        yield VerifyRow("kernel", name, check.op, check.error, bound, now - started)
        started = now


def _checked_backend(target: str) -> CheckedBackend:
    """The backend that generates code for a target."""
    if target in GPUS:
        from nemoc.codegen.triton import check as triton_check  # noqa: PLC0415  (loads triton)

        return triton_check.checked_backend(GPUS[target])
    from nemoc.codegen.tvm import check as tvm_check  # noqa: PLC0415  (loads tvm)
    from nemoc.codegen.tvm.target import cpu_target  # noqa: PLC0415

    return tvm_check.checked_backend(cpu_target(target))


def model_rows(
    executable: Executable, model: Model, own: tuple[type[Op], ...] = ()
) -> Iterator[VerifyRow]:
    """The ways of running a model, each against eager PyTorch in float32; its graphs may have ops of a user's own."""
    reference = eager_reference(model)

    @torch.inference_mode()
    def eager(rows: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = reference(rows)
        return logits

    return _way_rows("model", executable, _Expected(eager), own)


def verify_artifact(
    folder: Path, progress: Progress | None = None, plugins: Plugins = ()
) -> VerifyReport:
    """Check an artifact by itself: its files, and the ways of running its code against its own graphs.

    That its graphs are those of a model takes the model: `verify_model`.

    Args:
        folder: the artifact.
        progress: told what is being done.
        plugins: as for `nemoc.compile`; ops of their modules may occur in the graphs.

    Raises:
        NemocError: the artifact is incomplete, altered or for another machine, or too small to be run.
    """
    started = time.perf_counter()
    executable = compiler.load(folder, progress=progress, plugins=plugins)
    manifest = read_manifest(folder)
    seconds = time.perf_counter() - started
    detail = f"{len(manifest.files)} files, against their SHA-256"
    rows = [VerifyRow("artifact", "files", detail, 0.0, 0.0, seconds)]
    if progress is not None:
        progress("check the code against the graphs", 0, 0)
    own = compiler.plugin_ops(plugins)
    rows.extend(_way_rows("artifact", executable, _interpreted(executable, own), own))
    return VerifyReport(tuple(rows))


def _graphs(executable: Executable, own: tuple[type[Op], ...]) -> dict[str, Graph]:
    """The graphs of an artifact, in which ops of a user's own may be."""
    files = read_manifest(executable.folder).graphs
    return {name: read_graph(executable.folder / file, own) for name, file in files.items()}


def _interpreted(executable: Executable, own: tuple[type[Op], ...]) -> _Expected:
    """An executable's own graphs and weights in the interpreter.

    A prompt stands for steps of one token too, which proves that both agree, unless they quantize activations
    differently.
    """
    folder, manifest = executable.folder, read_manifest(executable.folder)
    weights = open_weights(folder, manifest, verify="headers")
    graphs = _graphs(executable, own)
    interpreted = Executable(
        executable.program, ReferenceBackend(graphs, weights), folder, manifest
    )

    def prompt(tokens: torch.Tensor) -> torch.Tensor:
        return interpreted.prefill(tokens, interpreted.new_state(len(tokens)), all_logits=True)

    def steps(tokens: torch.Tensor, count: int) -> torch.Tensor:
        state = interpreted.new_state(len(tokens))
        first = interpreted.prefill(tokens[:, :count], state, all_logits=True)
        following = [interpreted.decode(ids, state) for ids in tokens[:, count:].unbind(1)]
        return torch.cat([first, torch.stack(following, dim=1)], dim=1)

    many, one = (_quantized_rows(graphs[name]) for name in ("prefill_all", "decode"))
    return _Expected(prompt, steps if many != one else None)


def _quantized_rows(graph: Graph) -> int:
    """How often a step quantizes activations to FP8; weights are stored so."""
    return sum(isinstance(op, QuantizeFp8) for op in _ops(graph))


def _way_rows(
    kind: str, executable: Executable, expected: _Expected, own: tuple[type[Op], ...]
) -> Iterator[VerifyRow]:
    """The ways of running an executable, as far as its bounds allow them.

    Where steps round activations and a router chooses by them, a row has the largest error of three quarters of its
    tokens, and one more row that of the worst token of all; ways of a few tokens are held to the bound of that one.

    Args:
        kind: of the rows.
        executable: what is checked.
        expected: what it is held against.
        own: ops of a user's own that may be in its graphs.
    """
    graphs = _graphs(executable, own)
    rounds = _rounds(graphs)
    tied = rounds and any(isinstance(op, TopK) for g in graphs.values() for op in _ops(g))
    worst = []
    prompts = _MANY_TOKENS if tied else 1
    for name, (detail, run) in _ways(executable, expected, prompts).items():
        started = time.perf_counter()
        found, wanted = run()
        if tied:
            errors = token_errors(found, wanted)
            worst.append(errors.max())
            many = len(errors) >= _MANY_TOKENS
            error = float(errors.quantile(0.75) if many else errors.max())
            bound = NARROW_BOUND if many else TIED_BOUND
        else:
            error = relative_error(found, wanted)
            bound = NARROW_BOUND if rounds else MODEL_BOUND
        yield VerifyRow(kind, name, detail, error, bound, time.perf_counter() - started)
    if tied:
        detail = "the worst one; experts whose scores tie change places"
        error = float(torch.stack(worst).max())
        yield VerifyRow(kind, "every token", detail, error, TIED_BOUND, 0.0)


def _ways(
    executable: Executable, expected: _Expected, prompts: int = 1, seed: int = 0
) -> dict[str, tuple[str, Callable[[], _Pair]]]:
    """By name what each way is, and what runs it.

    Tokens are random; of the tokenizer's text or not makes no difference to the arithmetic.

    Args:
        executable: what is run.
        expected: what it is held against.
        prompts: of how many prompts, each longer than the one before, the last token is looked at.
        seed: of the tokens.

    Raises:
        NemocError: the executable is too small.
    """
    bounds = executable.program.bounds
    batch, width = min(2, bounds.max_batch), min(24, bounds.max_context - 1)
    if width < _SHORTEST:
        raise NemocError(
            f"{executable.program.name}: max_context is {bounds.max_context}, "
            f"expected at least {_SHORTEST + 1} to check it"
        )
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, executable.program.vocab, (batch, width), generator=generator)
    wanted = expected.prompt(tokens)

    def prefill() -> _Pair:
        return executable.prefill(tokens, executable.new_state(batch), all_logits=True), wanted

    lengths = range(width - prompts + 1, width + 1)

    def last() -> _Pair:
        found = [executable.prefill(tokens[:1, :n], executable.new_state()) for n in lengths]
        return torch.cat(found), wanted[0, lengths[0] - 1 :]

    def chunked() -> _Pair:
        state = executable.new_state()
        cuts = (tokens[:1, :5], tokens[:1, 5:6], tokens[:1, 6:])
        parts = [executable.prefill(cut, state, all_logits=True) for cut in cuts]
        return torch.cat(parts, dim=1), wanted[:1]

    def decode() -> _Pair:
        state = executable.new_state(batch)
        executable.prefill(tokens[:, :8], state)
        steps = [executable.decode(tokens[:, i], state) for i in range(8, width)]
        whole = wanted if expected.steps is None else expected.steps(tokens, 8)
        return torch.stack(steps, dim=1), whole[:, 8:]

    more = min(_MANY_TOKENS // 2, bounds.max_context - width)

    def unequal() -> _Pair:
        state = executable.new_state(2)
        found = [executable.prefill(tokens, state, lengths=torch.tensor([width, 9]))]
        found += [executable.decode(tokens[:, i], state) for i in range(more)]
        alone = expected.behind(torch.cat([tokens[1:, :9], tokens[1:, :more]], dim=1), 9)
        longer = expected.behind(torch.cat([tokens[:1], tokens[:1, :more]], dim=1), width)
        last = slice(-1 - more, None)
        return torch.stack(found, dim=1), torch.stack([longer[0, last], alone[0, last]])

    ways: dict[str, tuple[str, Callable[[], _Pair]]] = {
        "prefill": (f"batch {batch}, {width} tokens, all logits", prefill),
        "prefill, last token": (f"batch 1, {_range(lengths)} tokens", last),
        "chunked prefill": (f"5 + 1 + {width - 6} tokens", chunked),
        "decode": (f"batch {batch}, 8 tokens, then {width - 8} steps", decode),
    }
    if batch == 2:
        detail = f"{width} and 9 tokens, then {more} steps, against each alone"
        ways["unequal rows"] = (detail, unequal)
    return ways


def _range(lengths: range) -> str:
    """`24`, or `17 to 24`."""
    return f"{lengths[0]} to {lengths[-1]}" if len(lengths) > 1 else str(lengths[0])


def token_errors(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """‖found − expected‖ / ‖expected‖ of each token's logits [..., V], f64 [tokens]; NaN or infinite if one is."""
    wanted = expected.double()
    differences = (found.double() - wanted).norm(dim=-1)
    return torch.div(differences, wanted.norm(dim=-1).clamp(min=1e-300)).flatten()


def replay_reproducer(folder: Path, plugins: Plugins = ()) -> tuple[Reproducer, Divergence | None]:
    """Read what `nemoc bisect` wrote, and compare its graphs again; none when they do not part any more.

    Args:
        folder: where it is.
        plugins: modules or pass classes; ops of their modules may occur in the graphs. The passes do not run.

    Raises:
        NemocError: a file is missing, altered or malformed.
    """
    found = read_reproducer(folder, compiler.plugin_ops(plugins))
    try:
        return found, replay(found)
    except NemocError as error:
        raise NemocError(f"{folder}: {error}") from None
