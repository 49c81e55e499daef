"""Passes: rewrites of graphs, pipelines of them, and the check that each keeps its word."""

from nemoc.passes.base import Assumptions, Effect, Pass
from nemoc.passes.context import PassContext, Remark, TargetInfo
from nemoc.passes.pipeline import (
    PassError,
    PassRun,
    parse_pipeline,
    print_pipeline,
    run_pipeline,
)
from nemoc.passes.plugins import load_entry_points, load_plugin
from nemoc.passes.presets import preset
from nemoc.passes.registry import PASSES, passes_by_name

__all__ = [
    "PASSES",
    "Assumptions",
    "Effect",
    "Pass",
    "PassContext",
    "PassError",
    "PassRun",
    "Remark",
    "TargetInfo",
    "load_entry_points",
    "load_plugin",
    "parse_pipeline",
    "passes_by_name",
    "preset",
    "print_pipeline",
    "run_pipeline",
]
