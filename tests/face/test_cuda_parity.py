"""Models compiled for the NVIDIA GPU of this machine, against transformers in float32 and against their own graphs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu_session import find_target

import nemoc
from nemoc.models import open_model
from nemoc.passes.check import relative_error
from nemoc.verification import NARROW_BOUND, model_rows, verify_artifact
from support.checkpoints import VARIANTS, write_checkpoint
from support.parity import CAPACITY, Pair, ParityWithTransformers, tokens

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU, which torch does not find here", allow_module_level=True)

TARGET = find_target(torch.cuda.get_device_capability())

ROUNDED_BOUND = 2 * NARROW_BOUND
"""The same for weights larger than trained ones, which make more of a number that is rounded the other way."""


def write(folder: Path, variant: str, dtype: torch.dtype) -> Any:
    """A variant's checkpoint, as for other targets; returns transformers' model in float32."""
    seed = 100 + list(VARIANTS).index(variant)
    return write_checkpoint(folder, seed=seed, dtype=dtype, **VARIANTS[variant])


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda name: name.replace(" ", "-"))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A transformers model, and its checkpoint compiled for the device, both in float32."""
    folder = tmp_path_factory.mktemp("checkpoint")
    reference = write(folder, request.param, torch.float32)
    executable = nemoc.compile(
        str(folder), target=TARGET, dtype="f32", max_batch=3, max_context=CAPACITY
    )
    return reference, executable


@pytest.fixture(scope="module", params=["f32", "bf16"])
def sample(request: pytest.FixtureRequest) -> nemoc.Executable:
    """The sample model in both types."""
    return nemoc.compile("sample", target=TARGET, dtype=request.param, max_batch=2, max_context=128)


class TestOnTheGpu(ParityWithTransformers):
    """Every variant, compiled for the device."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_rounded_is_rounded_as_in_the_graphs(variant: str, tmp_path: Path) -> None:
    write(tmp_path, variant, torch.bfloat16)
    executable = nemoc.compile(
        str(tmp_path), target=TARGET, dtype="bf16", max_batch=2, max_context=CAPACITY
    )
    rows = verify_artifact(executable.folder).rows
    assert len(rows) == 7
    for row in rows:
        assert row.error <= max(row.bound, ROUNDED_BOUND), row


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_the_sample_equals_eager_torch(dtype: str) -> None:
    model = open_model("sample")
    executable = nemoc.compile(model, target=TARGET, dtype=dtype, max_batch=2, max_context=64)
    for row in model_rows(executable, model):
        assert row.ok, row


def test_the_sample_continues_as_the_interpreter_does() -> None:
    on_device = nemoc.compile("sample", target=TARGET, dtype="f32", max_context=128)
    interpreted = nemoc.compile("sample", target="reference", dtype="f32", max_context=128)
    prompt = "import torch\n\n\ndef "
    ids = torch.tensor([on_device.tokenizer.encode(prompt)])
    found = on_device.generate(ids, 48)
    assert torch.equal(found, interpreted.generate(ids, 48))


def test_recorded_decodes_have_the_bits_of_launched_ones(sample: nemoc.Executable) -> None:
    start = sample.new_state(2)
    sample.prefill(tokens(2, 9), start)
    state = start.clone()
    results = []
    for _ in range(4):  # launched, recorded and replayed, replayed, replayed
        state.arena.copy_(start.arena)
        logits = sample.decode(torch.tensor([5, 6]), state)
        results.append((logits, state.arena.clone()))
    for logits, arena in results[1:]:
        assert torch.equal(logits, results[0][0])
        assert torch.equal(arena, results[0][1])


def test_a_batch_has_the_logits_of_its_rows(sample: nemoc.Executable) -> None:
    ids = tokens(2, 40, seed=5)
    together = sample.prefill(ids, sample.new_state(2))
    for row in range(2):
        alone = sample.prefill(ids[row : row + 1], sample.new_state())
        assert relative_error(together[row : row + 1], alone) <= NARROW_BOUND
