"""The model as a readable, trainable eager PyTorch module: the meaning that everything else must meet.

Equal to transformers' `NemotronHForCausalLM` except where that disagrees with how the models were
trained: dt is never clamped (transformers' prefill clamps it to at least `time_step_min`, its
decode does not), and `attention_bias` and `tie_word_embeddings` are honoured.

Shapes use B batch, L new tokens, H hidden, V vocabulary, E experts, F their width, X what they read
and write. Parameters have the names that checkpoints have on disk
(`backbone.layers.0.mixer.in_proj.weight`), but for the routed experts, which are stacked:
`mixer.experts.up_proj` [E, F, X] and `mixer.experts.down_proj` [E, X, F]. `from_disk` and `to_disk`
translate.

What the published implementations compute in float32 is computed in float32 here, or in float64 when
the module's parameters are float64. Under `torch.autocast` the scan's matrix products follow
autocast; the router does not.
"""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nemoc.models.config import ModelConfig
from nemoc.models.mixers import Cache, Call, KeysValues, MambaState, RMSNorm, build_mixer, wide

__all__ = ["Cache", "KeysValues", "MambaState", "NemotronH", "from_disk", "to_disk"]


class Layer(nn.Module):
    """x + mixer(norm(x))."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = build_mixer(config, config.layers[index], index)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        out: Tensor = x + self.mixer(self.norm(x), call)
        return out


class Backbone(nn.Module):
    """Embedding, layers and the final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(len(config.layers)))
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)

    def forward(self, ids: Tensor, call: Call) -> Tensor:
        x: Tensor = self.embeddings(ids)
        for layer in self.layers:
            x = layer(x, call)
        normed: Tensor = self.norm_f(x)
        return normed


class NemotronH(nn.Module):
    """The whole model.

    Built under `torch.device("meta")` it takes no memory, whatever the size.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.backbone.embeddings.weight

    def forward(
        self, ids: Tensor, cache: Cache | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """The logits after each new token.

        Args:
            ids: New tokens, int64 [B, L], right-padded where rows differ in length.
            cache: State of the tokens before them; updated in place. None: there are none, and no
                state is kept.
            lengths: How many of a row's L tokens are real, int64 [B] on the device of ids, None for
                all. Logits at padding mean nothing.

        Returns:
            [B, L, V] float32 (float64 for a float64 module).
        """
        return wide(self.lm_head(self.hidden_states(ids, cache, lengths)))

    def hidden_states(
        self, ids: Tensor, cache: Cache | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """As `forward`, but what `lm_head` reads, [B, L, H]."""
        if cache is not None and cache.lengths is None:
            cache.lengths = torch.zeros(ids.shape[0], dtype=torch.int64, device=ids.device)
        hidden: Tensor = self.backbone(ids, Call(cache, lengths))
        if cache is not None and cache.lengths is not None:
            cache.lengths = cache.lengths + (ids.shape[1] if lengths is None else lengths)
        return hidden

    @torch.no_grad()
    def reset_parameters(self, seed: int, std: float = 0.02) -> None:
        """Random weights for training, as the family was initialised, from a seed.

        Matrices are normal with deviation `std`, those that write into the residual divided by
        √layers; A is 1 to heads; dt starts log-uniform in [0.001, 0.1].
        """
        random = torch.Generator().manual_seed(seed)
        outputs = ("out_proj.weight", "o_proj.weight", "down_proj", "down_proj.weight")
        for name, value in self.named_parameters():
            leaf = name.rpartition(".")[2]
            if leaf == "A_log":
                value.copy_(torch.arange(1, len(value) + 1).log())
            elif leaf == "dt_bias":
                low, high = math.log(1e-3), math.log(0.1)
                dt = torch.exp(torch.rand(len(value), generator=random) * (high - low) + low)
                value.copy_(dt + torch.log(-torch.expm1(-dt)))
            elif leaf == "D" or "norm" in name.split(".")[-2]:
                value.fill_(1.0)
            elif leaf == "bias":
                value.zero_()
            elif ".conv1d." in name:
                bound = value.shape[-1] ** -0.5
                value.copy_((torch.rand(value.shape, generator=random) * 2 - 1) * bound)
            else:
                depth = math.sqrt(len(self.config.layers)) if name.endswith(outputs) else 1.0
                value.copy_(torch.randn(value.shape, generator=random) * (std / depth))


def from_disk(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames a checkpoint's tensors to those of `NemotronH.state_dict`.

    Accepts the prefix `backbone.` or `model.`, experts one by one or stacked; drops `mtp.*`.
    """
    renamed: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, value in tensors.items():
        name = re.sub(r"^model\.", "backbone.", name).replace(".embedding.", ".embeddings.")
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name):
            experts.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = value
        elif not name.startswith("mtp."):
            renamed[name] = value
    for name, by_index in experts.items():
        renamed[name] = torch.stack([by_index[i] for i in range(len(by_index))])
    return renamed


def to_disk(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_disk`: names with `backbone.`, one tensor per expert and projection."""
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith((".experts.up_proj", ".experts.down_proj")):
            stem, _, projection = name.rpartition(".")
            tensors |= {f"{stem}.{i}.{projection}.weight": part for i, part in enumerate(value)}
        else:
            tensors[name] = value
    return tensors
