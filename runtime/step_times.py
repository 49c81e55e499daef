"""How long the launches of a step took."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StepTimes:
    """What a step's clock says.

    Attributes:
        function: which function of the program.
        sizes: B, L and C.
        seconds: how long the step took, all in all.
        launches: seconds of each launch, in order. Launches that ran at once share the time of their phase as threads
            shared theirs.
        waiting: seconds of that in which threads waited for others, a part of a thread counted as a part.
    """

    function: str
    sizes: tuple[int, int, int]
    seconds: float
    launches: tuple[float, ...]
    waiting: float


def launch_seconds(marks: torch.Tensor, phases: Sequence[int]) -> tuple[tuple[float, ...], float]:
    """Seconds of each launch, and how long threads waited meanwhile.

    Args:
        marks: nanoseconds, int64 [threads, marks]: when each thread began each phase, and when it was through with each
            launch of it.
        phases: how many launches each phase has.
    """
    if not phases:
        return (), 0.0
    firsts = [0]
    for launches in phases:
        firsts.append(firsts[-1] + launches + 1)
    own = [
        marks[:, first : first + launches + 1].diff(dim=1)
        for first, launches in zip(firsts, phases, strict=False)
    ]
    begins = marks[:, firsts[:-1]].amin(0).tolist()
    ends = [*begins[1:], int(marks[:, -1].max())]
    # Threads that sleep come late to the first phase. Waiting for them is the way into the step, and costs no launch.
    latest = min(int(marks[:, 0].max()), ends[0] - int(own[0].sum(1).max()))
    begins[0] = max(begins[0], latest)
    seconds: list[float] = []
    waiting = 0.0
    for spent, begin, end in zip(own, begins, ends, strict=True):
        by_launch = spent.sum(0).double()
        together, passed = float(by_launch.sum()), 1e-9 * (end - begin)
        shares = (
            by_launch / together if together else torch.full_like(by_launch, 1 / len(by_launch))
        )
        seconds += (shares * passed).tolist()
        waiting += passed - 1e-9 * together / len(marks)
    return tuple(seconds), waiting
