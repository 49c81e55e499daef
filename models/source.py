"""Where a model comes from: every kind of source that a user may name, opened as one `Model`."""

import difflib
import json
import os.path
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nemoc.ir.dtypes import DType
from nemoc.ir.errors import NemocError
from nemoc.ir.graph import Graph
from nemoc.ir.json_file import read_json
from nemoc.ir.params import ParameterSource
from nemoc.models.checkpoint import PICKLES, Checkpoint, pickle_error
from nemoc.models.config import ModelConfig
from nemoc.models.config_fields import FieldReader
from nemoc.models.formats import WeightTypes
from nemoc.models.gguf import open_gguf
from nemoc.models.gguf_tokenizer import tokenizer_files
from nemoc.models.graph import build_step
from nemoc.models.presets import PRESETS, preset
from nemoc.models.quantization import Quantization, parse_quantization, read_quantization
from nemoc.models.random_weights import RandomSource
from nemoc.models.sample import CHECKPOINT as SAMPLE

_IN_MEMORY = "NemotronHForCausalLM"


@dataclass(frozen=True)
class Generation:
    """What generation needs to know of the vocabulary.

    Attributes:
        eos_token_ids: every id that ends a generation; may be empty.
        bos_token_id: the id that starts a text, or None.
        pad_token_id: the id that fills short rows, or None.
    """

    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int | None


@dataclass(frozen=True)
class Model:
    """A model ready to be compiled.

    Attributes:
        name: a short name for reports and artifacts.
        config: its shape and constants.
        parameters: its weights, read when asked for; None when only the configuration is known.
        generation: special token ids.
        directory: the Hugging Face directory that it was opened from, or None.
        tokenizer_dir: the directory that holds `tokenizer.json`, or None.
        tokenizer_texts: the texts of `tokenizer.json` and `tokenizer_config.json` of a source that has them in another
            form; else empty.
        chat_template: the Jinja text that turns a conversation into a prompt, or None.
        notes: what was tolerated in the checkpoint, one line each.
        quantization: how its weights are stored.
        scales: the names of scales of activations and caches which `parameters` has beyond those that the graph
            reads (`Checkpoint.scales`).
    """

    name: str
    config: ModelConfig
    parameters: ParameterSource | None
    generation: Generation
    directory: Path | None = None
    tokenizer_dir: Path | None = None
    tokenizer_texts: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    notes: tuple[str, ...] = ()
    quantization: Quantization = field(default_factory=Quantization)
    scales: tuple[str, ...] = ()

    def build_step(
        self, *, dtype: DType = DType.F32, logits: Literal["last", "all"] = "last"
    ) -> Graph:
        """`nemoc.models.graph.build_step` with the types and formats of this model's weights."""
        return build_step(
            self.config,
            dtype=dtype,
            logits=logits,
            weight_types=self.weight_types,
            formats=self.quantization.formats,
        )

    def tokenizer_files(self) -> dict[str, Path | str]:
        """What makes up the tokenizer, by file name: where it is, or its text."""
        files: dict[str, Path | str] = {**self.tokenizer_texts}
        if self.tokenizer_dir is not None:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                path = self.tokenizer_dir / name
                if path.is_file():
                    files[name] = path
        if files and self.chat_template is not None:
            files["chat_template.jinja"] = self.chat_template
        return files

    @property
    def weight_types(self) -> WeightTypes | None:
        """The stored type of each parameter, None when only the configuration is known."""
        source = self.parameters
        return None if source is None else lambda name: source.type_of(name).dtype


def open_model(source: Any) -> Model:
    """Open a model.

    Args:
        source: one of
            a Hugging Face directory (`config.json`, safetensors, perhaps a tokenizer);
            a GGUF file;
            `"sample"`, the trained model that comes with nemoc;
            `"random:PRESET"` or `"random:PRESET,seed=3"`, random weights in a preset's shape;
            a preset's name or the path of a `config.json`, which have no weights;
            a transformers `NemotronHForCausalLM` in memory.

    Raises:
        NemocError: the source is none of these, or what it names is damaged.
    """
    if type(source).__name__ == _IN_MEMORY:
        return _of_module(source)
    if not isinstance(source, str | Path):
        raise NemocError(f"source: found {type(source).__name__}, expected {_accepted()}")
    text = str(source)
    if text == "sample":
        return _of_directory(SAMPLE, "sample")
    if text.startswith("random:"):
        return _of_random(text)
    if text in PRESETS:
        config = preset(text)
        return Model(text, config, None, _generation(config))
    if os.path.isdir(text):  # unlike Path's methods, false for whatever cannot be a path
        return _of_directory(Path(text), Path(text).resolve().name)
    if os.path.isfile(text):
        return _of_file(Path(text))
    near = difflib.get_close_matches(text.removeprefix("random:"), ("sample", *PRESETS), n=1)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    raise NemocError(f"source '{text}': no such file or directory, expected {_accepted()}{hint}")


