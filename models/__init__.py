"""Models: configuration, graph, checkpoints to read and to write, and the eager reference."""

from nemoc.models.checkpoint import Checkpoint
from nemoc.models.config import ModelConfig
from nemoc.models.eager import eager_reference
from nemoc.models.formats import Format, Fp8, Nvfp4
from nemoc.models.gguf_writer import write_gguf
from nemoc.models.graph import COMPUTE_TYPES, build_step, default_weight_types
from nemoc.models.presets import PRESETS, preset
from nemoc.models.quantization import Quantization, read_quantization
from nemoc.models.quantize import Written
from nemoc.models.random_weights import RandomSource
from nemoc.models.release import write_release
from nemoc.models.source import Generation, Model, open_model
from nemoc.models.summary import Summary, render_summary, summarize

__all__ = [
    "COMPUTE_TYPES",
    "PRESETS",
    "Checkpoint",
    "Format",
    "Fp8",
    "Generation",
    "Model",
    "ModelConfig",
    "Nvfp4",
    "Quantization",
    "RandomSource",
    "Summary",
    "Written",
    "build_step",
    "default_weight_types",
    "eager_reference",
    "open_model",
    "preset",
    "read_quantization",
    "render_summary",
    "summarize",
    "write_gguf",
    "write_release",
]
