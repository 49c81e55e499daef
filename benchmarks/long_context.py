"""Long contexts on the sample model: `python -m benchmarks.long_context --json FILE`.

Two models: the sample model, and what is left of it without its attention layers, whose state does not grow. Of both:
prefill of a long text in chunks, with the memory it takes; the states that chunks of different sizes lead to; and the
time of a decoded token behind contexts of different lengths. The figures are about time and memory: neither model was
trained on such lengths.
"""

import itertools
import json
import multiprocessing
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch

import nemoc
from benchmarks.watch import AnonymousPeak
from nemoc import compiler
from nemoc.autotune.measure import interleaved, read_bandwidth
from nemoc.ir.params import ParameterSource
from nemoc.ir.types import TensorType
from nemoc.models import Model, open_model
from nemoc.models.sample import CHECKPOINT
from nemoc.models.sample.corpus import HELD_OUT
from nemoc.runtime.tokenizer import Tokenizer

PLAIN, WHOLE = "without_attention", "with_attention"
"""What reports call the two models."""

SHORT = 1024
"""The context that longer ones are compared with, in tokens."""

_ROOM = 256
"""Tokens for which states have room behind their context; timed runs decode no more and start over."""

CACHES = (".k", ".v")
"""How the names of states end that hold keys and values."""


@dataclass(frozen=True)
class _Renumbered:
    """A parameter source for a model with some of another's layers.

    Attributes:
        source: the other model's weights.
        kept: the number there of each layer here.
    """

    source: ParameterSource
    kept: tuple[int, ...]

    def type_of(self, name: str) -> TensorType:
        return self.source.type_of(self._original(name))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return self.source.read(self._original(name), start, stop)

    def _original(self, name: str) -> str:
        match name.split("."):
            case ["layers", number, *rest]:
                return ".".join(["layers", str(self.kept[int(number)]), *rest])
        return name


def sample_model(context: int, attention: bool = True) -> Model:
    """The sample model for contexts of so many tokens, with or without its attention layers."""
    model = open_model("sample")
    config = replace(model.config, max_position_embeddings=context)
    if attention:
        return replace(model, config=config)
    assert model.parameters is not None
    kept = tuple(i for i, kind in enumerate(config.layers) if kind != "attention")
    config = replace(
        config,
        layers=tuple(config.layers[i] for i in kept),
        num_attention_heads=0,
        num_key_value_heads=0,
        head_dim=0,
    )
    name = f"{model.name} without attention"
    return replace(model, name=name, config=config, parameters=_Renumbered(model.parameters, kept))


def compile_sample(
    context: int,
    attention: bool = True,
    step_tokens: int = compiler.STEP_TOKENS,
    destination: Path | None = None,
    target: str = "cpu",
    threads: int | None = None,
) -> nemoc.Executable:
    """Compile `sample_model`; a prefill step takes at most `step_tokens` tokens."""
    with mock.patch.object(compiler, "STEP_TOKENS", step_tokens):
        return nemoc.compile(
            sample_model(context, attention),
            target=target,
            max_context=context,
            threads=threads,
            destination=destination,
        )


