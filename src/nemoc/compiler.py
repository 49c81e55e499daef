"""From a model to an executable: the one place where all the rooms meet.

source --models--> graph --passes--> functions --codegen--> kernels --runtime--> artifact
"""

import dataclasses
import functools
import importlib.metadata
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from nemoc.autotune.records import Records
from nemoc.calibration import input_scales
from nemoc.codegen.lower import corner_sizes, describe
from nemoc.codegen.object_store import ObjectStore
from nemoc.codegen.storage import Layout, Weight, bind_weights, weight_layout
from nemoc.codegen.triton.kernel_store import KernelStore
from nemoc.codegen.triton.target import GPUS, INTERPRETER
from nemoc.error_budget import calibrate
from nemoc.gpu import BACKENDS, compiled_files, gpu_source, lower_gpu
from nemoc.ir import DType, Graph, NemocError, Op
from nemoc.ir.ops import own_ops
from nemoc.models import Model, open_model
from nemoc.options import read_options
from nemoc.passes import (
    Pass,
    PassContext,
    PassRun,
    Remark,
    load_entry_points,
    load_plugin,
    preset,
    print_pipeline,
    run_pipeline,
)
from nemoc.passes.check import NumericCheck
from nemoc.passes.quantize_nvfp4 import PROMPTS, QuantizeNvfp4
from nemoc.passes.specialize_decode import SpecializeDecode
from nemoc.progress import Progress
from nemoc.quantizations import Quantize, quantization, read_passes
from nemoc.runtime import Bounds, Contents, Executable, Generation, Machine, build
from nemoc.runtime import load as load_artifact
from nemoc.runtime.costs import COSTS, CostRecord
from nemoc.runtime.cpu import LIBRARY, kernel_record
from nemoc.runtime.machine import thread_count
from nemoc.runtime.scalars import check_count
from nemoc.runtime.weights import weight_pieces
from nemoc.schedules import (
    Chosen,
    Numerics,
    RecordSource,
    check_numerics,
    cpu_device,
    gpu_device,
    known_records,
)
from nemoc.targets import compute_type, multiplies_fp8, resolve_target, target_info

FUNCTIONS = ("prefill", "prefill_all", "decode")
"""What an executable can do: logits of the last of L new tokens, of all of them, of the only one."""

STEP_TOKENS = 512
"""Tokens of all rows that one prefill step takes at most on a CPU; longer prompts are split."""

GPU_STEP_TOKENS = 8192
"""The same on a GPU, which has more to fill."""

Plugins = str | type[Pass] | Iterable[str | type[Pass]]
"""What has passes of a user's own: names of modules, or classes."""

Pipeline = str | Sequence[Pass] | None
"""Text, passes, or none for the target's preset."""

PIPELINES = "pipelines.txt"
"""The file of an artifact that says, line by line, which passes made each function."""


@dataclass(frozen=True)
class Functions:
    """A model's graphs after the passes.

    Attributes:
        model: where they come from.
        target: the resolved target.
        dtype: the compute type of activations.
        graphs: by function name.
        pipelines: the passes that made them, by function name.
        remarks: what passes did and refused, site by site.
    """

    model: Model
    target: str
    dtype: DType
    graphs: Mapping[str, Graph]
    pipelines: Mapping[str, tuple[Pass, ...]]
    remarks: tuple[Remark, ...]


_Made = TypeVar("_Made")
_Given = ParamSpec("_Given")


def _on_cpu(make: Callable[_Given, _Made]) -> Callable[_Given, _Made]:
    """The same function, which makes its tensors on the CPU whatever the user's default is."""

    @functools.wraps(make)
    def on_cpu(*args: _Given.args, **options: _Given.kwargs) -> _Made:
        with torch.device("cpu"):
            return make(*args, **options)

    return on_cpu


