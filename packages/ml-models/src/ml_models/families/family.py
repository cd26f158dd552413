"""What a model family is: a translation of `config.json`, and a list of rules for its weights.

A rule names a Megatron-Core module and says which rows of which Hugging Face modules are its rows,
in order. That is all conversion needs: the pieces of every rule form one list of row ranges, which
reads from left to right or from right to left, so both directions come from the same rule and
cannot disagree. `*` stands for the layer number; weight and bias of a module follow the same rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple, Protocol

from ml_models.architecture import Architecture
from ml_models.weights import Parameter, parameters


class Piece(NamedTuple):
    """Rows of a Hugging Face tensor that are rows of a Megatron-Core tensor."""

    hf_name: str
    hf_row: int
    name: str
    row: int
    rows: int


class Part(NamedTuple):
    """The next rows of a Megatron-Core module: where in a Hugging Face module they lie."""

    hf_module: str
    hf_row: int
    rows: int


class Rule(Protocol):
    """Where the rows of one Megatron-Core module come from."""

    @property
    def module(self) -> str:
        """Megatron-Core module, `*` for the layer number."""

    def parts(self, arch: Architecture, rows: int) -> Iterator[Part]:
        """List the rows of the module from first to last; `rows` is how many there are."""


@dataclass(frozen=True)
class Same:
    """The same tensor under another name."""

    module: str
    hf_module: str

    def parts(self, arch: Architecture, rows: int) -> Iterator[Part]:  # noqa: ARG002
        """All rows, in order."""
        yield Part(self.hf_module, 0, rows)


@dataclass(frozen=True)
class Stacked:
    """Tensors of equal size on top of each other, such as [gate; up]."""

    module: str
    hf_modules: tuple[str, ...]

    def parts(self, arch: Architecture, rows: int) -> Iterator[Part]:  # noqa: ARG002
        """All rows of the first, then all of the next."""
        for hf_module in self.hf_modules:
            yield Part(hf_module, 0, rows // len(self.hf_modules))


@dataclass(frozen=True)
class GroupedQkv:
    """Query, key and value in one tensor, by query group: its queries, its key, its value."""

    module: str
    query: str
    key: str
    value: str

    def parts(self, arch: Architecture, rows: int) -> Iterator[Part]:  # noqa: ARG002
        """Group by group, the query heads, then the key head, then the value head."""
        head = arch.head_dim
        queries = arch.num_attention_heads // arch.query_groups * head
        for group in range(arch.query_groups):
            yield Part(self.query, group * queries, queries)
            yield Part(self.key, group * head, head)
            yield Part(self.value, group * head, head)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: everything that is particular about it."""

    name: str
    """Our name of it, written to checkpoints as `model_family`."""
    aliases: tuple[str, ...] = ()
    """Other names it is known by on command lines."""
    model_types: tuple[str, ...]
    """Values of `model_type` in config.json."""
    architectures: tuple[str, ...]
    """Values of `architectures` in config.json, for files without a model type."""
    from_hf: Callable[[Mapping[str, object]], Architecture]
    """Translate a config.json; raises ValueError for what cannot be represented."""
    to_hf: Callable[[Architecture, str], dict[str, object]]
    """Write a config.json for a model stored in this dtype; raises ValueError likewise."""
    rules: tuple[Rule, ...]
    """Where the weights go."""
    ignored: tuple[str, ...] = ()
    """Patterns of Hugging Face tensors that hold no weights, such as rotary frequencies."""

    def represents(self, arch: Architecture) -> bool:
        """Tell whether a config.json of this family can say what the model is."""
        try:
            self.to_hf(arch, "float32")
        except ValueError:
            return False
        return True

    def pieces(self, arch: Architecture) -> Iterator[Piece]:
        """List where all rows of all parameters come from, in the order of `parameters(arch)`."""
        rules = {rule.module: rule for rule in self.rules}
        for parameter in parameters(arch):
            yield from self._parameter_pieces(arch, parameter, rules)

    def tensors(self, arch: Architecture) -> dict[str, tuple[int, ...]]:
        """Give the name and shape of every Hugging Face tensor of a model, in reading order."""
        trailing = {parameter.name: parameter.shape[1:] for parameter in parameters(arch)}
        shapes: dict[str, tuple[int, ...]] = {}
        for piece in self.pieces(arch):
            rows = max(piece.hf_row + piece.rows, shapes.get(piece.hf_name, (0,))[0])
            shapes[piece.hf_name] = (rows, *trailing[piece.name])
        return shapes

    def ignores(self, hf_name: str) -> bool:
        """Tell whether a Hugging Face tensor holds no weights."""
        return any(fnmatchcase(hf_name, pattern) for pattern in self.ignored)

    def _parameter_pieces(
        self, arch: Architecture, parameter: Parameter, rules: Mapping[str, Rule]
    ) -> Iterator[Piece]:
        module, kind = parameter.name.rsplit(".", 1)
        layer = "" if parameter.layer is None else str(parameter.layer)
        rule = rules.get(module.replace(f".{layer}.", ".*.", 1) if layer else module)
        if rule is None:
            raise ValueError(f"{parameter.name}: family {self.name} has no place for it")
        row = 0
        for part in rule.parts(arch, parameter.shape[0]):
            hf_name = f"{part.hf_module.replace('*', layer)}.{kind}"
            yield Piece(hf_name, part.hf_row, parameter.name, row, part.rows)
            row += part.rows
