"""Sampling and generation: repeatable, each row by itself, ended by ids and texts."""

import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from nemoc.ir import NemocError
from nemoc.runtime import Contents, Executable, Generation, build
from nemoc.runtime.sampling import Sampler, draw_row, draw_sorted

PROMPTS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])
LENGTHS = torch.tensor([4, 2, 3])


def test_greedy_generation_takes_the_largest_logit(exe: Executable) -> None:
    out = exe.generate(PROMPTS, 6)
    state = exe.new_state(3)
    logits = exe.prefill(PROMPTS, state)
    for step in range(out.shape[1]):
        assert torch.equal(out[:, step], logits.argmax(-1))
        logits = exe.decode(out[:, step], state)
    assert out.dtype == torch.int64


def test_a_seed_repeats_and_another_differs(exe: Executable) -> None:
    first, again, other = (exe.generate(PROMPTS, 8, 1.0, 0.9, seed) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    fresh = [exe.generate(PROMPTS, 8, temperature=1.0) for _ in range(2)]
    assert not torch.equal(*fresh)


def test_a_row_depends_on_no_other(exe: Executable) -> None:
    together = exe.generate(PROMPTS, 8, 0.8, 0.95, seed=[3, 4, 5], lengths=LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = exe.generate(PROMPTS[row : row + 1, :length], 8, 0.8, 0.95, seed=3 + row)
        assert torch.equal(together[row : row + 1, : alone.shape[1]], alone)
        assert not together[row, alone.shape[1] :].any()  # padding
    assert torch.equal(together, exe.generate(PROMPTS, 8, 0.8, 0.95, seed=3, lengths=LENGTHS))


def test_rows_end_at_eos_and_are_padded(contents: Callable[..., Contents]) -> None:
    plain = build(contents(generation=Generation())).generate(PROMPTS, 12)
    eos = int(plain[0, 2])
    out = build(contents(generation=Generation(eos=(eos,), pad=96))).generate(PROMPTS, 12)
    for row in range(3):
        places = (plain[row] == eos).nonzero()
        end = int(places[0]) + 1 if len(places) else out.shape[1]
        assert torch.equal(out[row, :end], plain[row, :end])
        assert bool((out[row, end:] == 96).all())


def test_stop_ids_end_rows_and_generation_ends_with_the_last(exe: Executable) -> None:
    plain = exe.generate(PROMPTS, 12)
    out = exe.generate(PROMPTS, 12, stop=[int(t) for t in plain[:, 1]])
    assert out.shape[1] <= 2
    assert torch.equal(exe.generate(PROMPTS[:1], 12, stop=int(plain[0, 0])), plain[:1, :1])


def test_stop_texts_end_rows_wherever_tokens_part_them(exe: Executable) -> None:
    plain = exe.generate(PROMPTS[:1], 20, temperature=1.0, seed=1)
    tokenizer = exe.tokenizer
    text = tokenizer.decode(plain[0].tolist(), skip_special=False)
    stop = tokenizer.decode(plain[0, 5:8].tolist(), skip_special=False)
    out = exe.generate(PROMPTS[:1], 20, temperature=1.0, seed=1, stop=["never there", stop])
    found = tokenizer.decode(out[0].tolist(), skip_special=False)
    assert found == text[: text.index(stop) + len(stop)]


def test_stream_gives_the_tokens_of_generate_one_by_one(exe: Executable) -> None:
    stream = exe.stream(PROMPTS, 8, 1.0, 1.0, 5, lengths=LENGTHS)
    first = next(stream)
    assert first.shape == (3,)
    rest = list(stream)
    expected = exe.generate(PROMPTS, 8, 1.0, 1.0, 5, lengths=LENGTHS)
    assert torch.equal(torch.stack([first, *rest], 1), expected)


def test_generation_goes_on_from_a_state(exe: Executable) -> None:
    whole = exe.generate(PROMPTS, 4)
    state = exe.new_state(3, capacity=7)
    exe.prefill(PROMPTS[:, :2], state)
    assert torch.equal(exe.generate(PROMPTS[:, 2:], 4, state=state), whole)
    assert state.lengths.tolist() == [7, 7, 7]
    with pytest.raises(NemocError, match="row 0: 7 tokens so far and 1 more exceed"):
        exe.generate(PROMPTS[:, :1], 1, state=state)


def test_a_context_is_filled_to_the_last_token(exe: Executable) -> None:
    ids = torch.randint(3, 97, (1, 198))
    assert exe.generate(ids, 3, stop=[]).shape[1] <= 3
    with pytest.raises(
        NemocError, match="a prompt of 198 tokens and 4 new ones exceed the context of 200 tokens"
    ):
        exe.generate(ids, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected at least 1"),
        ({"temperature": -1.0}, "temperature is -1.0, expected a finite number from 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0, expected more than 0 and at most 1"),
        ({"seed": [1]}, "1 seeds for 3 rows"),
        ({"stop": ""}, "stop: an empty text would end every row at once"),
        ({"stop": 1.5}, "stop is 1.5, expected token ids and texts"),
        ({"stop": [2, 1.5]}, "stop is 1.5, expected an integer"),
        ({"seed": 3.5}, "seed is 3.5, expected an integer, or one for each row"),
        ({"seed": [1, 2, "3"]}, "seed is '3', expected an integer"),
        ({"seed": True}, "seed is True, expected an integer"),
        ({"temperature": "1"}, "temperature is '1', expected a finite number from 0"),
        ({"temperature": None}, "temperature is None, expected a finite number from 0"),
        ({"top_p": "1"}, "top_p is '1', expected more than 0 and at most 1"),
        ({"max_new_tokens": None}, "max_new_tokens is None, expected an integer"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5, expected an integer"),
        ({"state": "x"}, r"state is a str, expected one from new_state\(\)"),
    ],
)
def test_bad_options_are_refused_at_once(
    exe: Executable, options: dict[str, object], message: str
) -> None:
    with pytest.raises(NemocError, match=message):
        exe.stream(PROMPTS, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor])
def test_numbers_of_numpy_and_torch_are_numbers(
    exe: Executable, kind: Callable[[int], Any]
) -> None:
    expected = exe.generate(PROMPTS, 6, 1.0, 0.9, seed=3, stop=[5, 9])
    options = {"temperature": np.float32(1.0), "top_p": 0.9, "stop": [kind(5), kind(9)]}
    assert torch.equal(exe.generate(PROMPTS, 6, seed=kind(3), **options), expected)
    seeds = [kind(3), kind(4), kind(5)]
    assert torch.equal(exe.generate(PROMPTS, kind(6), seed=seeds, **options), expected)
    one = exe.generate(PROMPTS, 6, stop=int(expected[0, 0]))
    assert torch.equal(exe.generate(PROMPTS, 6, stop=kind(int(expected[0, 0]))), one)


def test_seeds_and_stops_may_be_arrays(exe: Executable) -> None:
    expected = exe.generate(PROMPTS, 6, 1.0, seed=[3, 4, 5], stop=[5, 9])
    for make in (np.array, torch.tensor):
        found = exe.generate(PROMPTS, 6, 1.0, seed=make([3, 4, 5]), stop=make([5, 9]))
        assert torch.equal(found, expected)
    with pytest.raises(NemocError, match="1 seeds for 3 rows"):
        exe.generate(PROMPTS, 6, seed=torch.tensor([3]))  # type: ignore[arg-type]


@pytest.mark.parametrize("stop", [10**9, [1, -1]])
def test_stop_ids_that_no_token_has_are_refused(exe: Executable, stop: Any) -> None:
    with pytest.raises(NemocError, match=r"^stop: token id -?\d+, expected 0 to \d+$"):
        exe.generate(torch.tensor([[1, 2]]), 2, stop=stop)


def test_pickling_says_what_to_pass_on_instead(exe: Executable) -> None:
    with pytest.raises(
        NemocError, match=r"cannot be pickled: pass on the folder of its artifact, /"
    ):
        pickle.dumps(exe)


def test_stop_texts_need_a_tokenizer(contents: Callable[..., Contents]) -> None:
    exe = build(contents())
    with pytest.raises(NemocError, match=r"model.nemoc: the model came without a tokenizer"):
        exe.generate(PROMPTS, stop="x")


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -30.0]])
    sampler = Sampler(1, temperature=0.5, top_p=1.0, seed=0)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[sampler.sample(logits)] += 1
    expected = (logits[0] / 0.5).softmax(-1)
    assert torch.allclose(counts / 4000, expected, atol=0.03)


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    for top_p, kept in (
        (0.4, {1}),
        (0.5, {1}),
        (0.6, {1, 3}),
        (0.8, {1, 2, 3}),
        (1.0, {0, 1, 2, 3}),
    ):
        sampler = Sampler(1, 1.0, top_p, seed=2)
        assert {int(sampler.sample(logits)) for _ in range(300)} == kept


