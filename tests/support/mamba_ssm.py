"""mamba-ssm's kernels in torch, with the signatures that its own have."""

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F


def kernels_in_torch(module: str) -> ModuleType:
    """Stands for mamba-ssm's modules."""
    found = ModuleType(module)
    found.mamba_chunk_scan_combined = _scan  # type: ignore[attr-defined]
    found.selective_state_update = _update  # type: ignore[attr-defined]
    return found


def _recurrence(x: Any, dt: Any, a: Any, b: Any, c: Any, d: Any, state: Any) -> Any:
    """One token as mamba-ssm's kernels define it, in float32: y [B, H, P] and the next state [B, H, P, N].

    x [B, H, P], dt [B, H], a and d [H], b and c [B, G, N], state [B, H, P, N].
    """
    b, c = (each.float().repeat_interleave(x.shape[1] // b.shape[1], 1) for each in (b, c))
    decay = torch.exp(dt * a)[..., None, None]
    state = decay * state + (dt[..., None] * x.float())[..., None] * b[:, :, None]
    return (state * c[:, :, None]).sum(-1) + d[:, None] * x.float(), state


def _scan(
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    chunk_size: int,
    D: Any = None,
    z: Any = None,
    dt_bias: Any = None,
    initial_states: Any = None,
    dt_softplus: bool = False,
    return_final_states: bool = False,
) -> Any:
    """`mamba_chunk_scan_combined` of mamba-ssm: x [B, L, H, P], dt [B, L, H], B and C [B, L, G, N]."""
    assert dt_softplus
    assert return_final_states
    steps, state, parts = F.softplus(dt.float() + dt_bias), initial_states, []
    for t in range(x.shape[1]):
        y, state = _recurrence(x[:, t], steps[:, t], A, B[:, t], C[:, t], D, state)
        parts.append(y * F.silu(z[:, t].float()))
    return torch.stack(parts, 1).to(x.dtype), state


def _update(
    state: Any,
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    dt_bias: Any = None,
    dt_softplus: bool = False,
) -> Any:
    """`selective_state_update` of mamba-ssm: x, dt and z [B, H, P], A [H, P, N], D and dt_bias [H, P]."""
    assert dt_softplus
    heads, width = x.shape[1:]
    assert (dt.shape, A.shape) == (x.shape, (heads, width, state.shape[-1]))
    assert D.shape == dt_bias.shape == (heads, width)
    steps = F.softplus(dt.float() + dt_bias)[..., 0]
    y, following = _recurrence(x, steps, A[:, 0, 0], B, C, D[:, 0], state)
    state.copy_(following)
    return (y * F.silu(z.float())).to(x.dtype)
