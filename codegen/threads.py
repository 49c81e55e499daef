"""What holds for the threads of TVM's pool, whether they run a program or a kernel alone."""

import os


def let_idle_threads_sleep() -> None:
    """Have threads without work sleep after 1,000 yields, unless the environment says otherwise.

    To be called before the pool is made. TVM's own number is 300,000: on cores that others keep busy a yield takes
    milliseconds, and the process does not end before its threads are through with theirs.
    """
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "1000")
