"""The repository's shape: links that packaging relies on, and a documented public face."""

import inspect
from pathlib import Path

import pytest

import nemoc

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("autotune", "codegen", "ir", "models", "passes", "runtime")


@pytest.mark.parametrize("room", ROOMS)
def test_each_room_is_linked_into_the_package(room: str) -> None:
    link = ROOT / "src" / "nemoc" / room
    assert link.is_symlink(), "git was told not to make links (core.symlinks)"
    assert link.readlink() == Path("../..") / room
    assert link.resolve() == ROOT / room
    assert (link / "__init__.py").is_file()


@pytest.mark.parametrize("name", nemoc.__all__)
def test_public_names_exist_and_are_documented(name: str) -> None:
    value = getattr(nemoc, name)
    assert isinstance(value, str) or inspect.getdoc(value)


def test_public_methods_are_documented() -> None:
    for cls in (nemoc.Executable, nemoc.State):
        for name, member in inspect.getmembers(cls):
            if not name.startswith("_"):
                assert inspect.getdoc(member), f"{cls.__name__}.{name}"


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'compil'"):
        nemoc.compil  # noqa: B018


def test_names_are_listed() -> None:
    assert set(nemoc.__all__) <= set(dir(nemoc))


def test_every_module_says_what_it_is_for() -> None:
    folders = ("src/nemoc", *ROOMS)
    for path in (p for f in folders for p in sorted((ROOT / f).glob("**/*.py"))):
        assert path.read_text().startswith(('"""', 'r"""')), path
