"""Stands in for llama.cpp behind `benchmarks.serving`: a script that is run where an interpreter is expected."""

import shutil
import sys
import time
from array import array
from pathlib import Path

from benchmarks.serving import serve

VOCABULARY = 97
"""Tokens of the models that it pretends to run: `support.checkpoints.BASE`'s."""

NAME = "llama.cpp's stand-in"


class FakeLlama:
    """Copies where it should quantize, and finds token 1 the likeliest."""

    def about(self) -> dict[str, str]:
        """What it is."""
        return {"llama-cpp-python": NAME}

    def quantize(self, source: str, out: str, type: str, threads: int) -> None:
        """Copy a file; it knows no MXFP4."""
        if type.startswith("MXFP4"):
            raise ValueError(f"quantizing to {type} failed")
        shutil.copy(source, out)

    def open(self, file: str, threads: int, context: int) -> None:
        """Look whether a file is there."""
        self._magic = Path(file).read_bytes()[:4]

    def prefill(self, ids: list[int]) -> None:
        """Take some time."""
        time.sleep(0.002)

    def decode(self, steps: int) -> list[int]:
        """Take some time for each token."""
        time.sleep(0.001 * steps)
        return [1] * steps

    def logits(self, ids: list[int], out: str) -> None:
        """Ones everywhere."""
        with open(out, "wb") as file:
            array("f", [1.0] * (len(ids) * VOCABULARY)).tofile(file)

    def hold(self, size: int) -> None:
        """Keep so many bytes for long enough to be seen."""
        self._held = b"x" * size
        time.sleep(0.05)

    def leave(self) -> None:
        """End the process as a crash does."""
        print("a last word", file=sys.stderr, flush=True)
        sys.stdin.close()
        raise SystemExit(3)


def write_interpreter(path: Path) -> Path:
    """Write a script that runs this whatever it is asked to run."""
    root = Path(__file__).parents[2]
    path.write_text(f"#!/bin/sh\nPYTHONPATH='{root}' exec '{sys.executable}' '{__file__}'\n")
    path.chmod(0o755)
    return path


if __name__ == "__main__":
    serve(FakeLlama)
