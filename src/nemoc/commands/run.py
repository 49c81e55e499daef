"""`nemoc run`: text from an artifact, printed as it comes."""

import sys
import time
from pathlib import Path

import click
import torch

from nemoc.compiler import load
from nemoc.ir import NemocError
from nemoc.runtime import Tokenizer
from nemoc.terminal import progress


def run(
    artifact: Path,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    chat: bool,
    threads: int | None,
    resident: bool,
    plugins: tuple[str, ...],
    quiet: bool,
) -> None:
    """Print the prompt and what follows it; of a chat the answer alone."""
    with progress(quiet) as show:
        executable = load(artifact, threads, resident, show, plugins=plugins)
    ids = _encode(executable.tokenizer, prompt, chat)
    steps = executable.stream(ids, max_new_tokens, temperature, top_p, seed)
    if not chat:
        click.echo(prompt, nl=False)
    started, count = time.perf_counter(), 0
    pieces = executable.tokenizer.detokenizer()
    for tokens in steps:
        click.echo(pieces.push(int(tokens[0])), nl=False)
        count += 1
    click.echo(pieces.finish())
    if not quiet:
        rate = count / (time.perf_counter() - started)
        print(f"  {count} tokens, {rate:.0f} tokens/s with the prompt's", file=sys.stderr)


def _encode(tokenizer: Tokenizer, prompt: str, chat: bool) -> torch.Tensor:
    if not prompt:
        raise NemocError("--prompt: found nothing, expected some text")
    if chat:
        text = tokenizer.chat([{"role": "user", "content": prompt}])
        ids = tokenizer.encode(text, special=False)
    else:
        ids = tokenizer.encode(prompt)
    return torch.tensor([ids])