@_on_cpu
def compile(
    source: Any,
    target: str | None = None,
    quantize: Quantize = None,
    pipeline: Pipeline = None,
    dtype: str | None = None,
    max_batch: int = 1,
    max_context: int = 4096,
    *,
    scope: str | None = None,
    error_budget: float | None = None,
    calibration: Sequence[str | Path] = (),
    plugins: Plugins = (),
    records: RecordSource = None,
    numerics: str = "same",
    predicted: bool = False,
    threads: int | None = None,
    destination: str | Path | None = None,
    weights_of: Executable | None = None,
    verify_each: bool = False,
    progress: Progress | None = None,
) -> Executable:
    """Compile a model into an executable.

    Args:
        source: what `nemoc.models.open_model` takes: a Hugging Face directory, "sample", "random:PRESET",
            a transformers NemotronHForCausalLM in memory.
        target: what to compile for; None for the best target of this machine.
        quantize: None keeps weights as the checkpoint stores them. The name of a format
            (`nemoc.quantizations.QUANTIZATIONS`) stands for a pass with its defaults, "as-released" for the map of
            the model's family (`nemoc.models.released_maps`); or passes that quantize, or their text. They run
            before all others.
        pipeline: passes or their text, for the general step (decode prepends `specialize-decode`), instead of the
            target's preset, which the word `preset` stands for in text: "my-pass,preset".
        dtype: compute type of activations and the KV cache, "f32" or "bf16"; None for the target's best that keeps
            the checkpoint's precision: bf16 on GPUs if the checkpoint is in bf16, else f32. The CPU computes in f32.
        max_batch: most rows of a batch.
        max_context: most tokens of a row, prompt and generated ones together.
        scope: which weights a format is for: all, experts, or a regular expression that names begin with; None for
            the pass's default, all.
        error_budget: instead of `quantize`: each weight in scope gets the cheapest format that keeps the model's
            error, KL of the next token's distribution in nats, below this (`nemoc.error_budget`). For a target that
            multiplies FP8 by FP8, rows of prompts become FP8 too beside weights in FP8, as far as that leaves it there.
        calibration: files of text to measure that on; the sample model has some of its own. With "nvfp4-w4a4", text on
            which the largest activations are measured: their scales are then static. Without, they are those of a
            checkpoint that has them, else each row has its own.
        plugins: passes of the user's own that the pipeline's text may name: modules or classes.
        records: schedules that `nemoc tune` found: records or files of them; None for what comes with nemoc and what
            was found on this machine, an empty list for none. Only those of exactly these kernels on this kind of
            device are taken.
        numerics: "same" takes no schedule that changes a bit of any result, "any" all.
        predicted: where a kernel has no record that was measured, take one whose times were predicted, or else the
            schedule that records of other shapes predict, if they predict each other well enough
            (`nemoc.autotune.predict`); the artifact says which schedules are predicted.
        threads: threads that the executable runs on; None for `NEMOC_THREADS`, else all cores.
        destination: where to write the artifact; None for a temporary place that goes with the executable.
        weights_of: an executable of the same model, quantized in the same way, whose weights are taken as they were
            packed; where the file system can, both artifacts have one file of them.
        verify_each: hold every pass to what it declares, by running the graphs before and after it on small inputs.
        progress: told what is being done.

    Raises:
        NemocError: the source, an option or the machine does not allow it; one line.
    """
    threads = thread_count(threads if threads is not None else read_options().threads)
    model = source if isinstance(source, Model) else open_model(source)
    if model.parameters is None:
        raise NemocError(
            f"{model.name} has no weights; random:{model.name} compiles with random ones"
        )
    if error_budget is not None:
        if quantize is not None:
            raise NemocError(f"quantize is {quantize!r}, expected none beside an error budget")
        prompts = multiplies_fp8(resolve_target(target))
        quantize = calibrate(model, error_budget, calibration, scope, progress, prompts).passes
        scope = None
    found = functions(
        model,
        target,
        pipeline,
        dtype,
        quantize,
        scope=scope,
        calibration=() if error_budget is not None else calibration,
        plugins=plugins,
        check=NumericCheck() if verify_each else None,
        progress=progress,
    )
    on_gpu = found.target.partition(":")[0] in ("cuda", "hip")
    step = GPU_STEP_TOKENS if on_gpu else STEP_TOKENS
    bounds = Bounds(max_batch, max_context, max(step, check_count("max_batch", max_batch)))
    bound, weights = bind_weights(found.graphs)
    chosen = _Tuning(known_records(records), check_numerics(numerics), predicted, threads)
    compiled = _generate(found.target, bound, weights, bounds, chosen, progress)
    contents = Contents(
        target=found.target,
        machine=compiled.machine,
        model=model.config.to_dict(),
        functions=bound,
        weights=weights,
        pieces=weight_pieces(model.parameters),
        bounds=bounds,
        generation=Generation(
            model.generation.eos_token_ids,
            model.generation.bos_token_id,
            model.generation.pad_token_id,
        ),
        kernels=compiled.kernels,
        files={
            **compiled.files,
            **_tokenizer_files(model),
            PIPELINES: "".join(
                f"{name}: {print_pipeline(passes)}\n" for name, passes in found.pipelines.items()
            ),
        },
        tools=_tools(found.target),
        packed=weights_of,
    )
    return build(
        contents,
        destination,
        threads=threads,
        extra_ops=own_ops(found.graphs.values()),
        progress=progress or _quiet,
        backends=BACKENDS,
    )


