"""Which weights of a checkpoint are quantized, and how: the map that comes with it.

A release says per module what it quantized. Two libraries write that down:

- ModelOpt, in `hf_quant_config.json` and again in `quantization_config` of `config.json`: one algorithm for every
  linear layer but those on a list of names and wildcards, or `MIXED_PRECISION` with the algorithm of each module;
- compressed-tensors, in `quantization_config` alone: groups of a scheme and its targets, which are names, regular
  expressions or classes of modules, and a list of what is left as it is.

Fields are as in nvidia-modelopt 0.47 (`process_layer_quant_config`, `convert_hf_quant_config_format`) and
compressed-tensors 0.20 (`QuantizationConfig`, `match_targets`). What nemoc reads is NVFP4 in blocks of 16, and FP8
(E4M3) with one scale for each matrix; anything else is refused, since it would be computed wrongly.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nemoc.ir.errors import NemocError
from nemoc.ir.json_file import read_json
from nemoc.ir.nvfp4 import BLOCK
from nemoc.models.config import ModelConfig
from nemoc.models.config_fields import FieldReader
from nemoc.models.formats import Format, Fp8, Nvfp4
from nemoc.models.modules import Modules
from nemoc.models.names import bare_name

_ALGORITHMS: dict[str, Format] = {
    "NVFP4": Nvfp4("modelopt"),
    "W4A16_NVFP4": Nvfp4("modelopt", activations=False),
    "FP8": Fp8(),
}
"""By ModelOpt's names."""

