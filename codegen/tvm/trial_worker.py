"""The child process in which kernels are compiled, checked and timed that nobody trusts yet.

It reads JSON from standard input, one object a line, and answers each line with one on the file descriptor that its
argument names.

    setup    {"target", "threads", "store"}                                 ->  {}
    request  {"do": "compile", "source", "library"}                         ->  {}
             {"do": "check", "subject", "candidate", "default"}             ->  {"deviation", "equal"}
             {"do": "time", "subject", "candidates", "rounds", "seed", "flush"}  ->  {"seconds"}

each of which may be answered by {"error"} instead. `source` is a file of module text and `library` the one to write;
`store` is the folder of compiled functions.
`subject` is a folder that `nemoc.codegen.tvm.laboratory` has filled: `site.json` with the sizes and views of a site,
and `tensors.safetensors` with its operands and the results that they should lead to. A candidate is
{"library", "scratch", "updates"}: its function, the views of its scratch, and what it updates in place. `deviation` is
the largest relative error of a result, `equal` whether all have the bits that the default's have. `flush` is a library
like a candidate's that reads `FLUSHED` and writes the sum of its rows.
"""

import ctypes
import functools
import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tvm_ffi
from safetensors.torch import load_file

from nemoc.codegen.children import serve
from nemoc.codegen.guarded import Buffer, KernelFault, Views, bits, run_views
from nemoc.codegen.object_store import ObjectStore
from nemoc.codegen.plan import Arg, View
from nemoc.codegen.storage import ALIGNMENT
from nemoc.codegen.threads import ONE_CORE_EACH
from nemoc.codegen.tvm.build import build_library
from nemoc.codegen.tvm.harness import start_threads
from nemoc.codegen.tvm.target import cpu_target
from nemoc.ir.dtypes import DType

FUNCTION = "trial"
"""The function that a library exports."""

FLUSHED = (64, 1 << 18)
"""The shape of the f32 that are read to empty the caches: 64 MiB, twice the largest that a share of them is likely to
be."""

_WARM = 256 << 10
"""Bytes of an operand that a step would still find in a cache, having just computed it."""


@dataclass(frozen=True)
class Subject:
    """A site to try kernels on.

    Attributes:
        sizes: B, L and C.
        threads: how many kernels run on.
        operands, results: their views, of fixed sizes.
        warm: for each operand, whether a step has just computed it.
        tensors: `operand0` and so on by value, and `expected0` and so on: what results should be, floats in f64.
        outputs: the results of the default's library, by its path.
    """

    sizes: tuple[int, int, int]
    threads: int
    operands: tuple[View, ...]
    results: tuple[View, ...]
    warm: tuple[bool, ...]
    tensors: Mapping[str, torch.Tensor]
    outputs: dict[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, threads: int) -> "Subject":
        """What the laboratory wrote."""
        site = json.loads((folder / "site.json").read_text("utf-8"))
        return cls(
            tuple(site["sizes"]),
            threads,
            tuple(map(_view, site["operands"])),
            tuple(map(_view, site["results"])),
            tuple(site["warm"]),
            load_file(folder / "tensors.safetensors"),
        )

    def expected(self) -> list[torch.Tensor]:
        """What the results should be."""
        return [self.tensors[f"expected{i}"] for i in range(len(self.results))]


@dataclass(frozen=True)
class Candidate:
    """A compiled plan.

    Attributes:
        library: its path.
        scratch: views of fixed sizes.
        updates: pairs (result, operand) that are one buffer.
    """

    library: str
    scratch: tuple[View, ...]
    updates: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Candidate":
        """From a request."""
        return cls(
            record["library"],
            tuple(map(_view, record["scratch"])),
            tuple((result, operand) for result, operand in record["updates"]),
        )

    @functools.cached_property
    def function(self) -> Callable[..., object]:
        """What runs it."""
        found: Callable[..., object] = tvm_ffi.load_module(self.library)[FUNCTION]
        return found

    def views(self, subject: Subject) -> dict[Arg, View]:
        """Everything that it works on, in the order of its parameters."""
        groups = {"operand": subject.operands, "result": subject.results, "scratch": self.scratch}
        return {
            Arg(kind, i): view  # type: ignore[arg-type]
            for kind, views in groups.items()
            for i, view in enumerate(views)
        }


def check(subject: Subject, candidate: Candidate, default: Candidate) -> dict[str, Any]:
    """Run a candidate on guarded and poisoned memory."""
    if default.library not in subject.outputs:
        subject.outputs[default.library] = _outputs(subject, default)
    try:
        found = _outputs(subject, candidate)
    except KernelFault as fault:
        return {"deviation": math.inf, "equal": False, "fault": str(fault)}
    errors = map(_relative_error, found, subject.expected())
    worst = max((math.inf if math.isnan(e) else e for e in errors), default=0.0)
    same = subject.outputs[default.library]
    equal = all(map(_same_bits, found, same))
    return {"deviation": worst, "equal": equal}


