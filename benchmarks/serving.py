"""Engines in processes of their own: a request is a line of JSON on stdin, its answer one on stdout.

An engine is an object whose methods take and return JSON data. Nothing here needs more than Python, so that an engine
may live in another environment than nemoc's.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.watch import AnonymousPeak, anonymous_bytes

ROOT = Path(__file__).parent.parent


class EngineError(Exception):
    """What an engine could not do; one line."""


def serve(engine: Callable[[], object]) -> None:
    """Answer requests until there are no more.

    What is printed meanwhile goes to stderr. The request `peak` ends the watch over this process's memory, so that
    watching disturbs nothing that is timed later, and answers with two numbers of bytes: anonymous memory before the
    first request, and the most since.

    Args:
        engine: makes the engine.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with contextlib.ExitStack() as watch:
        served = engine()
        before = anonymous_bytes()
        peak = watch.enter_context(AnonymousPeak())
        for line in sys.stdin:
            name, arguments = json.loads(line)
            try:
                if name == "peak":
                    watch.close()
                    result: Any = [before, peak.bytes]
                else:
                    result = getattr(served, name)(**arguments)
                answer = {"result": result}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
            print(json.dumps(answer), file=answers, flush=True)


class Served:
    """An engine in a process of its own, as the process that asks sees it; ends with a `with` block.

    Once it has answered it is stopped until it is asked again: threads that go on spinning for a while, as those of
    several engines do, would take processors from whoever is measured next.

    Args:
        module: of this package; it is run.
        python: the interpreter that runs it.
    """

    def __init__(self, module: str, python: str | Path = sys.executable) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the engine
        self._process = subprocess.Popen(
            [str(python), "-m", f"benchmarks.{module}"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    def call(self, name: str, **arguments: Any) -> Any:
        """What the engine's method returns.

        Raises:
            EngineError: it raised something, or the process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = ""
        self._process.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps([name, arguments]), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        if not line:
            raise EngineError(self._last_words())
        self._process.send_signal(signal.SIGSTOP)
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer["result"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()  # closes stdin, which ends it
        self._errors.close()

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines: Sequence[str] = self._errors.read().strip().splitlines() or ("no message",)
        return f"ended with code {code}: {lines[-1]}"
