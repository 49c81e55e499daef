"""Muon for the matrices inside the layers, AdamW for everything else.

Muon (Jordan et al., 2024) replaces a matrix's momentum by its nearest orthogonal matrix, computed
with a few Newton-Schulz steps. At this size it reaches a given loss in clearly fewer tokens than
AdamW, which matters more than its cost of a few per cent.
"""

import torch
from torch import Tensor, nn

_MUON_RATE, _MUON_DECAY = 0.02, 0.03
_ADAM_RATE = 3e-3


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; the last two axes of a parameter are its matrix."""

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(param)
                momentum = state["momentum"].lerp_(param.grad, 1 - group["momentum"])
                update = orthogonalize(param.grad.lerp(momentum, group["momentum"]))
                rows, columns = param.shape[-2:]
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonalize(matrix: Tensor) -> Tensor:
    """U·Vᵀ of each matrix U·S·Vᵀ in [..., m, n], to about 15 %, by five Newton-Schulz steps."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x: Tensor = matrix.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(matrix.dtype)


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """The optimizers of all parameters, each with its peak rate in every group's `peak`."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, param in model.named_parameters():
        inner = ".mixer." in name and param.dim() >= 2
        is_matrix = inner and "conv1d" not in name and "gate" not in name
        (matrices if is_matrix else rest).append(param)
    built: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=_MUON_RATE, weight_decay=_MUON_DECAY),
        torch.optim.AdamW(rest, lr=_ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.01),
    ]
    for optimizer in built:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return built
