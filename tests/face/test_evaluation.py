"""What `nemoc eval` measures, and the table that it prints."""

import math
from pathlib import Path

import pytest
import torch

from nemoc.__main__ import main
from nemoc.compiler import compile
from nemoc.evaluation import Quality, evaluate, weight_bytes
from nemoc.ir import NemocError
from nemoc.models import eager_reference, open_model
from nemoc.passes import PassContext, parse_pipeline, run_pipeline
from nemoc.quality import CONTEXT, Window, divergence, model_tokenizer, own_text, read_windows
from nemoc.runtime import Executable
from nemoc.runtime.tokenizer import Tokenizer

TEXT = (
    'def greet(name):\n    """Say hello — in five\u202fways."""\n    return f"¡Hola, {name}!"\n' * 6
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return model_tokenizer(open_model("sample"))


@pytest.fixture(scope="module")
def exes() -> dict[str, Executable]:
    return {
        str(quantize): compile("sample", "reference", quantize, max_context=CONTEXT)
        for quantize in (None, "nvfp4")
    }


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    found = []
    for number, text in enumerate((TEXT, "x = 1\n", TEXT[::-1])):
        found.append(tmp_path / f"{number}.py")
        found[-1].write_text(text, encoding="utf-8")
    return found


def test_every_token_is_predicted_once(tokenizer: Tokenizer, files: list[Path]) -> None:
    windows = read_windows(tokenizer, files, 16)
    texts = [file.read_text(encoding="utf-8") for file in files]
    ids = [tokenizer.encode(text) for text in texts]
    assert sum(w.tokens for w in windows) == sum(len(i) - 1 for i in ids)
    assert sum(w.bytes for w in windows) == sum(len(text.encode()) for text in texts)
    assert all(1 <= w.tokens <= 16 for w in windows)
    predicted = sorted(i for w in windows for i in w.ids[1:].tolist())
    assert predicted == sorted(i for found in ids for i in found[1:])


def test_files_take_turns(tokenizer: Tokenizer, files: list[Path]) -> None:
    first, second, third, fourth = read_windows(tokenizer, files, 16)[:4]
    assert [w.ids[1:4].tolist() for w in (first, second, third)] == [
        tokenizer.encode(file.read_text(encoding="utf-8"))[1:4] for file in files
    ]
    assert first.ids[-1] == fourth.ids[0]


def test_tokens_may_be_limited(tokenizer: Tokenizer, files: list[Path]) -> None:
    assert sum(w.tokens for w in read_windows(tokenizer, files, 16, 40)) <= 40
    (only,) = read_windows(tokenizer, files, 16, 5)
    assert only.tokens == 5


def test_text_that_cannot_be_measured_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(NemocError, match=r"^text: found no files, expected at least one$"):
        read_windows(tokenizer, [])
    with pytest.raises(NemocError, match=r"missing\.py: cannot be read: No such file"):
        read_windows(tokenizer, [tmp_path / "missing.py"])
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(NemocError, match=r"empty\.py: found 1 tokens, expected at least 2$"):
        read_windows(tokenizer, [tmp_path / "empty.py"])
    (tmp_path / "latin.py").write_bytes(b"\xe9\xe9")
    with pytest.raises(NemocError, match=r"latin\.py: is no text in UTF-8"):
        read_windows(tokenizer, [tmp_path / "latin.py"])
    with pytest.raises(NemocError, match="context is 0 and max_tokens None, expected at least 1"):
        read_windows(tokenizer, [tmp_path / "latin.py"], 0)


def test_divergence_is_that_of_the_definition() -> None:
    random = torch.Generator().manual_seed(1)
    p, q = (3 * torch.randn(50, 300, generator=random) for _ in range(2))
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert torch.allclose(divergence(p, q), expected, rtol=1e-5)
    assert not torch.allclose(divergence(p, q), divergence(q, p), rtol=0.1)
    assert torch.equal(divergence(p, p + 2), torch.zeros(50, dtype=torch.float64)) or (
        divergence(p, p + 2).max() < 1e-6
    )


def test_figures_are_those_of_the_eager_model(exes: dict[str, Executable]) -> None:
    random = torch.Generator().manual_seed(2)
    sizes = (300, 40)  # more and less than what is held at a time
    windows = [Window(torch.randint(3, 4096, (n + 1,), generator=random), 3 * n) for n in sizes]
    found = evaluate({"nvfp4": exes["nvfp4"]}, windows, exes["None"])["nvfp4"]
    eager = eager_reference(open_model("sample"))
    bits, kl, agreed = 0.0, [], 0
    for window in windows:
        with torch.inference_mode():
            expected = eager(window.ids[None, :-1])[0].double().log_softmax(-1)
        quantized = exes["nvfp4"].prefill(
            window.ids[None, :-1], exes["nvfp4"].new_state(), all_logits=True
        )[0]
        logs = quantized.double().log_softmax(-1)
        bits -= float(logs.gather(-1, window.ids[1:, None]).sum()) / math.log(2)
        kl.append((expected.exp() * (expected - logs)).sum(-1))
        agreed += int((expected.argmax(-1) == logs.argmax(-1)).sum())
    every = torch.cat(kl).sort().values
    assert (found.tokens, found.bytes) == (340, 1020)
    assert found.bits_per_byte == pytest.approx(bits / 1020, rel=1e-5)
    assert found.kl == pytest.approx(float(every.mean()), rel=1e-3)
    assert found.kl_99 == pytest.approx(float(every[math.ceil(0.99 * 340) - 1]), rel=1e-3)
    assert found.agreement == pytest.approx(agreed / 340, abs=2 / 340)


def test_a_model_does_not_diverge_from_itself(
    exes: dict[str, Executable], tokenizer: Tokenizer, files: list[Path]
) -> None:
    windows = read_windows(tokenizer, files, 64, 128)
    found = evaluate({"same": exes["None"], "alone": exes["None"]}, windows, exes["None"])
    assert found["same"] == found["alone"]
    assert (found["same"].kl, found["same"].kl_99, found["same"].agreement) == (0, 0, 1)
    alone = evaluate({"alone": exes["None"]}, windows)["alone"]
    assert alone == Quality(alone.tokens, alone.bytes, found["same"].bits)


def test_a_window_beyond_the_context_is_refused(exes: dict[str, Executable]) -> None:
    window = Window(torch.arange(CONTEXT + 2), 9)
    with pytest.raises(NemocError, match=r"max_context is 1024, expected at least the 1025 tokens"):
        evaluate(exes, [window])


def test_nvfp4_weights_cost_the_sample_model_at_most_3_percent(
    exes: dict[str, Executable], tokenizer: Tokenizer
) -> None:
    windows = read_windows(tokenizer, own_text(open_model("sample")), 512, 2048)
    found = evaluate(exes, windows, exes["None"])
    cost = found["nvfp4"].bits_per_byte / found["None"].bits_per_byte - 1
    assert 0.001 < cost < 0.03
    assert found["None"].bits_per_byte < 1.6
    kl = found["nvfp4"].kl
    assert kl is not None
    assert 0.005 < kl < 0.05


@pytest.mark.parametrize(
    ("passes", "bits"),
    [("quantize-nvfp4", 4.5), ("quantize-fp8", 8), ("quantize-nvfp4{mode=w4a4}", 4.5)],
)
def test_weights_are_counted_as_their_formats_have_them(passes: str, bits: float) -> None:
    model = open_model("sample")
    graph = model.build_step()
    before = weight_bytes(graph)
    assert before == sum(int(p.type.bytes) for p in graph.params)
    pattern = (
        ".in_proj.",
        ".out_proj.",
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "up_proj",
        "down_",
    )
    chosen = [p for p in graph.params if any(part in p.name for part in pattern)]
    elements = sum(int(p.type.elements) for p in chosen)
    scales = sum(4 * (int(p.shape[0]) if p.type.rank == 3 else 1) for p in chosen)
    after = weight_bytes(run_pipeline(graph, parse_pipeline(passes), PassContext()))
    assert after == before - 2 * elements + bits * elements / 8 + scales


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["eval", *arguments, "-q"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_table_has_a_row_for_each_format_and_scope(
    capsys: pytest.CaptureFixture[str], files: list[Path]
) -> None:
    quantize = ["--quantize", "nvfp4", "--quantize", "as-released"]
    scopes = ["--scope", "all", "--scope", "experts"]
    text = ["--text", *map(str, files), "--context", "64", "--max-tokens", "64"]
    code, out, _ = run(capsys, "sample", *text, "--target", "reference", *quantize, *scopes)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("sample for reference: 64 tokens (")
    names = ["nvfp4, all", "nvfp4, experts", "as-released"]
    rows = [line for line in lines if "%" in line and "KL" not in line]
    assert [row.split("  ")[0] for row in rows] == names
    assert max(map(len, lines)) <= 80


def test_an_artifact_is_measured_alone_or_against_a_source(
    capsys: pytest.CaptureFixture[str], exes: dict[str, Executable], files: list[Path]
) -> None:
    artifact = str(exes["nvfp4"].folder)
    text = ["--text", str(files[0]), "--max-tokens", "32"]
    code, alone, _ = run(capsys, artifact, *text)
    assert code == 0
    assert "%" not in alone.splitlines()[-1]
    code, against, _ = run(capsys, artifact, *text, "--against", str(exes["None"].folder))
    assert code == 0
    assert "%" in against.splitlines()[-1]


BAD = {
    "no tokenizer": (["random:mid"], "random-mid: the model came without a tokenizer"),
    "unknown format": (["sample", "--quantize", "int3"], "quantize is 'int3', expected one of nvf"),
    "unknown pass option": (["sample", "--quantize", "quantize-fp8{bits=3}"], "no option 'bits'"),
    "scope of nothing": (["sample", "--scope", "experts"], "--scope experts: expected --quantize"),
    "bad scope": (["sample", "--quantize", "fp8", "--scope", "("], "scope '(': expected all"),
    "missing text": (["sample", "--text", "missing.py"], "missing.py: cannot be read"),
    "missing calibration": (
        ["sample", "--error-budget", "1", "--calibration", "missing.txt"],
        "missing.txt: cannot be read",
    ),
    "no budget": (["sample", "--error-budget", "0"], "'--error-budget'"),
    "no release": (["random:nano-4b", "--quantize", "as-released"], "without experts"),
}


@pytest.mark.parametrize(("arguments", "says"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    code, out, err = run(capsys, *arguments, "--target", "reference")
    assert code == 2
    assert out == ""
    assert err.startswith("nemoc: error: ")
    assert err.count("\n") == 1
    assert says in err
