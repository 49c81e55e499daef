"""What quantizing costs: bits per byte of a text, and how far predictions move from those of the unquantized model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from nemoc.ir import Graph, NemocError, Value
from nemoc.ir.ops import (
    Fp8Scale,
    Nvfp4BlockScales,
    Nvfp4GlobalScale,
    QuantizeFp8,
    QuantizeNvfp4,
)
from nemoc.progress import Progress
from nemoc.quality import Window, divergence
from nemoc.runtime import Executable

_STEP = 256
"""Tokens whose logits are held at a time."""

_ENCODERS = Nvfp4GlobalScale | Nvfp4BlockScales | QuantizeNvfp4 | Fp8Scale | QuantizeFp8


@dataclass(frozen=True)
class Quality:
    """What was measured of one executable.

    Attributes:
        tokens: predicted ones.
        bytes: of the text that they stand for.
        bits: that the executable spends on that text: −log₂ of the probability that it gives to it.
        kl: KL(expected || found) of the next token's distribution, in nats: the mean over tokens; None where there was
            nothing to compare with, and so below.
        kl_99: the same, its 99th percentile.
        agreement: the share of tokens for which both have the same likeliest next one.
    """

    tokens: int
    bytes: int
    bits: float
    kl: float | None = None
    kl_99: float | None = None
    agreement: float | None = None

    @property
    def bits_per_byte(self) -> float:
        """Bits over bytes."""
        return self.bits / self.bytes


def evaluate(
    executables: Mapping[str, Executable],
    windows: Sequence[Window],
    against: Executable | None = None,
    progress: Progress | None = None,
) -> dict[str, Quality]:
    """Measure executables on text, side by side; every window from an empty state.

    Logits are held for a few tokens at a time, so that the text may be of any length.

    Args:
        executables: by any name, all of one vocabulary.
        windows: what `nemoc.quality.read_windows` gives.
        against: the unquantized model, or None to measure bits alone.
        progress: told what is being done.

    Raises:
        NemocError: a window is longer than an executable's context, or the vocabularies differ.
    """
    _check([*executables.values(), *([] if against is None else [against])], windows)
    expected = None if against is None else _Run(against)
    runs = {
        name: expected if expected is not None and executable is against else _Run(executable)
        for name, executable in executables.items()
    }
    tallies = {name: _Tally() for name in runs}
    for number, window in enumerate(windows):
        if progress is not None:
            progress("measure quality", number, len(windows))
        for run in {*runs.values(), *(() if expected is None else (expected,))}:
            run.state.reset()
        for start in range(0, window.tokens, _STEP):
            seen = window.ids[start : min(start + _STEP, window.tokens)]
            following = window.ids[start + 1 : start + 1 + len(seen)]
            wanted = None if expected is None else expected.logits(seen)
            for name, run in runs.items():
                known = wanted if run is expected else None  # its state has seen these tokens
                logits = run.logits(seen) if known is None else known
                tallies[name].add(logits, following, wanted)
    size = sum(window.bytes for window in windows)
    return {name: tally.quality(size) for name, tally in tallies.items()}


def weight_bytes(graph: Graph) -> int:
    """Bytes of a step's weights as formats have them, whatever an artifact makes of them for its kernels.

    Args:
        graph: a general step, behind the passes that quantize and before all others.
    """
    coded = {n for n in graph.nodes if isinstance(n.op, _ENCODERS) and n.op.w in graph.params}
    sources = {node.op.w for node in coded}  # type: ignore[attr-defined]
    kept = (p for p in graph.params if p not in sources or not coded.issuperset(graph.uses[p]))
    return sum(_bytes(p) for p in kept) + sum(_bytes(node.results[0]) for node in coded)


class _Run:
    """An executable with one row of state."""

    def __init__(self, executable: Executable) -> None:
        self.executable = executable
        self.state = executable.new_state()

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """The logits behind each of the next tokens, f32 [n, V]."""
        return self.executable.prefill(tokens[None], self.state, all_logits=True)[0]


@dataclass
class _Tally:
    """What is added up of one executable; one number a token is kept for the percentile."""

    tokens: int = 0
    nats: float = 0.0
    agreed: int = 0
    divergences: list[torch.Tensor] = field(default_factory=list)

    def add(
        self, found: torch.Tensor, following: torch.Tensor, wanted: torch.Tensor | None
    ) -> None:
        """Take in the logits behind some tokens, the tokens that follow them, and the logits to compare with."""
        self.tokens += len(following)
        self.nats += float(F.cross_entropy(found, following, reduction="none").double().sum())
        if wanted is not None:
            self.divergences.append(divergence(wanted, found))
            self.agreed += int((found.argmax(-1) == wanted.argmax(-1)).sum())

    def quality(self, size: int) -> Quality:
        """The result, for text of that many bytes."""
        bits = self.nats / math.log(2)
        if not self.divergences:
            return Quality(self.tokens, size, bits)
        kl = torch.cat(self.divergences)
        worst = kl.sort().values[math.ceil(0.99 * len(kl)) - 1]
        return Quality(
            self.tokens, size, bits, float(kl.mean()), float(worst), self.agreed / self.tokens
        )


def _check(executables: Sequence[Executable], windows: Sequence[Window]) -> None:
    longest = max(window.tokens for window in windows)
    vocab = {executable.program.vocab for executable in executables}
    if len(vocab) > 1:
        raise NemocError(
            f"the vocabularies have {' and '.join(map(str, sorted(vocab)))} tokens, expected the same"
        )
    for executable in executables:
        context = executable.program.bounds.max_context
        if context < longest:
            raise NemocError(
                f"{executable.program.name}: max_context is {context}, expected at least the "
                f"{longest} tokens of a window"
            )


def _bytes(value: Value) -> int:
    return int(value.type.bytes)
