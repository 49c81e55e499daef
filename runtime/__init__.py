"""The runtime: artifacts on disk, executables, their state, generation."""

from nemoc.runtime.artifact import Contents, build, load
from nemoc.runtime.backend import Backend
from nemoc.runtime.cpu import LIBRARY, kernel_record
from nemoc.runtime.executable import Executable
from nemoc.runtime.machine import Machine
from nemoc.runtime.program import DECODE, PREFILL, PREFILL_ALL, Bounds, Generation, Program
from nemoc.runtime.reference import ReferenceBackend
from nemoc.runtime.state import State
from nemoc.runtime.tokenizer import Detokenizer, Tokenizer
from nemoc.runtime.weights import PackedWeights, Pieces, weight_pieces

__all__ = [
    "DECODE",
    "LIBRARY",
    "PREFILL",
    "PREFILL_ALL",
    "Backend",
    "Bounds",
    "Contents",
    "Detokenizer",
    "Executable",
    "Generation",
    "Machine",
    "PackedWeights",
    "Pieces",
    "Program",
    "ReferenceBackend",
    "State",
    "Tokenizer",
    "build",
    "kernel_record",
    "load",
    "weight_pieces",
]
