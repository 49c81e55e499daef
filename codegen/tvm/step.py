"""The step function: all launches of a step in one parallel region with a barrier after each."""

from collections.abc import Iterable

from nemoc.codegen.plan import Launch, StepFunction
from nemoc.codegen.tvm.writer import offset_text, size_text


def step_source(step: StepFunction) -> str:
    """The text of a step function."""
    pointers = "".join(f"{a}: T.handle, " for a in step.arenas)
    head = (
        "    @T.prim_func(s_tir=True)\n"
        f"    def {step.name}({pointers}B: T.int32, L: T.int32, C: T.int32):\n"
        '        with T.attr(0, "pragma_parallel_launch_point", 1):\n'
    )
    return head + "".join(_phase(launch) for launch in step.launches)


def _phase(launch: Launch) -> str:
    kernel = launch.kernel
    pointers = ", ".join(
        a.arena
        if a.offset == 0
        else f"T.handle_add_byte_offset({a.arena}, {offset_text(a.offset)})"
        for a in launch.buffers
    )
    call = f"T.evaluate(Module.{kernel.name}(task, {pointers}, B, L, C))"
    lines = [
        '            with T.attr(0, "pragma_parallel_barrier_when_finish", 1):',
        f"                for task in T.parallel({size_text(kernel.tasks)}):",
        f"                    {call}",
    ]
    if kernel.strided:
        lines[1:] = [
            '                with T.attr(0, "pragma_parallel_stride_pattern", 1):',
            *("    " + line for line in lines[1:]),
        ]
    return "\n".join(lines) + "\n"


def module_source(steps: Iterable[StepFunction]) -> str:
    """The text of a module: every distinct kernel once, in order of first use, then the steps."""
    steps = tuple(steps)
    kernels: dict[str, str] = {}
    for step in steps:
        for launch in step.launches:
            kernels.setdefault(launch.kernel.name, launch.kernel.source)
    parts = [*kernels.values(), *(step_source(step) for step in steps)]
    return "@I.ir_module\nclass Module:\n" + "\n".join(parts)
