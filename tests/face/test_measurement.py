"""The bytes that `nemoc bench` says a decoded token moves, against what lies in checkpoints."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import nemoc
from nemoc.ir import NemocError
from nemoc.measurement import decode_bytes
from nemoc.models import open_model
from nemoc.models.release import LAYOUTS, Layout, write_release
from support.checkpoints import BASE, write_checkpoint
from support.quantized import WIDE

CACHED = 24
MODEL = BASE | WIDE | {"moe_latent_size": None}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bf16; not to be changed."""
    folder = tmp_path_factory.mktemp("plain")
    write_checkpoint(folder, dtype=torch.bfloat16, **MODEL)
    return folder


@pytest.fixture(scope="module")
def artifact(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint compiled, its weights as they lie there; not to be changed."""
    path = tmp_path_factory.mktemp("artifact") / "plain.nemoc"
    _compile(plain, "canonicalize,dce").save(path)
    return path


def _read(checkpoint: Path) -> float:
    """Bytes of a checkpoint that a token reads: one row of embeddings, the chosen experts, all else."""
    total = 0.0
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        share = 1.0
        if ".experts." in name:
            share = MODEL["num_experts_per_tok"] / MODEL["n_routed_experts"]
        elif "embeddings" in name:
            share = 1 / MODEL["vocab_size"]
        total += share * tensor.nbytes
    return total


def _moved(checkpoint: Path) -> float:
    """Bytes of the state of one row that a token reads and writes, its history and its cache."""
    graph = open_model(checkpoint).build_step()
    total = 0.0
    for state in graph.states:
        once = int(state.type.substitute({"B": 1, "C": CACHED}).bytes)
        total += once if state.name.endswith((".k", ".v")) else 2 * once
    return total


def _compile(checkpoint: Path, passes: str) -> nemoc.Executable:
    return nemoc.compile(checkpoint, target="reference", pipeline=passes, max_context=64)


def test_a_token_moves_its_share_of_the_weights_and_the_state(plain: Path, artifact: Path) -> None:
    found = decode_bytes(nemoc.load(artifact), CACHED)
    assert found == pytest.approx(_read(plain) + _moved(plain), rel=5e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantized_weights_count_as_their_codes_and_scales(
    plain: Path, layout: Layout, tmp_path: Path
) -> None:
    write_release(open_model(plain), tmp_path, layout)
    found = decode_bytes(_compile(tmp_path, "canonicalize,dce"), CACHED)
    assert found == pytest.approx(_read(tmp_path) + _moved(plain), rel=5e-3)
    assert _read(tmp_path) < 0.6 * _read(plain)


def test_weights_unpacked_at_build_count_as_numbers(plain: Path, tmp_path: Path) -> None:
    write_release(open_model(plain), tmp_path, "modelopt")
    packed = decode_bytes(_compile(tmp_path, "canonicalize,dce"), CACHED)
    unpacked = decode_bytes(_compile(tmp_path, "canonicalize,fold-constants,dce"), CACHED)
    assert packed is not None
    assert unpacked is not None
    assert unpacked > 2 * packed


def test_fusions_change_next_to_nothing_of_what_has_to_be_moved(
    plain: Path, artifact: Path
) -> None:
    passes = "canonicalize,dce,fuse-conv-scan,fuse-moe-dispatch,fuse-epilogues,fuse-rows"
    found = decode_bytes(_compile(plain, passes), CACHED)
    assert found == pytest.approx(decode_bytes(nemoc.load(artifact), CACHED), rel=5e-3)


def test_ops_that_nemoc_does_not_have_are_not_guessed_at(artifact: Path, tmp_path: Path) -> None:
    executable = nemoc.load(shutil.copytree(artifact, tmp_path / "own.nemoc"))
    graph = executable.folder / "graphs" / "decode.ir"
    graph.write_text(graph.read_text().replace("rms_norm(", "norm_of_my_own("))
    assert decode_bytes(executable, CACHED) is None


def test_an_artifact_that_is_gone_is_said_to_be(artifact: Path, tmp_path: Path) -> None:
    executable = nemoc.load(shutil.copytree(artifact, tmp_path / "gone.nemoc"))
    shutil.rmtree(executable.folder)
    with pytest.raises(NemocError, match=r"decode.*cannot be read"):
        decode_bytes(executable, CACHED)
