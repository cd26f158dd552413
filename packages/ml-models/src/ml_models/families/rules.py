"""Rules: which rows of which Hugging Face tensors are the rows of a Megatron-Core module, in order.

That is all conversion needs. The parts of a rule form one list of row ranges, which reads from left
to right or from right to left, so both directions come from the same rule and cannot disagree.

In names `*` stands for the number of the layer and `@` for the number of the expert. Weight and
bias of a module follow the same rule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ml_models.architecture import Architecture
from ml_models.parameter import Parameter


class Part(NamedTuple):
    """The next rows of a Megatron-Core parameter: where in a Hugging Face tensor they lie."""

    hf_module: str
    first: int
    """Number of the first row there."""
    rows: int
    """How many."""
    step: int = 1
    """From one row to the next."""
    entry: int | None = None
    """The tensor is a stack of matrices, and this one holds the rows."""


@dataclass(frozen=True)
class Rule(ABC):
    """Where the rows of one Megatron-Core module come from."""

    module: str
    """Megatron-Core module."""
    suffixes: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    """What to add to the Hugging Face module for `weight`, `bias`, ... if not `.weight`, ..."""
    transposed: bool = field(default=False, kw_only=True)
    """Hugging Face stores matrices as (input features, output features)."""

    @abstractmethod
    def parts(self, arch: Architecture, parameter: Parameter) -> Iterator[Part]:
        """List the rows of a parameter of the module from first to last."""

    def hf_name(self, hf_module: str, parameter: Parameter) -> str:
        """Give the name of a Hugging Face tensor."""
        kind = parameter.name.rpartition(".")[2]
        name = hf_module + self.suffixes.get(kind, f".{kind}")
        return name.replace("*", str(parameter.layer)).replace("@", str(parameter.expert))


@dataclass(frozen=True)
class Same(Rule):
    """The same tensor under another name."""

    hf_module: str

    def parts(self, arch: Architecture, parameter: Parameter) -> Iterator[Part]:  # noqa: ARG002
        """All rows, in order."""
        yield Part(self.hf_module, 0, parameter.shape[0])


@dataclass(frozen=True)
class Stacked(Rule):
    """Tensors of equal size on top of each other, such as [gate; up]."""

    hf_modules: tuple[str, ...]

    def parts(self, arch: Architecture, parameter: Parameter) -> Iterator[Part]:  # noqa: ARG002
        """All rows of the first, then all of the next."""
        for hf_module in self.hf_modules:
            yield Part(hf_module, 0, parameter.shape[0] // len(self.hf_modules))


@dataclass(frozen=True)
class GroupedQkv(Rule):
    """Query, key and value in one tensor, by query group: its queries, its key, its value."""

    query: str
    key: str
    value: str

    def parts(self, arch: Architecture, parameter: Parameter) -> Iterator[Part]:  # noqa: ARG002
        """Group by group, the query heads, then the key head, then the value head."""
        head = arch.head_dim
        queries = arch.num_attention_heads // arch.query_groups * head
        for group in range(arch.query_groups):
            yield Part(self.query, group * queries, queries)
            yield Part(self.key, group * head, head)
            yield Part(self.value, group * head, head)


@dataclass(frozen=True)
class FlatQkv(Rule):
    """All queries, then all keys, then all values in one Hugging Face tensor."""

    hf_module: str

    def parts(self, arch: Architecture, parameter: Parameter) -> Iterator[Part]:  # noqa: ARG002
        """Group by group, the query heads, then the key head, then the value head."""
        head = arch.head_dim
        queries = arch.num_attention_heads // arch.query_groups * head
        first_key = arch.num_attention_heads * head
        first_value = first_key + arch.query_groups * head
        for group in range(arch.query_groups):
            yield Part(self.hf_module, group * queries, queries)
            yield Part(self.hf_module, first_key + group * head, head)
            yield Part(self.hf_module, first_value + group * head, head)


@dataclass(frozen=True)
class ExpertStack(Rule):
    """One Hugging Face tensor holds the matrices of all experts of a layer."""

    hf_module: str
    interleaved: int = 1
    """The rows of so many equal blocks (gate and up) take turns."""

    def parts(self, arch: Architecture, parameter: Parameter) -> Iterator[Part]:  # noqa: ARG002
        """Block by block, every so-manieth row of the expert's matrix."""
        step = self.interleaved
        for block in range(step):
            rows = parameter.shape[0] // step
            yield Part(self.hf_module, block, rows, step, parameter.expert)
