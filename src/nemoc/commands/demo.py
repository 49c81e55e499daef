"""`nemoc demo`: the whole of nemoc on the model that comes with it, in a minute or two."""

import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.text import Text

from nemoc.autotune.measure import interleaved
from nemoc.commands.verify import number, print_rows
from nemoc.compiler import compile
from nemoc.models import Model, eager_reference, open_model
from nemoc.models.reference import Cache, NemotronH
from nemoc.options import read_options
from nemoc.runtime import Executable
from nemoc.targets import default_target
from nemoc.terminal import (
    GOOD,
    count,
    duration,
    heading,
    print_table,
    progress,
    report,
    short,
    verdict,
)
from nemoc.verification import VerifyReport, verify_model

_PROMPTS = ('def read_config(path):\n    """Read', "class Stack:\n    def __init__(self,")
_NEW_TOKENS, _TEMPERATURE, _TOP_P, _SEED = 64, 0.8, 0.9, 1
_PREFILL, _DECODE, _ROUNDS = 256, 64, 9
_REPEAT = 8
"""Prompts in one timed run: long beside the moment in which one engine's threads give way to the other's."""

_NOISY = 0.2
"""Half the distance between the quartiles, relative to the median, beyond which a machine counts as busy."""


def run(threads: int | None, quiet: bool) -> int:
    """Print the report; 1 when a check missed its bound."""
    started = time.perf_counter()
    model, target, console = open_model("sample"), default_target(), report()
    _print_model(console, model)
    compiling = time.perf_counter()
    with progress(quiet) as show:
        executable = compile(model, target, max_batch=2, threads=threads, progress=show)
    _print_artifact(console, executable, time.perf_counter() - compiling)
    with progress(quiet) as show:
        found = verify_model("sample", target, executable=executable, progress=show)
    _print_checks(console, found)
    _print_texts(console, executable)
    _print_speed(console, executable, model, threads)
    console.print(f"\nAll of it took {duration(time.perf_counter() - started)}.")
    return 0 if found.ok else 1


def _print_model(console: Console, model: Model) -> None:
    config, graph = model.config, model.build_step()
    elements = sum(int(param.type.elements) for param in graph.params)
    console.print("The sample model", style="bold")
    console.print(
        f"  {count(elements)} parameters, {len(config.layers)} layers {config.pattern} "
        "(M Mamba-2, E experts, * attention),\n"
        "  trained on the sources of Python's standard library"
    )


def _print_artifact(console: Console, executable: Executable, seconds: float) -> None:
    heading(console, f"Compiled for {executable.program.target} in {duration(seconds)}")
    files = [file for file in executable.folder.rglob("*") if file.is_file()]
    size = short(sum(file.stat().st_size for file in files), "B")
    console.print(f"  an artifact of {len(files)} files, {size}; it loads without the compiler")


def _print_checks(console: Console, found: VerifyReport) -> None:
    print_rows(console, "pass", found.rows)
    kernels = [row for row in found.rows if row.kind == "kernel"]
    if kernels:
        worst = max(kernels, key=lambda row: row.error / row.bound if row.bound else row.error)
        held = verdict(all(row.ok for row in kernels)).plain
        heading(console, "Kernels: generated code against the ops it stands for")
        console.print(
            f"{len(kernels)} distinct kernels, each on poisoned buffers: {held}; the worst is\n"
            f"{worst.name}, relative error {number(worst.error)}, bound {number(worst.bound)}"
        )
    print_rows(console, "model", found.rows)


def _print_texts(console: Console, executable: Executable) -> None:
    how = f"temperature {_TEMPERATURE}, top-p {_TOP_P}, seed {_SEED}"
    heading(console, f"What it writes behind two prompts ({how})")
    tokenizer = executable.tokenizer
    for prompt in _PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        tokens = executable.generate(ids, _NEW_TOKENS, _TEMPERATURE, _TOP_P, _SEED)
        whole = Text(prompt)
        whole.append(tokenizer.decode(tokens[0].tolist()).rstrip(), GOOD)
        console.print()
        for line in whole.split("\n"):
            console.print(Text("    ") + line)


def _print_speed(
    console: Console, executable: Executable, model: Model, threads: int | None
) -> None:
    if (wanted := threads or read_options().threads) is not None:
        torch.set_num_threads(wanted)
    eager = eager_reference(model)
    ids = torch.randint(
        0, model.config.vocab_size, (1, _PREFILL), generator=torch.Generator().manual_seed(0)
    )
    rows, spreads = [], []
    for name, tokens, candidates in (
        (f"prefill of {_PREFILL} tokens", _REPEAT * _PREFILL, _prefills(executable, eager, ids)),
        (f"decode of {_DECODE} tokens", _DECODE, _decodes(executable, eager, ids[:, :_DECODE])),
    ):
        times = interleaved(candidates, _ROUNDS)
        ours, theirs = times["nemoc"], times["eager"]
        spreads += [ours.spread, theirs.spread]
        rows.append(
            (
                name,
                f"{tokens / ours.median:.0f} ± {ours.spread:.0%}",
                f"{tokens / theirs.median:.0f} ± {theirs.spread:.0%}",
                f"{theirs.median / ours.median:.1f}x",
            )
        )
    heading(console, f"Speed in tokens/s, batch 1, {torch.get_num_threads()} threads")
    print_table(console, ("", ">nemoc", ">eager PyTorch", ">ratio"), rows)
    console.print(f"medians of {_ROUNDS} interleaved rounds, float32 arithmetic in both")
    if max(spreads) > _NOISY:
        console.print("the spread is large: this machine is busy, and the ratios are rough")


def _prefills(
    executable: Executable, eager: NemotronH, ids: torch.Tensor
) -> dict[str, Callable[[], object]]:
    def ours() -> None:
        for _ in range(_REPEAT):
            executable.prefill(ids, executable.new_state())

    @torch.inference_mode()
    def theirs() -> None:
        for _ in range(_REPEAT):
            eager.lm_head(eager.hidden_states(ids, Cache())[:, -1])

    return {"nemoc": ours, "eager": theirs}


def _decodes(
    executable: Executable, eager: NemotronH, ids: torch.Tensor
) -> dict[str, Callable[[], object]]:
    def ours() -> None:
        state = executable.new_state()
        for token in ids[0]:
            executable.decode(token[None], state)

    @torch.inference_mode()
    def theirs() -> None:
        cache = Cache()
        for token in ids[0]:
            eager(token[None, None], cache)

    return {"nemoc": ours, "eager": theirs}