def _accepted() -> str:
    return (
        "a Hugging Face directory, a GGUF file, 'sample', 'random:PRESET', a config.json, "
        f"a {_IN_MEMORY} object or a preset ({', '.join(PRESETS)})"
    )


def _of_directory(directory: Path, name: str) -> Model:
    if (directory / "manifest.json").is_file() and not (directory / "config.json").exists():
        raise NemocError(
            f"{directory}: is an artifact, which is compiled already, expected a model"
        )
    config = ModelConfig.from_file(directory)
    quantization = read_quantization(directory / "config.json", config)
    parameters = Checkpoint.open(directory, config, quantization)
    return Model(
        name=name,
        config=config,
        parameters=parameters,
        generation=_generation(config, directory),
        directory=directory,
        tokenizer_dir=directory if (directory / "tokenizer.json").is_file() else None,
        chat_template=_chat_template(directory),
        notes=parameters.notes,
        quantization=quantization,
        scales=parameters.scales,
    )


def _of_file(path: Path) -> Model:
    if path.name.endswith(PICKLES):
        raise pickle_error(path)
    if path.suffix == ".gguf":
        return _of_gguf(path)
    if path.suffix != ".json":
        raise NemocError(f"{path}: found a file, expected {_accepted()}")
    config = ModelConfig.from_file(path)
    return Model(
        name=path.resolve().parent.name,
        config=config,
        parameters=None,
        generation=_generation(config),
        quantization=read_quantization(path, config),
    )


def _of_gguf(path: Path) -> Model:
    opened = open_gguf(path)
    metadata, texts, notes = opened.file.metadata, {}, opened.notes
    if metadata.get("tokenizer.ggml.model", "none") not in ("none", "no_vocab"):
        try:
            texts = tokenizer_files(metadata)
        except NemocError as error:
            notes = (*notes, f"the tokenizer is ignored: {error}")
    template = metadata.get("tokenizer.chat_template")
    return Model(
        name=path.stem,
        config=opened.config,
        parameters=opened.parameters,
        generation=_generation(opened.config),
        tokenizer_texts=texts,
        chat_template=template if isinstance(template, str) else None,
        notes=notes,
        quantization=opened.quantization,
        scales=opened.parameters.scales,
    )


def _of_random(text: str) -> Model:
    name, *options = text.removeprefix("random:").split(",")
    seed = 0
    for option in options:
        key, _, value = option.partition("=")
        if key != "seed" or not re.fullmatch("[0-9]{1,18}", value):
            raise NemocError(f"source '{text}': found option '{option}', expected seed=NUMBER")
        seed = int(value)
    config = preset(name)
    return Model(f"random-{name}", config, RandomSource(config, seed), _generation(config))


def _of_module(module: Any) -> Model:
    where = f"{_IN_MEMORY} in memory"
    data = json.loads(module.config.to_json_string(use_diff=False))
    config = ModelConfig.from_dict(data, where)
    quantization = parse_quantization(data, where, config)
    parameters = Checkpoint.of_state_dict(module.state_dict(), config, where, quantization)
    return Model(
        name=_IN_MEMORY,
        config=config,
        parameters=parameters,
        generation=_generation(config),
        notes=parameters.notes,
        quantization=quantization,
        scales=parameters.scales,
    )


def _generation(config: ModelConfig, directory: Path | None = None) -> Generation:
    """The ids of `generation_config.json` where the directory has one, else those of `config.json`."""
    path = None if directory is None else directory / "generation_config.json"
    data = read_json(path) if path is not None and path.is_file() else {}
    read = FieldReader(data, str(path), frozenset())
    return Generation(
        read.integers("eos_token_id", config.eos_token_ids),
        read.optional_integer("bos_token_id", config.bos_token_id),
        read.optional_integer("pad_token_id", config.pad_token_id),
    )


def _chat_template(directory: Path) -> str | None:
    """The text of `chat_template.jinja`, or the (default) template in `tokenizer_config.json`."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise NemocError(f"{path}: cannot be read: {error}") from None
    path = directory / "tokenizer_config.json"
    found = read_json(path).get("chat_template") if path.is_file() else None
    if isinstance(found, list):
        named = [entry for entry in found if isinstance(entry, dict)]
        found = next((e.get("template") for e in named if e.get("name") == "default"), None)
    if found is not None and not isinstance(found, str):
        raise NemocError(
            f"{path}: chat_template: found a JSON {type(found).__name__}, expected text"
        )
    return found
