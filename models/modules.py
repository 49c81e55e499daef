"""The modules of a model, as quantization files name them: by name, by pattern, by class.

Names are those on disk without the prefix, one for each expert: `layers.1.mixer.experts.7.up_proj`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import translate

from nemoc.models.config import ModelConfig
from nemoc.models.config_fields import FieldReader
from nemoc.models.graph import build_step
from nemoc.models.names import bare_name, is_stack, tensor_of

_NO_LINEAR = ("embeddings", "gate")
"""Modules with a matrix which are of another class than `Linear` where the models are defined."""


@dataclass(frozen=True)
class Modules:
    """The modules that have a matrix, and those around them.

    Attributes:
        owner: for each module with a matrix the parameter that holds it, perhaps with those of other experts.
        inside: for every module those with a matrix in it, itself included.
    """

    owner: dict[str, str]
    inside: dict[str, list[str]]

    @classmethod
    def of(cls, config: ModelConfig) -> "Modules":
        """The modules of a configuration."""
        owner: dict[str, str] = {}
        inside: dict[str, list[str]] = {"lm_head": []}  # even where it is tied, and not built
        for param in build_step(config).params:
            stacked = is_stack(param.name)
            for expert in range(int(param.shape[0]) if stacked else 1):
                module, _, leaf = bare_name(tensor_of(param.name, expert)).rpartition(".")
                has_matrix = leaf == "weight" and param.type.rank == 2 + stacked
                if has_matrix:
                    owner[module] = param.name
                for name in _ancestors(module):
                    inside.setdefault(name, []).extend([module] if has_matrix else [])
        return cls(owner, inside)

    def of_class(self, name: str) -> list[str] | None:
        """The modules with a matrix that are of a class; none if that is no class."""
        match name:
            case "Linear":
                return [m for m in self.owner if m.rpartition(".")[2] not in _NO_LINEAR]
            case "Embedding":
                return ["embeddings"]
        return None

    def named(self, read: FieldReader, field: str, name: str) -> list[str]:
        """The modules with a matrix in the module of a name; none in those of multi-token prediction.

        Raises:
            NemocError: there is no such module; the message says that the field names it.
        """
        bare = bare_name(name)
        if bare == "mtp" or bare.startswith("mtp."):
            return []
        if bare not in self.inside:
            read.fail(field, f"'{name}'", "a module of the model")
        return self.inside[bare]

    def matching(self, pattern: re.Pattern[str]) -> list[str]:
        """The modules with a matrix whose full names a pattern matches from their start."""
        return [m for m in self.owner if any(map(pattern.match, _spellings(m)))]

    def excluded(self, read: FieldReader, field: str, names: Iterable[str]) -> set[str]:
        """The modules with a matrix that a list of names and wildcards means.

        Raises:
            NemocError: a name without wildcards is none of a module.
        """
        wild = [name for name in names if re.search(r"[*?[]", name)]
        found = {m for name in names if name not in wild for m in self.named(read, field, name)}
        if wild:
            found.update(self.matching(re.compile("|".join(map(translate, wild)))))
        return found


def _ancestors(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts))]


def _spellings(module: str) -> tuple[str, ...]:
    return (module,) if module == "lm_head" else (f"backbone.{module}", f"model.{module}")
