"""What a user may ask for by `quantize`, and the passes that it stands for."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from nemoc.ir import NemocError
from nemoc.ir.scopes import scope_of
from nemoc.models import Format, Fp8, Model, ModelConfig, Nvfp4
from nemoc.models.released_maps import released_formats
from nemoc.passes import Pass, parse_pipeline, passes_by_name, quantize_fp8, quantize_nvfp4
from nemoc.passes.quantize_fp8 import QuantizeFp8
from nemoc.passes.quantize_nvfp4 import QuantizeNvfp4

QUANTIZATIONS: Mapping[str, QuantizeNvfp4 | QuantizeFp8] = {
    "nvfp4": QuantizeNvfp4(),
    "nvfp4-w4a8": QuantizeNvfp4(mode="w4a8"),
    "nvfp4-w4a4": QuantizeNvfp4(mode="w4a4"),
    "nvfp4-fp8-prompts": QuantizeNvfp4(mode=quantize_nvfp4.PROMPTS),
    "fp8": QuantizeFp8(),
    "fp8-w8a8": QuantizeFp8(mode="w8a8"),
    "fp8-prompts": QuantizeFp8(mode=quantize_fp8.PROMPTS),
}
"""Formats by name, each with the pass that it stands for."""

AS_RELEASED = "as-released"
"""Of a quantized checkpoint, activations in NVFP4 and FP8 too where it means that. Of any other model, every module in
the format that its weights have in NVIDIA's release of the family."""

Quantize = str | Sequence[Pass] | None
"""A name of `QUANTIZATIONS`, `AS_RELEASED`, passes or their text, or none."""


def quantization(
    model: Model,
    quantize: Quantize,
    scope: str | None = None,
    classes: tuple[type[Pass], ...] = (),
) -> tuple[Pass, ...]:
    """The passes that `quantize` stands for.

    Args:
        model: what is to be quantized.
        quantize: none, a name, or passes or their text.
        scope: which weights a format is for; None for the pass's default, and for what is no format.
        classes: passes of a user's own that text may name.

    Raises:
        NemocError: there is no such quantization, none for such a model, or the scope is none.
    """
    if isinstance(quantize, str) and quantize in QUANTIZATIONS:
        named = QUANTIZATIONS[quantize]
        return (named if scope is None else dataclasses.replace(named, scope=scope),)
    if scope is not None:
        formats = ", ".join(QUANTIZATIONS)
        raise NemocError(f"scope is {scope!r}: goes with a format ({formats}), found {quantize!r}")
    if quantize is None:
        return ()
    if quantize == AS_RELEASED:
        stored = model.quantization.formats
        return _activation_passes(stored) if stored else released_passes(model.config)
    if isinstance(quantize, str) and not _begins_with_a_pass(quantize, classes):
        known = ", ".join((*QUANTIZATIONS, AS_RELEASED))
        raise NemocError(f"quantize is {quantize!r}, expected one of {known}, passes, or None")
    return read_passes("quantize", quantize, classes)


def released_passes(config: ModelConfig) -> tuple[Pass, ...]:
    """The passes that give each weight the format of its family's release; activations stay as they are.

    Raises:
        NemocError: there is no release of such a model.
    """
    formats = released_formats(config)
    by_format: tuple[tuple[type[Format], type[QuantizeNvfp4 | QuantizeFp8]], ...] = (
        (Nvfp4, QuantizeNvfp4),
        (Fp8, QuantizeFp8),
    )
    scopes = (
        (pass_, [name for name, found in formats.items() if isinstance(found, stored)])
        for stored, pass_ in by_format
    )
    return tuple(pass_(scope=scope_of(names)) for pass_, names in scopes if names)


def _activation_passes(stored: Mapping[str, Format]) -> tuple[Pass, ...]:
    """The passes that quantize what weights in NVFP4 and FP8 multiply, where the checkpoint means that."""
    of_format: tuple[tuple[type[Format], QuantizeNvfp4 | QuantizeFp8], ...] = (
        (Nvfp4, QuantizeNvfp4(mode="w4a4")),
        (Fp8, QuantizeFp8(mode="w8a8")),
    )
    scopes = (
        (pass_, [n for n, f in stored.items() if isinstance(f, kind) and f.activations])
        for kind, pass_ in of_format
    )
    return tuple(
        dataclasses.replace(pass_, scope=scope_of(names)) for pass_, names in scopes if names
    )


def read_passes(
    what: str,
    passes: str | Sequence[Pass],
    classes: tuple[type[Pass], ...] = (),
    usual: tuple[Pass, ...] | None = None,
) -> tuple[Pass, ...]:
    """Passes that a user gave, as they are or as text.

    Args:
        what: what errors call them.
        passes: the passes or their text.
        classes: passes of a user's own that text may name.
        usual: what the word `preset` stands for in text; None where it means nothing.

    Raises:
        NemocError: the text cannot be read, or there is something else than passes.
    """
    if isinstance(passes, str):
        return parse_pipeline(passes, classes, usual)
    try:
        found = tuple(passes)
    except TypeError:
        raise NemocError(f"{what} is {passes!r}, expected text or passes") from None
    for item in found:
        if not isinstance(item, Pass):
            raise NemocError(f"{what}: found {item!r} among the passes, expected a pass")
    return found


def _begins_with_a_pass(text: str, classes: tuple[type[Pass], ...]) -> bool:
    return re.split(r"[{,]", text, maxsplit=1)[0].strip() in passes_by_name(classes)
