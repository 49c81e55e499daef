"""The memory plan of scratch."""

import pytest
import torch

from nemoc.codegen.memory import Lifetime, plan_memory
from nemoc.codegen.storage import ALIGNMENT


def overlapping(buffers: list[Lifetime], offsets: tuple[int, ...]) -> list[tuple[int, int]]:
    """Pairs that some launch uses together and that share bytes."""
    return [
        (i, j)
        for i, a in enumerate(buffers)
        for j, b in enumerate(buffers[:i])
        if a.meets(b) and offsets[i] < offsets[j] + b.bytes and offsets[j] < offsets[i] + a.bytes
    ]


def test_a_chain_needs_two_buffers() -> None:
    chain = [Lifetime(1024, i, i + 1) for i in range(50)]
    offsets, size = plan_memory(chain)
    assert size == 2048
    assert overlapping(chain, offsets) == []


def test_a_buffer_read_by_a_launch_is_not_its_result() -> None:
    offsets, _ = plan_memory([Lifetime(64, 0, 1), Lifetime(64, 1, 2)])
    assert offsets[0] != offsets[1]


def test_takes_the_tightest_gap() -> None:
    long_lived = [Lifetime(1000, 0, 9), Lifetime(900, 0, 9), Lifetime(800, 0, 9)]
    offsets, size = plan_memory([*long_lived, Lifetime(500, 0, 1), Lifetime(500, 2, 3)])
    assert offsets[3] == offsets[4]
    assert size == 1024 + 960 + 832 + 512


@pytest.mark.parametrize("seed", range(20))
def test_never_overlaps_what_lives_together(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randint(0, 60, (40, 3), generator=generator).tolist()
    buffers = [Lifetime(1 + 97 * size, start, start + span // 6) for size, start, span in draw]
    offsets, size = plan_memory(buffers)
    assert overlapping(buffers, offsets) == []
    assert all(
        o % ALIGNMENT == 0 and o + b.bytes <= size for o, b in zip(offsets, buffers, strict=True)
    )
    alive = max(sum(b.bytes for b in buffers if b.first <= t <= b.last) for t in range(80))
    assert size <= 2 * alive + ALIGNMENT * len(buffers)


def test_nothing_needs_nothing() -> None:
    assert plan_memory([]) == ((), 0)
