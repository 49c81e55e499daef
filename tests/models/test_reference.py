"""The eager reference against transformers' NemotronHForCausalLM, and against itself in pieces."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nemoc.models.config import ModelConfig
from nemoc.models.mixers import MambaState, chunked_scan
from nemoc.models.reference import Cache, NemotronH, from_disk, to_disk
from support.checkpoints import VARIANTS, unusual_model, write_checkpoint

VOCAB = 97
BOUND = 1e-5


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Operations are far too small to share out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def reference_of(theirs: Any) -> NemotronH:
    """The eager reference with the configuration and the weights of a transformers model."""
    model = NemotronH(ModelConfig.from_dict(theirs.config.to_dict())).eval()
    model.load_state_dict(from_disk(theirs.state_dict()))
    return model


def both(variant: str, **changes: Any) -> tuple[Any, NemotronH]:
    theirs = unusual_model(seed=list(VARIANTS).index(variant), **VARIANTS[variant] | changes)
    return theirs, reference_of(theirs)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_equals_transformers(variant: str) -> None:
    theirs, ours = both(variant)
    ids = tokens(2, 21)
    assert error(ours(ids), theirs(ids).logits) < BOUND


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_pieces_equal_the_whole(variant: str) -> None:
    theirs, ours = both(variant)
    ids, cache = tokens(2, 21), Cache()
    pieces = [ours(part, cache) for part in ids.split([9, 1, 6, 1, 1, 2, 1], 1)]
    assert error(torch.cat(pieces, 1), theirs(ids).logits) < BOUND
    assert cache.lengths is not None and cache.lengths.tolist() == [21, 21]


@torch.no_grad()
def test_decode_equals_transformers_decode() -> None:
    theirs, ours = both("base")
    ids, cache = tokens(2, 16), Cache()
    out = theirs(ids[:, :11], use_cache=True)
    ours(ids[:, :11], cache)
    for at in range(11, 16):
        new = ids[:, at : at + 1]
        out = theirs(new, past_key_values=out.past_key_values, use_cache=True)
        assert error(ours(new, cache), out.logits) < BOUND


@pytest.mark.parametrize("variant", ["base", "two taps", "seven taps without bias"])
@torch.no_grad()
def test_rows_of_unequal_length_equal_each_row_alone(variant: str) -> None:
    theirs, ours = both(variant)
    ids, cache = tokens(3, 40), Cache()
    done = torch.zeros(3, dtype=torch.int64)
    # A row may be shorter than the convolution's memory, or get nothing at all.
    for lengths in ([9, 2, 1], [3, 11, 0], [1, 1, 1], [7, 1, 12]):
        count = torch.tensor(lengths)
        step = torch.full((3, int(count.max())), VOCAB - 1)
        for row, length in enumerate(lengths):
            step[row, :length] = ids[row, done[row] : done[row] + length]
        logits = ours(step, cache, count)
        for row, length in enumerate(lengths):
            if length:
                start = int(done[row])
                alone = theirs(ids[row : row + 1, : start + length]).logits[0, start:]
                assert error(logits[row, :length], alone) < BOUND
        done += count
    assert cache.lengths is not None and cache.lengths.equal(done)


def test_gradients_equal_transformers() -> None:
    theirs, ours = both("latent experts")
    ids = tokens(2, 13)
    target = torch.randn(2, 13, VOCAB, generator=torch.Generator().manual_seed(1))
    (theirs(ids).logits * target).sum().backward()
    (ours(ids) * target).sum().backward()
    expected = from_disk({name: value.grad for name, value in theirs.named_parameters()})
    found = {name: value.grad for name, value in ours.named_parameters()}
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value is not None
        assert error(value, expected[name]) < 1e-4, name


@torch.no_grad()
def test_tiny_steps_are_not_clamped() -> None:
    _, ours = both("base")
    for name, value in ours.named_parameters():
        if name.endswith("dt_bias"):
            value.fill_(-14.0)
    ids, prefill, decode = tokens(1, 12), Cache(), Cache()
    ours(ids, prefill)
    for at in range(12):
        ours(ids[:, at : at + 1], decode)
    whole, stepped = prefill.layers[0], decode.layers[0]
    assert isinstance(whole, MambaState) and isinstance(stepped, MambaState)
    assert error(whole.ssm, stepped.ssm) < BOUND
    # Clamped to 0.001, steps would be a thousand times larger than softplus(-14 ± 2).
    assert float(whole.ssm.abs().max()) < 1e-3


@torch.no_grad()
def test_float64_model_computes_in_float64() -> None:
    theirs, ours = both("base")
    double = reference_of(theirs).double()
    ids = tokens(2, 15)
    exact = double(ids)
    assert exact.dtype == torch.float64
    assert 0 < error(ours(ids).double(), exact) < 1e-6
    pieces = Cache()
    split = torch.cat([double(part, pieces) for part in ids.split(4, 1)], 1)
    assert error(split, exact) < 1e-13


@torch.no_grad()
def test_bfloat16_model_stays_near() -> None:
    theirs, _ = both("base")
    rounded = theirs.to(torch.bfloat16).float()
    ids = tokens(2, 15)
    found = reference_of(rounded).to(torch.bfloat16)(ids)
    assert found.dtype == torch.float32
    assert error(found, reference_of(rounded)(ids)) < 5e-2


@pytest.mark.parametrize("chunk", [1, 3, 8, 64])
@torch.no_grad()
def test_scan_equals_its_recurrence(chunk: int) -> None:
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    batch, length, groups, heads, width, size = 2, 19, 2, 3, 4, 5
    x, dt = draw(batch, length, groups, heads, width), draw(batch, length, groups, heads).exp()
    a = -draw(groups, heads).exp()
    b, c = draw(batch, length, groups, size), draw(batch, length, groups, size)
    start = state = draw(batch, groups, heads, width, size)
    outputs = []
    for at in range(length):
        added = (dt[:, at, ..., None] * x[:, at])[..., None] * b[:, at, :, None, None]
        state = torch.exp(dt[:, at] * a)[..., None, None] * state + added
        outputs.append((state @ c[:, at, :, None, :, None])[..., 0])
    y, last = chunked_scan(x, dt, a, b, c, start, chunk)
    assert error(y, torch.stack(outputs, 1)) < 1e-13
    assert error(last, state) < 1e-13


@torch.no_grad()
def test_experts_that_no_token_chose_are_not_computed() -> None:
    _, ours = both("base")
    experts = ours.get_submodule("backbone.layers.1.mixer.experts")
    assert isinstance(experts.up_proj, Tensor)
    experts.up_proj[3:] = torch.nan
    chosen = torch.tensor([[0, 2], [1, 0], [2, 1]])
    out = experts(torch.ones(3, 40), chosen, torch.ones(3, 2))
    assert out.isfinite().all()


@torch.no_grad()
def test_reads_what_transformers_writes_and_writes_the_same_names(tmp_path: Path) -> None:
    theirs = write_checkpoint(tmp_path, seed=5)
    stored = load_file(tmp_path / "model.safetensors")
    ours = NemotronH(ModelConfig.from_file(tmp_path)).eval()
    ours.load_state_dict(from_disk(stored))
    ids = tokens(1, 9)
    assert error(ours(ids), theirs(ids).logits) < BOUND
    written = to_disk(ours.state_dict())
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], stored[name]) for name in stored)


def test_drops_the_prediction_head_and_reads_the_old_embedding_name() -> None:
    one = torch.ones(1)
    found = from_disk({"backbone.embedding.weight": one, "mtp.layers.0.norm.weight": one})
    assert list(found) == ["backbone.embeddings.weight"]


@torch.no_grad()
def test_attention_bias_enters_all_four_projections() -> None:
    theirs, plain = both("attention only")
    config = ModelConfig.from_dict(theirs.config.to_dict() | {"attention_bias": True})
    biased = NemotronH(config)
    missing = biased.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert [name.split(".")[-2] for name in missing] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    for name in missing:
        biased.get_parameter(name).zero_()
    ids = tokens(1, 8)
    assert error(biased(ids), plain(ids)) < BOUND
    # What is added to every key cancels in the softmax, so k_proj's bias alone shows nothing.
    for name in (name for name in missing if "k_proj" not in name):
        before = biased(ids)
        biased.get_parameter(name).normal_(generator=torch.Generator().manual_seed(0))
        assert error(biased(ids), before) > 1e-3


def test_tied_embeddings_are_one_parameter() -> None:
    theirs, _ = both("attention only")
    config = ModelConfig.from_dict(theirs.config.to_dict() | {"tie_word_embeddings": True})
    model = NemotronH(config)
    assert model.lm_head.weight is model.backbone.embeddings.weight


def test_initial_weights_depend_on_the_seed_alone() -> None:
    config = ModelConfig.from_dict(unusual_model().config.to_dict())
    models = [NemotronH(config) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        model.reset_parameters(seed)
    first, same, other = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    assert first.isfinite().all()
    assert torch.equal(first, same) and not torch.equal(first, other)
