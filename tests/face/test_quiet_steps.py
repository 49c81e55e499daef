"""What runs between steps of the cpu target leaves no threads behind that take the processors from the next step."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import nemoc
from support.checkpoints import BASE, write_checkpoint

if importlib.util.find_spec("tvm") is None:
    pytest.skip("needs apache-tvm", allow_module_level=True)

SCRIPT = """
import sys

import numpy as np
import psutil
import torch

import nemoc
from nemoc.runtime.sampling import Sampler

def threads():
    return psutil.Process().num_threads()

torch.set_num_threads(4)
executable = nemoc.load(sys.argv[1], threads=1)
before = threads()
state = executable.new_state()
assert state.arena.numel() > 1 << 22
state.clone().reset()
ids = torch.tensor([[5, 6, 7]])
executable.generate(ids, 4, state=state, temperature=0.8, top_p=0.9, seed=1)
logits = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 1 << 17), np.float32))
for temperature in (0.0, 0.8):
    Sampler(1, temperature, 0.9, seed=1).sample(logits)
after = threads()
assert after <= before + 1, (before, after)  # one that TVM begins with
torch.zeros(1 << 22)  # such a thing as none of that may do
assert threads() == after + 3, (after, threads())
print("ok")
"""


def test_states_and_sampling_wake_none_of_torchs_threads(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", **BASE)
    executable = nemoc.compile(tmp_path / "model", target="cpu", max_context=1 << 17)
    executable.save(tmp_path / "model.nemoc")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "model.nemoc")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "ok", done.stderr
