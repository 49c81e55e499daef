"""The intermediate representation: what a model is between its checkpoint and its kernels."""

from nemoc.ir.builder import Builder
from nemoc.ir.cost import Cost
from nemoc.ir.dims import Dim
from nemoc.ir.dtypes import DType
from nemoc.ir.errors import IRError, NemocError
from nemoc.ir.graph import Graph, Node
from nemoc.ir.interpreter import StepResult, interpret
from nemoc.ir.op import Env, Op
from nemoc.ir.parser import parse
from nemoc.ir.printer import print_graph
from nemoc.ir.types import TensorType, Value
from nemoc.ir.verifier import verify

__all__ = [
    "Builder",
    "Cost",
    "DType",
    "Dim",
    "Env",
    "Graph",
    "IRError",
    "NemocError",
    "Node",
    "Op",
    "StepResult",
    "TensorType",
    "Value",
    "interpret",
    "parse",
    "print_graph",
    "verify",
]
