"""Every kind of model source, and what random weights promise."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemoc.ir import DType, NemocError
from nemoc.ir.json_file import read_json
from nemoc.models import Generation, RandomSource, open_model, preset
from support.checkpoints import unusual_model, write_checkpoint


def _refusal(source: Any) -> str:
    with pytest.raises(NemocError) as caught:
        open_model(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model", hybrid_override_pattern="*")
    return tmp_path / "model"


def _edit(path: Path, **changes: object) -> None:
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(data | changes))


def test_a_preset_has_a_configuration_and_no_weights() -> None:
    model = open_model("nano")
    assert (model.name, model.parameters, model.config) == ("nano", None, preset("nano"))
    assert len(model.build_step(dtype=DType.BF16).states) == 1 + 2 * 23 + 2 * 6


def test_a_configuration_file_has_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "tiny" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(preset("mid").to_dict()))
    model = open_model(path)
    assert (model.name, model.parameters, model.config) == ("tiny", None, preset("mid"))


def test_the_sample_has_weights_and_a_tokenizer() -> None:
    model = open_model("sample")
    assert model.name == "sample"
    assert model.tokenizer_dir is not None
    assert model.parameters is not None
    assert model.parameters.read("norm_f.weight").shape == (model.config.hidden_size,)


def test_random_weights_of_a_preset_are_named_with_a_seed() -> None:
    first, again, other = (open_model(f"random:mid{end}") for end in ("", ",seed=0", ",seed=7"))
    rows = []
    for model in (first, again, other):
        assert model.parameters is not None
        rows.append(model.parameters.read("lm_head.weight", 5, 6))
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_a_transformers_model_is_read_where_it_lies() -> None:
    module = unusual_model(hybrid_override_pattern="M", eos_token_id=[2, 11])
    model = open_model(module)
    assert model.generation.eos_token_ids == (2, 11)
    assert model.parameters is not None
    with torch.no_grad():
        module.model.norm_f.weight[3] = 7.5
    assert model.parameters.read("norm_f.weight", 3, 4).item() == 7.5
    with torch.no_grad():
        module.model.norm_f.weight[3] = torch.nan
    with pytest.raises(NemocError, match=r"tensor 'model\.norm_f\.weight': found NaN"):
        model.parameters.read("norm_f.weight")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("nanno", "source 'nanno': no such file or directory, expected a Hugging Face directory, "),
        ("nanno", "(did you mean 'nano'?)"),
        ("random:nan", "preset: found 'nan', expected one of nano, "),
        (
            "random:mid,sed=3",
            "source 'random:mid,sed=3': found option 'sed=3', expected seed=NUMBER",
        ),
        ("random:mid,seed=-1", "found option 'seed=-1', expected seed=NUMBER"),
        (f"random:mid,seed={'9' * 5000}", "expected seed=NUMBER"),
        (3, "source: found int, expected a Hugging Face directory, a GGUF file, "),
        ("", "source '': no such file"),
        ("a\0b", "no such file"),
        ("x" * 5000, "no such file"),
    ],
)
def test_an_unknown_source_is_refused_with_what_is_accepted(source: Any, expected: str) -> None:
    assert expected in _refusal(source)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pytorch_model.bin", "pytorch_model.bin: is a pickle, which can run code"),
        ("model.safetensors", "model.safetensors: found a file, expected a Hugging Face directory"),
    ],
)
def test_a_file_other_than_a_configuration_is_refused(
    tmp_path: Path, name: str, expected: str
) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert expected in _refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"dtype": "\\ud800"}', "config.json: is not JSON: 'utf-8' codec can't encode"),
        (None, "config.json: cannot be read: it is no regular file"),
    ],
)
def test_a_configuration_that_is_no_text_or_no_file_is_refused(
    tmp_path: Path, content: bytes | None, expected: str
) -> None:
    path = tmp_path / "config.json"
    if content is None:
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(content)
    assert expected in _refusal(tmp_path)


def test_characters_of_two_halves_are_text(tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    path.write_text('{"name": "\\ud83d\\ude00"}')
    assert read_json(path) == {"name": "\U0001f600"}


def test_an_artifact_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(NemocError) as refusal:
        open_model(tmp_path)
    assert str(refusal.value) == (
        f"{tmp_path}: is an artifact, which is compiled already, expected a model"
    )


def test_generation_ids_come_from_generation_config_first(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").unlink(missing_ok=True)
    assert open_model(checkpoint).generation == Generation((2,), 1, 0)
    _edit(checkpoint / "generation_config.json", eos_token_id=[2, 11], pad_token_id=5)
    assert open_model(checkpoint).generation == Generation((2, 11), 1, 5)
    _edit(checkpoint / "generation_config.json", eos_token_id="</s>")
    expected = "generation_config.json: eos_token_id: found '</s>', expected a token id"
    assert expected in _refusal(checkpoint)


def test_the_tokenizer_is_found_beside_the_weights(checkpoint: Path) -> None:
    assert open_model(checkpoint).tokenizer_dir is None
    (checkpoint / "tokenizer.json").write_text("{}")
    assert open_model(checkpoint).tokenizer_dir == checkpoint


def _template(name: str, value: object) -> Callable[[Path], object]:
    if name.endswith(".jinja"):
        return lambda directory: (directory / name).write_text(str(value))
    return lambda directory: _edit(directory / name, chat_template=value)


@pytest.mark.parametrize(
    ("writes", "expected"),
    [
        ([], None),
        ([_template("tokenizer_config.json", "{{ a }}")], "{{ a }}"),
        ([_template("tokenizer_config.json", None)], None),
        (
            [_template("tokenizer_config.json", [{"name": "default", "template": "{{ b }}"}])],
            "{{ b }}",
        ),
        ([_template("tokenizer_config.json", [{"name": "tools", "template": "x"}])], None),
        (
            [_template("tokenizer_config.json", "old"), _template("chat_template.jinja", "new")],
            "new",
        ),
    ],
)
def test_the_chat_template_is_found(
    checkpoint: Path, writes: list[Callable[[Path], object]], expected: str | None
) -> None:
    for write in writes:
        write(checkpoint)
    assert open_model(checkpoint).chat_template == expected


def test_a_chat_template_that_is_no_text_is_refused(checkpoint: Path) -> None:
    _edit(checkpoint / "tokenizer_config.json", chat_template=3)
    expected = "tokenizer_config.json: chat_template: found a JSON int, expected text"
    assert expected in _refusal(checkpoint)


def test_random_slices_do_not_depend_on_how_they_are_read() -> None:
    source = RandomSource(preset("mid"), seed=3)
    for param in open_model("mid").build_step().params[:60]:
        rows = int(param.shape[0])
        a, b = sorted((rows // 3, min(rows // 3 + 5, rows)))
        whole = source.read(param.name, a, min(b + 3, rows))
        assert whole.dtype == param.dtype.torch
        assert tuple(whole.shape[1:]) == param.shape[1:]
        assert torch.equal(source.read(param.name, a, b), whole[: b - a])
        assert whole.isfinite().all()


def test_random_weights_keep_activations_of_order_one() -> None:
    source = RandomSource(preset("mid"), seed=1, dtype=DType.F32)
    weight = source.read("layers.1.mixer.experts.up_proj", 0, 2)
    x = torch.randn(16, weight.shape[2], generator=torch.Generator().manual_seed(0))
    assert 0.8 < float((x @ weight[1].T).std()) < 1.2
    step = torch.nn.functional.softplus(source.read("layers.0.mixer.dt_bias"))
    assert float(step.min()) > 0.9e-3
    assert float(step.max()) < 0.11
    assert source.type_of("layers.1.mixer.gate.weight").dtype == DType.F32


def test_random_weights_know_only_the_models_parameters() -> None:
    with pytest.raises(NemocError, match=r"^random weights: the model has no parameter 'x'$"):
        RandomSource(preset("mid")).read("x")
