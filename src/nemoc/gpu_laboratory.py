"""Trying kernels on the GPU at hand: compiled in child processes, checked and timed in one that owns the device.

    with GpuLaboratory(folder) as laboratory:
        bench = MeasuredBench(site, plan, aligned, sizes, target, compiled, laboratory, given)
        bench.compile([plan, other])
        bench.check(other)
        bench.time([plan, other], rounds=10, seed=0)

What the child does, `nemoc.gpu_trial_worker` says. Operands are as large as a model's experts and stay on the device,
where they are drawn: their values matter little to how long a kernel takes. Those of integers matter, since they say
which expert a token goes to; they are computed by the graph, from numbers that are drawn.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file

import nemoc
from nemoc.autotune.gpu_bench import CompiledBench
from nemoc.autotune.measure import Roofs
from nemoc.codegen.bench import Finding, Outcome
from nemoc.codegen.children import Children, Pool
from nemoc.codegen.plan import Plan, Site, View
from nemoc.gpu import launched
from nemoc.ir import Graph, NemocError
from nemoc.ir.cutting import cut
from nemoc.ir.dims import evaluate_dim
from nemoc.ir.dtypes import DType
from nemoc.ir.graph import Node
from nemoc.ir.op import Env
from nemoc.ir.region import evaluate_op
from nemoc.ir.types import Value

WORKERS = Children(
    command=(sys.executable, "-P", "-m", "nemoc.gpu_trial_worker"),
    jobs=1,
    seconds=60.0,
    bytes=None,  # the driver reserves many times what it uses
    what="the kernel's process",
    variables=(("PYTHONPATH", str(Path(nemoc.__file__).parents[1])),),
)
"""The process that runs candidates."""

_DRAWN = 1 << 21
"""Elements from which on a weight is drawn on the device, not read."""

Arguments = Callable[[Graph], Mapping[str, torch.Tensor]]
"""Arguments of a graph by name."""


class GpuLaboratory:
    """The process that owns the device, and the files that it works on.

    Args:
        folder: an empty folder for kernels and tensors.
        workers: the process and its limits.
        device: torch's number of the GPU.
    """

    def __init__(self, folder: Path, workers: Children = WORKERS, device: int = 0) -> None:
        self._folder = folder
        for name in ("subjects", "kernels", "runs"):
            (folder / name).mkdir()
        self._runs = Pool({"device": device}, workers, folder / "runs")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._runs.close()

    def roofs(self) -> Roofs:
        """What the device reaches in a copy and in a product of bf16.

        Raises:
            NemocError: the device does not work.
        """
        answer = self._ask({"do": "roofs"})
        if "error" in answer:
            raise NemocError(f"the GPU cannot be measured: {answer['error']}")
        return Roofs(answer["bandwidth"], answer["arithmetic"])

    def subject(self, site: Site, name: str, sizes: Mapping[str, int], given: "Given") -> Path:
        """The folder of a site that candidates are tried on, filled when it is first asked for.

        Args:
            site: the op and its views.
            name: of its default plan.
            sizes: B, L, C and T.
            given: what reaches it.
        """
        # One kernel may be launched at several sizes.
        known = ",".join((name, *(f"{symbol}={sizes[symbol]}" for symbol in "BLCT")))
        folder = self._folder / "subjects" / hashlib.sha256(known.encode()).hexdigest()[:32]
        record_file = folder / "site.json"
        if not record_file.exists():
            operands, tensors = given.operands(site, sizes)
            folder.mkdir(exist_ok=True)
            record = {
                "graph": str(_alone(site)),
                "sizes": dict(sizes),
                "operands": operands,
                "results": [_view(view, sizes) for view in site.results],
            }
            save_file(tensors, folder / "tensors.safetensors")
            record_file.write_text(json.dumps(record), "utf-8")  # last: then all is there
        return folder

    def kernel(self, image: bytes) -> Path:
        """The file of a kernel's code."""
        path = self._folder / "kernels" / hashlib.sha256(image).hexdigest()[:32]
        if not path.exists():
            path.write_bytes(image)
        return path

    def check(self, subject: Path, candidate: object, default: object, bound: float) -> Finding:
        """Run a candidate on guarded memory and compare its results with the default's and with what they should be."""
        answer = self._ask(
            {"do": "check", "subject": str(subject), "candidate": candidate, "default": default}
        )
        if "error" in answer:
            return _fault(answer)
        error = float(answer["deviation"])
        if not error <= bound:
            expected = f"relative error {error:.1e}, expected at most {bound:g}"
            return Finding("wrong", error=error, message=answer.get("fault", expected))
        return Finding("ok", bool(answer["equal"]), error)

    def time(
        self, subject: Path, candidates: Sequence[object], rounds: int, seed: int
    ) -> list[list[float]] | Finding:
        """Seconds of each candidate in each round."""
        answer = self._ask(
            {
                "do": "time",
                "subject": str(subject),
                "candidates": candidates,
                "rounds": rounds,
                "seed": seed,
            }
        )
        if "error" in answer:
            return _fault(answer)
        seconds: list[list[float]] = answer["seconds"]
        return seconds

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        ((_, answer),) = self._runs.answers([request])
        return answer