def _outputs(subject: Subject, candidate: Candidate) -> tuple[torch.Tensor, ...]:
    views = candidate.views(subject)
    operands = [subject.tensors[f"operand{i}"] for i in range(len(subject.operands))]

    def call(buffers: Mapping[Arg, Buffer]) -> None:
        candidate.function(
            *(buffers[arg].pointer for arg in views), *subject.sizes, subject.threads, None
        )

    all_views = Views(subject.operands, subject.results, candidate.scratch, candidate.updates)
    return run_views(all_views, {}, operands, call)


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    if not found.is_floating_point():
        return 0.0 if torch.equal(found.long(), expected.long()) else math.inf
    norm = float(expected.norm())
    distance = float((found.double() - expected).norm())
    return distance / norm if norm > 0.0 else distance


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(bits(a), bits(b))


def measure(
    subject: Subject, candidates: Sequence[Candidate], rounds: int, seed: int, flush: str
) -> list[list[float]]:
    """Seconds of each candidate in each round; in a round all run, in random order, each with cold caches.

    What a step would have just computed is brought back into the cache first. Rounds go on what earlier ones left in
    updated operands. Caches are emptied by the threads that run kernels, so that those are awake as they are within a
    step, and no other library's threads are, which would go on spinning on the same processors.
    """
    tensors = {
        Arg("operand", i): _aligned(view, subject.tensors[f"operand{i}"])
        for i, view in enumerate(subject.operands)
    }
    empty = _flush(flush, subject.threads)
    warm = [
        tensors[Arg("operand", i)]
        for i, (view, is_warm) in enumerate(zip(subject.operands, subject.warm, strict=True))
        if is_warm and _bytes(view) <= _WARM
    ]
    calls = [_call(subject, candidate, dict(tensors)) for candidate in candidates]
    for call in calls:
        call()
    order, chance = list(range(len(calls))), random.Random(seed)
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        chance.shuffle(order)
        for number in order:
            empty()
            for tensor in warm:
                tensor.sum()
            start = time.perf_counter()
            calls[number]()
            seconds[number].append(time.perf_counter() - start)
    return seconds


def _flush(library: str, threads: int) -> Callable[[], object]:
    """What empties the caches of all threads."""
    function = tvm_ffi.load_module(library)[FUNCTION]
    x, y = torch.ones(FLUSHED), torch.empty(FLUSHED[1:])

    def call(held: Sequence[torch.Tensor] = (x, y)) -> object:
        return function(*map(_pointer, held), 1, 1, 1, threads, None)

    return call


def _call(
    subject: Subject, candidate: Candidate, tensors: dict[Arg, torch.Tensor]
) -> Callable[[], object]:
    """A run of a candidate on memory as a step has it; scratch and results of its own."""
    for result, operand in candidate.updates:
        tensors[Arg("result", result)] = tensors[Arg("operand", operand)]
    views = candidate.views(subject)
    for arg, view in views.items():
        if arg not in tensors:
            tensors[arg] = _aligned(view)
    held = [tensors[arg] for arg in views]
    pointers = [_pointer(tensor) for tensor in held]
    function = candidate.function

    def call(held: Sequence[torch.Tensor] = held) -> object:
        return function(*pointers, *subject.sizes, subject.threads, None)

    return call


def _aligned(view: View, values: torch.Tensor | None = None) -> torch.Tensor:
    """Bytes aligned as arenas are, which hold a tensor under its view."""
    size = _bytes(view)
    memory = torch.zeros(size + ALIGNMENT, dtype=torch.uint8)
    start = -memory.data_ptr() % ALIGNMENT
    inside = memory[start : start + size]
    if values is not None:
        typed = inside.view(view.dtype.torch)
        place = typed.as_strided([int(n) for n in view.shape], [int(s) for s in view.strides])
        once = tuple(slice(0, 1) if s == 0 else slice(None) for s in view.strides)
        place[once] = values[once]
    return inside


def _bytes(view: View) -> int:
    return int(view.span)


def _pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _view(record: Mapping[str, Any]) -> View:
    return View(DType(record["dtype"]), tuple(record["shape"]), tuple(record["strides"]))


@functools.lru_cache(maxsize=1)
def _subject(folder: str, threads: int) -> Subject:
    return Subject.read(Path(folder), threads)


def answer(request: Mapping[str, Any], setup: Mapping[str, Any]) -> dict[str, Any]:
    """Carry out a request."""
    if request["do"] == "compile":
        source, store = Path(request["source"]).read_text("utf-8"), Path(setup["store"])
        target, library = cpu_target(setup["target"]), Path(request["library"])
        build_library(source, target, library, ObjectStore(store))
        return {}
    subject = _subject(request["subject"], setup["threads"])
    if request["do"] == "check":
        return check(subject, Candidate.of(request["candidate"]), Candidate.of(request["default"]))
    candidates = [Candidate.of(record) for record in request["candidates"]]
    rounds, seed, flush = request["rounds"], request["seed"], request["flush"]
    return {"seconds": measure(subject, candidates, rounds, seed, flush)}


def _start(setup: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    torch.set_num_threads(1)
    threads = start_threads(setup["threads"], ONE_CORE_EACH)
    return functools.partial(answer, setup={**setup, "threads": threads})


if __name__ == "__main__":
    serve(_start)
