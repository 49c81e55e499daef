"""Checkpoints of `nemoc quantize` in transformers: `python -m benchmarks.checkpoint_logits`.

Needs compressed-tensors beside nemoc and transformers. A model of dense layers with random weights is written by
transformers, quantized by nemoc, and loaded by transformers with compressed-tensors' decompression; its logits are
held against nemoc's run of the same checkpoint. compressed-tensors decompresses to bf16 whatever is asked for, so
nemoc's weights are rounded to bf16 too; the last column is without that. Of routed experts transformers 5.23 loads no
quantized weights, so there are none here.
"""

import tempfile
from importlib.metadata import version
from pathlib import Path

import click
import torch
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    NemotronHConfig,
    NemotronHForCausalLM,
)

from nemoc.models import eager_reference, open_model, write_release

_CONFIG = NemotronHConfig(
    vocab_size=512,
    hidden_size=256,
    hybrid_override_pattern="M-M*-M-",
    mamba_num_heads=16,
    mamba_head_dim=32,
    n_groups=4,
    ssm_state_size=64,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=640,
    tie_word_embeddings=False,
)


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@click.command()
@click.option("--seed", default=0, help="Of weights and tokens.")
def main(seed: int) -> None:
    """Print relative errors of logits for sources in float32 and bf16."""
    click.echo(", ".join(f"{p} {version(p)}" for p in ("transformers", "compressed-tensors")))
    click.echo("source      error of logits   without rounding weights to bf16")
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(seed)
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            source, written = Path(folder, "source"), Path(folder, "written")
            NemotronHForCausalLM(_CONFIG).to(dtype).save_pretrained(source)
            written.mkdir()
            write_release(open_model(str(source)), written, "compressed-tensors")
            ids = torch.randint(_CONFIG.vocab_size, (2, 64))
            peer = AutoModelForCausalLM.from_pretrained(
                written, quantization_config=CompressedTensorsConfig(run_compressed=False)
            ).float()
            for layer in peer.model.layers:  # nemoc does not clamp dt: docs/architecture.md
                layer.mixer.time_step_min = 0.0
            found = peer(ids).logits
            own = eager_reference(open_model(str(written)))
            plain = own(ids)
            for name, weight in own.named_parameters():
                if name.endswith("proj.weight"):
                    weight.copy_(weight.bfloat16())
            errors = _error(found, own(ids)), _error(found, plain)
        click.echo(f"{str(dtype)[6:]:10}  {errors[0]:15.1e}   {errors[1]:.1e}")


if __name__ == "__main__":
    main()