@_on_cpu
def load(
    path: str | Path,
    threads: int | None = None,
    resident: bool = False,
    progress: Progress | None = None,
    *,
    plugins: Plugins = (),
) -> Executable:
    """Open an artifact: nothing is traced, compiled or tuned.

    Args:
        path: what `Executable.save` wrote.
        threads: as for `compile`.
        resident: copy the weights into memory instead of mapping the file.
        progress: told what is being done.
        plugins: as for `compile`; targets that run graphs, `reference` and `triton-interpret`, need those whose ops
            the graphs have.

    Raises:
        NemocError: a file is missing or altered, or the artifact is for another machine or version.
    """
    threads = threads if threads is not None else read_options().threads
    return load_artifact(
        path,
        resident=resident,
        threads=threads,
        extra_ops=plugin_ops(plugins),
        progress=progress or _quiet,
        backends=BACKENDS,
    )


@_on_cpu
def functions(
    source: Any,
    target: str | None = None,
    pipeline: Pipeline = None,
    dtype: str | None = None,
    quantize: Quantize = None,
    *,
    scope: str | None = None,
    calibration: Sequence[str | Path] = (),
    plugins: Plugins = (),
    which: Sequence[str] = FUNCTIONS,
    check: Callable[[PassRun, PassContext], None] | None = None,
    on_pass: Callable[[str, PassRun], None] | None = None,
    progress: Progress | None = None,
) -> Functions:
    """A model's graphs after the passes.

    Args:
        source, target, pipeline, dtype, quantize, scope, plugins, progress: as for `compile`.
        calibration: text to measure scales of activations on, if they are quantized.
        which: the functions wanted.
        check: held against every pass that changed a graph (`nemoc.passes.check`).
        on_pass: called with the function's name after each pass.
    """
    name = resolve_target(target)
    model = source if isinstance(source, Model) else open_model(source)
    compute = _compute_type(dtype, name, model)
    classes = plugin_classes(plugins)
    first = quantization(model, quantize, scope, classes)
    pipelines = {
        function: passes_of(function, name, pipeline, classes, first) for function in which
    }
    info = target_info(name, read_options().threads or 1)
    if any(map(_recodes_nvfp4, chain(*pipelines.values()))):
        info = dataclasses.replace(info, spread_nvfp4=False)
    ctx = PassContext(info, model.parameters, input_scales(model, first, calibration, progress))
    graphs = {}
    for i, function in enumerate(which):
        if progress is not None:
            progress("run passes", i, len(which))
        graph = model.build_step(
            dtype=compute, logits="all" if function == "prefill_all" else "last"
        )
        graphs[function] = run_pipeline(
            graph,
            pipelines[function],
            ctx,
            check=check,
            on_pass=None if on_pass is None else functools.partial(on_pass, function),
        )
    return Functions(model, name, compute, graphs, pipelines, tuple(ctx.remarks))


