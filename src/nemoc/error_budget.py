"""The cheapest format of each weight that keeps a model's measured error within a budget.

The error is KL(unquantized || quantized) of the next token's distribution, the mean over tokens of calibration text, in
nats. Each weight is measured alone in each format. From that follows an order of steps, each a weight that goes to a
cheaper format, by error for the bytes that it saves; errors of single weights roughly add up, so that whole models
along this order get worse and worse. Which is the last one within the budget is found by measuring whole models. What
is held against the budget is the mean and twice its standard error over windows, so that other text of the kind keeps
to it too.

Where a target multiplies FP8 by FP8, the rows of prompts that quantized weights multiply may become FP8 too, and beside
them the weights that are NVFP4; that makes prompts faster and saves no byte. Weights have the budget first; what they
leave of it goes to these rows, those first that lose least by it, and how many that are is found by measuring whole
models again. Every token of the calibration text counts as a prompt's. A weight that a checkpoint stores quantized
keeps its rows, as it keeps its format.

Measuring runs the eager model in float32: all of it has to fit into memory.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from nemoc.ir import Builder, DType, Graph, NemocError, interpret
from nemoc.ir.dims import B
from nemoc.ir.nvfp4 import BLOCK
from nemoc.ir.ops import DequantizeNvfp4
from nemoc.ir.ops.fp8 import dequantized_fp8, nvfp4_in_fp8, quantized_fp8
from nemoc.ir.ops.nvfp4 import quantized
from nemoc.ir.scopes import scope_of
from nemoc.models import Model, eager_reference
from nemoc.models.dequantized import Dequantized
from nemoc.models.eager import change_rows, eager_path
from nemoc.models.mixers import Call
from nemoc.models.names import is_stack
from nemoc.models.quantize import select
from nemoc.models.reference import NemotronH
from nemoc.passes import Pass, quantize_fp8, quantize_nvfp4
from nemoc.passes.quantize_fp8 import QuantizeFp8
from nemoc.passes.quantize_nvfp4 import QuantizeNvfp4
from nemoc.progress import Progress
from nemoc.quality import (
    Window,
    divergence,
    model_tokenizer,
    own_calibration,
    read_windows,
)

NVFP4, FP8 = "nvfp4", "fp8"
"""The formats, the cheapest first."""

_NVFP4_IN_FP8 = "nvfp4, in fp8"
"""What rows in FP8 multiply of a weight in NVFP4."""

CONTEXT, TOKENS = 256, 2048
"""Tokens of a window of calibration text, and of all of them: 8 windows."""

_ALONE = 4
"""Windows on which weights are measured alone; that decides nothing but the order."""

_DEVIATIONS = 2.0
"""Standard errors above the mean that have to be within the budget too."""


@dataclass(frozen=True)
class Error:
    """The error of a whole model on the calibration text.

    Attributes:
        mean: over windows, in nats.
        deviation: its standard error.
    """

    mean: float
    deviation: float

    @classmethod
    def of(cls, errors: torch.Tensor) -> "Error":
        """That of windows, float64 [n]."""
        return cls(float(errors.mean()), float(errors.std() / len(errors) ** 0.5))

    def within(self, budget: float) -> bool:
        """Whether other text of the kind keeps to a budget too."""
        return self.mean + _DEVIATIONS * self.deviation <= budget


@dataclass(frozen=True)
class Choice:
    """What was found of one weight.

    Attributes:
        name: of the parameter.
        format: the one chosen, or None where it stays.
        kl: the whole model's error, in nats, if this weight alone has a format, by format.
        bytes: its size by format, and as stored under None.
        prompts: whether the rows of prompts that it multiplies become FP8 too.
        kl_prompts: the whole model's error if this weight alone has the format chosen, and those rows are FP8; None
            where that was not measured, since they have to stay.
    """

    name: str
    format: str | None
    kl: Mapping[str, float]
    bytes: Mapping[str | None, int]
    prompts: bool = False
    kl_prompts: float | None = None

    @property
    def saved(self) -> int:
        """Bytes that the choice saves."""
        return self.bytes[None] - self.bytes[self.format]


@dataclass(frozen=True)
class Prompts:
    """What rows of prompts in FP8 cost.

    Attributes:
        chosen: the error of the whole model with those that were chosen.
        all: with those that all quantized weights multiply, but the head.
    """

    chosen: Error
    all: Error


@dataclass(frozen=True)
class Budgeted:
    """A choice for every weight.

    Attributes:
        budget: what the error was to stay within, in nats.
        error: that of the whole model, its weights quantized so and no activations.
        choices: one for each weight that could be quantized, in the model's order.
        prompts: the same with rows of prompts in FP8 too; None where these were not to become that.
    """

    budget: float
    error: Error
    choices: tuple[Choice, ...]
    prompts: Prompts | None = None

    @property
    def passes(self) -> tuple[Pass, ...]:
        """What quantizes a graph so."""
        kinds: tuple[tuple[QuantizeNvfp4 | QuantizeFp8, str, bool], ...] = (
            (QuantizeNvfp4(), NVFP4, False),
            (QuantizeNvfp4(mode=quantize_nvfp4.PROMPTS), NVFP4, True),
            (QuantizeFp8(), FP8, False),
            (QuantizeFp8(mode=quantize_fp8.PROMPTS), FP8, True),
        )
        named = (
            (pass_, [c.name for c in self.choices if (c.format, c.prompts) == (format_, prompts)])
            for pass_, format_, prompts in kinds
        )
        return tuple(replace(pass_, scope=scope_of(names)) for pass_, names in named if names)


def calibrate(
    model: Model,
    budget: float,
    files: Sequence[str | Path] = (),
    scope: str | None = None,
    progress: Progress | None = None,
    prompts: bool = False,
) -> Budgeted:
    """`within_budget` by the text of files.

    Args:
        model, budget, progress, prompts: as there.
        files: calibration text; of the sample model, which has some of its own, there need be none.
        scope: as there; None for all.

    Raises:
        NemocError: as there, or there is no text, or it cannot be read.
    """
    windows = _windows(model, files)
    return within_budget(model, budget, windows, scope or "all", progress, prompts)


def calibration_tokens(model: Model, files: Sequence[str | Path]) -> torch.Tensor:
    """The tokens that a model is calibrated on, int64 [n, L]: n ≥ 2 windows, each to be seen by itself.

    Args:
        model: with a tokenizer.
        files: as for `calibrate`.

    Raises:
        NemocError: there is no text, it cannot be read, or it is too short.
    """
    return _tokens(_windows(model, files))


def _windows(model: Model, files: Sequence[str | Path]) -> list[Window]:
    text = files or own_calibration(model)
    if not text:
        raise NemocError(f"calibration: found no text for {model.name}, expected files")
    return read_windows(model_tokenizer(model), text, CONTEXT, TOKENS)


def within_budget(
    model: Model,
    budget: float,
    windows: Sequence[Window],
    scope: str = "all",
    progress: Progress | None = None,
    prompts: bool = False,
) -> Budgeted:
    """Choose the cheapest format of each weight, and whether rows of prompts become FP8 too.

    Args:
        model: with weights. What is quantized already stays.
        budget: of the error, in nats, above 0.
        windows: of calibration text, as `nemoc.quality.read_windows` cuts it; shorter ones than the first are left out.
        scope: which weights may be quantized, as for the passes.
        progress: told what is being done.
        prompts: whether rows of prompts may become FP8, which is for targets that multiply FP8 by FP8.

    Raises:
        NemocError: the budget is no positive number, the text too short, or the scope means nothing.
    """
    if not 0 < budget < float("inf"):
        raise NemocError(f"error budget is {budget}, expected a positive number of nats")
    probe = _Probe(model, _tokens(windows))
    candidates = _candidates(model, scope)
    for number, candidate in enumerate(candidates):
        if progress is not None:
            progress("measure each weight", number, len(candidates))
        for name in candidate.formats:
            candidate.kl[name] = float(probe.errors({candidate.name: name}, _ALONE).mean())
    steps = _steps(candidates)
    count, error = _longest(
        lambda count: Error.of(probe.errors(_after(steps[:count]))),
        len(steps),
        Error(0.0, 0.0),
        budget,
        "measure whole models",
        progress,
    )
    chosen = _after(steps[:count])
    rows = _Rows()
    if prompts:
        # The head reads one row of a prompt, its last token's.
        known = {
            c.name: c.kl[chosen[c.name]]
            for c in candidates
            if c.name in chosen and not c.name.startswith("lm_head.")
        }
        rows = _rows_of_prompts(probe, chosen, known, error, budget, progress)
    choices = (
        Choice(
            c.name,
            chosen.get(c.name),
            c.kl,
            c.bytes,
            prompts=c.name in rows.chosen,
            kl_prompts=rows.kl.get(c.name),
        )
        for c in candidates
    )
    return Budgeted(budget, error, tuple(choices), rows.errors)


@dataclass(frozen=True)
class _Candidate:
    """A weight that may be quantized: its formats, cheapest first, sizes, and what was measured."""

    name: str
    formats: tuple[str, ...]
    bytes: dict[str | None, int]
    kl: dict[str, float]


@dataclass(frozen=True)
class _Step:
    """A weight goes to a cheaper format, at a price: error for each byte saved."""

    name: str
    format: str
    price: float


def _candidates(model: Model, scope: str) -> list[_Candidate]:
    stored = Dequantized(model)
    found = []
    chosen = select(model.config, scope, 1).chosen
    for name, type_ in stored.types.items():
        if name not in chosen or name in stored.formats:
            continue
        *lead, rows, width = map(int, type_.shape)
        matrices = lead[0] if lead else 1
        elements = matrices * rows * width
        sizes: dict[str | None, int] = {None: elements * type_.dtype.bytes}
        if width % BLOCK == 0:
            sizes[NVFP4] = elements // 2 + elements // BLOCK + 4 * matrices
        sizes[FP8] = elements + 4 * matrices
        found.append(_Candidate(name, tuple(n for n in sizes if n is not None), sizes, {}))
    return found


def _steps(candidates: Sequence[_Candidate]) -> list[_Step]:
    """Every weight on its way to its cheapest format, the steps with the least error for a byte first.

    A format is passed over if going past it costs less for a byte than stopping there.
    """
    steps: list[_Step] = []
    for candidate in candidates:
        here: str | None = None
        while here != candidate.formats[0]:
            cheaper = [f for f in candidate.formats if candidate.bytes[f] < candidate.bytes[here]]
            if not cheaper:
                break
            known = 0.0 if here is None else candidate.kl[here]
            price = {
                f: (candidate.kl[f] - known) / (candidate.bytes[here] - candidate.bytes[f])
                for f in cheaper
            }
            here = min(price, key=price.__getitem__)
            steps.append(_Step(candidate.name, here, price[here]))
    # Sorting is stable, and prices of one weight rise, so that its steps stay in order.
    return sorted(steps, key=lambda step: step.price)


@dataclass(frozen=True)
class _Rows:
    """What was found of rows of prompts.

    Attributes:
        chosen: the weights whose rows become FP8.
        kl: errors as in `Choice.kl_prompts`, by weight.
        errors: as in `Budgeted.prompts`.
    """

    chosen: frozenset[str] = frozenset()
    kl: Mapping[str, float] = field(default_factory=dict)
    errors: Prompts | None = None


def _rows_of_prompts(
    probe: "_Probe",
    formats: Mapping[str, str],
    known: Mapping[str, float],
    error: Error,
    budget: float,
    progress: Progress | None,
) -> _Rows:
    """Which rows of prompts the budget allows in FP8.

    Args:
        probe: measures.
        formats: of all weights that have one.
        known: the weights whose rows may become FP8, with the error if the weight alone has its format.
        error: of the whole model with these formats.
        budget: of errors.
        progress: told what is being done.
    """
    kl = {}
    for number, name in enumerate(known):
        if progress is not None:
            progress("measure rows of prompts", number, len(known))
        kl[name] = float(probe.errors({name: formats[name]}, _ALONE, [name]).mean())
    order = sorted(known, key=lambda name: kl[name] - known[name])

    @functools.cache
    def measured(count: int) -> Error:
        return Error.of(probe.errors(formats, rows=order[:count])) if count else error

    count, chosen = _longest(
        measured, len(order), error, budget, "measure whole models with rows in FP8", progress
    )
    return _Rows(frozenset(order[:count]), kl, Prompts(chosen, measured(len(order))))


def _longest(
    measured: Callable[[int], Error],
    count: int,
    none: Error,
    budget: float,
    stage: str,
    progress: Progress | None,
) -> tuple[int, Error]:
    """How many of some steps, one after the other, the budget allows, and the error behind them.

    Args:
        measured: given how many steps are taken, the error behind them.
        count: of steps.
        none: the error behind none of them.
        budget: of errors.
        stage: what is being done, in words.
        progress: told that.
    """
    good, error = 0, none
    bad, middle, tries = count + 1, count, 0
    while bad - good > 1:
        if progress is not None:
            progress(stage, tries, count.bit_length() + 1)
        found = measured(middle)
        if found.within(budget):
            good, error = middle, found
        else:
            bad = middle
        middle, tries = (good + bad) // 2, tries + 1
    return good, error


def _after(steps: Sequence[_Step]) -> dict[str, str]:
    return {step.name: step.format for step in steps}


def _tokens(windows: Sequence[Window]) -> torch.Tensor:
    """The tokens of all windows as long as the first, int64 [n, L]."""
    rows = [window.ids[:-1] for window in windows if window.tokens == windows[0].tokens]
    if len(rows) < 2:
        raise NemocError(
            f"calibration: found {len(rows)} window of {windows[0].tokens} tokens, expected at "
            "least 2: give more text"
        )
    return torch.stack(rows)


class _Probe:
    """The eager model, whose weights are exchanged, on fixed tokens.

    What enters each layer is kept, so that a change of one weight runs the layers from its own on.
    """

    def __init__(self, model: Model, tokens: torch.Tensor) -> None:
        self._weights = Dequantized(model)
        self._module: NemotronH = eager_reference(model)
        self._head = self._module.lm_head.weight.detach()
        self._present: dict[str, str] = {}
        with torch.no_grad():
            self._entering = [self._module.backbone.embeddings(tokens)]
            for layer in self._module.backbone.layers:
                self._entering.append(layer(self._entering[-1], Call(None, None)))

    @torch.no_grad()
    def errors(
        self, formats: Mapping[str, str], windows: int | None = None, rows: Collection[str] = ()
    ) -> torch.Tensor:
        """The mean error of each of the first windows, float64 [n], if some weights have other formats.

        Args:
            formats: by name.
            windows: how many; None for all.
            rows: those of these weights of which every row that they multiply is in FP8 too.
        """
        in_fp8 = {name: _NVFP4_IN_FP8 for name in rows if formats[name] == NVFP4}
        self._assign({**formats, **in_fp8})
        with contextlib.ExitStack() as changes:
            for name in rows:
                changes.enter_context(change_rows(self._module, name, rows_in_fp8))
            return self._run(formats, windows)

    def _run(self, formats: Mapping[str, str], windows: int | None) -> torch.Tensor:
        """`errors` of the model as it is now, whose layers before the first of these weights' are unchanged."""
        backbone = self._module.backbone
        first = min(map(self._layer, formats), default=len(backbone.layers))
        x = self._entering[first][:windows]
        for layer in backbone.layers[first:]:
            x = layer(x, Call(None, None))
        pairs = zip(self._entering[-1][:windows], x, strict=True)
        return torch.stack(
            [
                divergence(
                    F.linear(backbone.norm_f(expected), self._head),
                    self._module.lm_head(backbone.norm_f(found)),
                ).mean()
                for expected, found in pairs
            ]
        )

    def _layer(self, name: str) -> int:
        """The layer that a weight is in; behind the last one for the head."""
        match = re.match(r"layers\.(\d+)\.", name)
        return int(match[1]) if match else len(self._module.backbone.layers)

    def _assign(self, formats: Mapping[str, str]) -> None:
        """Give weights these formats, and all others what is stored."""
        for name in {*self._present, *formats}:
            wanted = formats.get(name)
            if wanted != self._present.get(name):
                self._module.get_parameter(eager_path(name)).data = self._read(name, wanted)
        self._present = dict(formats)

    def _read(self, name: str, wanted: str | None) -> torch.Tensor:
        if wanted is None:
            return self._weights.read(name).float()
        if not is_stack(name):
            return _round_trip(self._weights.read(name), wanted)
        count = int(self._weights.type_of(name).shape[0])
        parts = [_round_trip(self._weights.read(name, i, i + 1), wanted) for i in range(count)]
        return torch.cat(parts)


