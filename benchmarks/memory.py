"""Peak anonymous memory of compiling and loading: `python -m benchmarks.memory --json FILE`.

Each measurement is a process of its own, watched from within.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from benchmarks.checkpoints import random_checkpoint

_WATCH = """
import json, sys, time
from benchmarks.watch import AnonymousPeak

started = time.perf_counter()
with AnonymousPeak("start") as peak:
{work}
print(json.dumps({{
    "peak_bytes": peak.bytes,
    "stages": peak.stages,
    "seconds": time.perf_counter() - started,
    "compiler": "tvm" in sys.modules,
}}))
"""

_COMPILE = """
    import nemoc

    def enter(stage, done, total):
        peak.stage = stage

    nemoc.compile({source!r}, target="cpu", destination={artifact!r}, progress=enter)
"""
_LOAD = """
    import torch, nemoc
    executable = nemoc.load({artifact!r})
    executable.decode(torch.tensor([1]), executable.new_state(capacity=64))
"""


@click.command()
@click.option("--preset", default="mid", help="Model preset, with random weights.")
@click.option("--layers", type=int, help="Repeat or cut the preset to so many layers.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Where to write the figures.")
def main(preset: str, layers: int | None, out: Path | None) -> None:
    """Compile a preset from its checkpoint, then load it and decode one token."""
    source = str(random_checkpoint(preset, layers=layers))
    with tempfile.TemporaryDirectory() as folder:
        artifact = str(Path(folder) / "model.nemoc")
        report: dict[str, Any] = {
            "command": f"python -m benchmarks.memory --preset {preset}"
            + ("" if layers is None else f" --layers {layers}"),
            "compile": _run(_COMPILE.format(source=source, artifact=artifact)),
            "load": _run(_LOAD.format(artifact=artifact)),
        }
    for name in ("compile", "load"):
        row = report[name]
        click.echo(f"{name}: {row['peak_bytes'] / 1e6:.0f} MB anonymous, {row['seconds']:.1f} s")
        for stage, peak in row["stages"].items():
            click.echo(f"  {stage}: {peak / 1e6:.0f} MB")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")


def _run(work: str) -> dict[str, Any]:
    command = [sys.executable, "-c", _WATCH.format(work=work)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