@dataclass(frozen=True)
class Given:
    """What reaches the kernels of a step.

    Attributes:
        graph: the step, as it was lowered.
        arguments: of a graph that reads some of the step's values: inputs, states and weights.
    """

    graph: Graph
    arguments: Arguments

    def operands(
        self, site: Site, sizes: Mapping[str, int]
    ) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        """How each operand of a site is made, and those that are made here, as `operandN`."""
        values = site.op.operands()
        here = [v for v in values if self._is_made_here(v)]
        made = self._values(dict.fromkeys(here), sizes)
        records, tensors = [], {}
        for i, (value, view) in enumerate(zip(values, site.operands, strict=True)):
            is_weight = value in self.graph.params
            source = "file" if value in made else "normal" if value.dtype.is_float else "bytes"
            wide = is_weight and view.rank > 1
            width = evaluate_dim(view.shape[-1], sizes) if view.rank else 1
            records.append(
                {
                    "view": _view(view, sizes),
                    "source": source,
                    "scale": width**-0.5 if wide else 1.0,
                    "warm": not self.is_stored(value),
                }
            )
            if value in made:
                tensors[f"operand{i}"] = made[value].clone().contiguous()
        return records, tensors

    def is_stored(self, value: Value) -> bool:
        """Whether a value is a weight or a state, which no step has just computed."""
        return value in self.graph.params or value in self.graph.states

    def _is_made_here(self, value: Value) -> bool:
        """Whether a value is no large tensor of any numbers."""
        if value in self.graph.params:
            return int(value.type.elements) < _DRAWN
        return not value.dtype.is_float

    def _values(
        self, wanted: Mapping[Value, None], sizes: Mapping[str, int]
    ) -> dict[Value, torch.Tensor]:
        """Weights and integers: what of these the graph computes, from floats that are drawn."""
        nodes = self._makers(wanted)
        part = cut(self.graph, nodes, "integers")
        arguments, env = self.arguments(part), Env(sizes)
        found = {v: arguments[v.name] for v in part.arguments}
        for node in nodes:
            results = evaluate_op(node.op, env, found)
            found.update(zip(node.results, results, strict=True))
        made = {v for node in nodes for v in node.results}
        known = set(self.graph.arguments)
        rest = tuple(v for v in wanted if v not in made and v in known)
        params = tuple(v for v in rest if v in self.graph.params)
        inputs = tuple(v for v in rest if v not in self.graph.params)
        read = self.arguments(Graph("read", inputs, (), (), params))
        found.update((v, read[v.name]) for v in rest)
        for value in wanted:  # a copy that lowering put in, which no value of the graph stands for
            if value not in found:
                shape = [evaluate_dim(d, sizes) for d in value.shape]
                count = torch.arange(torch.Size(shape).numel())
                found[value] = count.reshape(shape).to(value.dtype.torch)
        return {v: found[v] for v in wanted}

    def _makers(self, wanted: Mapping[Value, None]) -> list[Node]:
        """The nodes that compute integers, and the integers that these are computed from."""
        producers = self.graph.producers
        waiting = [v for v in wanted if v in producers]
        nodes: set[Node] = set()
        while waiting:
            node = producers[waiting.pop()]
            if node not in nodes:
                nodes.add(node)
                waiting += [
                    v for v in node.op.operands() if not v.dtype.is_float and v in producers
                ]
        return [node for node in self.graph.nodes if node in nodes]


