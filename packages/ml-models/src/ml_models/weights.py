"""The parameters of a model under their Megatron-Core names, and how tensor parallelism cuts them.

One table answers every question about layout: `parameters` lists each tensor of the whole model
once, with its global shape (one device, true vocabulary), where it is cut, and how it starts.
Checkpoints, conversion and initialisation read it instead of knowing names. The names are those of
megatron-core's local layer spec.

Layouts worth knowing:
  linear_qkv  rows in groups: for each query group its query heads, its key head, then its value
              head; a plain cut of dim 0 therefore keeps groups together
  linear_fc1  with SwiGLU two blocks [gate; up]: a rank holds its part of gate, then its part of up
  vocabulary  tables are padded with rows that belong to no token; how many depends on the number of
              ranks
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from ml_models.architecture import Architecture

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"

Init = Literal["normal", "scaled_normal", "ones", "zeros"]

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


class Split(NamedTuple):
    """A cut along one dimension: `blocks` equal blocks, each cut in one part for every rank."""

    dim: int
    blocks: int = 1


class Run(NamedTuple):
    """Consecutive indices along the split dimension, in the global tensor and in a rank's shard."""

    global_start: int
    local_start: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One tensor of the model, as it is without parallelism."""

    name: str
    """Megatron-Core name with the global layer number."""
    shape: tuple[int, ...]
    """Shape on a single device, with the true vocabulary."""
    split: Split | None
    """How tensor parallelism cuts it; None = every rank holds all of it."""
    padded: bool = False
    """Whether dim 0 is the vocabulary, which is padded before it is cut."""
    layer: int | None = None
    """Global layer number; None outside the layers."""
    init: Init
    """How it starts; scaled_normal divides the standard deviation by sqrt(2 * num_layers)."""


def parameters(arch: Architecture) -> tuple[Parameter, ...]:
    """List every parameter once, in order of the forward pass; tied models have no output layer."""
    if arch.vocab_size < 1:
        raise ValueError("--vocab-size is not known yet: give it, or take it from a tokenizer")
    table = (arch.vocab_size, arch.hidden_size)
    found = [Parameter(name=EMBEDDING, shape=table, split=Split(0), padded=True, init="normal")]
    for layer in range(arch.num_layers):
        found += _layer_parameters(arch, layer)
    found += _norm(arch, "decoder.final_layernorm", None)
    if arch.untie_embeddings_and_output_weights:
        found.append(
            Parameter(name=OUTPUT_LAYER, shape=table, split=Split(0), padded=True, init="normal")
        )
    return tuple(found)


def stage_parameters(
    arch: Architecture, layers: Iterable[int], *, first: bool, last: bool
) -> tuple[Parameter, ...]:
    """List the parameters a pipeline stage or chunk with these global layers stores.

    Args:
        arch: The model.
        layers: Global numbers of its layers.
        first: Whether it holds the embedding.
        last: Whether it holds the final norm and the output layer. When embeddings are tied and it
            is not also the first, it stores a copy of the embedding as `output_layer.weight`.
    """
    wanted = set(layers)
    table = parameters(arch)
    stage = [
        p
        for p in table
        if p.layer in wanted or (p.layer is None and (first if p.name == EMBEDDING else last))
    ]
    if last and not first and not arch.untie_embeddings_and_output_weights:
        stage.append(replace(table[0], name=OUTPUT_LAYER))
    return tuple(stage)


def padded_vocab_size(
    vocab_size: int, *, make_vocab_size_divisible_by: int, tensor_model_parallel_size: int
) -> int:
    """Round the vocabulary up so that every rank holds the same, aligned number of rows."""
    multiple = make_vocab_size_divisible_by * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


def shard_runs(
    parameter: Parameter, *, tp_size: int, tp_rank: int, padded_vocab_size: int
) -> tuple[tuple[int, ...], tuple[Run, ...]]:
    """Give the shape of a rank's shard and where its parts lie in the global tensor.

    Runs go along `parameter.split.dim` (dim 0 for a replicated tensor) in the order of the shard;
    rows of the shard that are in no run are padding of the vocabulary.

    Raises:
        ValueError: The tensor cannot be cut in `tp_size` equal parts.
    """
    if parameter.split is None:
        return parameter.shape, (Run(0, 0, parameter.shape[0]),)
    dim, blocks = parameter.split
    true = parameter.shape[dim]
    size = padded_vocab_size if parameter.padded else true
    part, rest = divmod(size, blocks * tp_size)
    if rest or size < true:
        raise ValueError(_uncuttable(parameter, size=size, tp_size=tp_size))
    shape = (*parameter.shape[:dim], blocks * part, *parameter.shape[dim + 1 :])
    starts = (block * (size // blocks) + tp_rank * part for block in range(blocks))
    runs = (Run(start, block * part, min(part, true - start)) for block, start in enumerate(starts))
    return shape, tuple(run for run in runs if run.length > 0)


def check_tensor_parallel(arch: Architecture, tp_size: int) -> None:
    """Check that attention heads and MLP can be cut over `tp_size` ranks, as megatron-core does.

    Raises:
        ValueError: Names the flag, its value, the rule and the sizes that are possible.
    """
    groups = arch.query_groups
    rules = {
        "num_attention_heads": (arch.num_attention_heads, arch.num_attention_heads % tp_size),
        "num_query_groups": (groups, groups % tp_size and tp_size % groups),
        "ffn_hidden_size": (arch.ffn_size, arch.ffn_size % tp_size),
    }
    for name, (value, broken) in rules.items():
        if broken:
            rule = "divide or be a multiple of" if name == "num_query_groups" else "divide"
            raise ValueError(
                f"--tensor-model-parallel-size {tp_size}: must {rule} "
                f"--{name.replace('_', '-')} {value} "
                f"(valid for this model: {', '.join(map(str, tensor_parallel_sizes(arch)))})"
            )


def tensor_parallel_sizes(arch: Architecture) -> tuple[int, ...]:
    """List the tensor-parallel sizes this model can be cut to, ascending."""
    heads, groups = arch.num_attention_heads, arch.query_groups
    divisors = (n for n in range(1, heads + 1) if heads % n == 0 and arch.ffn_size % n == 0)
    return tuple(n for n in divisors if groups % n == 0 or n % groups == 0)


def local_name(name: str, *, first_layer: int) -> str:
    """Turn a global layer number into the number within a stage that starts at `first_layer`."""
    return _renumber(name, -first_layer)


def global_name(name: str, *, first_layer: int) -> str:
    """Turn the layer number within a stage that starts at `first_layer` into the global one."""
    return _renumber(name, first_layer)


def _renumber(name: str, offset: int) -> str:
    match = _LAYER.match(name)
    if match is None:
        return name
    layer = int(match[1]) + offset
    if layer < 0:
        raise ValueError(f"{name}: its layer lies before the stage's first layer {-offset}")
    return f"decoder.layers.{layer}.{name[match.end() :]}"


def _uncuttable(parameter: Parameter, *, size: int, tp_size: int) -> str:
    dim, blocks = parameter.split or Split(0)
    if size < parameter.shape[dim]:
        true = parameter.shape[dim]
        return f"{parameter.name}: padded vocabulary ({size}) is smaller than the true one ({true})"
    return (
        f"{parameter.name}: {size // blocks} indices along dim {dim} cannot be cut in "
        f"--tensor-model-parallel-size {tp_size} equal parts"
    )


def _layer_parameters(arch: Architecture, layer: int) -> Iterator[Parameter]:
    prefix = f"decoder.layers.{layer}"
    hidden, heads_width = arch.hidden_size, arch.num_attention_heads * arch.head_dim
    qkv_width = heads_width + 2 * arch.query_groups * arch.head_dim
    gate_and_up = 2 if arch.swiglu else 1
    attention, mlp = f"{prefix}.self_attention", f"{prefix}.mlp"
    yield from _norm(arch, f"{prefix}.input_layernorm", layer)
    yield from _column(
        f"{attention}.linear_qkv", (qkv_width, hidden), layer, bias=arch.has_qkv_bias
    )
    yield from _row(
        f"{attention}.linear_proj", (hidden, heads_width), layer, bias=arch.add_bias_linear
    )
    yield from _norm(arch, f"{prefix}.pre_mlp_layernorm", layer)
    fc1_shape = (gate_and_up * arch.ffn_size, hidden)
    yield from _column(
        f"{mlp}.linear_fc1", fc1_shape, layer, bias=arch.add_bias_linear, blocks=gate_and_up
    )
    yield from _row(f"{mlp}.linear_fc2", (hidden, arch.ffn_size), layer, bias=arch.add_bias_linear)


def _norm(arch: Architecture, module: str, layer: int | None) -> Iterator[Parameter]:
    shape = (arch.hidden_size,)
    yield Parameter(name=f"{module}.weight", shape=shape, split=None, layer=layer, init="ones")
    if arch.normalization == "LayerNorm":
        yield Parameter(name=f"{module}.bias", shape=shape, split=None, layer=layer, init="zeros")


def _column(
    module: str, shape: tuple[int, int], layer: int, *, bias: bool, blocks: int = 1
) -> Iterator[Parameter]:
    """Output features are cut: weight and bias along dim 0."""
    split = Split(0, blocks)
    yield Parameter(name=f"{module}.weight", shape=shape, split=split, layer=layer, init="normal")
    if bias:
        yield Parameter(
            name=f"{module}.bias", shape=shape[:1], split=split, layer=layer, init="zeros"
        )


def _row(module: str, shape: tuple[int, int], layer: int, *, bias: bool) -> Iterator[Parameter]:
    """Input features are cut: weight along dim 1; the bias joins after the sum: all have it."""
    yield Parameter(
        name=f"{module}.weight", shape=shape, split=Split(1), layer=layer, init="scaled_normal"
    )
    if bias:
        yield Parameter(
            name=f"{module}.bias", shape=shape[:1], split=None, layer=layer, init="zeros"
        )
