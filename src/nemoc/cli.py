"""The command line: what each command takes. What it does is in `nemoc.commands`.

Commands import their work when they run, so that `nemoc --help` answers at once: it loads neither torch nor a
code generator.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from nemoc import __version__

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Session:
    """What holds for a whole command line.

    Attributes:
        debug: show the traceback of an error.
    """

    debug: bool = False


def _set_debug(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        context.find_root().obj.debug = True


def _find_plugins_here(
    context: click.Context, parameter: click.Parameter, value: tuple[str, ...]
) -> tuple[str, ...]:
    """Let modules in the working directory be plugins; whatever is installed goes first."""
    here = str(Path.cwd())
    if value and here not in sys.path:
        sys.path.append(here)
    return value


_debug = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=_set_debug,
    is_eager=True,
    help="Show the traceback of an error.",
)
_target = click.option(
    "--target",
    metavar="TARGET",
    help="Where the model is to run: see `nemoc targets`. Default: the best this machine can do.",
)
_pipeline = click.option(
    "--pipeline",
    metavar="TEXT",
    help="Passes to run instead of the target's preset, which is called preset in it: see `nemoc passes`.",
)
_plugin = click.option(
    "--plugin",
    "plugins",
    metavar="MODULE",
    multiple=True,
    callback=_find_plugins_here,
    help="A module with passes of your own (its list NEMOC_PASSES). Repeatable.",
)
_dtype = click.option(
    "--dtype",
    metavar="TYPE",
    help="Compute type of activations, f32 or bf16. Default: what keeps the checkpoint's precision.",
)
_QUANTIZE = (
    "Fewer bits: nvfp4 or fp8 (weights), nvfp4-w4a8, nvfp4-w4a4 or fp8-w8a8 (activations too), "
    "fp8-prompts or nvfp4-fp8-prompts (activations of prompts too), as-released (like NVIDIA's "
    "release of the family), or passes. Default: as they are stored."
)
_SCOPE = (
    "What a format is for: all linear layers but the head, those of experts, or what names of "
    "weights begin with."
)
_formats = (
    click.option("--quantize", metavar="FORMAT", help=_QUANTIZE),
    click.option("--scope", metavar="all|experts|REGEX", help=_SCOPE),
)
_quantize = (
    *_formats,
    click.option(
        "--error-budget",
        type=click.FloatRange(min=0.0, min_open=True),
        metavar="X",
        help="Instead: the cheapest format of each weight that keeps KL on calibration text below X; on "
        "GPUs that multiply FP8, prompts' activations in it too as far as X allows.",
    ),
)
_calibration = click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="FILE",
    multiple=True,
    help="Text to measure an error budget, or static scales of activations, on. Repeatable; "
    "sample has some of its own for a budget.",
)
_numerics = click.option(
    "--numerics",
    type=click.Choice(["same", "any"]),
    default="same",
    show_default=True,
    help="Tuned schedules that keep every bit of every result, or any that are right.",
)
_verify_each = click.option(
    "--verify-each",
    is_flag=True,
    help="Hold each pass to what it declares, by running the graphs before and after it.",
)
_function = click.option(
    "--function",
    type=click.Choice(["prefill", "decode"]),
    default="prefill",
    show_default=True,
    help="The step over any number of tokens, or over one.",
)
_quiet = click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
_PAGE = "Also write a page about it, HTML with nothing from the network."
_threads = click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Threads to run on. Default: NEMOC_THREADS, else one per core.",
)
_resident = click.option(
    "--resident",
    is_flag=True,
    help="Copy the weights into huge pages of memory, instead of mapping the file.",
)
_shape = (
    click.option(
        "--batch",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Rows (B) for which --remarks gives numbers.",
    ),
    click.option(
        "--tokens",
        type=click.IntRange(min=1),
        default=256,
        show_default=True,
        help="New tokens of each (L); 1 for decode.",
    ),
    click.option(
        "--cached",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Tokens that each has cached (T).",
    ),
)


_record_file = click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The file of records."
)


def _options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, in the order in which help lists them."""

    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


