"""The child process in which Triton compiles kernels; run as a file, it imports nothing of nemoc.

It reads JSON from standard input, one object a line, and answers each line with one on the file descriptor that its
argument names; standard output is left to Triton, LLVM and the assembler, who write there what they like.

    setup    {"backend", "arch", "warp"}                 ->  {"triton": version}
    request  {"module", "kernel", "signature", "aligned", "warps", "stages"}
             ->  {"code", "assembly", "ttgir", "log", "metadata"}  or  {"error"}

`module` is a file with the kernel; `signature` gives Triton's type of every parameter, `aligned` the numbers of the
pointers that are multiples of 16. `code` is in base64.

No GPU is asked for: Triton looks for a driver only when it is not told the target, or to launch.
"""

import base64
import contextlib
import importlib.util
import io
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_FILES = {"cuda": ("cubin", "ptx"), "hip": ("hsaco", "amdgcn")}
"""What Triton's backends call the binary and its text."""

_METADATA = (
    "name",
    "num_warps",
    "shared",
    "tmem_size",
    "global_scratch_size",
    "global_scratch_align",
    "profile_scratch_size",
    "profile_scratch_align",
)
"""What a launch needs; versions of Triton and its backends leave out what they have no use for."""


def load(path: Path) -> ModuleType:
    """Import a file; Triton reads the text of functions from it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def compile_kernel(request: dict[str, Any], target: GPUTarget) -> dict[str, Any]:
    """Carry out a request."""
    function = getattr(load(Path(request["module"])), request["kernel"])
    alignment = {(number,): [["tt.divisibility", 16]] for number in request["aligned"]}
    source = ASTSource(function, request["signature"], attrs=alignment)
    options = {
        "num_warps": request["warps"],
        "num_stages": request["stages"],
        "num_ctas": 1,
        "enable_fp_fusion": True,  # by default, versions of Triton differ
    }
    log = io.StringIO()  # the assembler's, which Triton prints (TRITON_DUMP_PTXAS_LOG)
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(source, target=target, options=options)
    binary, text = _FILES[target.backend]
    metadata = compiled.metadata._asdict()
    return {
        "code": base64.b64encode(compiled.asm[binary]).decode(),
        "assembly": compiled.asm[text],
        "ttgir": compiled.asm["ttgir"],
        "log": log.getvalue(),
        "metadata": {name: metadata[name] for name in _METADATA if name in metadata},
    }


def main() -> None:
    """Answer until standard input ends."""
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    answers = os.fdopen(descriptor, "w", encoding="utf-8")

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    setup = json.loads(sys.stdin.readline())
    target = GPUTarget(setup["backend"], setup["arch"], setup["warp"])
    answer({"triton": triton.__version__})
    for line in sys.stdin:
        try:
            answer(compile_kernel(json.loads(line), target))
        except Exception as error:  # whatever is wrong with one kernel, the next may be right
            answer({"error": f"{type(error).__name__}: {error}".rstrip(": ")})


if __name__ == "__main__":
    main()