def _recodes_nvfp4(made: Pass) -> bool:
    """Whether FP8 is made of NVFP4 codes for prompts, from codes as they are; tokens read the same weights."""
    return isinstance(made, QuantizeNvfp4) and made.mode == PROMPTS


def plugin_classes(plugins: Plugins) -> tuple[type[Pass], ...]:
    """Pass classes of a user's own: given ones, modules', `NEMOC_PLUGINS`', installed packages'.

    Raises:
        NemocError: a plugin is neither a module nor a class of a pass, or a module cannot be imported.
    """
    found = list(load_entry_points())
    many = isinstance(plugins, Iterable) and not isinstance(plugins, str)
    given: Iterable[object] = plugins if many else (plugins,)  # type: ignore[assignment]
    for plugin in (*read_options().plugins, *given):
        if isinstance(plugin, str):
            found.extend(load_plugin(plugin))
        elif isinstance(plugin, type) and issubclass(plugin, Pass):
            found.append(plugin)
        else:
            raise NemocError(
                f"plugins: found {plugin!r}, expected the name of a module or a class of a pass"
            )
    return tuple(dict.fromkeys(found))


def plugin_ops(plugins: Plugins) -> tuple[type[Op], ...]:
    """The op classes that the modules of a user's passes define, or import from elsewhere than nemoc.

    Raises:
        NemocError: as `plugin_classes`.
    """
    modules = {cls.__module__ for cls in plugin_classes(plugins)}
    found = [item for name in sorted(modules) for item in vars(sys.modules[name]).values()]
    ops = (item for item in found if isinstance(item, type) and issubclass(item, Op))
    return tuple(dict.fromkeys(op for op in ops if not op.__module__.startswith("nemoc.")))


def passes_of(
    function: str,
    target: str,
    pipeline: Pipeline,
    classes: tuple[type[Pass], ...] = (),
    first: tuple[Pass, ...] = (),
) -> tuple[Pass, ...]:
    """The passes that make one of `FUNCTIONS` from the general step.

    Args:
        function, target, pipeline: which.
        classes: passes of a user's own that the pipeline's text may name.
        first: passes that run before all others but the one that derives the step of one token.

    Raises:
        NemocError: the pipeline cannot be read.
    """
    passes = _general_passes(function, target, pipeline, classes)
    derive = tuple(p for p in passes[:1] if isinstance(p, SpecializeDecode))
    return (*derive, *first, *passes[len(derive) :])


def _general_passes(
    function: str, target: str, pipeline: Pipeline, classes: tuple[type[Pass], ...]
) -> tuple[Pass, ...]:
    """The passes without those that quantize."""
    decode = function == "decode"
    usual = preset(target.partition(":")[0], "decode" if decode else "prefill")
    if pipeline is None:
        return usual
    given = read_passes("pipeline", pipeline, classes, usual)
    general = tuple(p for p in given if not isinstance(p, SpecializeDecode))
    if not decode:
        return general
    return given if len(general) < len(given) else (SpecializeDecode(), *given)


def _quiet(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


_COMPUTE_TYPES = {
    "f32": DType.F32,
    "float32": DType.F32,
    "bf16": DType.BF16,
    "bfloat16": DType.BF16,
}


def _compute_type(dtype: str | None, target: str, model: Model) -> DType:
    if dtype is None:
        return compute_type(target, model.config.dtype)
    if dtype not in _COMPUTE_TYPES:
        raise NemocError(f"dtype {dtype!r}, expected one of {', '.join(_COMPUTE_TYPES)}")
    found = _COMPUTE_TYPES[dtype]
    if found != DType.F32 and target.partition(":")[0] == "cpu":
        raise NemocError(f"dtype {dtype!r}: the cpu target computes in f32")
    return found


@dataclass(frozen=True)
class _Compiled:
    """A target's code, ready for the artifact."""

    machine: Machine | None = None
    kernels: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes | str] = field(default_factory=dict)


