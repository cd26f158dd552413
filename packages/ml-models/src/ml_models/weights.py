"""The parameters of a model under their Megatron-Core names, and how tensor parallelism cuts them.

One table answers every question about layout: `parameters` lists each tensor of the whole model
once, with its global shape (one device, true vocabulary), where it is cut, and how it starts.
Checkpoints, conversion and initialisation read it instead of knowing names. The names are those of
megatron-core's local layer spec.

Layouts worth knowing:
  linear_qkv  rows in groups: for each query group its query heads, its key head, then its value
              head; a plain cut of dim 0 therefore keeps groups together
  linear_fc1  with a gate two blocks [gate; up]: a rank holds its part of gate, then its part of up
  vocabulary  tables are padded with rows that belong to no token; how many depends on the number of
              ranks
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from ml_models.architecture import Architecture
from ml_models.layer_weights import layer_parameters, norm
from ml_models.parameter import Parameter, Split

__all__ = ["Parameter", "Run", "Split", "parameters", "shard_runs", "stage_parameters"]

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"

_EMBEDDING_NORM = "embedding.word_embeddings.norm"
_POSITIONS = "embedding.position_embeddings.weight"
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")


class Run(NamedTuple):
    """Consecutive indices along the split dimension, in the global tensor and in a rank's shard."""

    global_start: int
    local_start: int
    length: int


@lru_cache(maxsize=16)
def parameters(arch: Architecture) -> tuple[Parameter, ...]:
    """List every parameter once, in order of the forward pass; tied models have no output layer."""
    if arch.vocab_size < 1:
        raise ValueError("--vocab-size is not known yet: give it, or take it from a tokenizer")
    found = list(_embedding(arch))
    for layer in range(arch.num_layers):
        found += layer_parameters(arch, layer)
    found += norm(arch, "decoder.final_layernorm")
    if arch.untie_embeddings_and_output_weights:
        found.append(replace(found[0], name=OUTPUT_LAYER))
    return tuple(found)


def _embedding(arch: Architecture) -> Iterable[Parameter]:
    table = (arch.vocab_size, arch.hidden_size)
    yield Parameter(name=EMBEDDING, shape=table, split=Split(0), padded=True, init="normal")
    if arch.embed_layernorm:
        yield from norm(replace(arch, normalization="LayerNorm"), _EMBEDDING_NORM)
    if arch.position_embedding_type == "learned_absolute":
        shape = (arch.max_position_embeddings, arch.hidden_size)
        yield Parameter(name=_POSITIONS, shape=shape, split=None, init="normal")


def stage_parameters(
    arch: Architecture,
    layers: Iterable[int],
    *,
    first: bool,
    last: bool,
    experts: Container[int] | None = None,
) -> tuple[Parameter, ...]:
    """List the parameters a pipeline stage or chunk with these global layers stores.

    Args:
        arch: The model.
        layers: Global numbers of its layers.
        first: Whether it holds the embedding.
        last: Whether it holds the final norm and the output layer. When embeddings are tied and it
            is not also the first, it stores a copy of the embedding as `output_layer.weight`.
        experts: Global numbers of the experts of this expert-parallel rank; None = all.
    """
    wanted = set(layers)
    table = parameters(arch)

    def is_held(p: Parameter) -> bool:
        if p.layer is None:
            return first if p.name.startswith("embedding.") else last
        return p.layer in wanted and (p.expert is None or experts is None or p.expert in experts)

    stage = [p for p in table if is_held(p)]
    if last and not first and not arch.untie_embeddings_and_output_weights:
        stage.append(replace(table[0], name=OUTPUT_LAYER))
    return tuple(stage)


def expert_range(arch: Architecture, *, ep_rank: int, ep_size: int) -> range:
    """Give the global numbers of the experts of an expert-parallel rank.

    Raises:
        ValueError: The experts cannot be dealt out evenly.
    """
    experts = arch.num_experts or 0
    if experts % ep_size:
        valid = ", ".join(str(n) for n in range(1, experts + 1) if experts % n == 0)
        raise ValueError(
            f"--expert-model-parallel-size {ep_size}: must divide --num-experts {experts} "
            f"(valid: {valid})"
        )
    share = experts // ep_size
    return range(ep_rank * share, (ep_rank + 1) * share)


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
    rules = {name: size % tp_size for name, size in _cut_sizes(arch).items()}
    rules["num_query_groups"] = groups % tp_size and tp_size % groups
    for name, broken in rules.items():
        if broken:
            rule = "divide or be a multiple of" if name == "num_query_groups" else "divide"
            raise ValueError(
                f"--tensor-model-parallel-size {tp_size}: must {rule} "
                f"--{name.replace('_', '-')} {getattr(arch, name)} "
                f"(valid for this model: {', '.join(map(str, tensor_parallel_sizes(arch)))})"
            )


def tensor_parallel_sizes(arch: Architecture) -> tuple[int, ...]:
    """List the tensor-parallel sizes this model can be cut to, ascending."""
    groups, sizes = arch.query_groups, _cut_sizes(arch).values()
    candidates = range(1, arch.num_attention_heads + 1)
    divisors = (n for n in candidates if not any(size % n for size in sizes))
    return tuple(n for n in divisors if groups % n == 0 or n % groups == 0)


def _cut_sizes(arch: Architecture) -> dict[str, int]:
    """Give the sizes that tensor parallelism cuts in equal parts, by flag."""
    layers = range(arch.num_layers)
    sizes = {"num_attention_heads": arch.num_attention_heads}
    if not all(arch.has_experts(layer) for layer in layers):
        sizes["ffn_hidden_size"] = arch.ffn_size
    if any(arch.has_experts(layer) for layer in layers):
        sizes["moe_ffn_hidden_size"] = arch.expert_size
    if arch.moe_shared_expert_intermediate_size:
        sizes["moe_shared_expert_intermediate_size"] = arch.shared_expert_size
    return sizes


def local_name(name: str, *, first_layer: int, first_expert: int = 0) -> str:
    """Turn global numbers into those within a stage and a rank that start at these."""
    return _renumber(name, -first_layer, -first_expert)


def global_name(name: str, *, first_layer: int, first_expert: int = 0) -> str:
    """Turn the numbers within a stage and a rank that start at these into the global ones."""
    return _renumber(name, first_layer, first_expert)


def _renumber(name: str, layers: int, experts: int) -> str:
    match = _LAYER.match(name)
    if match is None:
        return name
    layer = int(match[1]) + layers
    if layer < 0:
        raise ValueError(f"{name}: its layer lies before the stage's first layer {-layers}")
    name = f"decoder.layers.{layer}.{name[match.end() :]}"
    return _EXPERT.sub(lambda m: f".local_experts.{int(m[1]) + experts}.", name)


def _uncuttable(parameter: Parameter, *, size: int, tp_size: int) -> str:
    dim, blocks = parameter.split or Split(0)
    if size < parameter.shape[dim]:
        true = parameter.shape[dim]
        return f"{parameter.name}: padded vocabulary ({size}) is smaller than the true one ({true})"
    return (
        f"{parameter.name}: {size // blocks} indices along dim {dim} cannot be cut in "
        f"--tensor-model-parallel-size {tp_size} equal parts"
    )
