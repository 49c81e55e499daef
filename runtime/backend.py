"""What a target must offer to run a program."""

from typing import Protocol

import torch

from nemoc.runtime.state import State


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
            tokens: int64 [B, L], contiguous, every id in range; L is 1 for `decode`.
            valid: int32 [B]: how many tokens of each row count; a row with 0 keeps its state, its logits mean nothing.
            state: of this program, for B rows.

        Returns:
            float32 logits: [B, V], or [B, L, V] from `prefill_all`. The caller owns them.
        """
        ...
