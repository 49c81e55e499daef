"""Settings from the environment."""

from pathlib import Path

import pytest

from nemoc.ir import NemocError
from nemoc.options import Options, read_options

ROOT = Path(__file__).resolve().parents[2]


def test_nothing_set_means_the_defaults() -> None:
    assert read_options({"PATH": "/bin"}) == Options()
    assert read_options({"NEMOC_THREADS": "", "NEMOC_PLUGINS": ""}) == Options()


def test_each_variable_is_read() -> None:
    environment = {"NEMOC_THREADS": "3", "NEMOC_PLUGINS": "mine, yours,", "NEMOC_DEBUG": "1"}
    environment["NEMOC_CACHE"] = "/somewhere"
    expected = Options(3, ("mine", "yours"), debug=True, cache=Path("/somewhere"))
    assert read_options(environment) == expected


def test_the_cache_is_where_the_desktop_wants_it() -> None:
    assert read_options({"XDG_CACHE_HOME": "/fast"}).cache == Path("/fast/nemoc")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NEMOC_THREADS", "0"),
        ("NEMOC_THREADS", "-1"),
        ("NEMOC_THREADS", "two"),
        ("NEMOC_THREADS", "9" * 5000),
        ("NEMOC_THREADS", "0" * 5000 + "1"),
        ("NEMOC_DEBUG", "yes"),
        ("NEMOC_THREAD", "2"),
    ],
)
def test_a_wrong_setting_is_named(name: str, value: str) -> None:
    with pytest.raises(NemocError, match=name):
        read_options({name: value})


def test_only_options_reads_the_environment() -> None:
    allowed = ROOT / "src/nemoc/options.py"
    folders = ("src/nemoc", "ir", "models", "passes", "codegen", "runtime", "autotune")
    readers = [
        path
        for folder in folders
        for path in sorted((ROOT / folder).glob("**/*.py"))
        if path != allowed
        and any(w in path.read_text() for w in ("environ.get", "environ[", "getenv"))
    ]
    assert readers == []


def test_the_readme_lists_every_setting() -> None:
    text = (ROOT / "README.md").read_text()
    for field in Options.__dataclass_fields__:
        assert f"`NEMOC_{field.upper()}`" in text
