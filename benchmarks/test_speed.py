"""Speed on `mid` with random weights, peers in one process: `make bench`.

pytest-benchmark times each engine by itself, for its tables and its comparison over time; the ratios that the project
promises are measured with the engines taking turns, by `benchmarks.compare`.
"""

from typing import Any

import pytest
import torch

from benchmarks.compare import load_engines, measure, prompt
from benchmarks.peers import Engine

PRESET, LENGTH, STEPS, THREADS = "mid", 256, 16, 2
ENGINES = ("transformers", "nemoc")


@pytest.fixture(scope="module")
def engines() -> dict[str, Engine]:
    """The engines, loaded once."""
    torch.set_num_threads(THREADS)
    return load_engines(PRESET, LENGTH, STEPS, THREADS, compiled=False)[0]


@pytest.mark.benchmark(group="prefill 256")
@pytest.mark.parametrize("name", ENGINES)
def test_prefill(benchmark: Any, engines: dict[str, Engine], name: str) -> None:
    ids = prompt(PRESET, LENGTH)
    benchmark.pedantic(engines[name].prefill, (ids,), rounds=5, warmup_rounds=1)


@pytest.mark.benchmark(group="decode 16 behind 256")
@pytest.mark.parametrize("name", ENGINES)
def test_decode(benchmark: Any, engines: dict[str, Engine], name: str) -> None:
    ids, token = prompt(PRESET, LENGTH), torch.tensor([1])

    def steps() -> None:
        for _ in range(STEPS):
            engines[name].decode(token)

    def prepare() -> None:
        engines[name].prefill(ids)

    benchmark.pedantic(steps, setup=prepare, rounds=5)


def test_decode_is_3_times_and_prefill_1_5_times_transformers(engines: dict[str, Engine]) -> None:
    rows = {row.engine: row for row in measure(engines, {}, PRESET, LENGTH, STEPS, rounds=5)}
    eager, ours = rows["transformers"], rows["nemoc"]
    assert ours.error < 1e-4
    assert eager.decode.median / ours.decode.median >= 3.0
    assert eager.prefill.median / ours.prefill.median >= 1.5
