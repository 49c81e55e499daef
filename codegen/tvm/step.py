"""The step function: all phases of a step in one parallel region with a barrier after each.

Memory is read fastest where a thread reads one stretch of it, so each thread has a consecutive share of a launch's
tasks. It claims them one by one, and when none is left claims tasks of the other shares: threads that are not equally
fast, or lose their core for a while, wait for each other no longer than for the task at hand. Which thread carries out
a task changes nothing in what the task computes.

Who wants to know how long each launch takes hands in memory for times: a thread notes one when it begins a phase, and
one behind each of the phase's launches.
"""

from collections.abc import Iterable

from nemoc.codegen.plan import Launch, StepFunction
from nemoc.codegen.tvm.claim import CLAIM, LINE
from nemoc.codegen.tvm.clock import MARK
from nemoc.codegen.tvm.writer import offset_text, size_text

_NAMES = frozenset(("memory", "times", "line", "thread", "threads", "B", "L", "C"))
"""What a step function calls its own."""


def step_source(step: StepFunction) -> str:
    """The text of a step function: `(arena pointers..., B, L, C, threads, times)`.

    Times are null, or a pointer to int64[threads, marks], where a phase has a mark more than launches. In memory of
    its own, rows of a line for each thread, it keeps the claims of each launch of a phase, in two sets of
    rows that phases use in turn, and in one more row the task that each thread is at.
    """
    assert not _NAMES.intersection(step.arenas), f"{step.name}: arenas are called {step.arenas}"
    most = max(map(len, step.phases), default=0)
    zeroed = len(step.phases[0]) if step.phases else 0
    marks = _Marks(len(step.launches) + len(step.phases))
    pointers = "".join(f"{a}: T.handle, " for a in step.arenas)
    text = f"""\
    @T.prim_func(s_tir=True)
    def {step.name}({pointers}B: T.int32, L: T.int32, C: T.int32, threads: T.int32, times: T.handle):
        with T.attr(0, "device_type", 1), T.attr(0, "device_id", 0):
            memory = T.alloc_buffer(({2 * most + 1} * threads * {LINE},), "int32")
            for line in range({zeroed} * threads):
                memory[line * {LINE}] = 0
            with T.attr(0, "pragma_parallel_launch_point", 1):
"""
    for number, launches in enumerate(step.phases):
        here, there = number % 2 * most, (number + 1) % 2 * most
        following = step.phases[number + 1] if number + 1 < len(step.phases) else ()
        text += _phase(launches, here, range(there, there + len(following)), 2 * most, marks)
    return text


def _phase(
    launches: Iterable[Launch], first: int, cleared: Iterable[int], at: int, marks: "_Marks"
) -> str:
    """A phase: loops that follow each other, so that a thread goes on while others are still at tasks of those before.

    Args:
        launches: of the phase.
        first: the row of claims of the first of them; those of the others follow.
        cleared: the rows of the next phase. They are those of the phase before, which all threads have left.
        at: the row of the tasks that threads are at.
        marks: where threads note the time.
    """
    begun = marks.next()
    clear = (f"{'':24}{_line(row, 'thread')} = 0\n" for row in cleared)
    loops = (_loop(n, row, at) + marks.next() for row, n in enumerate(launches, first))
    return f"""\
                with T.attr(0, "pragma_parallel_barrier_when_finish", 1):
                    for thread in T.parallel(threads):
{"".join((begun, *clear, *loops))}"""


def _loop(launch: Launch, row: int, at: int) -> str:
    kernel = launch.kernel
    pointers = ", ".join(
        a.arena
        if a.offset == 0
        else f"T.handle_add_byte_offset({a.arena}, {offset_text(a.offset)})"
        for a in launch.buffers
    )
    claims, task = _line(row, "0"), _line(at, "thread")
    claim = f"T.address_of({claims}), T.address_of({task}), {size_text(kernel.tasks)}"
    return f"""\
                        while T.call_extern("int32", "{CLAIM}", {claim}, thread, threads) != 0:
                            T.evaluate(Module.{kernel.name}({task}, {pointers}, B, L, C))
"""


class _Marks:
    """The marks of a step in order.

    Args:
        count: how many there are.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._made = 0

    def next(self) -> str:
        """The statement by which a thread notes the time."""
        at = f"thread * {self._count} + {self._made}"
        self._made += 1
        return f"""\
                        T.evaluate(T.call_extern("int32", "{MARK}", times, {at}))
"""


def _line(row: int, thread: str) -> str:
    """The first number of a thread's line in a row."""
    return f"memory[({row} * threads + {thread}) * {LINE}]"


def module_source(steps: Iterable[StepFunction]) -> str:
    """The text of a module: every distinct kernel once, in order of first use, then the steps."""
    steps = tuple(steps)
    kernels: dict[str, str] = {}
    for step in steps:
        for launch in step.launches:
            kernels.setdefault(launch.kernel.name, launch.kernel.source)
    parts = [*kernels.values(), *(step_source(step) for step in steps)]
    return "@I.ir_module\nclass Module:\n" + "\n".join(parts)
