"""Quantized releases on disk, written once."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nemoc.models import open_model
from support.releases import RELEASES, Written


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    """All of `RELEASES`, by name; not to be changed."""
    written = {}
    for name, release in RELEASES.items():
        directory = tmp_path_factory.mktemp(name)
        dense = release.write(directory)
        written[name] = Written(release, directory, dense, open_model(directory))
    return written


@pytest.fixture(params=RELEASES)
def written(request: pytest.FixtureRequest, releases: dict[str, Written]) -> Written:
    """Each of them in turn."""
    return releases[request.param]


@pytest.fixture
def copy(releases: dict[str, Written], tmp_path: Path) -> Callable[[str], Path]:
    """Copies a release to damage it."""
    return lambda name: Path(shutil.copytree(releases[name].directory, tmp_path / "model"))
