"""Quantized models on the CPU next to llama.cpp: `python -m benchmarks.quantized --llama-python PATH --json FILE`.

One model in all formats: nemoc's executables in float32, bf16, FP8 and NVFP4, and llama.cpp on GGUF files of the same
weights. Each engine lives in a process of its own, so that its memory is its own; they take turns, and figures are
medians. Weights start as a GGUF file in float32, from which llama.cpp's own quantizer makes its files; nemoc quantizes
a file in bf16, so that what is not quantized is bf16. Caches of keys and values are float32 in all.

llama.cpp is what llama-cpp-python has (`CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python`, in an environment of
its own). If the interpreter that `--llama-python` names has none, llama.cpp's lines are left out.
"""

import contextlib
import functools
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch

import nemoc
from benchmarks.serving import EngineError, Served
from nemoc.autotune.measure import Timing, interleaved, read_bandwidth
from nemoc.ir import DType, NemocError
from nemoc.models import Model, ModelConfig, open_model, write_gguf
from nemoc.models.gguf_file import read_gguf
from nemoc.models.gguf_writer import GgufType
from nemoc.models.quantize import Written
from nemoc.models.summary import summarize
from nemoc.runtime.machine import processor_model

BASE = "nemoc f32"
"""What all are compared with."""

_NVFP4 = {"nvfp4": "quantize-nvfp4", "nvfp4-w4a8": "quantize-nvfp4{mode=w4a8}"}
"""Formats, and their passes: text may name a second pass, for the head."""

COMPILED: dict[str, tuple[GgufType, str | None, str | None]] = {
    BASE: ("f32", None, None),
    "nemoc bf16": ("bf16", None, None),
    **{f"nemoc {mode}": ("bf16", mode, None) for mode in ("fp8", "nvfp4", "nvfp4-w4a8")},
    **{
        f"nemoc {mode}, head fp8": ("bf16", f"{passes},quantize-fp8{{scope=lm_head}}", None)
        for mode, passes in _NVFP4.items()
    },
    **{f"nemoc {mode}, head too": ("bf16", mode, r"(?!.*\.gate\.)") for mode in _NVFP4},
}
"""nemoc's executables: the file of weights, how it is quantized, and its scope. llama.cpp's files have the head
quantized too, to 6.6 bits in Q4_0's."""

FILES: dict[str, tuple[str, str]] = {
    "llama.cpp Q4_0": ("llama.cpp", "Q4_0"),
    "llama.cpp MXFP4": ("llama.cpp", "MXFP4_MOE"),
    "llama.cpp Q8_0": ("llama.cpp", "Q8_0"),
    "llama.cpp NVFP4": ("nemoc", "nvfp4"),
}
"""llama.cpp's files: who writes them, and the type as the writer calls it. MXFP4 is of experts, other matrices Q8_0."""

FOUR_BITS = ("llama.cpp Q4_0", "llama.cpp MXFP4", "llama.cpp NVFP4")

_COMPARED = 32
"""Tokens of the prompt whose logits are compared."""


@dataclass(frozen=True)
class Sizes:
    """How much is run.

    Attributes:
        prefill: tokens of the prompt.
        decode: tokens of a timed run.
        rounds: timed runs.
        threads: of every engine.
        target: what nemoc compiles for.
    """

    prefill: int
    decode: int
    rounds: int
    threads: int
    target: str = "cpu"

    @property
    def context(self) -> int:
        """Tokens that states have room for: two runs, of which one warms up."""
        return self.prefill + 2 * self.decode + 8


@dataclass(frozen=True)
class Entry:
    """An engine that is ready to be measured.

    Attributes:
        engine: in its process.
        weights: size of its file of weights, in bytes.
        writer: who wrote it.
        bytes_per_token: what decoding a token must move.
        before: the most anonymous memory of its process before the model was opened, in bytes.
        peak: the same until it had run once.
    """

    engine: Served
    weights: int
    writer: str
    bytes_per_token: int | None
    before: int
    peak: int


