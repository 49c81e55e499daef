"""The sample model: what is shipped is small, readable by transformers, and has really learned."""

import json
import platform
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, NemotronHForCausalLM

from nemoc.ir.errors import NemocError
from nemoc.models.config import ModelConfig
from nemoc.models.mixers import Router
from nemoc.models.reference import NemotronH
from nemoc.models.sample import CHECKPOINT, corpus, train
from nemoc.models.sample.evaluate import bits_per_byte, generate, load_model, xz_bits_per_byte
from nemoc.models.sample.optimizer import orthogonalize
from nemoc.models.sample.tokenizer import BOS
from support.checkpoints import unusual_model

needs_corpus = pytest.mark.skipif(
    platform.python_version() != corpus.PYTHON_VERSION,
    reason=f"the held-out files are those of CPython {corpus.PYTHON_VERSION}'s library",
)


@pytest.fixture(scope="module")
def shipped() -> tuple[NemotronH, Tokenizer]:
    return load_model(CHECKPOINT)


@pytest.fixture(scope="module")
def text() -> str:
    """A held-out file."""
    return corpus.load().held_out["csv.py"]


def test_checkpoint_is_under_16_mib() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 16 * 2**20


def test_has_all_the_layer_kinds_that_a_nemotron_3_has(
    shipped: tuple[NemotronH, Tokenizer],
) -> None:
    model, tokenizer = shipped
    assert set(model.config.layers) == {"mamba", "moe", "attention"}
    assert 4e6 < sum(value.numel() for value in model.parameters()) < 8e6
    assert tokenizer.get_vocab_size() == model.config.vocab_size
    assert model.config == train.CONFIG


def test_every_width_that_a_product_sums_over_is_a_multiple_of_256(
    shipped: tuple[NemotronH, Tokenizer],
) -> None:
    for name, value in shipped[0].named_parameters():
        if value.dim() >= 2 and "conv1d" not in name and "embeddings" not in name:
            assert value.shape[-1] % 256 == 0, name


@torch.no_grad()
def test_transformers_loads_it_and_agrees(shipped: tuple[NemotronH, Tokenizer]) -> None:
    model, tokenizer = shipped
    theirs = NemotronHForCausalLM.from_pretrained(
        CHECKPOINT, dtype=torch.float32, experts_implementation="eager"
    )
    for layer in theirs.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (0.0, float("inf"))
    ids = torch.tensor([tokenizer.encode("import os\n\n\ndef main(argv):\n    for ").ids])
    expected = theirs(ids).logits
    assert (model(ids) - expected).norm() / expected.norm() < 1e-5


def test_transformers_reads_the_tokenizer(shipped: tuple[NemotronH, Tokenizer]) -> None:
    theirs = AutoTokenizer.from_pretrained(CHECKPOINT)
    line = "    return self._größe  # €\t\r\n"
    assert theirs(line)["input_ids"] == shipped[1].encode(line).ids
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)


@pytest.mark.parametrize(
    "text", ["", " x", "\n\n\n    if  x:\t\n", "naïve 😀 \x00\x7f", "<s> </s>"]
)
def test_tokenizer_keeps_every_byte(text: str, shipped: tuple[NemotronH, Tokenizer]) -> None:
    _, tokenizer = shipped
    ids = tokenizer.encode(text).ids
    assert ids[0] == BOS
    if "<s>" not in text:
        assert tokenizer.decode(ids) == text


@needs_corpus
def test_spends_fewer_bits_than_xz(shipped: tuple[NemotronH, Tokenizer], text: str) -> None:
    # xz gets all held-out files at once, which is its better case.
    xz = xz_bits_per_byte(corpus.load().held_out.values())
    assert bits_per_byte(*shipped, text) < 0.8 * xz


@needs_corpus
@torch.no_grad()
def test_uses_all_experts(shipped: tuple[NemotronH, Tokenizer], text: str) -> None:
    model, tokenizer = shipped
    chosen: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _args, out: chosen.append(out[0]))
        for module in model.modules()
        if isinstance(module, Router)
    ]
    model(torch.tensor([tokenizer.encode(text).ids]))
    for hook in hooks:
        hook.remove()
    assert len(chosen) == model.config.layers.count("moe")
    for experts in chosen:
        share = experts.flatten().bincount(minlength=8) / experts.numel()
        assert share.min() > 0.02


def test_generates_something_like_python(shipped: tuple[NemotronH, Tokenizer]) -> None:
    prompt = "import os\n\n\nclass Reader:\n    def __init__(self"
    text = generate(*shipped, prompt, tokens=60, temperature=0.3, seed=0)
    assert text.startswith(prompt)
    assert "self." in text[len(prompt) :]
    assert generate(*shipped, prompt, tokens=60, temperature=0.3, seed=0) == text


