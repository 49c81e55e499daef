"""The reference backend: next states and outputs may be each other's operands."""

import torch

from nemoc.codegen.storage import state_layout
from nemoc.ir import Builder, DType
from nemoc.ir.dims import B, C, L
from nemoc.ir.params import InMemory
from nemoc.runtime import ReferenceBackend, State


def test_states_that_are_swapped_and_given_out_keep_their_values() -> None:
    builder = Builder("delay")
    builder.input("tokens", DType.I64, (B, L))
    first = builder.state("first", DType.F32, (B, C))
    second = builder.state("second", DType.F32, (B, C))
    graph = builder.finish([first], [second, first])
    backend = ReferenceBackend({"prefill": graph}, InMemory({}))
    layout = state_layout(graph)
    size = int(layout.at({"B": 1, "C": 4}).bytes)
    state = State(layout, "", 1, 4, backend.allocate(size))
    state.tensors["first"].fill_(1)
    state.tensors["second"].fill_(2)
    tokens, valid = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, dtype=torch.int32)
    for given, other in ((1, 2), (2, 1), (1, 2)):
        assert backend.run("prefill", tokens, valid, state).tolist() == [[given] * 4]
        assert state.tensors["first"].tolist() == [[other] * 4]
        assert state.tensors["second"].tolist() == [[given] * 4]
