"""What an executable knows of its model besides kernels and weights: bounds, ids, the layout of its state."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemoc.codegen.storage import Layout
from nemoc.ir.dims import B, Dim, L
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import NemocError
from nemoc.ir.parser import Signature
from nemoc.ir.types import TensorType
from nemoc.runtime.scalars import check_count, check_integer

PREFILL = "prefill"
"""The function that takes L new tokens of each row and gives the logits of the last: f32 [B, V]."""
PREFILL_ALL = "prefill_all"
"""The function that takes L new tokens of each row and gives the logits of all: f32 [B, L, V]."""
DECODE = "decode"
"""The function that takes one new token of each row and gives its logits: f32 [B, V]."""

FUNCTIONS = (PREFILL, PREFILL_ALL, DECODE)
LENGTHS = "lengths"
"""The state that counts the tokens of each row: i32 [B]."""

_MOST = 2**31 - 1
"""The largest size that kernels count with."""

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
        NemocError: a bound is no integer from 1 to 2³¹ − 1, or a step could not hold one token of each row.
    """

    max_batch: int
    max_context: int
    max_tokens: int

    def __post_init__(self) -> None:
        for name, given in vars(self).items():
            value = check_count(name, given)
            if value > _MOST:
                raise NemocError(f"{name} is {value}, expected at most {_MOST}")
            object.__setattr__(self, name, value)  # numpy's integers have no JSON
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

    Raises:
        NemocError: an id is no integer.
    """

    eos: tuple[int, ...] = ()
    bos: int | None = None
    pad: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "eos", tuple(check_integer("eos token id", i) for i in self.eos))
        for name in ("bos", "pad"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_integer(f"{name} token id", value))

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


def check_functions(functions: Mapping[str, Signature]) -> int:
    """Hold what a program's functions are given against each other and against what a step passes.

    Returns:
        The size of the vocabulary.

    Raises:
        NemocError: a function is missing, or one cannot be called as the others are.
    """
    for name in (PREFILL, DECODE):
        if name not in functions:
            raise NemocError(f"there is no function {name}")
    if unknown := sorted(functions.keys() - FUNCTIONS):
        raise NemocError(f"there is no use for a function {unknown[0]}")
    states = _states(functions[PREFILL])
    _check_states(states)
    for name, signature in functions.items():
        if _states(signature) != states:
            raise NemocError(f"the states of {name} are not those of {PREFILL}")
        _check_inputs(name, signature)
    bounds = {v.bound for s in functions.values() for v in s.inputs if v.name == "tokens"}
    (vocab,) = bounds if len(bounds) == 1 else (None,)
    if not isinstance(vocab, int) or vocab < 1:
        raise NemocError(f"{PREFILL}: the input %tokens has no bound that is one number for all")
    return vocab


def _states(signature: Signature) -> list[tuple[str, TensorType]]:
    return [(s.name, s.type) for s in signature.states]


def _check_states(states: list[tuple[str, TensorType]]) -> None:
    lengths = dict(states).get(LENGTHS)
    if lengths is None:
        raise NemocError(f"{PREFILL}: has no state %{LENGTHS}")
    if lengths != (expected := TensorType(DType.I32, (B,))):
        raise NemocError(f"{PREFILL}: %{LENGTHS} is {lengths}, expected {expected}")
    for name, type_ in states:
        if unbound := sorted(type_.symbols - {"B", "C"}):
            raise NemocError(f"{PREFILL}: the size {unbound[0]} of %{name} is not known to a state")


def _check_inputs(name: str, signature: Signature) -> None:
    length: Dim = 1 if name == DECODE else L
    known = {"tokens": TensorType(DType.I64, (B, length)), "valid": TensorType(DType.I32, (B,))}
    for value in signature.inputs:
        if value.name not in known:
            raise NemocError(f"{name}: no step has an input %{value.name}")
        if value.type != known[value.name]:
            raise NemocError(f"{name}: %{value.name} is {value.type}, expected {known[value.name]}")
