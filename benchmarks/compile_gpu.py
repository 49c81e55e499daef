"""How long a model's kernels take to compile for a GPU, which need not be there.

`python -m benchmarks.compile_gpu SOURCE TARGET` makes graphs, launches and machine code twice: with an empty store of
compiled kernels, and with what the first time left in it. Weights are not looked at, so that a preset's name will do.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from nemoc import compiler
from nemoc.codegen.lower import corner_sizes
from nemoc.codegen.storage import bind_weights, weight_layout
from nemoc.codegen.triton.kernel_store import KernelStore
from nemoc.gpu import REPORT, compiled_files, lower_gpu
from nemoc.models import Model, open_model


@click.command()
@click.argument("source")
@click.argument("target")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(source: str, target: str, json_file: Path | None) -> None:
    """Compile SOURCE's kernels for TARGET, cold and warm."""
    found = {"source": source, "target": target} | measure(open_model(source), target)
    click.echo(json.dumps(found, indent=1))
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def measure(model: Model, target: str) -> dict[str, Any]:
    """Seconds with an empty store and with a full one, and what compilers say of the kernels."""
    with tempfile.TemporaryDirectory() as folder:
        store = KernelStore(Path(folder))
        started = time.perf_counter()
        files = _compiled(model, target, store)
        cold = time.perf_counter()
        again = _compiled(model, target, store)
        warm = time.perf_counter()
    if files != again:
        raise click.ClickException(f"{target}: the second time made other files than the first")
    report = json.loads(files[REPORT])
    return {
        "cold_seconds": round(cold - started, 1),
        "warm_seconds": round(warm - cold, 1),
        "kernels": len(report),
        "spilled_bytes": sum(kernel["report"]["spilled"] for kernel in report),
        "most_registers": max(kernel["report"]["registers"] for kernel in report),
    }


def _compiled(model: Model, target: str, store: KernelStore) -> dict[str, bytes | str]:
    """The files of an artifact that hold a model's machine code."""
    found = compiler.functions(model, target)
    graphs, weights = bind_weights(found.graphs)
    corners = corner_sizes(1, compiler.GPU_STEP_TOKENS, 4096)
    program = lower_gpu(graphs, weight_layout(weights), corners, target)
    return compiled_files(program, target, store, None)


if __name__ == "__main__":
    main()
