"""Arguments of `nemoc.compile` that make no sense: one line, before anything is compiled."""

from typing import Any

import pytest

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
