"""Proof on the user's own model: each pass, each kernel, and the whole against eager PyTorch."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from nemoc import compiler
from nemoc.codegen.storage import Weight, bind_weights, weight_layout
from nemoc.compiler import Functions, Pipeline
from nemoc.ir import NemocError, TensorType
from nemoc.ir.params import LazyArguments, ParameterSource
from nemoc.ir.sample_inputs import sample_arguments
from nemoc.models import Model, eager_reference, open_model
from nemoc.passes import Effect, Pass, PassContext, PassRun
from nemoc.passes.check import NumericCheck, relative_error
from nemoc.progress import Progress
from nemoc.runtime import Executable
from nemoc.runtime.weights import weight_pieces

MODEL_BOUND = 1e-4
"""‖executable − eager‖ / ‖eager‖ of the logits in float32."""

KERNEL_BOUND = 1e-5
"""‖kernel − op‖ / ‖op‖ of each result, the op evaluated in float64."""

_SIZES = {"B": 2, "L": 7, "C": 24}
"""Small, and no multiple of any vector or block: tails are where kernels go wrong."""


@dataclass(frozen=True)
class VerifyRow:
    """One thing proved, or not.

    Attributes:
        kind: "pass", "kernel" or "model".
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
    *,
    plugins: Iterable[str | type[Pass]] = (),
    executable: Executable | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check every pass, every distinct kernel and the whole executable of a model.

    Args:
        source, target, pipeline, plugins, progress: as for `nemoc.compile`. The source needs weights.
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
    compiler.functions(
        model, target, pipeline, plugins=plugins, which=("prefill", "decode"), check=recorder
    )
    rows.extend(recorder.rows)
    tell("check kernels", 0, 0)
    rows.extend(kernel_rows(compiler.functions(model, target, pipeline, plugins=plugins)))
    if executable is None:
        executable = compiler.compile(
            model,
            target,
            pipeline=pipeline,
            plugins=plugins,
            max_batch=2,
            max_context=64,
            progress=progress,
        )
    tell("check the model against eager PyTorch", 0, 0)
    rows.extend(model_rows(executable, model))
    return VerifyReport(tuple(rows))


@dataclass
class PassRecorder:
    """A check for `run_pipeline` that keeps a row for each pass instead of stopping at a miss."""

    rows: list[VerifyRow] = field(default_factory=list)

    def __call__(self, run: PassRun, ctx: PassContext) -> None:
        """Measure one pass."""
        started = time.perf_counter()
        error = NumericCheck(_SIZES).error(run, ctx)
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
    from nemoc.codegen.tvm.check import check_kernels  # noqa: PLC0415  (loads tvm)
    from nemoc.codegen.tvm.target import cpu_target  # noqa: PLC0415

    graphs, weights = bind_weights(found.graphs)
    packed = _Packed(found.model.parameters, weights)
    checks = check_kernels(
        graphs,
        weight_layout(weights),
        lambda graph: LazyArguments(graph, packed, sample_arguments(graph, _SIZES, params=False)),
        _SIZES,
        cpu_target(found.target),
        relative_error,
    )
    started = time.perf_counter()
    for check in checks:
        now = time.perf_counter()
        name = " + ".join(check.kernels)
        yield VerifyRow("kernel", name, check.op, check.error, KERNEL_BOUND, now - started)
        started = now


class _Packed:
    """A model's weights in the form in which steps read them."""

    def __init__(self, source: ParameterSource, weights: Iterable[Weight]) -> None:
        self._pieces = weight_pieces(source)
        self._weights = {w.name: w for w in weights}

    def type_of(self, name: str) -> TensorType:
        return self._weights[name].type

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        pieces = list(self._pieces(self._weights[name]))
        return pieces[0] if pieces[0].dim() == 0 else torch.cat(pieces)[start:stop]


def model_rows(executable: Executable, model: Model, seed: int = 0) -> Iterator[VerifyRow]:
    """The ways of running a model, each against the eager reference in float32.

    Tokens are random; of the tokenizer's text or not makes no difference to the arithmetic.
    """
    reference = eager_reference(model)
    vocab = model.config.vocab_size
    tokens = torch.randint(0, vocab, (2, 24), generator=torch.Generator().manual_seed(seed))

    @torch.inference_mode()
    def eager(rows: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = reference(rows)
        return logits

    expected = eager(tokens)

    def prefill() -> tuple[torch.Tensor, torch.Tensor]:
        state = executable.new_state(2)
        return executable.prefill(tokens, state, all_logits=True), expected

    def last() -> tuple[torch.Tensor, torch.Tensor]:
        return executable.prefill(tokens[:1], executable.new_state()), expected[:1, -1]

    def chunked() -> tuple[torch.Tensor, torch.Tensor]:
        state = executable.new_state()
        cuts = (tokens[:1, :5], tokens[:1, 5:6], tokens[:1, 6:])
        parts = [executable.prefill(cut, state, all_logits=True) for cut in cuts]
        return torch.cat(parts, dim=1), expected[:1]

    def decode() -> tuple[torch.Tensor, torch.Tensor]:
        state = executable.new_state(2)
        executable.prefill(tokens[:, :8], state)
        steps = [executable.decode(tokens[:, i], state) for i in range(8, 24)]
        return torch.stack(steps, dim=1), expected[:, 8:]

    def unequal() -> tuple[torch.Tensor, torch.Tensor]:
        lengths = torch.tensor([24, 9])
        state = executable.new_state(2)
        first = executable.prefill(tokens, state, lengths=lengths)
        second = executable.decode(tokens[:, 0], state)
        alone = eager(torch.cat([tokens[1:, :9], tokens[1:, :1]], dim=1))
        longer = eager(torch.cat([tokens[:1], tokens[:1, :1]], dim=1))
        return (
            torch.stack([first, second], dim=1),
            torch.stack([longer[0, -2:], alone[0, -2:]]),
        )

    ways: dict[str, tuple[str, Callable[[], tuple[torch.Tensor, torch.Tensor]]]] = {
        "prefill": ("batch 2, 24 tokens, all logits", prefill),
        "prefill, last token": ("batch 1, 24 tokens", last),
        "chunked prefill": ("5 + 1 + 18 tokens", chunked),
        "decode": ("batch 2, 8 tokens, then 16 steps", decode),
        "unequal rows": ("24 and 9 tokens, against each alone", unequal),
    }
    for name, (detail, run) in ways.items():
        started = time.perf_counter()
        error = relative_error(*run())
        yield VerifyRow("model", name, detail, error, MODEL_BOUND, time.perf_counter() - started)
