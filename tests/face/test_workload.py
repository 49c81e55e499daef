"""What a model is tuned for: sizes of its steps, and what reaches them."""

from collections.abc import Mapping

import pytest
import torch

from nemoc.ir.params import InMemory
from nemoc.models.graph import build_step
from nemoc.workload import Workload
from support.models import SMALL

GRAPH = build_step(SMALL)
WEIGHT = GRAPH.params[0].name


def arguments(work: Workload, function: str) -> Mapping[str, torch.Tensor]:
    source = InMemory({WEIGHT: torch.tensor([2.5])})
    return work.arguments(GRAPH, function, source)


def test_sizes_are_those_of_each_step() -> None:
    work = Workload(prefill=7, cached=9, batch=3)
    assert work.sizes("prefill") == {"B": 3, "L": 7, "C": 10}
    assert work.sizes("decode") == {"B": 3, "L": 1, "C": 10}


@pytest.mark.parametrize(
    ("prefill", "cached", "context"), [(64, 32, 64), (32, 32, 33), (32, 31, 32), (1, 0, 1)]
)
def test_context_holds_the_prompt_and_the_token_behind_the_cached(
    prefill: int, cached: int, context: int
) -> None:
    work = Workload(prefill, cached)
    assert work.context == context
    assert {work.sizes(step)["C"] for step in work.functions} == {context}


def test_only_decoding_has_tokens_before_it() -> None:
    work = Workload(prefill=7, cached=9, batch=3)
    assert work.before("prefill") == Workload(prefill=1).before("prefill") == 0
    assert work.before("decode") == 9
    assert [work.symbols(step)["T"] for step in ("prefill", "decode")] == [0, 9]


@pytest.mark.parametrize(("function", "valid", "lengths"), [("prefill", 7, 0), ("decode", 1, 9)])
def test_every_token_of_every_sequence_counts(function: str, valid: int, lengths: int) -> None:
    given = arguments(Workload(prefill=7, cached=9, batch=3), function)
    assert given["tokens"].shape == (3, valid)
    for name, expected in (("valid", valid), ("lengths", lengths)):
        assert given[name].dtype == torch.int32
        assert given[name].tolist() == [expected] * 3


def test_weights_are_those_of_the_source() -> None:
    given = arguments(Workload(prefill=7, cached=9), "decode")
    assert set(given) == {value.name for value in GRAPH.arguments}
    assert given[WEIGHT].tolist() == [2.5]


def test_a_part_of_a_step_is_given_what_it_reads() -> None:
    """Be that neither valid nor lengths."""
    part = type(GRAPH)("part", GRAPH.inputs[:1], (), ())
    (name,) = Workload(batch=2).arguments(part, "prefill", InMemory({}))
    assert name == "tokens"
