"""What is said of logits: where a router ties, by three quarters of the tokens and the worst one, else by all."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import nemoc
from nemoc import verification
from nemoc.ir import DType
from nemoc.models import Model, open_model
from nemoc.passes import PassContext, run_pipeline
from nemoc.passes.quantize_nvfp4 import QuantizeNvfp4
from nemoc.verification import (
    MODEL_BOUND,
    NARROW_BOUND,
    TIED_BOUND,
    VerifyRow,
    model_rows,
    token_errors,
)
from support.checkpoints import write_checkpoint
from support.stepping import Stepper

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, seed=4, hybrid_override_pattern="ME*")
    return open_model(folder)


@pytest.fixture(scope="module")
def executable(model: Model) -> nemoc.Executable:
    return nemoc.compile(model, "reference", max_batch=2, max_context=32)


def rows(
    executable: nemoc.Executable,
    model: Model,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[torch.Tensor], None],
    rounds: bool = True,
) -> dict[str, VerifyRow]:
    """The rows of an executable whose prefill gives logits [B, L, V] that are changed in place."""
    whole = executable.prefill

    def prefill(tokens: torch.Tensor, state: object, **options: object) -> torch.Tensor:
        logits: torch.Tensor = whole(tokens, state, **options)  # type: ignore[arg-type]
        if options.get("all_logits") and logits.shape[1] > 20:
            change(logits)
        return logits

    monkeypatch.setattr(executable, "prefill", prefill)
    monkeypatch.setattr(verification, "_rounds", lambda graphs: rounds)
    return {row.name: row for row in model_rows(executable, model)}


def test_without_a_router_no_token_may_be_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, seed=5, hybrid_override_pattern="M-*")
    dense = open_model(tmp_path)

    def change(logits: torch.Tensor) -> None:
        logits[0, 3] *= 1.2

    made = nemoc.compile(dense, "reference", max_batch=2, max_context=32)
    found = rows(made, dense, monkeypatch, change)
    assert "every token" not in found
    assert {row.bound for row in found.values()} == {NARROW_BOUND}
    assert not found["prefill"].ok


def test_every_way_has_tokens_enough_to_be_held_to_the_bound_of_rounding(
    executable: nemoc.Executable, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = rows(executable, model, monkeypatch, lambda logits: None)
    assert {name for name, row in found.items() if row.bound == TIED_BOUND} == {"every token"}
    assert all(row.ok for row in found.values())


def test_ways_of_a_few_tokens_are_held_to_the_bound_of_the_worst_one(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = nemoc.compile(model, "reference", max_batch=2, max_context=12)
    found = rows(short, model, monkeypatch, lambda logits: None)
    few = {"decode", "unequal rows", "every token"}
    assert {name for name, row in found.items() if row.bound == TIED_BOUND} == few
    assert all(row.ok for row in found.values())


@pytest.mark.parametrize(("factor", "ok"), [(1.2, False), (1.001, True)])
def test_logits_of_last_tokens_alone_are_held_to_the_bound_of_rounding(
    executable: nemoc.Executable,
    model: Model,
    factor: float,
    ok: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = executable.prefill

    def prefill(tokens: torch.Tensor, state: object, **options: object) -> torch.Tensor:
        logits: torch.Tensor = whole(tokens, state, **options)  # type: ignore[arg-type]
        return logits if options.get("all_logits") else logits * factor

    monkeypatch.setattr(executable, "prefill", prefill)
    monkeypatch.setattr(verification, "_rounds", lambda graphs: True)
    found = {row.name: row for row in model_rows(executable, model)}
    assert found["prefill, last token"].ok == ok
    assert found["prefill"].ok


def test_one_token_whose_experts_tie_is_no_fault(
    executable: nemoc.Executable, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(logits: torch.Tensor) -> None:
        logits[0, 3] *= 1.2

    found = rows(executable, model, monkeypatch, change)
    assert all(row.ok for row in found.values())
    assert found["prefill"].error < 1e-4
    assert found["every token"].error == pytest.approx(0.2, rel=1e-3)
    strict = rows(executable, model, monkeypatch, change, rounds=False)
    assert "every token" not in strict
    assert {row.bound for row in strict.values()} == {MODEL_BOUND}
    assert not strict["prefill"].ok


@pytest.mark.parametrize("fault", ["another token's", "NaN", "nothing"])
def test_one_token_with_other_logits_is_a_fault(
    executable: nemoc.Executable, model: Model, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(logits: torch.Tensor) -> None:
        wrong = {"another token's": logits[0, 9], "NaN": torch.nan, "nothing": 0.0}
        logits[0, 3] = wrong[fault]

    found = rows(executable, model, monkeypatch, change)
    assert not found["every token"].ok
    assert found["every token"].bound == TIED_BOUND


def test_an_error_of_every_token_is_a_fault(
    executable: nemoc.Executable, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(logits: torch.Tensor) -> None:
        logits *= 1.02

    found = rows(executable, model, monkeypatch, change)
    assert [row.name for row in found.values() if not row.ok] == ["prefill"]
    assert found["prefill"].error == pytest.approx(0.02, rel=1e-3)
    assert found["prefill"].bound == NARROW_BOUND


def test_rounding_alone_moves_single_tokens_of_the_sample_by_a_tenth() -> None:
    sample = open_model("sample")
    plain = sample.build_step(dtype=DType.BF16, logits="all")
    graph = run_pipeline(plain, (QuantizeNvfp4(),), PassContext())
    ids = torch.randint(0, sample.config.vocab_size, (2, 24), generator=torch.manual_seed(0))
    rounded, exact = (
        Stepper(sample, 2, 24, graph=graph, float64=float64)(ids) for float64 in (False, True)
    )
    errors = token_errors(rounded, exact)
    assert 2e-3 < float(errors.median()) < 5e-3
    assert 0.1 < float(errors.max()) < 0.15
