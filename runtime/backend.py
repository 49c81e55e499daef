"""What a target must offer to run a program, and what it is given to do so."""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from nemoc.ir.graph import Graph
from nemoc.ir.op import Op
from nemoc.ir.parser import Signature, parse
from nemoc.runtime.manifest import Manifest
from nemoc.runtime.program import Program
from nemoc.runtime.state import State
from nemoc.runtime.step_times import StepTimes
from nemoc.runtime.weights import PackedWeights


class Backend(Protocol):
    """Runs a program's functions on one device."""

    def allocate(self, size: int) -> torch.Tensor:
        """Zeroed memory for a state: uint8 [size], aligned to `nemoc.codegen.storage.ALIGNMENT`."""
        ...

    def run(
        self, function: str, tokens: torch.Tensor, valid: torch.Tensor, state: State
    ) -> torch.Tensor:
        """Carry out one step; the state is changed in place.

        Args:
            function: one of the program's functions.
            tokens: int64 [B, L] on the CPU, contiguous, every id in range; L is 1 for `decode`.
            valid: int32 [B] on the CPU: how many tokens of each row count; a row with 0 keeps its state, its logits
                mean nothing.
            state: of this program, for B rows.

        Returns:
            float32 logits: [B, V], or [B, L, V] from `prefill_all`; on the backend's device, so that tokens can be
            chosen there and logits that nobody else wants stay there. The caller owns them.
        """
        ...


@runtime_checkable
class TimedBackend(Backend, Protocol):
    """A backend that can say how long launches take."""

    def timed(self, phases: Mapping[str, Sequence[int]]) -> AbstractContextManager[list[StepTimes]]:
        """Let steps note how long their launches take, until the context ends.

        Args:
            phases: for each function, how many launches each of its phases has.

        Returns:
            What each step took that has run within the context, in order; it is there when that has ended.
        """
        ...


@dataclass(frozen=True)
class Opened:
    """An artifact that has been checked: what a backend is made from.

    Attributes:
        folder: where it is; every file that the manifest lists has been held against its digest.
        manifest: what it says of itself.
        program: what its functions are of.
        texts: the text of each function's graph.
        signatures: what each function is given.
        weights: in the layout of `nemoc.codegen.storage.weight_layout`.
        threads: how many the user wants to share the work.
        extra_ops: op classes of the graphs beside those of the IR.
    """

    folder: Path
    manifest: Manifest
    program: Program
    texts: Mapping[str, str]
    signatures: Mapping[str, Signature]
    weights: PackedWeights
    threads: int
    extra_ops: tuple[type[Op], ...] = ()

    def graphs(self) -> dict[str, Graph]:
        """The graph of each function.

        Raises:
            NemocError: a text is no graph.
        """
        return {
            name: parse(text, str(self.folder / self.manifest.graphs[name]), self.extra_ops)
            for name, text in self.texts.items()
        }


BackendFactory = Callable[[Opened], Backend]
"""Makes a backend; raises `NemocError` when the artifact does not fit it or this machine cannot run it."""


class DeferredBackend:
    """A backend that is made when it is first used, so that artifacts can be written where they cannot run.

    Args:
        make: makes the backend; if it raises, so does each use.
    """

    def __init__(self, make: Callable[[], TimedBackend]) -> None:
        self._make: Callable[[], TimedBackend] | None = make
        self._made: TimedBackend | None = None
        self._lock = threading.Lock()

    def allocate(self, size: int) -> torch.Tensor:
        return self._backend().allocate(size)

    def run(
        self, function: str, tokens: torch.Tensor, valid: torch.Tensor, state: State
    ) -> torch.Tensor:
        return self._backend().run(function, tokens, valid, state)

    def timed(self, phases: Mapping[str, Sequence[int]]) -> AbstractContextManager[list[StepTimes]]:
        return self._backend().timed(phases)

    def _backend(self) -> TimedBackend:
        with self._lock:
            if self._made is None:
                assert self._make is not None
                self._made = self._make()
                self._make = None  # and with it the artifact's mapping
            return self._made