class _InOrder(click.Group):
    """Lists commands in the order in which this file defines them, which is that of use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="nemoc %(version)s")
@_debug
def nemoc() -> None:
    """Compile Nemotron-3-style hybrid language models: Mamba-2, mixture of experts, attention.

    SOURCE is a Hugging Face directory, a GGUF file, 'sample' (a small trained model that comes with
    nemoc), 'random:PRESET' (random weights) or, where weights are not needed, a preset or a
    config.json.
    """


@nemoc.command(short_help="Compile SOURCE into an artifact.")
@click.argument("source")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The artifact."
)
@_options(_target, *_quantize, _calibration, _dtype, _pipeline, _plugin)
@click.option("--max-batch", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--max-context",
    type=click.IntRange(min=1),
    default=4096,
    show_default=True,
    help="Tokens that a state can hold.",
)
@click.option(
    "--records",
    metavar="FILE|none",
    help="Schedules to take. Default: those that come with nemoc, and what `nemoc tune` found.",
)
@_options(_numerics)
@click.option(
    "--predicted",
    is_flag=True,
    help="Where a kernel has no record, take what those of other shapes predict for it.",
)
@_options(_verify_each, _quiet, _debug)
def compile(source: str, output: Path, quiet: bool, **options: Any) -> None:
    """Compile SOURCE into an artifact, a directory that loads without the compiler."""
    from nemoc.commands import compile

    compile.run(source, output, quiet, options)


@nemoc.command(short_help="Generate text with an artifact.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="The text to continue, or the message with --chat.")
@click.option("-n", "--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0.0),
    default=0.0,
    show_default=True,
    help="0 takes the likeliest token each time.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0.0, max=1.0, min_open=True),
    default=1.0,
    show_default=True,
    help="Sample among the likeliest tokens that make up this probability.",
)
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--chat", is_flag=True, help="Wrap the prompt in the model's chat template.")
@_options(_plugin, _threads, _resident, _quiet, _debug)
def run(artifact: Path, prompt: str, **options: Any) -> None:
    """Generate text with a compiled model, printed as it comes."""
    from nemoc.commands import run

    run.run(artifact, prompt, **options)


@nemoc.command(short_help="Check passes, kernels and model; a table.")
@click.argument("source")
@_options(_target, _dtype, *_formats, _pipeline, _plugin, _quiet, _debug)
def verify(source: str, quiet: bool, **options: Any) -> int:
    """Check each pass, each kernel and the whole model against eager PyTorch; exit 1 on a miss.

    SOURCE may also be an artifact, whose code is held against its own graphs, or a folder that
    `nemoc bisect` wrote, which is replayed.
    """
    from nemoc.commands import verify

    return verify.run(source, quiet, options)


@nemoc.command(short_help="Measure what quantizing costs; a table.")
@click.argument("model")
@click.argument("files", type=click.Path(path_type=Path), nargs=-1)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    metavar="FILES",
    multiple=True,
    help="Text to measure on, in UTF-8; sample has some of its own, which it was not trained on.",
)
@_options(_target)
@click.option("--quantize", metavar="FORMAT", multiple=True, help=f"{_QUANTIZE} Repeatable.")
@click.option("--scope", metavar="all|experts|REGEX", multiple=True, help=f"{_SCOPE} Repeatable.")
@click.option(
    "--error-budget",
    type=click.FloatRange(min=0.0, min_open=True),
    metavar="X",
    multiple=True,
    help="Also the cheapest formats that keep KL on calibration text below X. Repeatable.",
)
@_options(_calibration)
@click.option(
    "--against",
    metavar="SOURCE",
    help="What to compare with. Default: MODEL as it is stored; nothing if it is an artifact.",
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    help="Tokens of a window; each is looked at by itself.",
)
@click.option("--max-tokens", type=click.IntRange(min=1), help="Tokens to measure on, at most.")
@_options(_dtype, _threads, _quiet, _debug)
def eval(model: str, files: tuple[Path, ...], text: tuple[Path, ...], **options: Any) -> None:
    """Measure a model on text: bits per byte, and how far it is from the unquantized one.

    MODEL is a SOURCE or an artifact. Of a source there is a row for each --quantize, one for each
    --scope of a format, and one for each --error-budget; KL and the share of tokens with the same
    likeliest next one are those against --against. FILES may also stand behind the first --text.
    """
    from nemoc.commands import eval

    eval.run(model, (*text, *files), **options)


@nemoc.command(short_help="Find the pass and the change that break a pipeline.")
@click.argument("source")
@_options(_function, _target, _pipeline, _plugin)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default="reproducer",
    show_default=True,
    help="Where to write what shows it again; `nemoc verify` replays it.",
)
@_options(_quiet, _debug)
def bisect(source: str, output: Path, quiet: bool, **options: Any) -> int:
    """Find the first pass that does what it declares not to, and the change that does it; exit 1.

    SOURCE may also be a file of IR text (NAME.ir). The target's own pipeline runs unless --pipeline
    names another. Graphs are run on small random inputs, with the model's weights or, where it has
    none, random ones.
    """
    from nemoc.commands import bisect

    return bisect.run(source, output, quiet, **options)


@nemoc.command(short_help="Measure an artifact: tokens per second, and what takes the time.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--prefill", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--decode", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write JSON there.")
@click.option("--report", "page", type=click.Path(path_type=Path), metavar="FILE", help=_PAGE)
@_options(_plugin, _threads, _resident, _quiet, _debug)
def bench(artifact: Path, **options: Any) -> None:
    """Measure tokens per second of a compiled model, and which kernels take the time.

    Beside each stands which part of the time it had to take by the bandwidth of memory and the
    speed of arithmetic, which are measured in the same run.
    """
    from nemoc.commands import bench

    bench.run(artifact, **options)


@nemoc.command(
    short_help="Find faster schedules for SOURCE: measured here, predicted for absent GPUs."
)
@click.argument("source")
@_options(_target)
@click.option(
    "--budget",
    metavar="TIME",
    default="10m",
    show_default=True,
    help="Wall-clock time of all runs together that tune this: 90s, 10m, 1h.",
)
@_options(_numerics)
@click.option(
    "--prefill",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Tokens of the prompt to tune for.",
)
@click.option(
    "--cached",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Tokens before the one that is decoded.",
)
@click.option(
    "--step",
    "steps",
    type=click.Choice(["prefill", "decode"]),
    multiple=True,
    help="A step to tune for; both unless given.",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Sequences to tune for.",
)
@click.option(
    "--db",
    "journal",
    metavar="FILE|URL",
    help="Journal of trials, or an Optuna storage that several machines share. Default: in the cache.",
)
@click.option(
    "--records",
    type=click.Path(path_type=Path),
    help="File to add results to. Default: in the cache, where `nemoc compile` finds them.",
)
@click.option(
    "--report",
    "page",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help=_PAGE,
)
@click.option("--no-compare", is_flag=True, help="Do not measure the whole model before and after.")
@_options(*_formats, _pipeline, _plugin, _threads, _quiet, _debug)
def tune(source: str, **options: Any) -> None:
    """Find faster schedules for the kernels of SOURCE.

    Every candidate is compiled, checked and timed in a process of its own, and written down as it is
    done: a run that is interrupted or killed goes on where it ended, and one that has spent its
    budget is over at once. `nemoc compile` then takes what was found. Control-C ends the search: what was
    found is kept, and the exit code is 130. Kernels whose turn does not come within the budget are
    left to the next run.

    For a GPU that is not there candidates are compiled and their times predicted, nothing is measured:
    `nemoc compile` takes that with --predicted only.
    """
    from nemoc.commands import tune

    tune.run(source, **options)


@nemoc.group(cls=_InOrder, short_help="List, exchange and remove what tuning found.")
@_debug
def records() -> None:
    """List, exchange and remove what tuning found: the user's records, which `nemoc compile` takes.

    Files of records are JSON, and those of others are read with care; a record counts only for
    exactly its kernel, device and tools.
    """


@records.command("list", short_help="Print records as a table.")
@click.argument("file", type=click.Path(path_type=Path), required=False)
@_debug
def records_list(file: Path | None) -> None:
    """Print the records of FILE; by default all that `nemoc compile` knows here."""
    from nemoc.commands import records

    records.list_(file)


@records.command("export", short_help="Write the user's records to a file.")
@_record_file
@click.option("--device", metavar="NAME", help="Those of one device, as `list` names it.")
@_debug
def records_export(output: Path, device: str | None) -> None:
    """Write the user's records to a file, for other machines of the same kind."""
    from nemoc.commands import records

    records.export(output, device)


