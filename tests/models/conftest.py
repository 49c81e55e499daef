"""Models that several files of tests read."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from nemoc.models import ModelConfig, open_model
from support.checkpoints import write_checkpoint
from support.gguf_files import SHAPES, Source
from support.quantized import WIDE
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


@pytest.fixture(scope="module")
def gguf_sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """Models of `SHAPES`, f32."""
    found = {}
    for name, changes in SHAPES.items():
        directory = tmp_path_factory.mktemp(name)
        write_checkpoint(directory, **(WIDE | changes))
        config = replace(ModelConfig.from_file(directory), mtp_layers=(), chunk_size=128)
        tensors = load_file(directory / "model.safetensors")
        found[name] = replace(config, num_nextn_predict_layers=0, bos_token_id=None), tensors
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a GGUF file is to be."""
    return tmp_path / "model.gguf"
