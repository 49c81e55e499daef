"""The numbers of the published models, read off their graphs."""

import pytest

from nemoc.ir import DType
from nemoc.ir.dims import B, L, T
from nemoc.models import preset, render_summary, summarize

MIB = 2**20


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("nano", 31_577_940_288, 3_580_076_352),
        ("super", 120_668_707_840, 12_770_237_440),
        ("ultra", 549_308_993_536, 56_058_843_136),
        ("lightning", 31_577_940_288, 3_580_076_352),
        ("nano-9b-v2", 8_888_227_328, 8_888_227_328),
        ("nemotron-h-8b", 8_100_852_736, 8_100_852_736),
        ("nano-4b", 3_973_556_832, 3_973_556_832),
    ],
)
def test_parameters_are_those_published(name: str, total: int, active: int) -> None:
    summary = summarize(preset(name))
    assert (summary.parameters, summary.active_parameters) == (total, active)


@pytest.mark.parametrize(
    ("name", "ssm", "conv", "cache"),
    [("nano", 46, 0.81, 6144), ("super", 160, 2.34, 8192), ("ultra", 384, 5.06, 12288)],
)
def test_state_of_a_request_is_that_published(name: str, ssm: int, conv: float, cache: int) -> None:
    summary = summarize(preset(name))
    assert summary.ssm_bytes == ssm * MIB
    # Published for a bf16 history; ours is f32.
    assert summary.conv_bytes / MIB == pytest.approx(2 * conv, abs=0.01)
    assert summary.kv_bytes_per_token == cache
    assert summarize(preset(name), DType.F32).kv_bytes_per_token == 2 * cache


@pytest.mark.parametrize(
    ("name", "gigabytes", "gigaflop"),
    [("nano", 6.456, 6.46), ("super", 24.467, 24.47), ("ultra", 109.970, 109.97)],
)
def test_a_decoded_token_reads_the_published_bytes(
    name: str, gigabytes: float, gigaflop: float
) -> None:
    work = summarize(preset(name)).decode.at(1, 1, 0)
    assert float(work.weights) / 1e9 == pytest.approx(gigabytes, abs=0.0006)
    # The published figure is of the matrix products alone.
    assert gigaflop < float(work.flops) / 1e9 < 1.01 * gigaflop


def test_a_batch_shares_the_experts_that_its_tokens_choose() -> None:
    summary = summarize(preset("nano"))
    step = [float(summary.step.at(batch, 1, 0).weights) / 1e9 for batch in (1, 4, 16, 256)]
    assert step == pytest.approx([6.5, 14.0, 35.2, 62.5], abs=0.06)


def test_closed_forms_name_only_what_they_depend_on() -> None:
    summary = summarize(preset("nano"))
    assert summary.decode.flops.free_symbols == {B, T}
    assert summary.decode.state.diff(T) == summary.kv_bytes_per_token
    assert summary.prefill.flops.free_symbols == {B, L, T}
    assert summary.decode.flops.diff(T) == 4 * 6 * 32 * 128


def test_weight_bytes_follow_the_stored_types() -> None:
    summary = summarize(preset("nano"))
    biases = 23 * 128
    assert summary.weight_bytes == 2 * summary.parameters + 2 * biases
    wide = summarize(preset("nano"), weight_types=lambda name: DType.F32)
    assert wide.weight_bytes == 4 * summary.parameters


def test_text_names_layers_totals_and_closed_forms() -> None:
    text = render_summary(summarize(preset("nano")), "nano")
    assert text.startswith("nano: 52 layers (23 mamba, 23 moe, 6 attention)\n")
    assert "31,577,940,288" in text
    assert "3,580,076,352" in text
    assert "46.00 MiB recurrent" in text
    assert "98304*T" in text
