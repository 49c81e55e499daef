"""Models: configuration, graph, checkpoints and the eager reference."""

from nemoc.models.checkpoint import Checkpoint
from nemoc.models.config import ModelConfig
from nemoc.models.eager import eager_reference
from nemoc.models.graph import COMPUTE_TYPES, build_step, default_weight_types
from nemoc.models.presets import PRESETS, preset
from nemoc.models.random_weights import RandomSource
from nemoc.models.source import Generation, Model, open_model
from nemoc.models.summary import Summary, render_summary, summarize

__all__ = [
    "COMPUTE_TYPES",
    "PRESETS",
    "Checkpoint",
    "Generation",
    "Model",
    "ModelConfig",
    "RandomSource",
    "Summary",
    "build_step",
    "default_weight_types",
    "eager_reference",
    "open_model",
    "preset",
    "render_summary",
    "summarize",
]