@dataclass(frozen=True)
class MeasuredBench(CompiledBench):
    """A `Bench` for one kernel of the GPU at hand.

    Attributes:
        laboratory: where it runs.
        cached: tokens that came before the step's first, T.
        given: what reaches it.
    """

    laboratory: GpuLaboratory
    cached: int
    given: Given

    def check(self, plan: Plan) -> Finding:
        """As `GpuLaboratory.check`."""
        records = self._record(plan), self._record(self.default)
        return self.laboratory.check(self._subject(), *records, self._bound)

    def time(self, plans: Sequence[Plan], rounds: int, seed: int) -> list[list[float]] | Finding:
        """As `GpuLaboratory.time`."""
        return self.laboratory.time(
            self._subject(), [self._record(plan) for plan in plans], rounds, seed
        )

    @property
    def _bound(self) -> float:
        """The largest relative error of a result that is right."""
        types = {view.dtype for view in (*self.site.operands, *self.site.results)}
        narrow = any(t.is_float and t.bytes < DType.F32.bytes for t in types)
        return _NARROW_BOUND if narrow else _BOUND

    def _subject(self) -> Path:
        sizes = dict(self.sizes) | {"T": self.cached}
        return self.laboratory.subject(self.site, self.default.name, sizes, self.given)

    def _record(self, plan: Plan) -> dict[str, Any]:
        stages = []
        for stage, binary in zip(plan.stages, self.binaries(plan), strict=True):
            file = self.laboratory.kernel(binary.code)
            stages.append(
                {
                    "file": str(file),
                    "binary": asdict(launched(file.name, binary)),
                    "tasks": evaluate_dim(stage.kernel.tasks, self.sizes),
                    "args": [[arg.kind, arg.index] for arg in stage.args],
                }
            )
        return {
            "stages": stages,
            "scratch": [_view(view, self.sizes) for view in plan.scratch],
            "updates": [list(pair) for pair in plan.updates],
        }


_BOUND, _NARROW_BOUND = 1e-3, 1e-2
"""Relative errors up to which results are right, without and with floats below 32 bits: what divides by sums of numbers
drawn at random, which may cancel, is far less exact in float32 than on a model's own numbers."""


def _alone(site: Site) -> Graph:
    """A site's op as a graph."""
    results = tuple(Value(f"result{i}", t) for i, t in enumerate(site.op.result_types()))
    operands = tuple(dict.fromkeys(site.op.operands()))
    return Graph("site", operands, (Node(site.op, results),), results)


def _view(view: View, sizes: Mapping[str, int]) -> dict[str, Any]:
    return {
        "dtype": view.dtype.value,
        "shape": [evaluate_dim(n, sizes) for n in view.shape],
        "strides": [evaluate_dim(s, sizes) for s in view.strides],
    }


def _fault(answer: Mapping[str, Any]) -> Finding:
    """What became of a request: what its process said, or how it ended."""
    message, outcome = str(answer["error"]), _CRASH
    if "memory" in message and "access" not in message:
        outcome = _MEMORY
    elif "did not answer" in str(answer.get("lost")):
        outcome = _HANG
    return Finding(outcome, message=message)


_CRASH: Outcome = "crash"
_HANG: Outcome = "hang"
_MEMORY: Outcome = "memory"
