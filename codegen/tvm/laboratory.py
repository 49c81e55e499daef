"""Trying kernels on the CPU at hand: compiled, checked and timed in child processes.

    with Laboratory(cpu_target(), 2, folder, store, bound=1e-5) as laboratory:
        subject = laboratory.subject(site, plan, operands, sizes, warm)
        subject.compile([plan, other])
        subject.check(other)
        subject.time([plan, other], rounds=10, seed=0)

Compilers run side by side, one for each core; kernels are checked and timed by one process, while nothing else runs.
What children do, `nemoc.codegen.tvm.trial_worker` says.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file

import nemoc
from nemoc.codegen.bench import Finding, Outcome
from nemoc.codegen.check import exact_results
from nemoc.codegen.children import Children, Pool
from nemoc.codegen.guarded import arguments
from nemoc.codegen.plan import Address, Launch, Plan, Site, StepFunction, View
from nemoc.codegen.tvm.shape import emit_sum
from nemoc.codegen.tvm.step import module_source
from nemoc.codegen.tvm.target import CpuTarget
from nemoc.codegen.tvm.trial_worker import FLUSHED, FUNCTION
from nemoc.ir.dims import evaluate_dim
from nemoc.ir.dtypes import DType
from nemoc.ir.ops.shape import Sum
from nemoc.ir.types import TensorType, Value

WORKERS = Children(
    command=(sys.executable, "-P", "-m", "nemoc.codegen.tvm.trial_worker"),
    seconds=120.0,
    what="the kernel's process",
    variables=(("PYTHONPATH", str(Path(nemoc.__file__).parents[1])),),
)
"""Processes that compile and run candidates."""


class Laboratory:
    """Child processes, and the files that they work on.

    Args:
        target: the CPU at hand.
        threads: that kernels run on.
        folder: an empty folder for tensors and libraries.
        store: folder of compiled functions (`nemoc.codegen.object_store`).
        bound: the largest relative error of a result that is right.
        workers: the processes and their limits.
    """

    def __init__(
        self,
        target: CpuTarget,
        threads: int,
        folder: Path,
        store: Path,
        bound: float,
        workers: Children = WORKERS,
    ) -> None:
        self._folder, self._bound, self._target = folder, bound, target
        for name in ("subjects", "libraries", "compilers", "runs"):
            (folder / name).mkdir()
        name = f"cpu:{target.mcpu}"
        setup = {"target": name, "threads": threads, "store": str(store)}
        self._compilers = Pool(setup | {"threads": 1}, workers, folder / "compilers")
        self._runs = Pool(setup, dataclasses.replace(workers, jobs=1), folder / "runs")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._compilers.close()
        self._runs.close()

    def subject(
        self,
        site: Site,
        default: Plan,
        operands: Sequence[torch.Tensor],
        sizes: Mapping[str, int],
        warm: Sequence[bool],
    ) -> "Subject":
        """Write a site's operands, and what its results should be, to a folder.

        Args:
            site: the op and its views.
            default: the plan that others are compared with.
            operands: a tensor for each operand.
            sizes: B, L and C.
            warm: for each operand, whether a step has just computed it.
        """
        # One kernel may be launched at several sizes.
        name = "-".join((default.name, *(f"{symbol}{sizes[symbol]}" for symbol in "BLC")))
        folder = self._folder / "subjects" / _file_name(name)
        if not folder.exists():
            folder.mkdir()
            record = {
                "sizes": [sizes[symbol] for symbol in "BLC"],
                "operands": [_record(view, sizes) for view in site.operands],
                "results": [_record(view, sizes) for view in site.results],
                "warm": list(warm),
            }
            (folder / "site.json").write_text(json.dumps(record), "utf-8")
            exact = exact_results(site.op, operands, sizes)
            tensors = {
                **{f"operand{i}": t.contiguous() for i, t in enumerate(operands)},
                **{f"expected{i}": t.contiguous() for i, t in enumerate(exact)},
            }
            # Operands may be one tensor, which safetensors refuses to write twice.
            save_file({k: t.clone() for k, t in tensors.items()}, folder / "tensors.safetensors")
        return Subject(self, site, default, sizes, folder)

    def compile(self, plans: Iterable[tuple[Site, Plan]]) -> dict[str, Finding]:
        """Compile what is not compiled yet, side by side; what is wrong with plans, by their names."""
        wanted = {plan.name: (site, plan) for site, plan in plans}
        missing = [name for name in wanted if not self._library(wanted[name][1]).exists()]
        requests = []
        for name in missing:
            source = self._folder / "libraries" / f"{_file_name(name)}.py"
            source.write_text(_module(*wanted[name]), "utf-8")
            library = self._library(wanted[name][1])
            requests.append({"do": "compile", "source": str(source), "library": str(library)})
        return {
            missing[number]: _fault("compile", answer)
            for number, answer in self._compilers.answers(requests)
            if "error" in answer
        }

    def check(self, subject: "Subject", plan: Plan) -> Finding:
        """As `Subject.check`."""
        request = {
            "do": "check",
            "subject": str(subject.folder),
            "candidate": self._record(subject, plan),
            "default": self._record(subject, subject.default),
        }
        ((_, answer),) = self._runs.answers([request])
        if "error" in answer:
            return _fault("crash", answer)
        error = float(answer["deviation"])
        if not error <= self._bound:
            expected = f"relative error {error:.1e}, expected at most {self._bound:g}"
            return Finding("wrong", error=error, message=answer.get("fault", expected))
        return Finding("ok", bool(answer["equal"]), error)

    def time(
        self, subject: "Subject", plans: Sequence[Plan], rounds: int, seed: int
    ) -> list[list[float]] | Finding:
        """As `Subject.time`."""
        flush = self._flush()
        if isinstance(flush, Finding):
            return flush
        request = {
            "do": "time",
            "flush": str(flush),
            "subject": str(subject.folder),
            "candidates": [self._record(subject, plan) for plan in plans],
            "rounds": rounds,
            "seed": seed,
        }
        ((_, answer),) = self._runs.answers([request])
        if "error" in answer:
            return _fault("crash", answer)
        seconds: list[list[float]] = answer["seconds"]
        return seconds

    def _flush(self) -> Path | Finding:
        """The library that empties caches, compiled when it is first needed."""
        site = Site.dense(Sum(Value("x", TensorType.of(DType.F32, FLUSHED)), 0))
        plan = emit_sum(site, self._target)
        return self.compile([(site, plan)]).get(plan.name, self._library(plan))

    def _library(self, plan: Plan) -> Path:
        return self._folder / "libraries" / f"{_file_name(plan.name)}.so"

    def _record(self, subject: "Subject", plan: Plan) -> dict[str, Any]:
        return {
            "library": str(self._library(plan)),
            "scratch": [_record(view, subject.sizes) for view in plan.scratch],
            "updates": [list(pair) for pair in plan.updates],
        }


@dataclass(frozen=True)
class Subject:
    """A site that candidates are tried on: a `Bench`.

    Attributes:
        laboratory: where.
        site: the op and its views.
        default: the plan that others are compared with.
        sizes: B, L and C.
        folder: where its tensors are.
    """

    laboratory: Laboratory
    site: Site
    default: Plan
    sizes: Mapping[str, int]
    folder: Path

    def compile(self, plans: Sequence[Plan]) -> dict[str, Finding]:
        return self.laboratory.compile((self.site, plan) for plan in plans)

    def check(self, plan: Plan) -> Finding:
        return self.laboratory.check(self, plan)

    def time(self, plans: Sequence[Plan], rounds: int, seed: int) -> list[list[float]] | Finding:
        return self.laboratory.time(self, plans, rounds, seed)


def _file_name(name: str) -> str:
    """A plan's name, which may be longer than file names are."""
    return name if len(name) < 100 else hashlib.sha256(name.encode()).hexdigest()[:32]


def _module(site: Site, plan: Plan) -> str:
    """The text of a module that exports a plan."""
    args = arguments(site, plan)
    phases = tuple(
        (Launch(stage.kernel, tuple(Address(str(a)) for a in stage.args)),) for stage in plan.stages
    )
    return module_source([StepFunction(FUNCTION, tuple(map(str, args)), phases)])


def _record(view: View, sizes: Mapping[str, int]) -> dict[str, Any]:
    return {
        "dtype": view.dtype.value,
        "shape": [evaluate_dim(n, sizes) for n in view.shape],
        "strides": [evaluate_dim(s, sizes) for s in view.strides],
    }


def _fault(outcome: Outcome, answer: Mapping[str, Any]) -> Finding:
    """What became of a request: what its process said, or how it ended."""
    message = str(answer["error"])
    if any(word in message for word in ("MemoryError", "bad_alloc", "memory")):
        outcome = "memory"
    elif "did not answer" in str(answer.get("lost")):
        outcome = "hang"
    return Finding(outcome, message=message)
