"""The benchmark against llama.cpp without llama.cpp: processes that answer, files, figures, and what is left out."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import quantized
from benchmarks.quantized import BASE as PLAIN
from benchmarks.quantized import Sizes, about_llama, compare, file_bytes_per_token, show
from benchmarks.serving import EngineError, Served

from nemoc.models import Model, open_model, write_gguf
from nemoc.models.gguf_file import read_gguf
from support.checkpoints import BASE, write_checkpoint
from support.fake_llama import NAME, write_interpreter
from support.quantized import WIDE

MODEL = BASE | WIDE | {"moe_latent_size": None, "hybrid_override_pattern": "ME*"}
ENGINES = (PLAIN, "llama.cpp Q4_0", "llama.cpp MXFP4", "llama.cpp NVFP4")
SIZES = Sizes(prefill=40, decode=3, rounds=3, threads=1, target="reference")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("plain")
    write_checkpoint(folder, dtype=torch.bfloat16, **MODEL)
    return open_model(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_interpreter(tmp_path_factory.mktemp("llama") / "python"))


@pytest.fixture(scope="module")
def report(model: Model, llama: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized, "read_bandwidth", lambda: 1e9)
        return compare(model, tmp_path_factory.mktemp("work"), SIZES, ENGINES, llama)


def _row(report: dict[str, Any], engine: str) -> dict[str, Any]:
    (row,) = (row for row in report["engines"] if row["engine"] == engine)
    found: dict[str, Any] = row
    return found


def test_every_engine_that_runs_has_its_figures(report: dict[str, Any]) -> None:
    assert [row["engine"] for row in report["engines"]] == [PLAIN, "llama.cpp Q4_0"]
    for row in report["engines"]:
        assert row["prefill_tok_s"] > 0
        assert row["decode_tok_s"] > 0
        assert 1e6 < row["anonymous_bytes_before_the_model"] <= row["peak_anonymous_bytes"]
        assert row["decode_bytes_per_token"] < row["weights_bytes"]
        read = row["decode_bytes_per_token"] * row["decode_tok_s"] / 1e9
        assert row["decode_share_of_read_bandwidth"] == pytest.approx(read, rel=0.02, abs=1e-3)
    assert report["versions"]["llama-cpp-python"] == NAME


def test_ratios_say_how_many_times_as_fast(report: dict[str, Any]) -> None:
    ours, theirs = _row(report, PLAIN), _row(report, "llama.cpp Q4_0")
    assert ours["decode_ratio"] == theirs["decode_ratio_to_llama_cpp"] == 1
    assert theirs["decode_ratio"] == pytest.approx(1 / ours["decode_ratio_to_llama_cpp"], rel=0.05)
    assert theirs["decode_ratio"] > 1.5  # a millisecond a token, against the interpreter
    assert ours["logits_error"] == 0
    assert theirs["logits_error"] > 0.1


def test_what_cannot_be_made_is_left_out_with_its_reason(report: dict[str, Any]) -> None:
    assert report["skipped"].keys() == {"llama.cpp MXFP4", "llama.cpp NVFP4"}
    assert report["skipped"]["llama.cpp MXFP4"] == "ValueError: quantizing to MXFP4_MOE failed"
    assert "no width is a multiple of 64" in report["skipped"]["llama.cpp NVFP4"]


def test_the_table_has_all_of_it(
    report: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    show(report)
    lines = capsys.readouterr().out.splitlines()
    for name in ENGINES:
        assert sum(name in line for line in lines) == 1


@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is not None, reason="this interpreter has llama.cpp"
)
def test_an_interpreter_without_llama_cpp_is_said_to_be_so() -> None:
    found, reason = about_llama(sys.executable)
    assert found is None
    assert reason.startswith(f"{sys.executable} has no llama.cpp: ")
    assert "llama_cpp" in reason
    assert "\n" not in reason


def test_bytes_of_a_file_count_chosen_experts_and_one_embedding(
    model: Model, tmp_path: Path
) -> None:
    path = tmp_path / "plain.gguf"
    with path.open("wb") as file:
        write_gguf(model, file, "bf16")
    tensors = read_gguf(path).tensors
    experts = sum(t.bytes for name, t in tensors.items() if "exps" in name and "sh" not in name)
    spared = experts * (1 - MODEL["num_experts_per_tok"] / MODEL["n_routed_experts"])
    spared += tensors["token_embd.weight"].bytes * (1 - 1 / MODEL["vocab_size"])
    weights = sum(t.bytes for t in tensors.values()) - spared
    row = 2 * 4 * MODEL["num_key_value_heads"] * MODEL["head_dim"]  # keys and values in float32
    shorter, longer = (file_bytes_per_token(path, model.config, cached) for cached in (10, 30))
    assert longer - shorter == 20 * row
    assert shorter > weights
    assert shorter - weights < 0.5 * weights  # the rest is state


class TestServed:
    def test_an_engine_that_fails_says_so_in_a_line_and_goes_on(self, llama: str) -> None:
        with Served("serve_llama", llama) as engine:
            with pytest.raises(EngineError, match="No such file"):
                engine.call("open", file="/nowhere", threads=1, context=8)
            assert engine.call("decode", steps=2) == [1, 1]

    def test_memory_is_watched_until_it_is_asked_for(self, llama: str) -> None:
        with Served("serve_llama", llama) as engine:
            engine.call("hold", size=50 << 20)
            found = engine.call("peak")
            before, most = found
            assert 1e6 < before < 50e6 < most < 1e9
            engine.call("hold", size=200 << 20)
            assert engine.call("peak") == found

    def test_the_last_words_of_a_process_that_ends_are_passed_on(self, llama: str) -> None:
        with (
            Served("serve_llama", llama) as engine,
            pytest.raises(EngineError, match="ended with code 3: a last word"),
        ):
            engine.call("leave")


def test_an_engine_that_is_not_asked_is_stopped(llama: str) -> None:
    with Served("serve_llama", llama) as engine:
        for _ in range(2):
            assert engine.call("about")
            ended, status = os.waitpid(engine.pid, os.WUNTRACED)
            assert ended == engine.pid
            assert os.WIFSTOPPED(status)
