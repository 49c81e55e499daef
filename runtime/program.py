"""What an executable knows of its model besides kernels and weights: bounds, ids, the layout of its state."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemoc.codegen.storage import Layout
from nemoc.ir.errors import NemocError

PREFILL = "prefill"
"""The function that takes L new tokens of each row and gives the logits of the last: f32 [B, V]."""
PREFILL_ALL = "prefill_all"
"""The function that takes L new tokens of each row and gives the logits of all: f32 [B, L, V]."""
DECODE = "decode"
"""The function that takes one new token of each row and gives its logits: f32 [B, V]."""

_CHUNK_UNIT = 64
"""Prompts are split at multiples of this where they can be: the chunk of the scan, so that it stays whole."""


@dataclass(frozen=True)
class Bounds:
    """How large a step and a state can be.

    Attributes:
        max_batch: rows of a batch.
        max_context: tokens of a row, prompt and generated ones together: the largest cache capacity.
        max_tokens: tokens that one step takes over all rows, padding included; longer prompts are split.

    Raises:
        NemocError: a bound is not positive, or a step could not hold one token of each row.
    """

    max_batch: int
    max_context: int
    max_tokens: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise NemocError(f"{name} is {value}, expected at least 1")
        if self.max_tokens < self.max_batch:
            raise NemocError(
                f"max_tokens is {self.max_tokens}, expected at least max_batch, {self.max_batch}"
            )

    def chunk(self, batch: int) -> int:
        """How many tokens of each row one step takes."""
        fits = self.max_tokens // batch
        return fits if fits < _CHUNK_UNIT else fits // _CHUNK_UNIT * _CHUNK_UNIT


@dataclass(frozen=True)
class Generation:
    """Token ids that generation needs.

    Attributes:
        eos: ids that end a row.
        bos: the id that starts a text, if the model has one.
        pad: the id that fills rows which have ended.
    """

    eos: tuple[int, ...] = ()
    bos: int | None = None
    pad: int | None = None

    @property
    def padding(self) -> int:
        """The id that fills rows which have ended: `pad`, else the first of `eos`, else 0."""
        if self.pad is not None:
            return self.pad
        return self.eos[0] if self.eos else 0

    def check(self, vocab: int) -> None:
        """Hold the ids against the vocabulary.

        Raises:
            NemocError: an id is outside it.
        """
        named = [("eos", i) for i in self.eos] + [("bos", self.bos), ("pad", self.pad)]
        for name, value in named:
            if value is not None and not 0 <= value < vocab:
                raise NemocError(
                    f"{name} token id {value} is outside the vocabulary of {vocab} tokens"
                )


@dataclass(frozen=True)
class Program:
    """A compiled model without its code.

    Attributes:
        name: what messages call it.
        target: the target that it was compiled for.
        identity: a digest of functions and weights; states belong to it.
        vocab: token ids are below this.
        bounds: how large steps and states can be.
        generation: token ids for generation.
        state: the layout of a state in B and C; it has a slot `lengths`, i32 [B].
        functions: names of the functions that it has.
        model: the model's configuration as JSON data.
    """

    name: str
    target: str
    identity: str
    vocab: int
    bounds: Bounds
    generation: Generation
    state: Layout
    functions: frozenset[str]
    model: Mapping[str, Any] = field(default_factory=dict)