@click.command()
@click.option("--source", default="random:mid", help="What `nemoc compile` takes.")
@click.option("--prefill", default=256, help="Prompt tokens.")
@click.option("--decode", default=32, help="Tokens decoded in one timed run.")
@click.option("--rounds", default=9, help="Timed rounds.")
@click.option("--threads", default=2, help="Threads of every engine.")
@click.option("--engine", "wanted", multiple=True, help="Only these, as the table names them.")
@click.option("--llama-python", default=sys.executable, help="An interpreter that has llama_cpp.")
@click.option("--work", type=click.Path(path_type=Path), help="Where files are made, and kept.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Where to write the figures.")
def main(
    source: str,
    prefill: int,
    decode: int,
    rounds: int,
    threads: int,
    wanted: tuple[str, ...],
    llama_python: str,
    work: Path | None,
    out: Path | None,
) -> None:
    """Print a table of engines and write it as JSON."""
    torch.set_num_threads(threads)
    sizes = Sizes(prefill, decode, rounds, threads)
    known = (*COMPILED, *FILES)
    if unknown := sorted(set(wanted) - set(known)):
        raise click.UsageError(f"--engine {unknown[0]}: expected one of {', '.join(known)}")
    with contextlib.ExitStack() as stack:
        folder = work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        report = compare(open_model(source), folder, sizes, wanted or known, llama_python)
    report["command"] = (
        f"python -m benchmarks.quantized --source {source} --prefill {prefill} --decode {decode} "
        f"--rounds {rounds} --threads {threads}" + "".join(f" --engine '{w}'" for w in wanted)
    )
    show(report)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")


def compare(
    model: Model, folder: Path, sizes: Sizes, wanted: Sequence[str], llama_python: str
) -> dict[str, Any]:
    """All figures of a model.

    Args:
        model: what is measured.
        folder: where files are made.
        sizes: how much is run.
        wanted: names of engines.
        llama_python: the interpreter that has llama-cpp-python.
    """
    about, missing = about_llama(llama_python)
    names = [name for name in wanted if about is not None or name in COMPILED]
    skipped = {name: missing for name in wanted if name not in names}
    made = make_files(model, folder, sizes, names, llama_python, skipped)
    with contextlib.ExitStack() as stack:
        entries = {}
        for name, path in made.items():
            try:
                entry = _opened(stack, name, path, sizes, model.config, llama_python)
            except EngineError as error:
                skipped[name] = str(error)
            else:
                entries[name] = entry
        rows, bandwidth = measure(entries, sizes, model.config.vocab_size, folder)
    return {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "model": processor_model(),
            "read_bandwidth_GBps": round(bandwidth / 1e9, 2),
        },
        "versions": {p: version(p) for p in ("nemoc", "torch", "apache-tvm")} | (about or {}),
        "batch": 1,
        "kv_cache": "float32",
        "threads": sizes.threads,
        "skipped": skipped,
        "engines": rows,
    }


def about_llama(python: str) -> tuple[dict[str, str] | None, str]:
    """The version of llama.cpp that an interpreter has; or None, and why."""
    with Served("serve_llama", python) as engine:
        try:
            found: dict[str, str] = engine.call("about")
        except EngineError as error:
            return None, f"{python} has no llama.cpp: {error}"
    return found, ""


def make_files(
    model: Model,
    folder: Path,
    sizes: Sizes,
    names: Sequence[str],
    llama_python: str,
    skipped: dict[str, str],
) -> dict[str, Path]:
    """What engines run, by their names: artifacts and GGUF files.

    Args:
        model, folder, sizes, names, llama_python: as for `compare`.
        skipped: told why something cannot be made.
    """
    made = {}
    for name in names:
        path = folder / name.replace(" ", "-")
        click.echo(f"making {name}", err=True)
        try:
            if name in COMPILED:
                start, mode, scope = COMPILED[name]
                nemoc.compile(
                    plain_file(model, folder, start),
                    target=sizes.target,
                    quantize=mode,
                    scope=scope,
                    max_context=sizes.context,
                    threads=sizes.threads,
                    destination=path,
                )
            else:
                write_file(model, path, *FILES[name], sizes.threads, llama_python)
        except (NemocError, EngineError) as error:
            skipped[name] = str(error)
        else:
            made[name] = path
    return made


def plain_file(model: Model, folder: Path, type_: GgufType) -> Path:
    """A GGUF file of all weights in one type, by nemoc; made once."""
    path = folder / f"{type_}.gguf"
    if not path.exists():
        _write(model, path, type_)
    return path


