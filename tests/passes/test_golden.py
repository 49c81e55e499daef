"""Golden tests: a graph, a pipeline, and exactly what it gives.

`tests/golden/passes/<pass>/<case>.ir` holds `// run: --passes=...`, the input, a line `// ---`, and the
expected output. `pytest --bless` writes the output; read the difference before you keep it. Each case also goes
through the numeric check.
"""

from pathlib import Path

import pytest

from nemoc.ir import parse
from nemoc.ir.rewrite import Rule
from nemoc.passes import PASSES, PassContext, parse_pipeline, run_pipeline
from nemoc.passes.canonicalize import RULES
from nemoc.passes.check import NumericCheck

FOLDER = Path(__file__).parent.parent / "golden" / "passes"
CASES = sorted(FOLDER.glob("*/*.ir"))
SEPARATOR = "// ---\n"
HEADER = "// run: --passes="


def _snake(name: str) -> str:
    return name.replace("-", "_")


@pytest.mark.parametrize("case", CASES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_golden(case: Path, bless: bool) -> None:
    text = case.read_text()
    given, _, expected = text.partition(SEPARATOR)
    header = given.splitlines()[0]
    assert header.startswith(HEADER), f"{case.name} must start with {HEADER!r}"
    passes = parse_pipeline(header.removeprefix(HEADER))
    assert any(_snake(p.name) == case.parent.name for p in passes)
    result = run_pipeline(parse(given, case.name), passes, PassContext(), check=NumericCheck())
    if bless:
        case.write_text(given + SEPARATOR + str(result))
    else:
        assert str(result) == expected
    assert parse(str(result)) == result


def test_every_rule_has_a_case() -> None:
    cases = {path.stem for path in (FOLDER / "canonicalize").glob("*.ir")}
    missing = {rule.name for rule in RULES} - cases
    assert not missing, f"no tests/golden/passes/canonicalize/*.ir for {sorted(missing)}"


def test_every_pass_has_a_case() -> None:
    assert {_snake(p.name) for p in PASSES} <= {path.parent.name for path in CASES}


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_case_needs_its_rule(rule: Rule) -> None:
    """Without its rule a case comes out otherwise, so each case shows its rule at work."""
    given, _, expected = (
        (FOLDER / "canonicalize" / f"{rule.name}.ir").read_text().partition(SEPARATOR)
    )
    passes = parse_pipeline(f"canonicalize{{without=[{rule.name}]}},dce")
    assert run_pipeline(parse(given), passes, PassContext()) != parse(expected)
