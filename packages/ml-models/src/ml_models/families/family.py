"""What a model family is: how its `config.json` reads, where its weights go, its published sizes.

A family is data. The entries of its configuration and the rules of its weights each know both
directions, so reading and writing cannot disagree, and nothing else in the repository knows a
family by name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import NamedTuple

from ml_models.architecture import Architecture
from ml_models.families.config_json import Config
from ml_models.families.entries import Entry
from ml_models.families.rules import Part, Rule
from ml_models.parameter import Parameter
from ml_models.weights import parameters

_NUMBERS = ((re.compile(r"\.layers\.\d+\."), ".layers.*."), (re.compile(r"s\.\d+\."), "s.@."))


class Piece(NamedTuple):
    """Rows of a parameter, and where they lie in a Hugging Face tensor."""

    name: str
    """The parameter."""
    row: int
    """First of its rows."""
    hf_name: str
    """The Hugging Face tensor."""
    part: Part


class HfTensor(NamedTuple):
    """A Hugging Face tensor of a model.

    `view` is its shape as (entries, rows / step, step, columns), or with `transposed` as
    (entries, columns, rows / step, step): row `first + step * i` of an entry is then row i of a
    part.
    """

    shape: tuple[int, ...]
    view: tuple[int, int, int, int]
    transposed: bool


@dataclass(frozen=True, kw_only=True)
class Size:
    """A published model."""

    name: str
    """Its name, such as `llama2-7b`: `examples/<family>/<name>.yaml` trains it."""
    config: Config
    """What its config.json says, without what the family says of all sizes."""
    parameters: int
    """How many parameters it was published with."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: everything that is particular about it."""

    name: str
    """Our name of it, written to checkpoints as `model_family`."""
    aliases: tuple[str, ...] = ()
    """Other names it is known by on command lines."""
    model_types: tuple[str, ...]
    """Values of `model_type` in config.json; the first is written."""
    architectures: tuple[str, ...]
    """Values of `architectures` in config.json, for files without a model type."""
    config: tuple[Entry, ...]
    """What config.json says."""
    rules: tuple[Rule, ...]
    """Where the weights go."""
    ignored: tuple[str, ...] = ()
    """Patterns of Hugging Face tensors that hold no weights, such as rotary frequencies."""
    optional_prefix: str = ""
    """First part of the names of Hugging Face tensors that some files leave out."""
    sizes: tuple[Size, ...] = ()
    """Published models."""

    # config.json

    def from_hf(self, config: Config) -> Architecture:
        """Translate a config.json.

        Raises:
            ValueError: It is incomplete, or says what cannot be represented.
        """
        fields: dict[str, object] = {}
        for entry in self.config:
            fields |= entry.read(config)
        return Architecture(**fields)  # type: ignore[arg-type]

    def to_hf(self, arch: Architecture, dtype: str) -> dict[str, object]:
        """Write a config.json for a model whose weights are stored in this dtype.

        Raises:
            ValueError: A config.json of this family cannot say what the model is.
        """
        config: dict[str, object] = {
            "architectures": [self.architectures[0]],
            "model_type": self.model_types[0],
        }
        for entry in self.config:
            config |= entry.write(arch)
        found = self.from_hf(config)
        for field in dataclasses.fields(arch):
            ours, theirs = getattr(arch, field.name), getattr(found, field.name)
            if field.compare and ours != theirs:
                flag = f"--{field.name.replace('_', '-')}"
                raise ValueError(
                    f"not a {self.name} model: {flag} is {ours}, config.json can only say {theirs}"
                )
        return config | {"use_cache": True, "dtype": dtype, "torch_dtype": dtype}

    def represents(self, arch: Architecture) -> bool:
        """Tell whether a config.json of this family can say what the model is."""
        try:
            self.to_hf(arch, "float32")
        except ValueError:
            return False
        return True

    def size(self, size: Size) -> Architecture:
        """Describe a published model."""
        return self.from_hf(size.config)

    # Weights

    def pieces(self, arch: Architecture) -> Iterator[Piece]:
        """List where all rows of all parameters come from, in the order of `parameters(arch)`."""
        for parameter in parameters(arch):
            rule, row = self.rule(parameter), 0
            for part in rule.parts(arch, parameter):
                name = rule.hf_name(part.hf_module, parameter)
                yield Piece(parameter.name, row, name, part)
                row += part.rows

    def tensors(self, arch: Architecture) -> dict[str, HfTensor]:
        """Give the name and shape of every Hugging Face tensor of a model, in reading order."""
        table = {parameter.name: parameter for parameter in parameters(arch)}
        rows: dict[str, int] = {}
        last: dict[str, Piece] = {}
        for piece in self.pieces(arch):
            part = piece.part
            end = (part.first // part.step + part.rows) * part.step
            rows[piece.hf_name] = max(end, rows.get(piece.hf_name, 0))
            last[piece.hf_name] = piece
        return {
            name: self._tensor(arch, rows[name], piece.part, table[piece.name])
            for name, piece in last.items()
        }

    def rule(self, parameter: Parameter) -> Rule:
        """Find the rule of a parameter.

        Raises:
            ValueError: The family has no place for it.
        """
        module = parameter.name.rpartition(".")[0]
        if parameter.layer is not None:
            for number, wildcard in _NUMBERS:
                module = number.sub(wildcard, f"{module}.").removesuffix(".")
        if module not in self._rules:
            raise ValueError(f"{parameter.name}: family {self.name} has no place for it")
        return self._rules[module]

    def ignores(self, hf_name: str) -> bool:
        """Tell whether a Hugging Face tensor holds no weights."""
        names = (hf_name, f"{self.optional_prefix}{hf_name}")
        return any(fnmatchcase(name, pattern) for pattern in self.ignored for name in names)

    @cached_property
    def _rules(self) -> dict[str, Rule]:
        return {rule.module: rule for rule in self.rules}

    def _tensor(self, arch: Architecture, rows: int, part: Part, parameter: Parameter) -> HfTensor:
        entries = () if part.entry is None else (arch.num_experts or 0,)
        columns = parameter.shape[1:]
        transposed = self.rule(parameter).transposed and bool(columns)
        shape = (*columns, rows) if transposed else (rows, *columns)
        width, groups = columns[0] if columns else 1, rows // part.step
        last = (width, groups, part.step) if transposed else (groups, part.step, width)
        view = (entries[0] if entries else 1, *last)
        return HfTensor((*entries, *shape), view, transposed)
