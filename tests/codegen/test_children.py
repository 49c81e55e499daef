"""Child processes that answer requests."""

import sys
from pathlib import Path

import pytest

import nemoc
from nemoc.codegen.children import Children, Pool

ECHO = """
import time
from nemoc.codegen.children import serve

def answer(request):
    time.sleep(request.get("seconds", 0))
    if "fatal" in request:
        raise SystemError(request["fatal"])
    return request if "error" not in request else {"error": request["error"]}

serve(lambda setup: answer, ends=lambda error: isinstance(error, SystemError))
"""


def echo(folder: Path, **limits: int | None) -> Children:
    script = folder / "echo.py"
    script.write_text(ECHO)
    found = ("PYTHONPATH", str(Path(nemoc.__file__).parents[1]))
    command = (sys.executable, str(script))
    return Children(command, jobs=1, variables=(found,), **limits)  # type: ignore[arg-type]


def test_answers_after_an_interrupt_are_those_of_later_requests(tmp_path: Path) -> None:
    with Pool({}, echo(tmp_path), tmp_path) as pool:
        interrupted = pool.answers([{"first": 1, "seconds": 0}, {"never": 1, "seconds": 30}])
        assert next(interrupted) == (0, {"first": 1, "seconds": 0})
        with pytest.raises(KeyboardInterrupt):
            interrupted.throw(KeyboardInterrupt)
        assert list(pool.answers([{"later": 2}])) == [(0, {"later": 2})]


@pytest.mark.parametrize(("limit", "told"), [(1 << 30, " (the limit is 1024 MiB)"), (None, "")])
def test_a_limit_is_named_where_there_is_one(tmp_path: Path, limit: int | None, told: str) -> None:
    with Pool({}, echo(tmp_path, bytes=limit), tmp_path) as pool:
        ((_, answer),) = pool.answers([{"error": "out of memory"}])
    assert answer["error"] == "out of memory" + told


def test_an_error_is_an_answer_unless_it_ends_the_process(tmp_path: Path) -> None:
    with Pool({}, echo(tmp_path), tmp_path) as pool:
        for request, lost in (({"seconds": "many"}, False), ({"fatal": "gone"}, True)):
            ((_, answer),) = pool.answers([request])
            assert ("TypeError" in answer["error"]) is not lost
            assert ("lost" in answer) is lost
        assert list(pool.answers([{"later": 2}])) == [(0, {"later": 2})]
