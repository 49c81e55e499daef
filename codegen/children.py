"""Child processes that compile or run kernels: several at once, each request within limits of time and memory.

Compilers are C++ that may crash, hang or fill the memory, as kernels may; then the process is given up and another one
started for the requests that are left. Children see none of the variables by which a user's shell may change what
compilers do, and write to a folder of their own only.
"""

import json
import os
import re
import resource
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from nemoc.codegen.threads import usable_processors
from nemoc.ir.errors import NemocError


@dataclass(frozen=True)
class Children:
    """What processes run, and their limits.

    Attributes:
        command: what a process runs; the descriptor that it answers on is added.
        jobs: processes at a time; none: one for each core that this process may use.
        seconds: for each request, and for a process to start.
        bytes: of data that each process may have, and each one that it starts; none for no limit.
        what: what a process is, for messages.
        variables: of a process's environment, besides a few of this process's; `{folder}` stands for its folder.
    """

    command: tuple[str, ...]
    jobs: int | None = None
    seconds: float = 300.0
    bytes: int | None = 4 << 30
    what: str = "the compiler"
    variables: tuple[tuple[str, str], ...] = ()

    @property
    def processes(self) -> int:
        """The number of jobs."""
        return len(usable_processors()) if self.jobs is None else self.jobs


def answers(
    requests: Sequence[Mapping[str, Any]],
    setup: Mapping[str, Any],
    children: Children,
    folder: Path,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The answers of a `Pool` that is there for these requests only.

    Raises:
        NemocError: a process does not start.
    """
    with Pool(setup, children, folder) as pool:
        yield from pool.answers(requests)


def serve(
    start: Callable[[dict[str, Any]], Callable[[dict[str, Any]], Mapping[str, Any]]],
    ends: Callable[[Exception], bool] = lambda error: False,
) -> None:
    """Be such a process: answer on the descriptor that the first argument names, until standard input ends.

    Args:
        start: is given the setup, and gives what answers requests.
        ends: whether an error of a request ends the process, since no later one could be right.
    """
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    answers = os.fdopen(descriptor, "w", encoding="utf-8")

    def reply(content: Mapping[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    answer = start(json.loads(sys.stdin.readline()))
    reply({})
    for line in sys.stdin:
        try:
            reply(answer(json.loads(line)))
        except Exception as error:  # whatever is wrong with one request, the next may be right
            if ends(error):
                raise
            reply({"error": f"{type(error).__name__}: {error}".rstrip(": ")})


class _Child:
    """A process, and the request that it works on.

    Attributes:
        request: its number; none while the process starts.
        deadline: when it has to have answered.
    """

    def __init__(
        self, children: Children, setup: Mapping[str, Any], folder: Path, number: int
    ) -> None:
        self.request: int | None = None
        self.deadline = 0.0
        self._limits = children
        self._written = folder / f"{number}.txt"
        self._told = 0
        self._received = bytearray()
        self._answers, far_end = os.pipe()
        try:
            with self._written.open("wb") as written:
                self._process = subprocess.Popen(
                    (*children.command, str(far_end)),
                    stdin=subprocess.PIPE,
                    stdout=written,
                    stderr=written,
                    env=_environment(children, folder),
                    pass_fds=(far_end,),
                    start_new_session=True,  # so that its assembler can be ended with it
                )
        except OSError as error:
            os.close(self._answers)
            raise NemocError(
                f"{children.what} cannot be started: {error.strerror or error}"
            ) from None
        finally:
            os.close(far_end)
        if children.bytes is not None:
            _limit(self._process.pid, children.bytes)
        self._send(setup)

    def fileno(self) -> int:
        """Where answers arrive."""
        return self._answers

    def ask(self, number: int, request: Mapping[str, Any]) -> None:
        """Hand in the next request."""
        self.request = number
        self._told = self._written.stat().st_size
        self._send(request)

    def receive(self) -> dict[str, Any] | None:
        """The answer; none while it is incomplete.

        Raises:
            EOFError: there will be none.
        """
        part = os.read(self._answers, 1 << 20)
        if not part:
            raise EOFError
        self._received += part
        if not part.endswith(b"\n"):
            return None
        answer: dict[str, Any] = json.loads(self._received)
        self._received.clear()
        if "error" in answer:
            message = _lines(
                answer["error"]
            )  # of which the first line is Python's, often but a title
            telling = _about_error(self._complaint()) or _about_error(message[1:]) or message[-1]
            answer["error"] = self._explained(telling)
        return answer

    def end(self) -> str:
        """What became of a process that answers no more."""
        try:
            status = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return "closed its answers and went on"
        complaint = self._complaint() or ["it left no message"]
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        return self._explained(f"ended with {how}: {_about_error(complaint) or complaint[-1]}")

    def close(self) -> None:
        """End the process and those that it started."""
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it never read its last request
            self._process.stdin.close()
        os.close(self._answers)

    def _send(self, content: Mapping[str, Any]) -> None:
        self.deadline = time.monotonic() + self._limits.seconds
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: so have its answers, which `receive` finds
            self._process.stdin.write(json.dumps(content).encode() + b"\n")
            self._process.stdin.flush()

    def _complaint(self) -> list[str]:
        """What it wrote since the last request."""
        return _lines(self._written.read_bytes()[self._told :].decode(errors="replace"))

    def _explained(self, message: str, most: int = 300) -> str:
        """A message of moderate length, and the limit that was met."""
        if len(message) > most:
            message = message[: most - 3] + "..."
        if self._limits.bytes is not None and _MEMORY.search(message):
            message += f" (the limit is {self._limits.bytes >> 20} MiB)"
        return message


class Pool:
    """Processes that share out requests, and stay for more of them until the pool is closed.

    Args:
        setup: what each process is told first.
        children: how many processes, and their limits.
        folder: an empty folder for what they write.
    """

    def __init__(self, setup: Mapping[str, Any], children: Children, folder: Path) -> None:
        self._setup = setup
        self._children = children
        self._folder = folder
        self._requests: Sequence[Mapping[str, Any]] = ()
        self._waiting: deque[int] = deque()
        self._idle: list[_Child] = []
        self._running: set[_Child] = set()
        self._started = 0
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def answers(
        self, requests: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """The answers to requests as they come, each with the request's number; what they hold, the worker says.

        Where a process crashes or takes too long, the answer is its `error` and has `lost`; each `error` is one line.

        Args:
            requests: what to do, one after the other; all answers are taken before more is asked.

        Raises:
            NemocError: a process does not start.
        """
        self._requests, self._waiting = requests, deque(range(len(requests)))
        try:
            while self._waiting or self._running:
                self._start()
                earliest = min(child.deadline for child in self._running)
                for key, _ in self._selector.select(max(0.0, earliest - time.monotonic())):
                    yield from self._advance(key.fileobj)  # type: ignore[arg-type]
                now = time.monotonic()
                for child in [c for c in self._running if c.deadline <= now]:
                    yield self._lost(child, f"did not answer within {self._children.seconds:g} s")
        finally:
            # After an interrupt, say: what they would answer now is no answer to later requests.
            for child in tuple(self._running):
                self._drop(child)

    def close(self) -> None:
        """End all processes."""
        for child in (*self._running, *self._idle):
            self._drop(child)
        self._selector.close()

    def _start(self) -> None:
        """Give processes that are idle something to do, and start as many more as there is work for."""
        while self._waiting and self._idle:
            child = self._idle.pop()
            self._running.add(child)
            self._hand_on(child)
        starting = sum(child.request is None for child in self._running)
        room = self._children.processes - len(self._running)
        for _ in range(min(room, len(self._waiting) - starting)):
            child = _Child(self._children, self._setup, self._folder, self._started)
            self._started += 1
            self._running.add(child)
            self._selector.register(child, selectors.EVENT_READ)

    def _advance(self, child: _Child) -> Iterator[tuple[int, dict[str, Any]]]:
        """Take what a process has to say, and give it its next request."""
        try:
            answer = child.receive()
        except EOFError:
            yield self._lost(child, child.end())
            return
        if answer is None:
            return
        done = child.request
        if self._waiting:
            self._hand_on(child)
        else:
            self._running.remove(child)
            self._idle.append(child)
            child.request = None
        if done is not None:
            yield done, answer

    def _hand_on(self, child: _Child) -> None:
        number = self._waiting.popleft()
        child.ask(number, self._requests[number])

    def _lost(self, child: _Child, why: str) -> tuple[int, dict[str, Any]]:
        """Give up a process; the answer to its request."""
        self._drop(child)
        if child.request is None:
            raise NemocError(f"{self._children.what} does not start: it {why}")
        return child.request, {"error": f"{self._children.what} {why}", "lost": why}

    def _drop(self, child: _Child) -> None:
        self._selector.unregister(child)
        self._running.discard(child)
        if child in self._idle:
            self._idle.remove(child)
        child.close()


def _limit(process: int, size: int) -> None:
    """Let a process and those that it starts have so many bytes of data each: heap and private mappings, not libraries.

    A crash leaves no core file. Only Linux can be asked for this from outside.
    """
    if not hasattr(resource, "prlimit"):
        return
    with suppress(ProcessLookupError):  # it has ended already
        _, most = resource.prlimit(process, resource.RLIMIT_DATA)
        soft = size if most == resource.RLIM_INFINITY else min(size, most)
        resource.prlimit(process, resource.RLIMIT_DATA, (soft, most))
        resource.prlimit(process, resource.RLIMIT_CORE, (0, 0))


_KEPT = (
    "CUDA_DEVICE_ORDER",
    "CUDA_VISIBLE_DEVICES",
    "HOME",
    "LANG",
    "LD_LIBRARY_PATH",
    "PATH",
    "PYTHONHOME",
    "PYTHONPATH",
)
"""Variables that a process is given; none that changes what it compiles."""


def _environment(children: Children, folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name in _KEPT}
    own = {name: value.replace("{folder}", str(folder)) for name, value in children.variables}
    return kept | {"TMPDIR": str(folder)} | own


_TELLING = re.compile(r"error\s*:|what\(\)\s*:|assert", re.IGNORECASE)

_MEMORY = re.compile(r"MemoryError|bad_alloc|out of memory|memory exhausted", re.IGNORECASE)


def _lines(text: str) -> list[str]:
    """The lines of a message; what Triton gives to repeat a failure with is no part of it."""
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("Repro command:")]


def _about_error(lines: Sequence[str]) -> str:
    """The first line that is about an error, which others follow from; empty where none is."""
    return next((line for line in lines if _TELLING.search(line)), "")
