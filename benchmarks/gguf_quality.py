"""What llama.cpp makes of GGUF files of the sample model: `python -m benchmarks.gguf_quality --llama-python PATH`.

Files in float32, Q8_0 and NVFP4 by nemoc, and in Q8_0 and Q4_0 by llama.cpp's own quantizer. llama.cpp's logits on text
that the model was not trained on are held against those of nemoc from the unquantized model; and nemoc reads each
quantized file too, which tells what the weights cost from what llama.cpp adds by rounding activations. In float32 both
have to choose the same tokens.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

import nemoc
from benchmarks.quantized import about_llama, plain_file, write_file
from benchmarks.serving import Served
from nemoc.models import Model, open_model
from nemoc.quality import Window, divergence, model_tokenizer, own_text, read_windows

FILES = {
    "Q8_0": ("nemoc", "q8_0"),
    "NVFP4": ("nemoc", "nvfp4"),
    "Q8_0 of llama.cpp": ("llama.cpp", "Q8_0"),
    "Q4_0 of llama.cpp": ("llama.cpp", "Q4_0"),
}
"""Quantized files: who writes each, and the type as the writer calls it."""

PLAIN = "F32"

_PROMPT = 24
"""Tokens of a text that a greedy continuation starts from."""

Run = Callable[[Window], torch.Tensor]
"""Logits float32 [n, V] behind each token of a window but the last."""


@dataclass(frozen=True)
class Distance:
    """How far two runs lie apart on the same text.

    Attributes:
        kl: KL(expected || found) of the next token, in nats: the mean over tokens.
        kl_99: its 99th percentile.
        agreement: the share of tokens after which both hold the same one for likeliest.
        logits_error: ‖found − expected‖ / ‖expected‖.
    """

    kl: float
    kl_99: float
    agreement: float
    logits_error: float

    @classmethod
    def of(cls, expected: torch.Tensor, found: torch.Tensor) -> "Distance":
        """The distance of logits [n, V]."""
        kl = divergence(expected, found)
        return cls(
            float(kl.mean()),
            float(kl.quantile(0.99)),
            float((expected.argmax(-1) == found.argmax(-1)).double().mean()),
            float((found - expected).norm() / expected.norm()),
        )


@click.command()
@click.option("--llama-python", required=True, help="An interpreter that has llama_cpp.")
@click.option("--tokens", default=8192, help="Predicted tokens of held-out text.")
@click.option("--context", default=512, help="Tokens of one piece of text.")
@click.option("--continued", default=64, help="Tokens of a greedy continuation.")
@click.option("--prompts", default=4, help="Texts that are continued.")
@click.option("--threads", default=2, help="Threads of both.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Where to write the figures.")
def main(
    llama_python: str,
    tokens: int,
    context: int,
    continued: int,
    prompts: int,
    threads: int,
    out: Path | None,
) -> None:
    """Print how far llama.cpp's runs lie from nemoc's, and write it as JSON."""
    torch.set_num_threads(threads)
    about, missing = about_llama(llama_python)
    if about is None:
        raise click.UsageError(missing)
    model = open_model("sample")
    windows = read_windows(model_tokenizer(model), own_text(model), context, tokens)
    report: dict[str, Any] = {
        "command": f"python -m benchmarks.gguf_quality --tokens {tokens} --context {context} "
        f"--continued {continued} --prompts {prompts} --threads {threads}",
        "versions": about,
        "tokens": sum(window.tokens for window in windows),
    }
    with tempfile.TemporaryDirectory() as folder:
        report |= measure(model, windows, Path(folder), llama_python, threads, (prompts, continued))
    show(report)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")


def measure(
    model: Model,
    windows: Sequence[Window],
    folder: Path,
    llama_python: str,
    threads: int,
    greedy: tuple[int, int],
) -> dict[str, Any]:
    """All figures.

    Args:
        model: what is written.
        windows: the text.
        folder: where files are made.
        llama_python: the interpreter that has llama-cpp-python.
        threads: of both.
        greedy: how many texts are continued, and by how many tokens.
    """
    context = max(window.tokens for window in windows) + _PROMPT + greedy[1]
    plain = plain_file(model, folder, "f32")
    ours = _nemoc(plain, context)
    expected = _logits(_run_nemoc(ours), windows)
    files = {PLAIN: plain}
    rows = {}
    for name, (writer, type_) in FILES.items():
        files[name] = folder / f"{name.replace(' ', '-')}.gguf"
        write_file(model, files[name], writer, type_, threads, llama_python)
    for name, path in files.items():
        with Served("serve_llama", llama_python) as engine:
            engine.call("open", file=str(path), threads=threads, context=context)
            theirs = _logits(_run_llama(engine, folder), windows)
            rows[name] = {"file_bytes": path.stat().st_size, "llama.cpp": _row(expected, theirs)}
            if name == PLAIN:
                texts = windows[: greedy[0]]
                same = [_continues_equally(engine, ours, text, greedy[1]) for text in texts]
                tokenized = [_tokenizes_equally(engine, ours, text) for text in texts]
        if name != PLAIN:
            read = _logits(_run_nemoc(_nemoc(path, context)), windows)
            rows[name]["nemoc"] = _row(expected, read)
            rows[name]["llama.cpp_against_nemoc"] = _row(read, theirs)
    return {
        "same_tokens_in_f32": {"continued": same, "tokenized": tokenized},
        "files": rows,
    }


def _nemoc(file: Path, context: int) -> nemoc.Executable:
    """The interpreter, in float32: what it computes is the meaning of the file."""
    return nemoc.compile(file, target="reference", dtype="f32", max_context=context)


def _run_nemoc(executable: nemoc.Executable) -> Run:
    def run(window: Window) -> torch.Tensor:
        ids = window.ids[None, :-1]
        return executable.prefill(ids, executable.new_state(), all_logits=True)[0]

    return run


def _run_llama(engine: Served, folder: Path) -> Run:
    def run(window: Window) -> torch.Tensor:
        out = folder / "logits.f32"
        engine.call("logits", ids=window.ids[:-1].tolist(), out=str(out))
        size = out.stat().st_size // 4
        return torch.from_file(str(out), size=size).clone().view(window.tokens, -1)

    return run


def _logits(run: Run, windows: Sequence[Window]) -> torch.Tensor:
    return torch.cat([run(window) for window in windows])


def _row(expected: torch.Tensor, found: torch.Tensor) -> dict[str, float]:
    return dict(vars(Distance.of(expected, found)))


def _continues_equally(
    engine: Served, executable: nemoc.Executable, text: Window, steps: int
) -> bool:
    """Whether both choose the same tokens behind the beginning of a text."""
    ids = text.ids[:_PROMPT]
    engine.call("prefill", ids=ids.tolist())
    state = executable.new_state()
    logits = executable.prefill(ids[None], state)
    chosen = []
    for _ in range(steps):
        chosen.append(int(logits.argmax()))
        logits = executable.decode(logits.argmax(-1), state)
    found: list[int] = engine.call("decode", steps=steps)
    return found == chosen


def _tokenizes_equally(engine: Served, executable: nemoc.Executable, text: Window) -> bool:
    said = executable.tokenizer.decode(text.ids.tolist())
    found: list[int] = engine.call("tokenize", text=said)
    return found == executable.tokenizer.encode(said, special=False)


def show(report: dict[str, Any]) -> None:
    """Print a report."""
    click.echo(f"{report['versions']}, {report['tokens']} tokens of held-out text")
    titles = (f"{title:>14}" for title in ("KL, nats", "99 %", "top-1", "logits error"))
    click.echo(f"{'file':<20}{'run by, against':<30}" + "".join(titles))
    runs = {
        "llama.cpp": "llama.cpp, nemoc F32",
        "nemoc": "nemoc, nemoc F32",
        "llama.cpp_against_nemoc": "llama.cpp, nemoc",
    }
    for name, row in report["files"].items():
        for key, run in runs.items():
            if key in row:
                found = Distance(**row[key])
                click.echo(
                    f"{name:<20}{run:<30}{found.kl:>14.2e}{found.kl_99:>14.2e}"
                    f"{found.agreement:>14.2%}{found.logits_error:>14.2e}"
                )
    same = report["same_tokens_in_f32"]
    click.echo(
        f"in F32: {sum(same['continued'])} of {len(same['continued'])} texts continued equally, "
        f"{sum(same['tokenized'])} of {len(same['tokenized'])} tokenized equally"
    )


if __name__ == "__main__":
    main()
