"""Child processes that answer requests."""

import sys
from pathlib import Path

import pytest

from nemoc.codegen.children import Children, Pool

ECHO = """
import json, os, sys, time
answers = os.fdopen(int(sys.argv[1]), "w")
def reply(content):
    answers.write(json.dumps(content) + chr(10))
    answers.flush()
sys.stdin.readline()
reply({})
for line in sys.stdin:
    request = json.loads(line)
    time.sleep(request.get("seconds", 0))
    reply(request if "error" not in request else {"error": request["error"]})
"""


def echo(folder: Path, **limits: int | None) -> Children:
    script = folder / "echo.py"
    script.write_text(ECHO)
    return Children((sys.executable, str(script)), jobs=1, **limits)  # type: ignore[arg-type]


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