def test_extreme_temperatures_are_safe() -> None:
    logits = torch.tensor([[1e4, -1e4, float("-inf"), 0.0]])
    assert int(Sampler(1, 1e-6, 1.0, 0).sample(logits)) == 0
    seen = {
        int(t) for t, _ in zip(draws(Sampler(1, 1e9, 1.0, 0), logits), range(200), strict=False)
    }
    assert seen == {0, 1, 3}


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.9999, 1.0])
def test_rows_on_the_cpu_are_drawn_as_if_all_tokens_were_sorted(
    spread: float, top_p: float
) -> None:
    """From flat logits, of which most are sorted, and steep ones, of which few are; some are equal."""
    logits = torch.randn(40, 3000, generator=torch.Generator().manual_seed(5)) * spread
    logits = (logits * 8).round() / 8 if spread == 1.0 else logits
    points = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    points[:2] = torch.tensor([0.0, 1.0 - 1e-16])
    expected = draw_sorted(logits, 0.7, top_p, points)
    found = [
        draw_row(row.numpy(), 0.7, top_p, float(p)) for row, p in zip(logits, points, strict=True)
    ]
    assert found == expected.tolist()


def test_tokens_that_are_ruled_out_are_never_drawn() -> None:
    logits = torch.full((1, 50), -float("inf"))
    logits[0, [7, 30]] = torch.tensor([1.0, 2.0])
    for top_p in (0.5, 1.0):
        drawn = {draw_row(logits[0].numpy(), 1.0, top_p, p) for p in (0.0, 0.3, 0.7, 1.0)}
        assert drawn == ({30} if top_p == 0.5 else {7, 30})


