"""The cheapest format of each weight that keeps a model's measured error within a budget.

The error is KL(unquantized || quantized) of the next token's distribution, the mean over tokens of calibration text, in
nats. Each weight is measured alone in each format. From that follows an order of steps, each a weight that goes to a
cheaper format, by error for the bytes that it saves; errors of single weights roughly add up, so that whole models
along this order get worse and worse. Which is the last one within the budget is found by measuring whole models. What
is held against the budget is the mean and twice its standard error over windows, so that other text of the kind keeps
to it too.

Only weights are quantized. Measuring runs the eager model in float32: all of it has to fit into memory.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from nemoc.ir import Builder, DType, Graph, NemocError, interpret
from nemoc.ir.nvfp4 import BLOCK
from nemoc.ir.ops import DequantizeNvfp4
from nemoc.ir.ops.fp8 import dequantized_fp8, quantized_fp8
from nemoc.ir.ops.nvfp4 import quantized
from nemoc.ir.scopes import scope_of
from nemoc.models import Model, eager_reference
from nemoc.models.dequantized import Dequantized
from nemoc.models.mixers import Call
from nemoc.models.names import is_stack
from nemoc.models.quantize import select
from nemoc.models.reference import NemotronH
from nemoc.passes import Pass
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

CONTEXT, TOKENS = 256, 2048
"""Tokens of a window of calibration text, and of all of them: 8 windows."""

_ALONE = 4
"""Windows on which weights are measured alone; that decides nothing but the order."""

_DEVIATIONS = 2.0
"""Standard errors above the mean that have to be within the budget too."""


@dataclass(frozen=True)
class Choice:
    """What was found of one weight.

    Attributes:
        name: of the parameter.
        format: the one chosen, or None where it stays.
        kl: the whole model's error, in nats, if this weight alone has a format, by format.
        bytes: its size by format, and as stored under None.
    """

    name: str
    format: str | None
    kl: Mapping[str, float]
    bytes: Mapping[str | None, int]

    @property
    def saved(self) -> int:
        """Bytes that the choice saves."""
        return self.bytes[None] - self.bytes[self.format]


@dataclass(frozen=True)
class Budgeted:
    """A choice for every weight.

    Attributes:
        budget: what the error was to stay within, in nats.
        kl: the error of the whole model, quantized so, on the calibration text.
        kl_error: its standard error.
        choices: one for each weight that could be quantized, in the model's order.
    """

    budget: float
    kl: float
    kl_error: float
    choices: tuple[Choice, ...]

    @property
    def passes(self) -> tuple[Pass, ...]:
        """What quantizes a graph so."""
        by_format = ((NVFP4, QuantizeNvfp4), (FP8, QuantizeFp8))
        named = (
            (pass_, [c.name for c in self.choices if c.format == name]) for name, pass_ in by_format
        )
        return tuple(pass_(scope=scope_of(names)) for pass_, names in named if names)


def calibrate(
    model: Model,
    budget: float,
    files: Sequence[str | Path] = (),
    scope: str | None = None,
    progress: Progress | None = None,
) -> Budgeted:
    """`within_budget` by the text of files.

    Args:
        model, budget, progress: as there.
        files: calibration text; of the sample model, which has some of its own, there need be none.
        scope: as there; None for all.

    Raises:
        NemocError: as there, or there is no text, or it cannot be read.
    """
    windows = _windows(model, files)
    return within_budget(model, budget, windows, scope or "all", progress)


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
) -> Budgeted:
    """Choose the cheapest format of each weight.

    Args:
        model: with weights. What is quantized already stays.
        budget: of the error, in nats, above 0.
        windows: of calibration text, as `nemoc.quality.read_windows` cuts it; shorter ones than the first are left out.
        scope: which weights may be quantized, as for the passes.
        progress: told what is being done.

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
    count, kl, deviation = _longest(probe, steps, budget, progress)
    chosen = _after(steps[:count])
    choices = (Choice(c.name, chosen.get(c.name), c.kl, c.bytes) for c in candidates)
    return Budgeted(budget, kl, deviation, tuple(choices))


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


def _longest(
    probe: "_Probe", steps: Sequence[_Step], budget: float, progress: Progress | None
) -> tuple[int, float, float]:
    """How many steps the budget allows; the error behind them and its standard error, measured."""
    good, kl, deviation = 0, 0.0, 0.0
    bad, middle, tries = len(steps) + 1, len(steps), 0
    while bad - good > 1:
        if progress is not None:
            progress("measure whole models", tries, len(steps).bit_length() + 1)
        errors = probe.errors(_after(steps[:middle]))
        mean, spread = float(errors.mean()), float(errors.std() / len(errors) ** 0.5)
        if mean + _DEVIATIONS * spread <= budget:
            good, kl, deviation = middle, mean, spread
        else:
            bad = middle
        middle, tries = (good + bad) // 2, tries + 1
    return good, kl, deviation


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
    def errors(self, formats: Mapping[str, str], windows: int | None = None) -> torch.Tensor:
        """The mean error of each of the first windows, float64 [n], if some weights have other formats."""
        self._assign(formats)
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
                path = name if name.startswith("lm_head.") else f"backbone.{name}"
                self._module.get_parameter(path).data = self._read(name, wanted)
        self._present = dict(formats)

    def _read(self, name: str, wanted: str | None) -> torch.Tensor:
        if wanted is None:
            return self._weights.read(name).float()
        if not is_stack(name):
            return _round_trip(self._weights.read(name), wanted)
        count = int(self._weights.type_of(name).shape[0])
        parts = [_round_trip(self._weights.read(name, i, i + 1), wanted) for i in range(count)]
        return torch.cat(parts)


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
    return build.finish([build(DequantizeNvfp4(*quantized(build, w)))])
