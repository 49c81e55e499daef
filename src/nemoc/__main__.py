"""The command `nemoc`: runs the command line and turns errors into one line and an exit code.

Exit codes: 0 all well, or nobody reads the output any more; 1 the command ran and its answer is no (a check missed its
bound); 2 bad input; 70 an error in nemoc itself; 130 interrupted; 143 terminated.
"""

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TextIO

import click

from nemoc.cli import Session, nemoc


class _Terminated(BaseException):
    """The process was asked to end: raised like an interrupt, so that temporary files are removed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (the process's own by default) and return its exit code."""
    session, stdout = Session(), sys.stdout
    try:
        with _ended_by_sigterm():
            result = nemoc.main(arguments, prog_name="nemoc", obj=session, standalone_mode=False)
        if stdout is not None:  # as it is where the process was started without one
            stdout.flush()
    except _Terminated:
        print("nemoc: terminated", file=sys.stderr)
        return 143
    except (KeyboardInterrupt, click.Abort):
        print("nemoc: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return _unread(stdout)
    except SystemExit as error:
        # So rich ends on a broken pipe, and click, which puts another stdout in its place.
        if isinstance(error.__context__, BrokenPipeError) or sys.stdout is not stdout:
            return _unread(stdout)
        raise
    except Exception as error:
        return _report(error, session)
    return result if isinstance(result, int) else 0


def _unread(stdout: TextIO | None) -> int:
    """Whoever read the output has gone (`nemoc ir ... | head`): Python must not write to it at exit."""
    if stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
    return 0


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Raise `_Terminated` on SIGTERM; a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise _Terminated

    former = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if former is None else former)


def _report(error: Exception, session: Session) -> int:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        print(error.format_message(), file=sys.stderr)
        return 2
    if isinstance(error, click.ClickException):
        message, code, debug = f"error: {_one_line(error.format_message())}", 2, session.debug
    else:
        message, code, debug = _explain(error, session)
    if debug:
        traceback.print_exception(error)
    print(f"nemoc: {message}", file=sys.stderr)
    return code


def _explain(error: Exception, session: Session) -> tuple[str, int, bool]:
    """What to say of an error, the exit code, and whether to show where it was raised."""
    # Here, not above: these load torch, and help and usage errors do without.
    from nemoc.ir.errors import NemocError  # noqa: PLC0415
    from nemoc.options import read_options  # noqa: PLC0415

    try:
        debug = session.debug or read_options().debug
    except NemocError:
        debug = session.debug
    if isinstance(error, NemocError):
        return f"error: {_one_line(str(error))}", 2, debug
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"error: {where}{error.strerror or _one_line(str(error))}", 2, debug
    what = _one_line(f"{type(error).__name__}: {error}")
    return f"internal error: {what} (--debug shows where; please report it)", 70, debug


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