def write_file(
    model: Model, path: Path, writer: str, type_: str, threads: int, llama_python: str
) -> None:
    """A quantized GGUF file, by nemoc or by llama.cpp from one in float32 beside it.

    Raises:
        NemocError, EngineError: the writer has no such type.
    """
    if writer == "nemoc":
        _write(model, path, "nvfp4" if type_ == "nvfp4" else "q8_0")
        return
    source = plain_file(model, path.parent, "f32")
    with Served("serve_llama", llama_python) as engine:
        engine.call("quantize", source=str(source), out=str(path), type=type_, threads=threads)


def _write(model: Model, path: Path, type_: GgufType) -> Written:
    with path.open("wb") as file:
        return write_gguf(model, file, type_)


def _opened(
    stack: contextlib.ExitStack,
    name: str,
    path: Path,
    sizes: Sizes,
    config: ModelConfig,
    llama_python: str,
) -> Entry:
    """An engine that has run once."""
    middle = sizes.prefill + sizes.decode // 2
    if name in COMPILED:
        engine = stack.enter_context(Served("serve_nemoc"))
        engine.call("open", artifact=str(path), threads=sizes.threads)
        needed: int | None = engine.call("bytes_per_token", cached=middle)
        writer, weights = "nemoc", path / "weights.safetensors"
    else:
        engine = stack.enter_context(Served("serve_llama", llama_python))
        engine.call("open", file=str(path), threads=sizes.threads, context=sizes.context)
        needed = file_bytes_per_token(path, config, middle)
        writer, weights = FILES[name][0], path
    engine.call("prefill", ids=prompt(config.vocab_size, sizes.prefill))
    engine.call("decode", steps=2)
    return Entry(engine, weights.stat().st_size, writer, needed, *engine.call("peak"))


def file_bytes_per_token(path: Path, config: ModelConfig, cached: int) -> int:
    """Bytes that decoding a token from a GGUF file must move: weights as stored, state in and out, cache in float32.

    Of experts those count that a token chooses, of embeddings one row.
    """
    tensors = read_gguf(path).tensors
    has_head = "output.weight" in tensors
    total = 0.0
    for name, tensor in tensors.items():
        share = 1.0
        if "_exps." in name:
            share = config.num_experts_per_tok / config.n_routed_experts
        elif name == "token_embd.weight" and has_head:
            share = 1 / config.vocab_size
        total += share * tensor.bytes
    return round(total + float(summarize(config, DType.F32).decode.at(1, 1, cached).state))


def prompt(vocab: int, length: int) -> list[int]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(1)
    found: list[int] = torch.randint(3, vocab, (length,), generator=generator).tolist()
    return found


def measure(
    entries: Mapping[str, Entry], sizes: Sizes, vocab: int, folder: Path
) -> tuple[list[dict[str, Any]], float]:
    """Every engine's figures, taken in turns, and bytes per second that were read from memory before or after."""
    ids = prompt(vocab, sizes.prefill)
    logits = {name: _logits(e.engine, ids[:_COMPARED], folder) for name, e in entries.items()}
    before = read_bandwidth()
    prefill = interleaved(
        {n: functools.partial(e.engine.call, "prefill", ids=ids) for n, e in entries.items()},
        sizes.rounds,
    )
    decode = _decode_times(entries, ids, sizes)
    bandwidth = max(before, read_bandwidth())
    rows = []
    for name, entry in entries.items():
        per_token = decode[name].median / sizes.decode
        share = None
        if entry.bytes_per_token is not None:
            share = round(entry.bytes_per_token / per_token / bandwidth, 3)
        rows.append(
            {
                "engine": name,
                "weights_written_by": entry.writer,
                "weights_bytes": entry.weights,
                "anonymous_bytes_before_the_model": entry.before,
                "peak_anonymous_bytes": entry.peak,
                "prefill_tok_s": round(sizes.prefill / prefill[name].median, 2),
                "prefill_spread": round(prefill[name].spread, 3),
                "decode_tok_s": round(1 / per_token, 2),
                "decode_spread": round(decode[name].spread, 3),
                "decode_bytes_per_token": entry.bytes_per_token,
                "decode_share_of_read_bandwidth": share,
                **_ratios(name, prefill, decode),
                "logits_error": _error(logits[name], logits.get(BASE)),
            }
        )
    return rows, bandwidth