@records.command("import", short_help="Add records of a file to the user's.")
@click.argument("file", type=click.Path(path_type=Path))
@_debug
def records_import(file: Path) -> None:
    """Add the records of FILE to the user's; of two for the same the later one counts."""
    from nemoc.commands import records

    records.import_(file)


@records.command("merge", short_help="Write several files of records as one.")
@click.argument("files", type=click.Path(path_type=Path), nargs=-1, required=True)
@_record_file
@_debug
def records_merge(files: tuple[Path, ...], output: Path) -> None:
    """Write the records of FILES to one file; of two for the same the later one counts."""
    from nemoc.commands import records

    records.merge(files, output)


@records.command("prune", short_help="Remove some of the user's records.")
@click.option(
    "--older-than",
    type=click.FloatRange(min=0.0, max=36500.0),
    metavar="DAYS",
    help="Those that were measured longer ago.",
)
@click.option("--not-this-machine", is_flag=True, help="Those of other processors.")
@_debug
def records_prune(older_than: float | None, not_this_machine: bool) -> None:
    """Remove those of the user's records of which anything that is asked for holds."""
    from nemoc.commands import records

    records.prune(older_than, not_this_machine)


@nemoc.command(short_help="Say what an artifact launches, and what that costs.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("-o", "page", type=click.Path(path_type=Path), metavar="FILE", help=_PAGE)
@click.option(
    "--prefill",
    type=click.IntRange(min=1),
    help="Tokens of the prompt for which costs are given. Default: 256, or as many as it takes.",
)
@click.option(
    "--cached",
    type=click.IntRange(min=0),
    help="Tokens before the one that is decoded. Default: the same.",
)
@_options(_debug)
def report(artifact: Path, **options: Any) -> None:
    """Say what the functions of an artifact launch, and what that costs; weights are not looked at.

    Of kernels for a GPU also what compiling said: registers and spilled bytes of a thread, shared
    memory of a program, programs that a multiprocessor holds and what there is too little of for
    more, and matrix instructions. `nemoc bench --report` has times in it.
    """
    from nemoc.commands import report

    report.run(artifact, **options)


@nemoc.command(short_help="Write SOURCE as a checkpoint that others load.")
@click.argument("source")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="The new directory; for gguf the new file.",
)
@click.option(
    "--format",
    type=click.Choice(["modelopt", "compressed-tensors", "gguf"]),
    required=True,
    help="Whose it is to be: of ModelOpt, of compressed-tensors, or of llama.cpp.",
)
@click.option(
    "--scope",
    metavar="all|experts|REGEX",
    default="all",
    show_default=True,
    help="What to quantize: all linear layers but the head, those of experts, or by name.",
)
@click.option(
    "--type",
    type=click.Choice(["nvfp4", "q8_0", "bf16", "f32"]),
    default="nvfp4",
    show_default=True,
    help="Of the matrices in scope; other than nvfp4 for gguf alone.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="FILE",
    multiple=True,
    help="Text to measure activations on: static scales are written, and they are meant to be NVFP4 too. "
    "Repeatable.",
)
@_options(_quiet, _debug)
def quantize(source: str, output: Path, **options: Any) -> None:
    """Write SOURCE as a checkpoint that others load, its linear layers quantized.

    Everything else stays as it is. A REGEX is what names of weights begin with, such as
    layers.1.mixer.experts.up_proj and lm_head.weight.
    """
    from nemoc.commands import quantize

    quantize.run(source, output, **options)


