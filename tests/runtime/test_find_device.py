"""Which CUDA device runs an artifact, without one at hand."""

import pytest
import torch

from nemoc.ir import NemocError
from nemoc.runtime import cuda_device


@pytest.mark.parametrize(
    ("target", "found", "runs"),
    [
        ("cuda:sm_80", (8, 0), True),
        ("cuda:sm_80", (8, 9), True),
        ("cuda:sm_86", (8, 0), False),
        ("cuda:sm_80", (9, 0), False),
        ("cuda:sm_90", (9, 0), True),
        ("cuda:sm_90", (10, 0), False),
        ("cuda:sm_100", (10, 0), True),
        ("cuda:sm_100", (10, 3), False),
        ("cuda:sm_120", (12, 0), True),
    ],
)
def test_code_runs_on_devices_of_its_kind(target: str, found: tuple[int, int], runs: bool) -> None:
    assert cuda_device._runs(cuda_device._capability(target, "x"), found) is runs


def test_a_device_that_fits_is_found_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = {0: (8, 0), 1: (9, 0), 2: (9, 0)}
    monkeypatch.setattr(cuda_device, "_capabilities", lambda: devices)
    monkeypatch.setattr(cuda_device, "CudaDevice", lambda index: index)
    for current, expected in ((0, 1), (1, 1), (2, 2)):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        assert cuda_device.find_device("cuda:sm_90", "x") == expected
    with pytest.raises(NemocError, match="x: target is 'cuda:sm_9', expected one such as"):
        cuda_device.find_device("cuda:sm_9", "x")


def test_the_model_is_that_of_the_device_that_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = {0: (8, 0), 1: (9, 0), 2: (9, 0)}
    monkeypatch.setattr(cuda_device, "_capabilities", lambda: devices)
    monkeypatch.setattr(cuda_device, "CudaDevice", lambda index: index)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    for current, expected in ((0, 1), (1, 1), (2, 2)):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        assert cuda_device.device_at_hand("cuda:sm_90") == (expected, f"GPU {expected}")
        assert cuda_device.find_device("cuda:sm_90", "x") == expected
    assert cuda_device.device_at_hand("cuda:sm_100") is None


@pytest.mark.parametrize(
    "target", ["", "cpu", "reference", "hip:gfx942", "cuda", "cuda:", "cuda:sm_9", "cuda:sm_90a"]
)
def test_what_names_no_cuda_device_has_no_model(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_device, "_capabilities", lambda: {0: (9, 0)})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU")
    assert cuda_device.device_at_hand("cuda:sm_90") == (0, "GPU")
    assert cuda_device.device_at_hand(target) is None


def test_without_devices_there_is_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*index: int) -> None:
        raise RuntimeError("no CUDA GPUs are available")

    monkeypatch.setattr(cuda_device, "_capabilities", dict)
    monkeypatch.setattr(torch.cuda, "current_device", refuse)
    monkeypatch.setattr(torch.cuda, "get_device_name", refuse)
    assert cuda_device.device_at_hand("cuda:sm_90") is None
