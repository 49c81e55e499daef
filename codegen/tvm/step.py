"""The step function: all phases of a step in one parallel region with a barrier after each."""

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
    return head + "".join(map(_phase, step.phases))


def _phase(launches: Iterable[Launch]) -> str:
    """Loops that follow each other: a thread goes on to the next one while others still have tasks of those before."""
    barrier = '            with T.attr(0, "pragma_parallel_barrier_when_finish", 1):\n'
    return barrier + "".join(map(_loop, launches))


def _loop(launch: Launch) -> str:
    kernel = launch.kernel
    pointers = ", ".join(
        a.arena
        if a.offset == 0
        else f"T.handle_add_byte_offset({a.arena}, {offset_text(a.offset)})"
        for a in launch.buffers
    )
    return (
        f"                for task in T.parallel({size_text(kernel.tasks)}):\n"
        f"                    T.evaluate(Module.{kernel.name}(task, {pointers}, B, L, C))\n"
    )


def module_source(steps: Iterable[StepFunction]) -> str:
    """The text of a module: every distinct kernel once, in order of first use, then the steps."""
    steps = tuple(steps)
    kernels: dict[str, str] = {}
    for step in steps:
        for launch in step.launches:
            kernels.setdefault(launch.kernel.name, launch.kernel.source)
    parts = [*kernels.values(), *(step_source(step) for step in steps)]
    return "@I.ir_module\nclass Module:\n" + "\n".join(parts)
