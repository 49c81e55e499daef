"""Reading the fields of JSON configurations one by one, with errors that name file and field."""

import difflib
import math
from typing import Any, NoReturn, TypeVar

from nemoc.ir.errors import NemocError

_T = TypeVar("_T")

# Other spellings of a field, as found in released files and in transformers' own fallbacks.
_ALIASES = {
    "layers_block_type": ("layer_types",),
    "layer_norm_epsilon": ("norm_eps", "rms_norm_eps"),
    "dtype": ("torch_dtype",),
    "head_dim": ("attention_head_dim",),
    "n_routed_experts": ("num_local_experts",),
    "n_groups": ("mamba_n_groups",),
    "conv_kernel": ("mamba_d_conv",),
    "use_conv_bias": ("mamba_conv_bias",),
    "chunk_size": ("mamba_chunk_size",),
    "time_step_limit": ("mamba_dt_limit",),
    "exclude_modules": ("ignore",),
}

# Fields that change no logit, and so never count as a misspelling of one that does.
_TOLERATED = frozenset(
    {
        "architectures",
        "attention_dropout",
        "auto_map",
        "chunk_size_feed_forward",
        "expand",
        "hidden_dropout",
        "initializer_range",
        "mamba_dt_init_floor",
        "mamba_dt_max",
        "mamba_dt_min",
        "mamba_expand",
        "mamba_proj_bias",
        "mamba_ssm_cache_dtype",
        "moe_shared_expert_overlap",
        "num_beams",
        "num_logits_to_keep",
        "output_router_logits",
        "partial_rotary_factor",
        "quantization_config",
        "rescale_prenorm_residual",
        "residual_in_fp32",
        "rope_scaling",
        "rope_theta",
        "sliding_window",
        "time_step_floor",
        "time_step_max",
        "time_step_min",
        "transformers_version",
        "use_cache",
        "use_mamba_kernels",
    }
)


class FieldReader:
    """Typed access to a parsed JSON object; remembers which fields it has been asked for.

    Args:
        data: The JSON object.
        source: What error messages call the file.
        fields: Every field that has a meaning, whether or not this file needs it.
    """

    def __init__(self, data: dict[str, Any], source: str, fields: frozenset[str]) -> None:
        self._data = data
        self._source = source
        self._fields = fields
        self._asked: set[str] = set()

    def fail(self, field: str, found: str, expected: str) -> NoReturn:
        """Raises the error that `field` holds `found` in place of `expected`."""
        raise NemocError(
            f"{self._source}: {self._spelling(field)}: found {found}, expected {expected}"
        )

    def missing(self, field: str, expected: str) -> NoReturn:
        """Raises the error that `field` is absent, or, if one looks like it, that it is misspelt."""
        self.check_unknown()
        raise NemocError(f"{self._source}: {field}: found nothing, expected {expected}")

    def check_unknown(self) -> None:
        """Refuses a field nobody asked for that resembles one which is absent.

        Raises:
            NemocError: Such a field exists; the message suggests the likely name.
        """
        known = {name for field in self._fields for name in _names(field)} | _TOLERATED
        absent = {field for field in self._asked if self._spelling(field) not in self._data}
        candidates = sorted(name for field in absent for name in _names(field))
        for field in sorted(self._data.keys() - known):
            near = difflib.get_close_matches(field, candidates, n=1, cutoff=0.84)
            if near:
                raise NemocError(
                    f"{self._source}: {field}: found an unknown field, expected '{near[0]}'?"
                )

    def integer(self, field: str, default: int | None = None, minimum: int = 1) -> int:
        """An integer of at least `minimum`; without a default the field is required."""
        value = self._get(field, default)
        if value is None:
            self.missing(field, f"an integer of at least {minimum}")
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail(field, _show(value), "an integer")
        if value < minimum:
            self.fail(field, str(value), f"an integer of at least {minimum}")
        return value

    def optional_integer(self, field: str, default: int | None, minimum: int = 0) -> int | None:
        """An integer of at least `minimum`, or None where the file says null."""
        if self._get(field, default) is None:
            return None
        return self.integer(field, default, minimum)

    def integers(self, field: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """One integer, a list of them, or null for none; none is negative."""
        value = self._get(field, default)
        if value is None:
            return ()
        items = tuple(value) if isinstance(value, list | tuple) else (value,)
        for item in items:
            if isinstance(item, bool) or not isinstance(item, int) or item < 0:
                self.fail(field, _show(value), "a token id or a list of token ids")
        return items

    def number(self, field: str, default: float) -> float:
        """A positive finite number."""
        value = _as_float(self._get(field, default))
        if value is None or not 0 < value < math.inf:
            self.fail(field, _show(self._data[self._spelling(field)]), "a positive number")
        return value

    def numbers(self, field: str, default: tuple[float, ...]) -> tuple[float, ...]:
        """A list of numbers; infinity may be bare or `{"__float__": "Infinity"}`."""
        value = self._get(field, default)
        items = [_as_float(item) for item in value] if isinstance(value, list | tuple) else [None]
        numbers = tuple(item for item in items if item is not None)
        if len(numbers) != len(items):
            self.fail(field, _show(value), "a list of numbers")
        return numbers

    def flag(self, field: str, default: bool) -> bool:
        """True or false."""
        value = self._get(field, default)
        if not isinstance(value, bool):
            self.fail(field, _show(value), "true or false")
        return value

    def text(self, field: str, default: str) -> str:
        """A string; null counts as absent."""
        value = self._get(field, None)
        if value is None:
            return default
        if not isinstance(value, str):
            self.fail(field, _show(value), "a string")
        return value

    def strings(self, field: str) -> tuple[str, ...]:
        """A list of strings; absent or null gives an empty tuple."""
        value = self._get(field, None)
        if value is None:
            return ()
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            self.fail(field, _show(value), "a list of strings")
        return tuple(value)

    def section(self, field: str) -> "FieldReader | None":
        """A nested object; null and an empty one count as absent."""
        value = self._get(field, None)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fail(field, _show(value), "an object")
        return FieldReader(value, f"{self._source}: {field}", frozenset()) if value else None

    def sections(self, field: str) -> "dict[str, FieldReader]":
        """An object of objects, none of them empty, by name; absent or null gives an empty one."""
        outer = self.section(field)
        if outer is None:
            return {}
        found = {name: outer.section(name) for name in outer._data}
        return {name: inner or outer.missing(name, "an object") for name, inner in found.items()}

    def _get(self, field: str, default: _T) -> Any | _T:
        self._asked.add(field)
        return self._data.get(self._spelling(field), default)

    def _spelling(self, field: str) -> str:
        """The name under which the file holds `field`; `field` itself if it holds none."""
        for name in _names(field):
            if name in self._data:
                return name
        return field


def _names(field: str) -> tuple[str, ...]:
    """All spellings of a field, the usual one first."""
    return (field, *_ALIASES.get(field, ()))


def _as_float(value: Any) -> float | None:
    if isinstance(value, dict) and set(value) == {"__float__"}:
        value = {"Infinity": math.inf, "-Infinity": -math.inf}.get(str(value["__float__"]))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer beyond every float
        return math.inf if value > 0 else -math.inf


def _show(value: Any) -> str:
    """The value as JSON would write it, cut to a length that fits a line."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
