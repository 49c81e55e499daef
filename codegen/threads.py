"""The processors of this process, and the threads of TVM's pool, whether they run a program or a kernel alone."""

import os
from collections.abc import Callable
from typing import Any

SHARE_CORES, ONE_CORE_EACH = -3, -2
"""TVM's thread pool modes in which threads may run on any of the given cores, or each stays on one of them; without
cores it may put all threads on one."""


def let_idle_threads_sleep() -> None:
    """Have threads without work sleep after 1,000 yields, unless the environment says otherwise.

    To be called before the pool is made. TVM's own number is 300,000: on cores that others keep busy a yield takes
    milliseconds, and the process does not end before its threads are through with theirs.
    """
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "1000")


def usable_processors() -> list[int]:
    """Numbers of the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def use_threads(
    find: Callable[[str], Callable[..., Any]], count: int, mode: int = SHARE_CORES
) -> int:
    """Have what the calling thread runs share so many threads, on the cores that this process may use.

    Args:
        find: finds TVM's functions by name. TVM keeps a pool for each thread that calls it.
        count: how many threads are wanted.
        mode: of TVM's pool.

    Returns:
        How many there are: no more than processors, or than the environment allows.
    """
    processors = [str(processor) for processor in usable_processors()]
    find("runtime.config_threadpool")(mode, min(count, len(processors)), processors)
    return int(find("runtime.NumThreads")())
