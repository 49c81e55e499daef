"""What `benchmarks.long_context` measures at great length, held at small sizes; at full size where marked slow."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from benchmarks.long_context import (
    agreement,
    cache_bytes,
    compile_sample,
    filled_state,
    measure_prefill,
    relative_error,
    sample_model,
    state_errors,
    state_file,
    text_tokens,
)

import nemoc
from nemoc.models import open_model
from support.stepping import Stepper

BOUND = 1e-5
"""‖found − expected‖ / ‖expected‖ of a state or of logits, in float32 against float64."""

LENGTH, PIECE = 328, 64
"""Tokens of a text that one prefill step takes, and of its pieces: the last one is shorter."""


@dataclass(frozen=True)
class Case:
    """The sample model compiled, with or without attention."""

    attention: bool
    executable: nemoc.Executable


@pytest.fixture(scope="module", params=[True, False], ids=["attention", "no-attention"])
def case(request: pytest.FixtureRequest) -> Case:
    context = LENGTH if request.param else 1 << 20
    return Case(request.param, compile_sample(context, request.param))


def test_without_attention_the_other_layers_keep_their_weights() -> None:
    sample, variant = open_model("sample"), sample_model(1 << 20, attention=False)
    assert sample.config.pattern == "MEM*EMM*E"
    assert variant.config.pattern == "MEMEMME"
    assert variant.config.max_position_embeddings == 1 << 20
    assert sample.parameters is not None and variant.parameters is not None
    for here, there in (
        ("layers.3.", "layers.4."),
        ("layers.6.", "layers.8."),
        ("norm_f", "norm_f"),
    ):
        names = [p.name for p in variant.build_step().params if p.name.startswith(here)]
        assert names
        for name in names:
            expected = sample.parameters.read(name.replace(here, there))
            assert torch.equal(variant.parameters.read(name), expected)


def test_pieces_of_any_size_lead_to_one_state(case: Case) -> None:
    ids = text_tokens(LENGTH)
    oracle = Stepper(sample_model(LENGTH, case.attention), 1, LENGTH, float64=True)
    expected = oracle(ids)[:, -1]
    for piece in (LENGTH, PIECE):
        state = case.executable.new_state(capacity=LENGTH)
        found = [case.executable.prefill(part, state) for part in ids.split(piece, dim=1)]
        assert relative_error(found[-1], expected) < BOUND
        assert max(state_errors(state, oracle.states).values()) < BOUND


def test_a_state_grows_by_its_caches_alone(case: Case) -> None:
    small, large = (case.executable.new_state(capacity=n) for n in (64, LENGTH))
    assert large.bytes - small.bytes == cache_bytes(large, LENGTH - 64)
    assert (cache_bytes(large, 1) > 0) == case.attention


def test_decode_reads_every_row_of_a_filled_cache(case: Case) -> None:
    length = LENGTH - 8
    state = filled_state(case.executable, length, room=8, seed=3)
    oracle = Stepper(sample_model(LENGTH, case.attention), 1, LENGTH, float64=True)
    for name, tensor in state.tensors.items():
        oracle.states[name] = tensor.clone()
    expected = oracle(torch.tensor([[7]]))[:, -1]
    assert relative_error(case.executable.decode(torch.tensor([7]), state), expected) < BOUND
    assert max(state_errors(state, oracle.states).values()) < BOUND


def test_different_states_have_errors(case: Case) -> None:
    states = [case.executable.new_state(capacity=LENGTH) for _ in range(2)]
    for state, ids in zip(states, (text_tokens(40), text_tokens(40).flip(1)), strict=True):
        case.executable.prefill(ids, state)
    assert min(state_errors(states[0], states[1].tensors).values()) > 1e-3
    case.executable.decode(torch.tensor([7]), states[0])
    with pytest.raises(ValueError, match=r"lengths \[41\] and \[40\]"):
        state_errors(states[0], states[1].tensors)


def test_text_repeats_to_any_length() -> None:
    short, long = text_tokens(1000), text_tokens(1 << 20)
    assert short.shape == (1, 1000) and long.shape == (1, 1 << 20)
    assert torch.equal(long[:, :1000], short)
    assert len(short.unique()) > 100


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_million_tokens_take_no_more_memory_than_a_thousand(tmp_path: Path) -> None:
    artifact = tmp_path / "plain.nemoc"
    compile_sample(1 << 21, attention=False, destination=artifact)
    few, many = (measure_prefill(artifact, n) for n in (1 << 10, 1 << 20))
    prompt = 8 << 20  # bytes of token ids, which are copied
    assert many["peak_bytes"] < few["peak_bytes"] + 4 * prompt
    assert many["state_bytes"] == few["state_bytes"]
    executable = nemoc.load(artifact)
    state = executable.load_state(state_file(artifact, 1 << 20))
    assert state.lengths.tolist() == [1 << 20]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("attention", [True, False])
def test_65536_tokens_in_steps_and_at_once_agree(attention: bool) -> None:
    for row in agreement(1 << 16, attention, [512, 8192], threads=None)[1:]:
        assert row["state_error"] < BOUND and row["logits_error"] < BOUND
