"""Weight files: aligned, readable by safetensors, written piece by piece; bad data and bad files are refused."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from nemoc.codegen.storage import Weight, bind_weights, weight_layout
from nemoc.ir import DType, NemocError, TensorType, parse
from nemoc.ir.params import InMemory
from nemoc.runtime.weights import PackedWeights, header_digest, weight_pieces, write_weights

FOLDING = """
graph @step {
  input %x: f32[B, 3]
  param %a: bf16[5, 3]
  param %b: f32[7]

  %w = folded([%a]) : f32[3, 5] {
    input %p: bf16[5, 3]

    %c = cast(%p) {dtype=f32} : f32[5, 3]
    %t = permute(%c) {axes=[1, 0]} : f32[3, 5]
    return %t
  }
  %f = folded([%a]) : f32[5, 3] {
    input %p: bf16[5, 3]

    %c = cast(%p) {dtype=f32} : f32[5, 3]
    return %c
  }
  %y = linear(%x, %f) : f32[B, 5]
  return %y, %w, %b
}
"""

TENSORS = {
    "a": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "b": torch.randn(7, generator=torch.Generator().manual_seed(1)),
}


def plain(name: str, tensor: torch.Tensor) -> Weight:
    return Weight(name, TensorType.of(DType.of(tensor), tuple(tensor.shape)), (name,))


def written(path: Path, weights: list[Weight], tensors: dict[str, torch.Tensor]) -> Path:
    with open(path, "wb") as file:
        write_weights(file, weights, weight_pieces(InMemory(tensors)))
    return path


def test_folded_values_of_all_functions_become_shared_parameters() -> None:
    graph = parse(FOLDING)
    bound, weights = bind_weights({"prefill": graph, "decode": graph})
    names = [w.name for w in weights]
    assert len(names) == 3
    assert names[0].startswith("a-")
    assert names[1].startswith("a-")
    assert names[2] == "b"
    assert [w.params for w in weights] == [("a",), ("a",), ("b",)]
    for function in bound.values():
        assert [p.name for p in function.params] == names
        assert "folded" not in str(function)
        assert parse(str(function)) == function


def test_a_folded_value_of_an_input_is_refused() -> None:
    text = FOLDING.replace("input %x: f32[B, 3]", "input %x: bf16[5, 3]").replace(
        "%f = folded([%a])", "%f = folded([%x])"
    )
    text = text.replace("%y = linear(%x, %f) : f32[B, 5]", "%y = cast(%x) {dtype=f32} : f32[5, 3]")
    text = text.replace("return %y, %w, %b", "return %y, %w, %f")
    with pytest.raises(NemocError, match="made from %x, which is no parameter"):
        bind_weights({"step": parse(text)})


def test_the_file_holds_what_a_step_reads(tmp_path: Path) -> None:
    _, weights = bind_weights({"step": parse(FOLDING)})
    path = written(tmp_path / "w", list(weights), TENSORS)
    expected = {
        weights[0].name: TENSORS["a"].float(),
        weights[1].name: TENSORS["a"].float().T.contiguous(),
        "b": TENSORS["b"],
    }
    by_library = safetensors.torch.load_file(path)
    packed = PackedWeights(path)
    for name, tensor in expected.items():
        assert torch.equal(by_library[name], tensor)
        assert torch.equal(packed.read(name), tensor)
        assert torch.equal(packed.read(name, 1, 3), tensor[1:3])
        assert packed.read(name).data_ptr() % 64 == 0
    assert {n for n in by_library if not n.startswith("padding.")} == set(expected)
    for slot in weight_layout(weights):
        assert packed.read(slot.name).data_ptr() == packed.data.data_ptr() + slot.offset
    assert packed.header_digest == header_digest(weights)


@pytest.mark.parametrize("resident", [False, True])
def test_every_element_type_round_trips(tmp_path: Path, resident: bool) -> None:
    tensors = {}
    for dtype in DType:
        bits = torch.randint(0, 2, (3, 16), dtype=torch.uint8)
        data = bits * 63 if dtype.is_float else bits
        tensors[str(dtype)] = data.view(dtype.torch) if dtype.is_float else data.to(dtype.torch)
    tensors["scalar"] = torch.tensor(3.5)
    path = written(tmp_path / "w", [plain(n, t) for n, t in tensors.items()], tensors)
    packed = PackedWeights(path, resident)
    for name, tensor in tensors.items():
        found = packed.read(name)
        assert found.dtype == tensor.dtype
        assert found.shape == tensor.shape
        bits = [t.reshape(-1).view(torch.uint8) for t in (found, tensor)]
        assert torch.equal(*bits)
    assert packed.size == path.stat().st_size


def test_no_weights_are_an_empty_block(tmp_path: Path) -> None:
    assert PackedWeights(written(tmp_path / "w", [], {})).data.numel() == 0


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([torch.zeros(2, 3)], "weight w: the data has 24 bytes or more, expected 48 for f32"),
        ([torch.zeros(5, 3)], "weight w: the data has 60 bytes or more, expected 48 for f32"),
        (
            [torch.zeros(4, 3).double()],
            "weight w: the data is torch.float64, expected torch.float32",
        ),
        ([torch.zeros(2, 3), torch.tensor([[0, torch.nan, 9]] * 2)], "weight w: holds NaN"),
    ],
)
def test_data_that_does_not_fit_is_refused(pieces: list[torch.Tensor], message: str) -> None:
    def source(weight: Weight) -> Iterator[torch.Tensor]:
        yield from pieces

    weight = Weight("w", TensorType(DType.F32, (4, 3)), ("w",))
    with pytest.raises(NemocError, match=message):
        write_weights(io.BytesIO(), [weight], source)


def test_large_parameters_are_read_in_slices() -> None:
    tensor = torch.arange(3 << 20, dtype=torch.int64).reshape(1024, -1)
    sizes = [p.nbytes for p in weight_pieces(InMemory({"w": tensor}))(plain("w", tensor))]
    assert sum(sizes) == tensor.nbytes
    assert max(sizes) <= 16 << 20


def header(**entries: object) -> bytes:
    text = json.dumps(entries).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"1234", "is truncated: 4 bytes, no whole header"),
        (b"\xff" * 20, "is truncated: 20 bytes, no whole header"),
        (b"\x38" + bytes(63), "is no safetensors file: its header cannot be read"),
        (b"\x08" + bytes(7) + b'["abcd"]', "is no safetensors file: its header cannot be read"),
        (header(w=GOOD), "tensor w lies at bytes 0 to 8 of 0, expected a range of 8"),
        (header(w={**GOOD, "data_offsets": [0, 4]}) + bytes(8), "bytes 0 to 4 of 8"),
        (header(w={**GOOD, "data_offsets": [-8, 0]}) + bytes(8), "bytes -8 to 0 of 8"),
        (header(w={**GOOD, "dtype": "F7"}) + bytes(8), "the entry of tensor w cannot be read"),
        (header(w={**GOOD, "shape": [-2]}) + bytes(8), "the entry of tensor w cannot be read"),
        (header(w=3), "the entry of tensor w cannot be read"),
        (
            b"\x03" + bytes(7) + b"{} " + bytes(8),
            "the data starts at byte 11, which is not aligned",
        ),
    ],
)
def test_files_that_are_no_weight_files_are_refused(
    tmp_path: Path, data: bytes, message: str
) -> None:
    path = tmp_path / "w"
    path.write_bytes(data)
    with pytest.raises(NemocError, match=message) as caught:
        PackedWeights(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_missing_weight_and_a_missing_file_are_named(tmp_path: Path) -> None:
    packed = PackedWeights(written(tmp_path / "w", [plain("b", TENSORS["b"])], TENSORS))
    with pytest.raises(NemocError, match="w: the tensor c is missing"):
        packed.read("c")
    with pytest.raises(NemocError, match="x: cannot be read: No such file"):
        PackedWeights(tmp_path / "x")
