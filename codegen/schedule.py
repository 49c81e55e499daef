"""The schedule of a step: which launches share a phase.

Two launches depend on each other when one writes memory that the other touches. Those that do not may run side by
side: they share a phase, with no barrier between them.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Access:
    """The memory that a launch works on; pieces of memory are equal or do not overlap.

    Attributes:
        touched: what it reads or writes.
        written: what it writes.
    """

    touched: frozenset[Hashable]
    written: frozenset[Hashable]


def schedule(launches: Sequence[Access]) -> tuple[int, ...]:
    """The phase of each launch, counted from 0: the earliest behind all launches before it that it depends on.

    So there are as few phases as dependences allow. The latest phases would be as few, but what waits keeps alive all
    that it reads, which is mostly more than it writes. Launches that depend on each other keep their order.
    """
    written: dict[Hashable, int] = {}
    touched: dict[Hashable, int] = {}
    phases = []
    for launch in launches:
        seen = [written.get(m, 0) for m in launch.touched]
        seen += [touched.get(m, 0) for m in launch.written]
        phase = max(seen, default=0)
        phases.append(phase)
        written.update(dict.fromkeys(launch.written, phase + 1))
        for memory in launch.touched:
            touched[memory] = max(touched.get(memory, 0), phase + 1)
    return tuple(phases)
