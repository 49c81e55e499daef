"""`nemoc bisect`: the pass, and the change within it, that break a pipeline."""

from pathlib import Path

from nemoc.commands.ir import named_passes, rewritten
from nemoc.ir.ops import own_ops
from nemoc.passes.bisect import Bisect, Culprit, CulpritFound
from nemoc.passes.reproducer import is_reproducer
from nemoc.runtime.files import replacing_directory
from nemoc.targets import resolve_target
from nemoc.terminal import progress, report


def run(
    source: str,
    output: Path,
    quiet: bool,
    *,
    function: str,
    target: str | None,
    pipeline: str | None,
    plugins: tuple[str, ...],
) -> int:
    """Say which pass and change broke its word and write a reproducer, and return 1; 0 when all kept it."""
    name = resolve_target(target)
    passes = named_passes(function, name, pipeline or "preset", plugins)
    console = report()
    try:
        with progress(quiet) as show:
            show("check passes", 0, 0)
            rewritten(source, function, name, passes, Bisect(), plugins=plugins)
    except CulpritFound as found:
        console.print("\n".join(_lines(found.culprit)), soft_wrap=True)
        shown = found.culprit.reproducer
        needed = plugins if own_ops((shown.before, shown.after)) else ()
        named = "".join(f" --plugin {plugin}" for plugin in needed)
        with replacing_directory(output, is_reproducer) as folder:
            shown.save(folder)
        console.print(
            f"{output}: shows it again with `nemoc verify {output}{named}`", soft_wrap=True
        )
        return 1
    console.print(f"{function}: {len(passes)} passes, each does what it declares.")
    return 0


def _lines(culprit: Culprit) -> list[str]:
    run, parted = culprit.run, culprit.divergence
    return [
        f"{run.place}, {culprit.change}",
        f"  declares {run.pass_.effect.value} but changes {parted.result}, expected {parted.allowed}",
        f"  the first value that diverges is {parted.first}",
        f"  reproduce with --pipeline '{run.reproduces}'",
    ]