def text_tokens(count: int) -> torch.Tensor:
    """Tokens int64 [1, count] of Python's library modules that the model was not trained on, over and over."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = (library / name for name in HELD_OUT)
    text = "".join(path.read_text("utf-8") for path in files if path.is_file())
    ids = Tokenizer.open(CHECKPOINT).encode(text, special=False)
    return torch.tensor(ids).repeat(-(-count // len(ids)))[:count].unsqueeze(0)


def filled_state(executable: nemoc.Executable, length: int, room: int, seed: int) -> nemoc.State:
    """A state as behind `length` tokens, with caches of normal random rows, and room for `room` more."""
    random = torch.Generator().manual_seed(seed)
    state = executable.new_state(capacity=length + room)
    for name, tensor in state.tensors.items():
        if name.endswith(CACHES):
            tensor[:, :length].normal_(generator=random)
    state.lengths.fill_(length)
    return state


def state_errors(found: nemoc.State, expected: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """‖found − expected‖ / ‖expected‖ of every tensor of a state, as far as tokens fill its caches.

    Raises:
        ValueError: the lengths differ.
    """
    if not torch.equal(found.lengths, expected["lengths"]):
        raise ValueError(f"lengths {found.lengths.tolist()} and {expected['lengths'].tolist()}")
    length = int(found.lengths.max())
    errors = {}
    for name, tensor in found.tensors.items():
        if name == "lengths":
            continue
        a, b = tensor, expected[name]
        if name.endswith(CACHES):
            a, b = a[:, :length], b[:, :length]
        errors[name] = relative_error(a, b)
    return errors


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def measure_prefill(artifact: Path, tokens: int, threads: int | None = None) -> dict[str, Any]:
    """Take in `tokens` tokens of text in a process of its own: the time, and the anonymous memory of that process.

    The state is written beside the artifact, as `state_file` says.
    """
    text = artifact.with_name(f"{artifact.stem}-{tokens}.text")
    text.write_bytes(text_tokens(tokens).numpy().tobytes())
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_prefill, artifact, text, tokens, threads).result()


def _prefill(artifact: Path, text: Path, tokens: int, threads: int | None) -> dict[str, Any]:
    """The process of `measure_prefill`; the text is mapped, so that it counts only where it is copied."""
    with AnonymousPeak() as peak:
        executable = nemoc.load(artifact, threads=threads)
        ids = torch.from_file(str(text), size=tokens, dtype=torch.int64).unsqueeze(0)
        state = executable.new_state(capacity=tokens + _ROOM)
        start = time.perf_counter()
        executable.prefill(ids, state)
        seconds = time.perf_counter() - start
    state.save(state_file(artifact, tokens))
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tok_s": tokens / seconds,
        "peak_bytes": peak.bytes,
        "state_bytes": state.bytes,
    }


def state_file(artifact: Path, tokens: int) -> Path:
    """Where `measure_prefill` leaves its state."""
    return artifact.with_name(f"{artifact.stem}-{tokens}.state")


def decode_times(
    executable: nemoc.Executable, states: Mapping[int, nemoc.State], steps: int, rounds: int
) -> list[dict[str, Any]]:
    """Seconds per token behind each context, taken in turns; every run of `steps` tokens starts from its state.

    Args:
        executable: of all the states.
        states: by tokens of their context. Each ends with the last run's tokens in it.
        steps: tokens of one timed run, at most `_ROOM`.
        rounds: timed runs of each.
    """

    def run(length: int) -> Callable[[], None]:
        def decode() -> None:
            state = states[length]
            state.lengths.fill_(length)
            token = torch.tensor([5])
            for _ in range(steps):
                token = executable.decode(token, state).argmax(-1)

        return decode

    timings = interleaved({str(length): run(length) for length in states}, rounds, warmup=2)
    return [
        {
            "context": length,
            "cache_bytes": cache_bytes(states[length], length + steps // 2),
            "us_per_token": timings[str(length)].median / steps * 1e6,
            "spread": timings[str(length)].spread,
        }
        for length in states
    ]


def cache_bytes(state: nemoc.State, tokens: int) -> int:
    """Bytes of keys and values of that many tokens: what attention reads to decode one more."""
    caches = [t for name, t in state.tensors.items() if name.endswith(CACHES)]
    return sum(t[:, :1].numel() * t.element_size() for t in caches) * tokens


def agreement(
    tokens: int, attention: bool, steps: Sequence[int], threads: int | None
) -> list[dict[str, Any]]:
    """The states and logits behind a text, for prefill steps of several sizes, against those of a single step."""
    ids = text_tokens(tokens)

    def run(step_tokens: int) -> tuple[nemoc.State, torch.Tensor, float]:
        executable = compile_sample(tokens, attention, step_tokens, threads=threads)
        state = executable.new_state(capacity=tokens)
        start = time.perf_counter()
        logits = executable.prefill(ids, state)
        return state, logits, time.perf_counter() - start

    whole, logits, seconds = run(tokens)
    rows: list[dict[str, Any]] = [{"step_tokens": tokens, "tok_s": tokens / seconds}]
    for size in steps:
        state, found, seconds = run(size)
        errors = state_errors(state, whole.tensors)
        worst = max(errors, key=lambda name: errors[name])
        rows.append(
            {
                "step_tokens": size,
                "tok_s": tokens / seconds,
                "worst_state": worst,
                "state_error": errors[worst],
                "logits_error": relative_error(found, logits),
                "errors": errors,
            }
        )
    return rows


@click.command()
@click.option("--tokens", default=1 << 20, help="Longest context without attention.")
@click.option("--attention-tokens", default=1 << 16, help="Longest context with attention.")
@click.option("--agree-tokens", default=1 << 16, help="Context at which states are compared.")
@click.option("--steps", default=64, type=click.IntRange(1, _ROOM), help="Tokens of a timed run.")
@click.option("--rounds", default=7, help="Timed rounds of decoding.")
@click.option("--threads", default=2, help="Threads of the executables.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Where to write the figures.")
def main(
    tokens: int,
    attention_tokens: int,
    agree_tokens: int,
    steps: int,
    rounds: int,
    threads: int,
    out: Path | None,
) -> None:
    """Prefill, compare and decode at great length."""
    torch.set_num_threads(threads)
    report: dict[str, Any] = {
        "command": f"python -m benchmarks.long_context --tokens {tokens} "
        f"--attention-tokens {attention_tokens} --agree-tokens {agree_tokens} --steps {steps} "
        f"--rounds {rounds} --threads {threads}",
    }
    with tempfile.TemporaryDirectory() as folder:
        plain, whole = (Path(folder, f"{name}.nemoc") for name in (PLAIN, WHOLE))
        compile_sample(tokens + _ROOM, False, destination=plain, threads=threads)
        compile_sample(attention_tokens + _ROOM, destination=whole, threads=threads)
        report["prefill"] = {
            PLAIN: _prefills(plain, tokens, threads),
            WHOLE: _prefills(whole, attention_tokens, threads),
        }
        report["read_bandwidth_GBps"] = read_bandwidth() / 1e9
        report["decode"] = {
            PLAIN: _decode_behind_text(plain, tokens, steps, rounds, threads),
            WHOLE: _decode_behind_random(whole, attention_tokens, steps, rounds, threads),
        }
    _print_decode(report["decode"], report["read_bandwidth_GBps"])
    report["agreement"] = {}
    for name in (PLAIN, WHOLE):
        rows = agreement(agree_tokens, name == WHOLE, _step_sizes(agree_tokens), threads)
        report["agreement"][name] = rows
        _print_agreement(name, agree_tokens, rows)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")


def _step_sizes(tokens: int) -> list[int]:
    """Sizes of prefill steps to compare with a single one: the default, and sixteen times as much."""
    return [n for n in (compiler.STEP_TOKENS, 16 * compiler.STEP_TOKENS) if n < tokens]


def _lengths(longest: int) -> Iterator[int]:
    """Contexts from the short one to the longest, each 4 times the one before."""
    yield from itertools.takewhile(lambda n: n < longest, (SHORT * 4**i for i in itertools.count()))
    yield longest


def _prefills(artifact: Path, longest: int, threads: int) -> list[dict[str, Any]]:
    """Prefill of a short text, of a sixteenth of the longest one, and of all of it."""
    rows = []
    for tokens in sorted({SHORT, longest // 16, longest}):
        row = measure_prefill(artifact, tokens, threads)
        rows.append(row)
        click.echo(
            f"{artifact.stem}: prefill of {tokens} tokens: {row['tok_s']:.0f} tok/s, "
            f"peak {row['peak_bytes'] / 1e6:.0f} MB anonymous, "
            f"{row['state_bytes'] / 1e6:.1f} MB of it state"
        )
    return rows


def _decode_behind_text(
    artifact: Path, longest: int, steps: int, rounds: int, threads: int
) -> list[dict[str, Any]]:
    """Decoding from the states that `_prefills` left."""
    executable = nemoc.load(artifact, threads=threads)
    states = {n: executable.load_state(state_file(artifact, n)) for n in (SHORT, longest)}
    return decode_times(executable, states, steps, rounds)


def _decode_behind_random(
    artifact: Path, longest: int, steps: int, rounds: int, threads: int
) -> list[dict[str, Any]]:
    """Decoding behind caches of random rows."""
    executable = nemoc.load(artifact, threads=threads)
    states = {n: filled_state(executable, n, _ROOM, seed=0) for n in _lengths(longest)}
    return decode_times(executable, states, steps, rounds)


def _print_decode(decode: Mapping[str, list[dict[str, Any]]], bandwidth: float) -> None:
    """Each context beside the shortest; what the cache costs, as bytes per second that it is read with."""
    for name, rows in decode.items():
        base = rows[0]
        for row in rows:
            more = row["us_per_token"] - base["us_per_token"]
            read = (row["cache_bytes"] - base["cache_bytes"]) / 1e3
            rate = f", cache read at {read / more:.1f} GB/s" if read > 0 and more > 0 else ""
            click.echo(
                f"{name}: decode behind {row['context']} tokens: {row['us_per_token']:.0f} us "
                f"± {row['spread']:.0%}, {row['us_per_token'] / base['us_per_token']:.2f} times "
                f"that behind {base['context']}{rate}"
            )
    click.echo(f"reading memory: {bandwidth:.1f} GB/s")


def _print_agreement(name: str, tokens: int, rows: Sequence[Mapping[str, Any]]) -> None:
    click.echo(f"{name}: {tokens} tokens in one step: {rows[0]['tok_s']:.0f} tok/s")
    for row in rows[1:]:
        click.echo(
            f"{name}: in steps of {row['step_tokens']}: {row['tok_s']:.0f} tok/s, "
            f"largest error of a state {row['state_error']:.1e} ({row['worst_state']}), "
            f"of the last logits {row['logits_error']:.1e}"
        )


if __name__ == "__main__":
    main()