def _generate(
    target: str,
    graphs: Mapping[str, Graph],
    weights: Sequence[Weight],
    bounds: Bounds,
    tuning: "_Tuning",
    progress: Progress | None,
) -> _Compiled:
    """The code of a target; none for the interpreter."""
    if target == "reference":
        return _Compiled()
    if progress is not None:
        progress("generate kernels", 0, 0)
    layout = weight_layout(weights)
    corners = corner_sizes(bounds.max_batch, bounds.max_tokens, bounds.max_context)
    if target in GPUS:
        return _generate_gpu(target, graphs, layout, corners, tuning, progress)
    from nemoc.codegen.tvm.compile import compile_program  # noqa: PLC0415  (loads tvm)
    from nemoc.codegen.tvm.target import cpu_target  # noqa: PLC0415

    cpu = cpu_target(target)
    device = cpu_device(cpu.mcpu, tuning.threads)
    chosen = Chosen(tuning.records, device, tuning.numerics, tuning.predicted)
    store = ObjectStore(read_options().cache / "objects")
    compiled = compile_program(graphs, layout, corners, cpu, chosen, store)
    machine = Machine.host() if target == "cpu" else Machine.of(cpu.architecture, cpu.features)
    return _Compiled(
        machine,
        kernel_record(compiled.program.scratch_bytes),
        {
            LIBRARY: compiled.library,
            "kernels/step.py": compiled.source,
            "kernels/launches.txt": describe(compiled.program.functions),
            COSTS: CostRecord.of(compiled.program.functions).to_text(),
            **chosen.files(),
        },
    )


@dataclass(frozen=True)
class _Tuning:
    """Which schedules may be taken.

    Attributes:
        records: where they are looked up.
        numerics: of which kind.
        predicted: whether what has no record may be predicted.
        threads: for how many.
    """

    records: Records
    numerics: Numerics
    predicted: bool
    threads: int


def _generate_gpu(
    target: str,
    graphs: Mapping[str, Graph],
    layout: Layout,
    corners: Sequence[Mapping[str, int]],
    tuning: "_Tuning",
    progress: Progress | None,
) -> _Compiled:
    """The code of a GPU, which need not be there; of the interpreter of GPU kernels their text."""
    chosen = Chosen(tuning.records, gpu_device(target), tuning.numerics, tuning.predicted)
    program = lower_gpu(graphs, layout, corners, target, chosen)
    files: dict[str, bytes | str] = {
        **chosen.files(),
        "kernels/step.py": gpu_source(program, target),
        "kernels/launches.txt": describe(program.functions),
        COSTS: CostRecord.of(program.functions).to_text(),
    }
    if target != INTERPRETER:
        store = KernelStore(read_options().cache / "kernels")
        files |= compiled_files(program, target, store, progress)
    return _Compiled(files=files)


def _tokenizer_files(model: Model) -> dict[str, Path | str]:
    """What the artifact keeps of the checkpoint's tokenizer."""
    return {f"tokenizer/{name}": file for name, file in model.tokenizer_files().items()}


def _tools(target: str) -> dict[str, str]:
    """Versions of what had a part in the artifact."""
    compiler = {"cpu": "apache-tvm", "cuda": "triton", "hip": "triton", INTERPRETER: "triton"}
    kind = target.partition(":")[0]
    packages = ["nemoc", "torch"] + ([compiler[kind]] if kind in compiler else [])
    return {p: importlib.metadata.version(p) for p in packages} | {
        "python": platform.python_version()
    }
