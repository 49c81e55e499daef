"""Peak anonymous memory of compiling and loading: `python -m benchmarks.memory --json FILE`.

Each measurement is a process of its own, watched from within; mapped files do not count, since the system takes their
pages back when it needs them.
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
import json, sys, threading, time

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

peak, running = [0], [True]

def watch():
    while running[0]:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.005)

thread = threading.Thread(target=watch, daemon=True)
thread.start()
started = time.perf_counter()
{work}
seconds = time.perf_counter() - started
running[0] = False
thread.join()
print(json.dumps({{"peak_bytes": peak[0], "seconds": seconds, "compiler": "tvm" in sys.modules}}))
"""

_COMPILE = "import nemoc; nemoc.compile({source!r}, target='cpu', destination={artifact!r})"
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