def _decode_times(entries: Mapping[str, Entry], ids: list[int], sizes: Sizes) -> dict[str, Timing]:
    """Seconds of each run of decoding; every round decodes behind the same prompt."""
    seconds: dict[str, list[float]] = {name: [] for name in entries}
    runs = {
        name: functools.partial(entry.engine.call, "decode", steps=sizes.decode)
        for name, entry in entries.items()
    }
    for number in range(sizes.rounds):
        for entry in entries.values():
            entry.engine.call("prefill", ids=ids)
        for name, timing in interleaved(runs, 1, warmup=1 if number == 0 else 0).items():
            seconds[name].append(timing.median)
    return {name: Timing(tuple(found)) for name, found in seconds.items()}


def _ratios(
    name: str, prefill: Mapping[str, Timing], decode: Mapping[str, Timing]
) -> dict[str, float | None]:
    """How many times as fast as the base, and as the fastest of llama.cpp's in four bits: the median over rounds."""
    fours = [other for other in FOUR_BITS if other in decode]
    best = min(fours, key=lambda other: decode[other].median, default=None)
    return {
        "prefill_ratio": _ratio(name, BASE, prefill),
        "decode_ratio": _ratio(name, BASE, decode),
        "decode_ratio_to_llama_cpp": _ratio(name, best, decode),
    }


def _ratio(name: str, base: str | None, timings: Mapping[str, Timing]) -> float | None:
    if base is None or base not in timings:
        return None
    pairs = zip(timings[base].seconds, timings[name].seconds, strict=True)
    return round(statistics.median(theirs / own for theirs, own in pairs), 3)


def _logits(engine: Served, ids: list[int], folder: Path) -> torch.Tensor:
    """float32 [L · V]."""
    out = folder / "logits.f32"
    engine.call("logits", ids=ids, out=str(out))
    return torch.from_file(str(out), size=out.stat().st_size // 4, dtype=torch.float32).clone()


def _error(found: torch.Tensor, expected: torch.Tensor | None) -> float | None:
    if expected is None:
        return None
    return float((found - expected).norm() / expected.norm())


def show(report: Mapping[str, Any]) -> None:
    """Print a report as a table."""
    click.echo(f"{report['machine']}")
    click.echo(f"{report['versions']}")
    click.echo("".join(f"{title:>{width}}" for title, width in _titles()))
    for row in report["engines"]:
        click.echo("".join(_cells(row)))
    for name, reason in report["skipped"].items():
        click.echo(f"{name}: left out: {reason}")


def _titles() -> Iterator[tuple[str, int]]:
    yield from (("engine", 22), ("prefill tok/s", 16), ("decode tok/s", 16), ("ratio", 8))
    yield from (("to llama.cpp", 14), ("MB a token", 12), ("bandwidth", 11))
    yield from (("weights MB", 12), ("anonymous MB: before", 22), ("peak", 8), ("error", 10))


def _cells(row: Mapping[str, Any]) -> Iterator[str]:
    def number(key: str, width: int, form: str, factor: float = 1.0) -> str:
        value = row[key]
        return f"{'-' if value is None else format(value * factor, form):>{width}}"

    yield f"{row['engine']:>22}"
    yield number("prefill_tok_s", 10, ".1f") + f" ±{row['prefill_spread']:4.0%}"
    yield number("decode_tok_s", 10, ".1f") + f" ±{row['decode_spread']:4.0%}"
    yield number("decode_ratio", 8, ".2f") + number("decode_ratio_to_llama_cpp", 14, ".2f")
    yield number("decode_bytes_per_token", 12, ".1f", 1e-6)
    yield number("decode_share_of_read_bandwidth", 11, ".0%")
    yield number("weights_bytes", 12, ".0f", 1e-6)
    yield number("anonymous_bytes_before_the_model", 22, ".0f", 1e-6)
    yield number("peak_anonymous_bytes", 8, ".0f", 1e-6)
    yield number("logits_error", 10, ".1e")


if __name__ == "__main__":
    main()
