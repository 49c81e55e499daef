"""Compare nemoc with its peers on one model: `python -m benchmarks.compare --json FILE`.

All engines live in one process and take turns; figures are medians, and what to quote is their ratios. The logits of
all engines are held against each other first, so that nothing wrong is called fast.
"""

import functools
import json
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.checkpoints import random_checkpoint
from benchmarks.peers import Engine, Nemoc, Transformers
from nemoc.autotune.measure import Timing, interleaved, read_bandwidth
from nemoc.measurement import decode_bytes
from nemoc.models import preset
from nemoc.runtime.machine import processor_model


@dataclass(frozen=True)
class Row:
    """One engine's figures in tokens per second, and its error against transformers' logits."""

    engine: str
    first_use_s: float
    prefill: Timing
    decode: Timing
    error: float


@click.command()
@click.option("--preset", "name", default="mid", help="Model preset, with random weights.")
@click.option("--prefill", "length", default=256, help="Prompt tokens.")
@click.option("--decode", "steps", default=16, help="Tokens decoded in one timed run.")
@click.option("--rounds", default=5, help="Timed rounds.")
@click.option("--threads", default=2, help="Threads of every engine.")
@click.option("--compiled/--no-compiled", default=True, help="Include torch.compile.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Where to write the figures.")
def main(
    name: str,
    length: int,
    steps: int,
    rounds: int,
    threads: int,
    compiled: bool,
    out: Path | None,
) -> None:
    """Print a table of engines and write it as JSON."""
    torch.set_num_threads(threads)
    engines, first_use = load_engines(name, length, steps, threads, compiled)
    before = read_bandwidth()
    rows = measure(engines, first_use, name, length, steps, rounds)
    bandwidth = max(before, read_bandwidth())
    ours = engines["nemoc"]
    assert isinstance(ours, Nemoc)
    needed = decode_bytes(ours.executable, length + steps // 2)
    assert needed is not None  # presets have ops of nemoc's alone
    report = _report(rows, length, steps, bandwidth, needed)
    report["command"] = (
        f"python -m benchmarks.compare --preset {name} --prefill {length} --decode {steps} "
        f"--rounds {rounds} --threads {threads}" + ("" if compiled else " --no-compiled")
    )
    _print(report)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")


def load_engines(
    name: str, length: int, steps: int, threads: int, compiled: bool
) -> tuple[dict[str, Engine], dict[str, float]]:
    """The engines, and the seconds from the checkpoint to the first token of each."""
    checkpoint = random_checkpoint(name)
    factories: dict[str, Any] = {
        "transformers": lambda: Transformers(checkpoint, threads),
        "nemoc": lambda: Nemoc(checkpoint, threads, capacity=length + steps + 8),
    }
    if compiled:
        factories["torch.compile"] = lambda: Transformers(checkpoint, threads, compiled=True)
    engines: dict[str, Engine] = {}
    seconds: dict[str, float] = {}
    for engine, make in factories.items():
        start = time.perf_counter()
        engines[engine] = make()
        engines[engine].prefill(prompt(name, length))
        engines[engine].decode(torch.tensor([1]))
        seconds[engine] = time.perf_counter() - start
    return engines, seconds


def prompt(name: str, length: int) -> torch.Tensor:
    """Random tokens int64 [1, length] of a preset's vocabulary."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, preset(name).vocab_size, (1, length), generator=generator)


def measure(
    engines: dict[str, Engine],
    first_use: dict[str, float],
    preset_name: str,
    length: int,
    steps: int,
    rounds: int,
) -> list[Row]:
    """Every engine's figures, taken in turns."""
    ids = prompt(preset_name, length)
    logits = {engine: _logits(e, ids) for engine, e in engines.items()}
    reference = logits["transformers"]
    prefill = interleaved(
        {name: functools.partial(engine.prefill, ids) for name, engine in engines.items()}, rounds
    )
    decode: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        for engine in engines.values():  # every round decodes behind the same prompt
            engine.prefill(ids)
        timings = interleaved(
            {name: functools.partial(_decode, e, steps) for name, e in engines.items()}, 1, warmup=0
        )
        for name, timing in timings.items():
            decode[name].append(timing.median)
    return [
        Row(
            engine,
            first_use.get(engine, 0.0),
            prefill[engine],
            Timing(tuple(decode[engine])),
            float((logits[engine] - reference).norm() / reference.norm()),
        )
        for engine in engines
    ]


def _logits(engine: Engine, ids: torch.Tensor) -> torch.Tensor:
    parts = [engine.prefill(ids)]
    parts.extend(engine.decode(torch.tensor([token])) for token in (5, 7, 11))
    return torch.cat(parts)


def _decode(engine: Engine, steps: int) -> None:
    token = torch.tensor([1])
    for _ in range(steps):
        token = engine.decode(token).argmax(-1)


def _report(
    rows: list[Row], length: int, steps: int, bandwidth: float, needed: float
) -> dict[str, Any]:
    base = next(r for r in rows if r.engine == "transformers")
    return {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "model": processor_model(),
            "read_bandwidth_GBps": round(bandwidth / 1e9, 2),
        },
        "versions": {p: version(p) for p in ("nemoc", "torch", "transformers", "apache-tvm")},
        "decode_bytes": needed,
        "engines": [
            {
                "engine": r.engine,
                "from_checkpoint_to_first_token_s": round(r.first_use_s, 2),
                "prefill_tok_s": round(length / r.prefill.median, 2),
                "prefill_spread": round(r.prefill.spread, 3),
                "prefill_ratio": round(base.prefill.median / r.prefill.median, 3),
                "decode_tok_s": round(steps / r.decode.median, 2),
                "decode_spread": round(r.decode.spread, 3),
                "decode_ratio": round(base.decode.median / r.decode.median, 3),
                "decode_share_of_read_bandwidth": (
                    round(needed * steps / r.decode.median / bandwidth, 3)
                    if r.engine == "nemoc"
                    else None
                ),
                "logits_error_against_transformers": r.error,
            }
            for r in rows
        ],
    }


def _print(report: dict[str, Any]) -> None:
    click.echo(f"{report['machine']}")
    click.echo(f"{'engine':<16}{'prefill tok/s':>16}{'ratio':>8}{'decode tok/s':>16}{'ratio':>8}")
    for row in report["engines"]:
        click.echo(
            f"{row['engine']:<16}{row['prefill_tok_s']:>16.1f}{row['prefill_ratio']:>8.2f}"
            f"{row['decode_tok_s']:>16.1f}{row['decode_ratio']:>8.2f}"
        )


if __name__ == "__main__":
    main()
