"""Choosing the next token of each row."""

import secrets
from collections.abc import Sequence
from typing import cast

import torch

from nemoc.ir.errors import NemocError
from nemoc.runtime.scalars import as_integer, as_number, check_integer


class Sampler:
    """Draws from temperature-scaled logits within the nucleus of top-p; temperature 0 takes the largest.

    Every row has a random generator of its own, so that its tokens depend on no other row: row b draws from
    seed + b, or from the b-th of several seeds. Random numbers come from the CPU wherever the logits are: a seed means
    the same draws on every device, and other tokens only where devices round sums of probabilities differently.

    Raises:
        NemocError: temperature or top_p is out of range, or there is not one seed for each row.
    """

    def __init__(
        self,
        batch: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | Sequence[int] | None = None,
    ) -> None:
        self._temperature = as_number(temperature)
        self._top_p = as_number(top_p)
        if not 0.0 <= self._temperature < float("inf"):
            raise NemocError(f"temperature is {temperature!r}, expected a finite number from 0")
        if not 0.0 < self._top_p <= 1.0:
            raise NemocError(f"top_p is {top_p!r}, expected more than 0 and at most 1")
        self._generators = [torch.Generator().manual_seed(s) for s in _seeds(seed, batch)]

    def sample(self, logits: torch.Tensor) -> torch.Tensor:
        """The next token of each row: float32 [B, V] on any device -> int64 [B] on the CPU.

        Raises:
            NemocError: a row's largest logit is not a finite number.
        """
        finite = logits.amax(-1).isfinite()
        chosen = logits.argmax(-1) if self._temperature == 0.0 else self._draw(logits)
        # One copy for both: each would wait for the device.
        tokens, sound = torch.stack([chosen, finite.long()]).cpu().unbind()
        if not bool(sound.all()):
            row = int((sound == 0).nonzero()[0])
            raise NemocError(f"row {row}: the model's logits are not finite numbers")
        return tokens

    def _draw(self, logits: torch.Tensor) -> torch.Tensor:
        """Inverse transform sampling over the tokens in order of falling probability, where the logits are."""
        wide = logits.double()
        scaled = (wide - wide.amax(-1, keepdim=True)) / self._temperature
        ordered, tokens = scaled.softmax(-1).sort(descending=True, stable=True)
        upto = ordered.cumsum(-1)
        # A token belongs to the nucleus if those before it do not reach top_p; the first always does.
        kept = ((upto - ordered) < self._top_p).sum(-1, keepdim=True).clamp(min=1)
        points = [torch.rand((), generator=g, dtype=torch.float64) for g in self._generators]
        point = torch.stack(points).unsqueeze(1).to(logits.device) * upto.gather(-1, kept - 1)
        chosen = torch.searchsorted(upto, point, right=True).minimum(kept - 1)
        return tokens.gather(-1, chosen).squeeze(1)


def _seeds(seed: int | Sequence[int] | None, batch: int) -> list[int]:
    if seed is None:
        return [secrets.randbits(63) for _ in range(batch)]
    first = as_integer(seed)
    if first is not None:
        return [(first + row) % 2**63 for row in range(batch)]
    try:
        seeds = [check_integer("seed", s) for s in cast(Sequence[int], seed)]
    except TypeError:
        raise NemocError(f"seed is {seed!r}, expected an integer, or one for each row") from None
    if len(seeds) != batch:
        raise NemocError(f"{len(seeds)} seeds for {batch} rows")
    return [s % 2**63 for s in seeds]