def draws(sampler: Sampler, logits: torch.Tensor) -> itertools.chain[torch.Tensor]:
    return itertools.chain.from_iterable(sampler.sample(logits) for _ in itertools.count())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(temperature: float) -> None:
    logits = torch.zeros(3, 5)
    logits[1, 2] = torch.nan
    with pytest.raises(NemocError, match="row 1: the model's logits are not finite numbers"):
        Sampler(3, temperature).sample(logits)


def one_by_one(sampler: Sampler, logits: torch.Tensor) -> Iterator[int]:
    """Sampling row by row, written differently: the least p of which the nucleus has that share below."""
    for row, generator in zip(logits, sampler._generators, strict=True):
        scaled = (row.double() - row.double().amax()) / sampler._temperature
        ordered, tokens = scaled.softmax(-1).sort(descending=True, stable=True)
        upto = ordered.cumsum(-1)
        kept = int(((upto - ordered) < sampler._top_p).sum())
        point = torch.rand((), generator=generator, dtype=torch.float64) * upto[kept - 1]
        chosen = int(torch.searchsorted(upto[:kept], point, right=True))
        yield int(tokens[min(chosen, kept - 1)])


@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("vocabulary", [7, 1000])
def test_rows_are_sampled_together_as_one_by_one(top_p: float, vocabulary: int) -> None:
    logits = 3 * torch.randn(5, vocabulary, generator=torch.Generator().manual_seed(1))
    together, alone = (Sampler(5, 0.8, top_p, seed=3) for _ in range(2))
    for turn in range(40):
        found = together.sample(logits + turn)
        assert found.tolist() == list(one_by_one(alone, logits + turn))
    assert found.device.type == "cpu"
