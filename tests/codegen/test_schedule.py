"""The schedule of a step: dependent launches in order, as few phases as that allows."""

import pytest
import torch

from nemoc.codegen.schedule import Access, schedule


def access(reads: str, writes: str) -> Access:
    """A launch that reads and writes memory named by letters."""
    return Access(frozenset(reads + writes), frozenset(writes))


def depend(a: Access, b: Access) -> bool:
    """Whether one writes what the other touches."""
    return bool(a.touched & b.written or a.written & b.touched)


def test_launches_on_other_memory_share_a_phase() -> None:
    assert schedule([access("a", "b"), access("c", "d"), access("e", "f")]) == (0, 0, 0)


def test_readers_share_a_phase() -> None:
    assert schedule([access("a", "b"), access("b", "c"), access("b", "d")]) == (0, 1, 1)


@pytest.mark.parametrize(
    "second",
    [access("b", "c"), access("c", "b"), access("c", "a"), access("", "b")],
    ids=["read after write", "write after write", "write after read", "written blindly"],
)
def test_a_launch_waits_for_what_it_depends_on(second: Access) -> None:
    assert schedule([access("a", "b"), second]) == (0, 1)


def test_a_writer_waits_for_all_readers() -> None:
    launches = [access("x", "y"), access("y", "z"), access("az", "b"), access("a", "c")]
    assert schedule([*launches, access("", "a")]) == (0, 1, 2, 0, 3)


def test_nothing_has_no_phases() -> None:
    assert schedule([]) == ()


@pytest.mark.parametrize("seed", range(20))
def test_is_the_earliest_that_keeps_dependent_launches_in_order(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randint(0, 12, (40, 4), generator=generator).tolist()
    launches = [access("".join(map(chr, reads)), chr(result)) for *reads, result in draw]
    phases = schedule(launches)
    for i, launch in enumerate(launches):
        before = [phases[j] + 1 for j in range(i) if depend(launches[j], launch)]
        assert phases[i] == max(before, default=0)
