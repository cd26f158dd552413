"""LoRA adapters as ModelLink trains them: tensors of the ranks of a Megatron checkpoint.

    decoder.layers.0.self_attention.linear_qkv.lora_A.default.weight     or without `.default`
    decoder.layers.0.self_attention.linear_qkv.lora_B.default.weight
    decoder.layers.0.self_attention.linear_qkv.base_layer.weight         the weight, if it is there

Query, key and value share one A, as gate and up do.
"""

from __future__ import annotations

import re
from itertools import product

from ml_convert import lora_table, ranks
from ml_convert.binding import Found, bind
from ml_convert.errors import ConversionError
from ml_convert.layout import Layout
from ml_convert.lora import Adapter, Settings, of_args
from ml_convert.rank_files import Coordinates, RankFiles
from ml_convert.ranks import chunk_key
from ml_convert.tensor import Extent
from ml_models.architecture import Architecture
from ml_models.weights import OUTPUT_LAYER, padded_vocab_size, parameters
from ml_parallel.stages import Stages, stage_layers
from ml_parallel.topology import Topology

DEFAULT = ".default"
"""What stands before `.weight`: PEFT's name of the first adapter."""

_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<which>[AB])(?:\.(?P<name>\w+))?\.weight")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


def open_adapter(files: RankFiles, arch: Architecture, given: Settings) -> Adapter:
    """Open the adapter in the files of a checkpoint's ranks.

    Args:
        files: What the ranks stored.
        arch: The model it belongs to.
        given: What the command line says.

    Raises:
        ConversionError: It is incomplete, does not fit the model, or is no plain LoRA.
    """
    found = _found(files)
    settings = given.agreeing_with(of_args(files.args), files.directory)
    base = _base(files, arch)
    weights = {
        stored.parameter
        for stored in base.tensors
        if not found.get(stored.file, {}).keys().isdisjoint(lora_table.names(stored.name))
    }
    adapted = tuple(p for p in parameters(arch) if p.name in weights)
    if not adapted:
        name = next(name for held in found.values() for name in held)
        raise ConversionError(f"{files.directory}: {name} belongs to no weight of this model")
    rank = _rank(found)
    settings.check_rank(rank, files.directory)
    settings.check_modules({w.name.split(".")[-2] for w in adapted}, files.directory)
    expected = lora_table.layout(base, weights, rank)
    return Adapter(
        path=files.directory,
        rank=rank,
        scale=settings.scale(rank, files.directory),
        weights=adapted,
        table=lora_table.parameters_of(adapted, rank),
        checkpoint=bind(expected, found, files.directory),
    )


def _found(files: RankFiles) -> Found:
    """List the tensors of the adapter by file and name, without the adapter's own name."""
    found: dict[str, dict[str, Extent]] = {}
    own_names = set()
    for coordinates, rank in files.ranks.items():
        for number, chunk in enumerate(rank.adapters):
            for name, extent in chunk.items():
                match = _TENSOR.fullmatch(name)
                if match is None or not extent.shape:
                    raise ConversionError(
                        f"{rank.path}: {name} is not supported; an adapter has lora_A and lora_B "
                        "of linear layers, and nothing else"
                    )
                own_names.add(match["name"])
                plain = f"{match['module']}.lora_{match['which']}.weight"
                held = found.setdefault(files.file(coordinates), {})
                held[f"{chunk_key(number, len(rank.chunks))}.{plain}"] = extent
    if not found:
        raise ConversionError(f"{files.directory}: holds no LoRA adapter (lora_A, lora_B)")
    if len(own_names) > 1:
        listed = ", ".join(sorted(map(str, own_names)))
        raise ConversionError(f"{files.directory}: holds several adapters ({listed})")
    return found


def _rank(found: Found) -> int:
    tensors = (item for held in found.values() for item in held.items())
    return next(extent.shape[0] for name, extent in tensors if ".lora_A." in name)


def _base(files: RankFiles, arch: Architecture) -> Layout:
    """Describe where these ranks would keep the weights, in the names of the local layer spec."""
    tp_size = files.sizes.tp_rank
    rows = padded_vocab_size(
        arch.vocab_size, make_vocab_size_divisible_by=1, tensor_model_parallel_size=tp_size
    )
    b = lora_table.names(OUTPUT_LAYER)[1]
    for rank in files.ranks.values():
        for name, extent in rank.adapters[-1].items():
            if name.replace(f"{DEFAULT}.weight", ".weight") == b:
                rows = extent.shape[0] * tp_size
    return ranks.layout(
        arch,
        _stages(files, arch),
        tensor_parallel_size=tp_size,
        padded_vocab_size=rows,
        expert_parallel_size=files.sizes.ep_rank,
    )


def _stages(files: RankFiles, arch: Architecture) -> Stages:
    """Number the layers of each chunk, from what is there, or else from what args say."""
    stages = files.sizes.pp_rank
    chunks = len(files.ranks[Coordinates(0, 0, 0)].adapters)
    if any(len(rank.adapters) != chunks for rank in files.ranks.values()):
        raise ConversionError(f"{files.directory}: stages have different numbers of chunks")
    counts = [[_count(files, stage, number) for number in range(chunks)] for stage in range(stages)]
    if sum(map(sum, counts)) == arch.num_layers:
        first, found = 0, [[range(0)] * chunks for _ in range(stages)]
        for number, stage in product(range(chunks), range(stages)):
            found[stage][number] = range(first, first + counts[stage][number])
            first += counts[stage][number]
        return tuple(map(tuple, found))
    return _stages_of_args(files, arch, stages, chunks)


def _count(files: RankFiles, stage: int, number: int) -> int:
    """Count the layers of a chunk up to the last one with an adapter."""
    numbers = (
        int(match[1])
        for coordinates, rank in files.ranks.items()
        if coordinates.pp_rank == stage
        for match in map(_LAYER.match, (*rank.adapters[number], *rank.chunks[number]))
        if match
    )
    return max(numbers, default=-1) + 1


def _stages_of_args(files: RankFiles, arch: Architecture, stages: int, chunks: int) -> Stages:
    layers = getattr(files.args, "num_layer_list", None)
    if isinstance(layers, str):
        layers = tuple(map(int, layers.split(",")))
    try:
        found = stage_layers(
            arch.num_layers,
            Topology(
                pipeline_model_parallel_size=stages,
                num_layer_list=tuple(layers) if layers else None,
                num_layers_per_virtual_pipeline_stage=(
                    arch.num_layers // stages // chunks if chunks > 1 else None
                ),
            ),
        )
    except (TypeError, ValueError) as error:
        raise ConversionError(
            f"{files.directory}: cannot tell how {arch.num_layers} layers were dealt out to "
            f"{stages} stages ({error})"
        ) from None
    return found


def is_alone(files: RankFiles) -> bool:
    """Tell whether there is nothing but an adapter."""
    return not any(chunk for rank in files.ranks.values() for chunk in rank.chunks)
