"""What every test shares: the `--bless` switch, hypothesis made repeatable, sources for child processes."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

settings.register_profile(
    "nemoc", derandomize=True, deadline=None, max_examples=80, database=None, print_blob=False
)
settings.load_profile("nemoc")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bless", action="store_true", help="rewrite the expected output of golden tests"
    )


def pytest_configure() -> None:
    """Child processes import nemoc from the checkout, as this one does; garbage is looked for less often."""
    gc.set_threshold(10_000, 10, 50)
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled kernels are kept for one run, by all its workers, and the user's own are left alone."""
    folder = tmp_path_factory.getbasetemp().parent / "nemoc-cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEMOC_CACHE", str(folder))
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tests whose operations are far too small to share out; no gradients either."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def bless(request: pytest.FixtureRequest) -> bool:
    """Whether golden tests rewrite what they expect."""
    return bool(request.config.getoption("--bless"))