def rows_in_fp8(x: torch.Tensor) -> torch.Tensor:
    """What rows [..., K] of f32 are in FP8, each by its own scale, f32: the ops that the pass puts into graphs."""
    rows = x.reshape(-1, 1, x.shape[-1])
    return interpret(_rows_graph(x.shape[-1]), {"x": rows}).outputs[0].reshape(x.shape)


@functools.lru_cache(maxsize=64)
def _rows_graph(width: int) -> Graph:
    build = Builder("rows")
    x = build.input("x", DType.F32, (B, 1, width))
    return build.finish([dequantized_fp8(build, *quantized_fp8(build, x))])


def _round_trip(w: torch.Tensor, wanted: str) -> torch.Tensor:
    """What a weight is in a format, f32: the ops that the passes put into graphs."""
    graph = _round_trip_graph(DType.of(w), tuple(w.shape), wanted)
    return interpret(graph, {"w": w}).outputs[0]


@functools.lru_cache(maxsize=64)
def _round_trip_graph(dtype: DType, shape: tuple[int, ...], wanted: str) -> Graph:
    build = Builder("round_trip")
    w = build.param("w", dtype, shape)
    if wanted == FP8:
        return build.finish([dequantized_fp8(build, *quantized_fp8(build, w))])
    stored = DequantizeNvfp4(*quantized(build, w))
    if wanted == _NVFP4_IN_FP8:
        return build.finish([dequantized_fp8(build, *nvfp4_in_fp8(build, stored))])
    return build.finish([build(stored)])