def test_corpus_listing_is_whole_and_disjoint() -> None:
    listing = json.loads(corpus.LISTING.read_text(encoding="utf-8"))
    files = listing["files"]
    assert corpus.listing_digest(files) == listing["sha256"]
    assert tuple(files["held_out"]) == tuple(sorted(corpus.HELD_OUT))
    names = [path for part in files.values() for path in part]
    digests = [digest for part in files.values() for digest in part.values()]
    assert len(set(names)) == len(names)
    assert not set(files["held_out"].values()) & (set(digests) - set(files["held_out"].values()))


@needs_corpus
def test_corpus_is_the_listed_one() -> None:
    texts = corpus.load()
    assert sum(len(text.encode()) for text in texts.held_out.values()) == 611_158


def test_refuses_another_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.python_version", lambda: "3.12.1")
    with pytest.raises(NemocError, match=r"^corpus.json: found Python 3.12.1, expected 3.11.7"):
        corpus.load()


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), (b"x", "found SHA-256 2d711642b726b044")]
)
def test_refuses_a_changed_library(
    content: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = next(iter(json.loads(corpus.LISTING.read_text())["files"]["library"]))
    if content is not None:
        (tmp_path / first).write_bytes(content)
    monkeypatch.setattr("platform.python_version", lambda: corpus.PYTHON_VERSION)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(NemocError, match=message) as error:
        corpus.load()
    assert str(error.value).startswith(str(tmp_path / first))


def tiny_run() -> train.Run:
    config = unusual_model(hidden_size=32, hybrid_override_pattern="ME*").config
    return train.Run(ModelConfig.from_dict(config.to_dict()))


def tiny_rows(step: int) -> torch.Tensor:
    return torch.randint(0, 97, (8, 17), generator=torch.Generator().manual_seed(step))


def test_a_resumed_run_takes_the_same_steps(tmp_path: Path) -> None:
    whole, first = tiny_run(), tiny_run()
    for step in range(4):
        whole.step(tiny_rows(step), step / 10)
        whole.balance.update()
    for step in range(2):
        first.step(tiny_rows(step), step / 10)
        first.balance.update()
    first.save(tmp_path / "state.pt")
    resumed = tiny_run()
    resumed.restore(tmp_path / "state.pt")
    assert resumed.progress == train.Progress(step=2)
    for step in range(2, 4):
        resumed.step(tiny_rows(step), step / 10)
        resumed.balance.update()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_training_lowers_the_loss() -> None:
    run = tiny_run()
    losses = [run.step(tiny_rows(0), 0.1) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]


def test_balance_moves_tokens_away_from_the_busiest_expert() -> None:
    run = tiny_run()
    router = next(module for module in run.model.modules() if isinstance(module, Router))
    run.step(tiny_rows(0), 0.1)
    counts = run.balance.counts[0].clone()
    assert run.balance.update() > 1
    bias = router.e_score_correction_bias
    assert bias[counts.argmax()] < 0 < bias[counts.argmin()]
    assert run.balance.counts[0].sum() == 0


def test_progress_follows_tokens_or_time_whichever_is_further() -> None:
    progress = train.Progress(step=10, seconds=30.0)
    seen = 10 * train.ROWS * train.WINDOW
    assert progress.fraction(tokens=4 * seen, minutes=1.0) == 0.5
    assert progress.fraction(tokens=2 * seen, minutes=1000.0) == 0.5


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    assert train.learning_rate(0.0) == 0.0
    assert train.learning_rate(0.2) == 1.0
    assert 0 < train.learning_rate(0.99) < 0.02
    assert train.learning_rate(1.0) == 0.0


def test_an_epoch_repeats_library_files_in_an_order_fixed_by_the_seed() -> None:
    files = [torch.full((5000,), value) for value in range(3, 7)]
    data = train.TokenFiles(library=files[:3], side=files[3:])
    rows = train.epoch_rows(data, 0)
    assert rows.equal(train.epoch_rows(data, 0))
    assert not rows.equal(train.epoch_rows(data, 1))
    seen = rows[:, :-1].flatten().bincount()
    assert seen[3:6].min() > 4 * seen[6] > 0
    steps = len(rows) // train.ROWS
    assert train.position_of(steps - 1, data) == (0, (steps - 1) * train.ROWS)
    assert train.position_of(steps, data) == (1, 0)


def test_orthogonalize_brings_singular_values_near_one() -> None:
    random = torch.randn(3, 48, 20, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(random))
    assert values.min() > 0.6 and values.max() < 1.3
