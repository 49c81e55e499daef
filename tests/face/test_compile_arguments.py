"""Arguments of `nemoc.compile` that make no sense: one line, before anything is compiled."""

from typing import Any

import pytest
import torch

import nemoc
from nemoc.ir import NemocError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 5}, "target is 5, expected text"),
        ({"pipeline": ["dce"]}, "pipeline: found 'dce' among the passes, expected a pass"),
        ({"pipeline": 5}, "pipeline is 5, expected text or passes"),
        ({"max_context": "12"}, "max_context is '12', expected an integer"),
        ({"max_context": 2**31}, "max_context is 2147483648, expected at most 2147483647"),
        ({"max_batch": "1"}, "max_batch is '1', expected an integer"),
        ({"max_batch": 0}, "max_batch is 0, expected at least 1"),
        ({"threads": 0}, "threads is 0, expected at least 1"),
        ({"threads": 1.5}, "threads is 1.5, expected an integer"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("nemoc.compiler.build", None)
    with pytest.raises(NemocError) as caught:
        nemoc.compile("random:mid", **{"target": "reference", **arguments})
    assert str(caught.value) == message


def test_a_destination_that_is_no_path_is_refused() -> None:
    with pytest.raises(NemocError, match="path is 5, expected text or a path"):
        nemoc.compile("random:mid", target="reference", destination=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_another_default_device_of_the_users_changes_nothing(target: str) -> None:
    ids = torch.arange(18).reshape(2, 9)
    bounds = {"max_batch": 2, "max_context": 16}
    usual = nemoc.compile("sample", target, **bounds)  # type: ignore[arg-type]
    torch.set_default_device("meta")  # as "cuda" would be where there is a GPU
    try:
        made = nemoc.compile("sample", target, **bounds)  # type: ignore[arg-type]
        logits = made.prefill(ids, made.new_state(2), all_logits=True)
        tokens = made.generate(ids, 3, temperature=0.7, seed=1)
        made.prefill(ids, made.new_state(2), lengths=torch.tensor([9, 4], device="cpu"))
    finally:
        torch.set_default_device(None)
    assert torch.equal(logits, usual.prefill(ids, usual.new_state(2), all_logits=True))
    assert torch.equal(tokens, usual.generate(ids, 3, temperature=0.7, seed=1))
