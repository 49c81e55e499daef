"""Choosing the next token of each row."""

import secrets
from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from nemoc.ir.errors import NemocError
from nemoc.runtime.scalars import as_integer, as_number, check_integer

_LIKELY = (1e-3, 1e-6, 0.0)
"""How likely tokens are, compared with the likeliest, that are sorted: the first for which they are enough."""


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
        if logits.device.type == "cpu":
            return torch.from_numpy(self._sample_here(logits.numpy()))
        finite = logits.amax(-1).isfinite()
        if self._temperature == 0.0:
            chosen = logits.argmax(-1)
        else:
            chosen = draw_sorted(logits, self._temperature, self._top_p, self._points())
        # One copy for both: each would wait for the device.
        tokens, sound = torch.stack([chosen, finite.long()]).cpu().unbind()
        _check(sound.bool().numpy())
        return tokens

    def _sample_here(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """`sample` in numpy, which runs on one thread: those of torch go on spinning for milliseconds after a function
        that they shared, and keep the next step's from the processors."""
        _check(np.isfinite(logits.max(-1)))
        if self._temperature == 0.0:
            return np.asarray(logits.argmax(-1))
        drawn = (
            draw_row(row, self._temperature, self._top_p, point)
            for row, point in zip(logits, self._points().tolist(), strict=True)
        )
        return np.fromiter(drawn, dtype=np.int64)

    def _points(self) -> torch.Tensor:
        """A random number from 0 to 1 for each row: float64 [B]."""
        points = [
            torch.rand((), generator=g, dtype=torch.float64, device="cpu") for g in self._generators
        ]
        return torch.stack(points)


def draw_sorted(
    logits: torch.Tensor, temperature: float, top_p: float, points: torch.Tensor
) -> torch.Tensor:
    """Inverse transform sampling over the tokens in order of falling probability, where the logits are.

    Args:
        logits: float32 [B, V].
        temperature, top_p: as for `Sampler`; temperature is not 0.
        points: float64 [B], from 0 to 1: which part of the nucleus lies before the token that is drawn.

    Returns:
        int64 [B].
    """
    wide = logits.double()
    scaled = (wide - wide.amax(-1, keepdim=True)) / temperature
    ordered, tokens = scaled.softmax(-1).sort(descending=True, stable=True)
    upto = ordered.cumsum(-1)
    # A token belongs to the nucleus if those before it do not reach top_p; the first always does.
    kept = ((upto - ordered) < top_p).sum(-1, keepdim=True).clamp(min=1)
    point = points.unsqueeze(1).to(logits.device) * upto.gather(-1, kept - 1)
    chosen = torch.searchsorted(upto, point, right=True).minimum(kept - 1)
    return tokens.gather(-1, chosen).squeeze(1)


def draw_row(
    logits: npt.NDArray[np.float32], temperature: float, top_p: float, point: float
) -> int:
    """`draw_sorted` of one row [V] on the CPU; tokens that are too unlikely to be reached are not sorted."""
    weights = logits.astype(np.float64)
    weights -= weights.max()
    with np.errstate(over="ignore"):  # a low temperature leaves the likeliest alone
        weights /= temperature
    np.exp(weights, out=weights)
    total = weights.sum()
    needed = total * (top_p if top_p < 1.0 else point)
    for least in _LIKELY:
        likely = np.flatnonzero(weights > least)
        if weights[likely].sum() > needed:
            break
    order = likely[np.argsort(-weights[likely], kind="stable")]
    ordered = weights[order]
    upto = ordered.cumsum()
    kept, reach = len(order), total
    if top_p < 1.0:
        kept = max(1, int(np.count_nonzero(upto - ordered < needed)))
        reach = upto[kept - 1]
    chosen = np.searchsorted(upto, point * reach, side="right")
    return int(order[min(chosen, kept - 1)])


def _check(finite: npt.NDArray[np.bool_]) -> None:
    """Refuse rows without a finite largest logit."""
    if not finite.all():
        raise NemocError(f"row {finite.argmin()}: the model's logits are not finite numbers")


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
