"""The interpreter: checks of its arguments, what it keeps alive, and the sample arguments it is fed."""

import gc
import re
import weakref
from collections.abc import Iterator, Mapping

import pytest
import torch

from nemoc.ir import DType, IRError, Node, interpret, parse
from nemoc.ir.params import InMemory, LazyArguments
from nemoc.ir.sample_inputs import sample_arguments

GRAPH = """graph @g {
  input %x: f32[B, 4]
  input %i: i64[B] < 4
  param %w: bf16[4]
  state %s: f32[B, C]

  %wide = cast(%w) {dtype=f32} : f32[4]
  %y = mul(%x, %wide) : f32[B, 4]
  %z = exp(%y) : f32[B, 4]
  %t = scale(%s) {factor=2.0} : f32[B, C]
  return %z
  update %s = %t
}
"""


def _good() -> dict[str, torch.Tensor]:
    return sample_arguments(parse(GRAPH), {"B": 3, "C": 2})


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("x", None, "g: no tensor for %x: f32[B, 4]"),
        ("x", torch.zeros(3, 5), "%x has shape [3, 5], expected [3, 4] (f32[B, 4] with"),
        ("x", torch.zeros(3, 4, 1), "%x has 3 dimensions, expected f32[B, 4]"),
        ("x", torch.zeros(3, 4, dtype=torch.int32), "%x is i32, expected f32"),
        ("i", torch.zeros(2, dtype=torch.int64), "%i has shape [2], expected [3]"),
        ("i", torch.zeros(3, dtype=torch.int32), "%i is i32, expected i64"),
        ("s", torch.zeros(4, 2), "%s has shape [4, 2], expected [3, 2]"),
        ("w", torch.zeros(5, dtype=torch.bfloat16), "%w has shape [5], expected [4]"),
        ("w", torch.zeros(4), "%w is f32, expected bf16"),
        ("x", torch.zeros(3, 4, dtype=torch.complex64), "torch.complex64 have no IR element type"),
    ],
)
def test_arguments_that_do_not_fit(name: str, tensor: torch.Tensor | None, message: str) -> None:
    arguments = _good()
    if tensor is None:
        del arguments[name]
    else:
        arguments[name] = tensor
    with pytest.raises(IRError, match=re.escape(message)):
        interpret(parse(GRAPH), arguments)


def test_values_are_dropped_after_their_last_use() -> None:
    seen: dict[str, weakref.ref[torch.Tensor]] = {}
    alive: dict[str, list[str]] = {}

    def observe(node: Node, results: tuple[torch.Tensor, ...]) -> None:
        gc.collect()
        name = node.results[0].name
        alive[name] = [n for n, ref in seen.items() if ref() is not None]
        seen[name] = weakref.ref(results[0])

    interpret(parse(GRAPH), _good(), observe=observe)
    assert alive == {"wide": [], "y": ["wide"], "z": ["y"], "t": ["z"]}


def test_parameters_are_read_when_their_turn_comes() -> None:
    read: list[str] = []

    class Recording(Mapping[str, torch.Tensor]):
        def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
            self.tensors = tensors

        def __getitem__(self, name: str) -> torch.Tensor:
            read.append(name)
            return self.tensors[name]

        def __iter__(self) -> Iterator[str]:
            return iter(self.tensors)

        def __len__(self) -> int:
            return len(self.tensors)

    interpret(
        parse(GRAPH),
        Recording(_good()),
        observe=lambda node, _: read.append(f"= {node.results[0].name}"),
    )
    assert read.index("w") < read.index("= wide") < read.index("= y")
    assert read.count("w") == 1


def test_float64_rounds_nothing() -> None:
    text = """graph @g {
      input %x: f32[B]
      %n = cast(%x) {dtype=bf16} : bf16[B]
      %w = cast(%n) {dtype=f32} : f32[B]
      return %n, %w
    }"""
    x = torch.tensor([1.0 + 2**-20])
    n, w = interpret(parse(text), {"x": x}, float64=True).outputs
    assert n.dtype is w.dtype is torch.float64
    assert torch.equal(w, x.double())
    exact = torch.tensor([1.0 + 2**-40], dtype=torch.float64)
    assert torch.equal(interpret(parse(text), {"x": exact}, float64=True).outputs[1], exact)


def test_bits_do_not_depend_on_strides() -> None:
    text = """graph @g {
      input %x: f32[L, B]
      %t = permute(%x) {axes=[1, 0]} : f32[B, L]
      %y = sigmoid(%t) : f32[B, L]
      return %y
    }"""
    x = torch.randn(37, 5, generator=torch.Generator().manual_seed(0))
    (y,) = interpret(parse(text), {"x": x}).outputs
    assert torch.equal(y, x.T.contiguous().sigmoid())


def test_lazy_arguments() -> None:
    graph = parse(GRAPH)
    good = _good()
    given = {name: good[name] for name in ("x", "i", "s")}
    lazy = LazyArguments(graph, InMemory({"w": good["w"]}), given)
    assert set(lazy) == {"x", "i", "s", "w"} and len(lazy) == 4
    assert torch.equal(interpret(graph, lazy).outputs[0], interpret(graph, good).outputs[0])
    with pytest.raises(KeyError):
        lazy["q"]
    with pytest.raises(IRError, match="no parameter 'w' among 0 tensors"):
        interpret(graph, LazyArguments(graph, InMemory({}), given))


def test_in_memory_parameters() -> None:
    source = InMemory({"w": torch.arange(6.0).reshape(3, 2), "s": torch.tensor(2.0)})
    assert str(source.type_of("w")) == "f32[3, 2]"
    assert source.read("w", 1, 2).tolist() == [[2.0, 3.0]]
    assert source.read("s").item() == 2.0


SAMPLED = """graph @g {
  input %tokens: i64[B, L] < 50
  input %valid: i32[B] < L + 1
  input %flag: bool[B]
  input %x: f32[B, L, 4]
  param %w: bf16[8, 400]
  state %lengths: i32[B] < C - L + 1

  %y = take_last(%x, %valid) : f32[B, 4]
  return %y
  update %lengths = %lengths
}
"""


def test_sample_arguments_keep_to_their_bounds() -> None:
    graph = parse(SAMPLED)
    sizes = {"B": 64, "L": 3, "C": 8, "unused": 1}
    for seed in range(5):
        sample = sample_arguments(graph, sizes, seed)
        assert {n: DType.of(t) for n, t in sample.items()} == {
            v.name: v.dtype for v in graph.arguments
        }
        assert sample["tokens"].min() >= 0 and sample["tokens"].max() < 50
        assert set(sample["valid"].tolist()) == {1, 2, 3}
        assert set(sample["lengths"].tolist()) == {0, 1, 2, 3, 4, 5}
        assert 0.5 < sample["w"].float().norm() / 8**0.5 < 1.5


def test_sample_arguments_repeat_and_depend_on_seed_and_name() -> None:
    graph = parse(SAMPLED)
    first, again, other = (sample_arguments(graph, seed=s) for s in (1, 1, 2))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["x"], other["x"])
    assert "w" not in sample_arguments(graph, params=False)
    fewer = parse(SAMPLED.replace("  input %flag: bool[B]\n", ""))
    assert torch.equal(sample_arguments(fewer, seed=1)["x"], first["x"])


def test_capacity_below_the_step_leaves_length_zero() -> None:
    sample = sample_arguments(parse(SAMPLED), {"B": 4, "L": 9, "C": 8})
    assert sample["lengths"].tolist() == [0, 0, 0, 0]