_PACKINGS: dict[str, tuple[type[Format], ...]] = {
    "nvfp4-pack-quantized": (Nvfp4,),
    "float-quantized": (Fp8,),
    "naive-quantized": (Fp8,),
    "mixed-precision": (Nvfp4, Fp8),
}
"""By what compressed-tensors calls it on disk."""


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint is quantized.

    Attributes:
        formats: of each quantized parameter, by its name; all others are stored as they are.
        kv_cache: the type in which keys and values are meant to be cached, or None for that of activations.
    """

    formats: Mapping[str, Format] = field(default_factory=dict)
    kv_cache: Literal["fp8"] | None = None


def read_quantization(path: Path, config: ModelConfig) -> Quantization:
    """What a `config.json`, and a `hf_quant_config.json` beside it, say.

    Where the first is in the words of compressed-tensors it counts alone: what converts checkpoints to that leaves the
    second as it was.

    Args:
        path: of the `config.json`.
        config: the model that it describes.

    Raises:
        NemocError: a file cannot be read, or says what nemoc cannot read or the model does not have, or the two
            contradict each other; one line that names file, field, what was found and what was expected.
    """
    embedded = FieldReader(read_json(path), str(path), frozenset()).section("quantization_config")
    sections = [embedded]
    beside = path.with_name("hf_quant_config.json")
    if path.name == "config.json" and beside.is_file() and not _is_compressed_tensors(embedded):
        sections.append(FieldReader(read_json(beside), str(beside), frozenset()))
    found = _parse_all(sections, config)
    if len(found) == 2 and found[0] != found[1]:
        raise NemocError(f"{path}: quantization_config: {_difference(*found)} {beside.name}")
    return found[-1] if found else Quantization()


def parse_quantization(data: Mapping[str, Any], source: str, config: ModelConfig) -> Quantization:
    """What the object in a `config.json` says.

    Args:
        data: the object.
        source: what errors call the file.
        config: the model that it describes.

    Raises:
        NemocError: as `read_quantization`.
    """
    section = FieldReader(dict(data), source, frozenset()).section("quantization_config")
    return next(iter(_parse_all([section], config)), Quantization())


def _parse_all(sections: list[FieldReader | None], config: ModelConfig) -> list[Quantization]:
    present = [section for section in sections if section is not None]
    if not present:
        return []
    modules = Modules.of(config)
    return [_parse(section, modules) for section in present]


def _is_compressed_tensors(read: FieldReader | None) -> bool:
    return read is not None and read.text("quant_method", "") == "compressed-tensors"


def _difference(found: Quantization, expected: Quantization) -> str:
    for name in (*expected.formats, *found.formats):
        formats = found.formats.get(name), expected.formats.get(name)
        if formats[0] != formats[1]:
            return f"found {_show(formats[0])} for {name}, expected {_show(formats[1])} as in"
    return f"found {found.kv_cache} for the cache, expected {expected.kv_cache} as in"


def _show(found: Format | None) -> str:
    return "no format" if found is None else str(found)


def _parse(read: FieldReader, modules: Modules) -> Quantization:
    nested = read.section("quantization")
    if nested is not None:
        return _modelopt(nested, modules)
    match read.text("quant_method", ""):
        case "modelopt":
            return _modelopt(read, modules)
        case "compressed-tensors":
            return _compressed_tensors(read, modules)
        case "":
            read.missing("quant_method", "'modelopt' or 'compressed-tensors'")
        case other:
            read.fail("quant_method", f"'{other}'", "'modelopt' or 'compressed-tensors'")


def _modelopt(read: FieldReader, modules: Modules) -> Quantization:
    formats: dict[str, Format | None] = {}
    blamed = "quant_algo"
    match read.text("quant_algo", ""):
        case "":  # nothing but the cache
            pass
        case "MIXED_PRECISION":
            blamed = "quantized_layers"
            layers = read.sections(blamed)
            if not layers:
                read.missing(blamed, "the algorithm of each quantized module")
            for name, layer in layers.items():
                inside = modules.named(read, blamed, name)
                formats |= dict.fromkeys(inside, _algorithm(layer, tuple(_ALGORITHMS)))
        case _:
            algorithm = _algorithm(read, (*_ALGORITHMS, "MIXED_PRECISION"))
            formats |= dict.fromkeys(modules.of_class("Linear") or (), algorithm)
    left = modules.excluded(read, "exclude_modules", read.strings("exclude_modules"))
    formats |= dict.fromkeys(left)
    return Quantization(_by_parameter(read, blamed, formats, modules), _modelopt_cache(read))


def _algorithm(read: FieldReader, expected: tuple[str, ...]) -> Format:
    """The format of an algorithm, its block size checked."""
    name = read.text("quant_algo", "")
    if name not in _ALGORITHMS:
        read.fail("quant_algo", f"'{name}'", f"one of {', '.join(expected)}")
    found = _ALGORITHMS[name]
    if isinstance(found, Nvfp4):
        _expect_block(read)
    return found


def _modelopt_cache(read: FieldReader) -> Literal["fp8"] | None:
    match read.text("kv_cache_quant_algo", ""):
        case "":
            return _cache(read)
        case "FP8":
            return "fp8"
        case other:
            read.fail("kv_cache_quant_algo", f"'{other}'", "'FP8' or null")


def _cache(read: FieldReader) -> Literal["fp8"] | None:
    scheme = read.section("kv_cache_scheme")
    if scheme is None:
        return None
    if _numbers(scheme) != "8-bit float":
        scheme.fail("num_bits", _numbers(scheme), "8-bit float")
    return "fp8"


def _compressed_tensors(read: FieldReader, modules: Modules) -> Quantization:
    _expect(read, "quantization_status", "compressed")
    for changed in ("transform_config", "sparsity_config"):
        section = read.section(changed)
        if section is not None and section.text("format", "") != "dense":
            read.fail(changed, "an object with settings", "none")
    by_target: dict[str, Format | None] = {}
    packing = read.text("format", "")
    for group in read.sections("config_groups").values():
        by_target |= dict.fromkeys(group.strings("targets"), _scheme(group, packing))
    formats: dict[str, Format | None] = {}
    # The most specific target decides: names before expressions before classes, then the first by alphabet.
    rank = {name: (_specificity(name, modules), name) for name in by_target}
    for target in sorted(by_target, key=rank.__getitem__, reverse=True):
        meant = _targets(read, "config_groups", target, modules)
        formats |= dict.fromkeys(meant, by_target[target])
    for name in read.strings("ignore"):
        formats |= dict.fromkeys(_targets(read, "ignore", name, modules))
    return Quantization(_by_parameter(read, "config_groups", formats, modules), _cache(read))


def _specificity(target: str, modules: Modules) -> int:
    return 2 if modules.of_class(target) is not None else int(target.startswith("re:"))


def _targets(read: FieldReader, where: str, target: str, modules: Modules) -> list[str]:
    """The modules with a matrix that an entry of `targets` or `ignore` means; a module around them is not they."""
    by_class = modules.of_class(target)
    if by_class is not None:
        return by_class
    if target.startswith("re:"):
        try:
            return modules.matching(re.compile(target.removeprefix("re:")))
        except (re.error, OverflowError, RecursionError) as error:
            read.fail(where, f"'{target}'", f"a regular expression ({error})")
    modules.named(read, where, target)
    return [bare] if (bare := bare_name(target)) in modules.owner else []


def _scheme(group: FieldReader, packing: str) -> Format | None:
    """The format of the weights of a group, none if it has no scheme for weights."""
    weights, inputs = group.section("weights"), group.section("input_activations")
    if weights is None:
        return None
    numbers = _numbers(weights)
    if inputs is not None and _numbers(inputs) != numbers:
        inputs.fail("num_bits", _numbers(inputs), f"{numbers} as for the weights")
    found: Format
    match numbers:
        case "4-bit float":
            _expect(weights, "strategy", "tensor_group")
            _expect_block(weights)
            found = Nvfp4("compressed-tensors", activations=inputs is not None)
        case "8-bit float":
            _expect(weights, "strategy", "tensor")
            found = Fp8(activations=inputs is not None)
        case _:
            weights.fail("num_bits", numbers, "4-bit float or 8-bit float")
    packing = group.text("format", packing)
    if type(found) not in _PACKINGS.get(packing, ()):
        known = (name for name, kinds in _PACKINGS.items() if type(found) in kinds)
        group.fail("format", f"'{packing}'", f"{' or '.join(known)} for {numbers}")
    return found


def _numbers(read: FieldReader) -> str:
    return f"{read.integer('num_bits', 8)}-bit {read.text('type', 'int')}"


def _expect(read: FieldReader, name: str, value: str) -> None:
    if (found := read.text(name, value)) != value:
        read.fail(name, f"'{found}'", f"'{value}'")


def _expect_block(read: FieldReader) -> None:
    if (size := read.integer("group_size", BLOCK)) != BLOCK:
        read.fail("group_size", str(size), str(BLOCK))


def _by_parameter(
    read: FieldReader, where: str, formats: Mapping[str, Format | None], modules: Modules
) -> dict[str, Format]:
    """Formats of modules as those of parameters, of which one holds the matrices of all experts."""
    first: dict[str, str] = {}
    found = {}
    for module, parameter in modules.owner.items():
        like = first.setdefault(parameter, module)
        here, there = formats.get(module), formats.get(like)
        if here != there:
            read.fail(where, f"{_show(here)} for '{module}'", f"{_show(there)} as for '{like}'")
        if here is not None:
            found[parameter] = here
    return found
