"""Names of tensors and modules: as checkpoints spell them, and as the graph does.

A parameter of the graph has the name of the tensor in released files without the prefix `backbone.`. Routed experts,
which files hold one by one, are stacked: `layers.1.mixer.experts.up_proj` is made of
`backbone.layers.1.mixer.experts.N.up_proj.weight` for every N. The scales of a weight follow the name of its module:
`layers.0.mixer.in_proj.weight_scale`, `layers.1.mixer.experts.up_proj.weight_scale`.
"""

import re

_PREFIX = re.compile(r"^(backbone|model)\.")
_OLD_EMBEDDING = re.compile(r"^embedding(?=\.|$)")
_PACKED = re.compile(r"\.weight_packed$")
_EXPERT = re.compile(r"(.*\.experts)\.([0-9]{1,9})\.(\w+)\.(\w+)")
_STACK = re.compile(r"(.*\.experts)\.(\w+)(?:\.(\w+))?")
_CACHE_SCALE = re.compile(r"(?<!_proj)\.([kv])_scale$")


def bare_name(name: str) -> str:
    """The name of a tensor or module without what files put before it."""
    return _OLD_EMBEDDING.sub("embeddings", _PREFIX.sub("", name))


def parameter_of(tensor: str) -> tuple[str, int | None]:
    """The parameter that a tensor of a checkpoint belongs to, and which expert of it.

    compressed-tensors says `weight_packed` for codes, and gives scales of the cache to the attention, not to the
    projections.
    """
    name = bare_name(tensor)
    if match := _EXPERT.fullmatch(name):
        leaf = "" if match[4] in ("weight", "weight_packed") else f".{match[4]}"
        return f"{match[1]}.{match[3]}{leaf}", int(match[2])
    return _CACHE_SCALE.sub(r".\1_proj.\1_scale", _PACKED.sub(".weight", name)), None


def tensor_of(parameter: str, expert: int = 0, *, packed: bool = False) -> str:
    """The tensor in which released files hold a parameter, or one expert of it.

    Args:
        parameter: its name in the graph.
        expert: which of them, where experts are stacked.
        packed: whether codes are called `weight_packed`.
    """
    weight = "weight_packed" if packed else "weight"
    if match := _STACK.fullmatch(parameter):
        parameter = f"{match[1]}.{expert}.{match[2]}.{match[3] or weight}"
    elif packed:
        parameter = f"{module_of(parameter)}.{weight}"
    return parameter if parameter.startswith("lm_head.") else f"backbone.{parameter}"


def on_disk(module: str) -> str:
    """The name that released files give to a module; of an expert's, one of that expert alone."""
    return module if module == "lm_head" else f"backbone.{module}"


def module_of(weight: str) -> str:
    """What a weight's module is called, and the scales of the weight after it."""
    return weight.removesuffix(".weight")


def is_stack(parameter: str) -> bool:
    """Whether a parameter holds the weights, or one of the scales, of all routed experts of a layer."""
    return _STACK.fullmatch(parameter) is not None