@nemoc.command(short_help="Print SOURCE's graph, or what it costs.")
@click.argument("source")
@click.option("--summary", is_flag=True, help="Layers, parameters, state, closed-form costs.")
@_options(_function, _target, _pipeline, _plugin)
@click.option("--print-after", metavar="PASS|all", help="Print the graph after this pass.")
@click.option(
    "--remarks", is_flag=True, help="Print what each pass did, refused and saved instead."
)
@click.option("--sites", is_flag=True, help="With --remarks: name every site.")
@_options(*_shape, _verify_each, _debug)
def ir(source: str, summary: bool, **options: Any) -> None:
    """Print a model's graph, or what it costs. No weights are needed.

    SOURCE may also be a file of IR text (NAME.ir). The graph is printed as it is built, unless
    --pipeline names passes to run first; 'preset' among them stands for the target's own, which
    --print-after, --remarks and --verify-each run by themselves.
    """
    from nemoc.commands import ir

    ir.run(source, summary, **options)


@nemoc.command(short_help="List the passes, or explain one.")
@click.argument("name", required=False)
@_options(_plugin, _debug)
def passes(name: str | None, plugins: tuple[str, ...]) -> None:
    """List the passes and the pipeline of each target, or explain the pass NAME."""
    from nemoc.commands import passes

    passes.run(name, plugins)


@nemoc.command(short_help="List the targets and what works today.")
@_debug
def targets() -> None:
    """List the targets and what works on this machine today."""
    from nemoc.commands import targets

    targets.run()


@nemoc.command(short_help="Check this machine.")
@_debug
def doctor() -> int:
    """Check this machine: what nemoc needs, what it found, what to do; exit 1 if something is amiss."""
    from nemoc.commands import doctor

    return doctor.run()


@nemoc.command(short_help="Compile, verify and run the sample model.")
@_options(_threads, _quiet, _debug)
def demo(threads: int | None, quiet: bool) -> int:
    """Compile, verify and run the sample model, and compare its speed with eager PyTorch."""
    from nemoc.commands import demo

    return demo.run(threads, quiet)
