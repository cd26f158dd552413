"""The `args` of a Megatron checkpoint: the command line of a training, in a namespace.

Megatron rebuilds a model from them, so what is written is complete and true. What is read is
checked for switches that would make the weights mean something else than they seem to.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from typing import Any

from ml_convert.errors import ConversionError
from ml_convert.tensor import Dtype
from ml_models.architecture import Architecture
from ml_parallel.topology import Topology

# Switches, and values when they are off, without which a model is not the one its weights show.
_MUST_BE_OFF = {
    "add_dense_bias": (False,),
    "add_rmsnorm_offset": (False,),
    "apply_layernorm_1p": (False,),
    "embed_layernorm": (False,),
    "geglu": (False,),
    "input_embeds_norm": (False,),
    "multi_latent_attention": (False,),
    "num_experts": (0, 1),
    "post_norm": (False,),
    "qk_layernorm": (False,),
    "rope_scaling_type": (),
    "rotary_interleaved": (False,),
    "rotary_percent": (1, 1.0),
    "use_rope_scaling": (False,),
}
# Not taken from args: derived from other fields, or false in args although rope is used.
_NOT_READ = {"group_query_attention", "use_rotary_position_embeddings"}
# Belongs to a training, of which a converted checkpoint holds nothing.
_TRAINING_STATE = ("iteration", "consumed_train_samples", "consumed_valid_samples")


def architecture(args: Namespace, default: Architecture | None, where: str) -> Architecture:
    """Read the description of the model.

    Args:
        args: What the checkpoint says.
        default: What to take where it says nothing.
        where: The checkpoint's name, for messages.

    Raises:
        ConversionError: It says too little, or describes a model that is not supported.
    """
    for name, off in _MUST_BE_OFF.items():
        value = getattr(args, name, None)
        if value is not None and value not in off:
            raise ConversionError(f"{where}: args say {name}={value!r}, which is not supported")
    fields = {} if default is None else dataclasses.asdict(default)
    for field in dataclasses.fields(Architecture):
        value = getattr(args, field.name, None)
        if field.name not in _NOT_READ and isinstance(value, (bool, int, float, str)):
            fields[field.name] = value
    if getattr(args, "group_query_attention", None) is False:
        fields["num_query_groups"] = None  # Megatron ignores the number then
    if getattr(args, "use_rotary_position_embeddings", False):
        fields["position_embedding_type"] = "rope"
    try:
        return Architecture(**fields)
    except (TypeError, ValueError) as error:
        raise ConversionError(f"{where}: args describe no supported model ({error})") from None


def namespace(
    arch: Architecture,
    topology: Topology,
    *,
    dtype: Dtype,
    padded_vocab_size: int,
    make_vocab_size_divisible_by: int,
    family: str | None,
    inherited: Namespace,
) -> Namespace:
    """Write the args of a converted checkpoint.

    Args:
        arch: The model.
        topology: The ranks it is cut for.
        dtype: What its weights are stored in.
        padded_vocab_size: Rows of the vocabulary tables over all ranks.
        make_vocab_size_divisible_by: How they were padded.
        family: Name of the model family, if known.
        inherited: Args of the checkpoint it was made from; plain values are kept.
    """
    kept = {name: value for name, value in vars(inherited).items() if is_plain(value)}
    per_chunk = topology.num_layers_per_virtual_pipeline_stage
    per_stage = arch.num_layers // topology.pipeline_model_parallel_size
    return Namespace(
        **{
            **kept,
            **dataclasses.asdict(arch),
            **dataclasses.asdict(topology),
            "virtual_pipeline_model_parallel_size": per_chunk and per_stage // per_chunk,
            "padded_vocab_size": padded_vocab_size,
            "make_vocab_size_divisible_by": make_vocab_size_divisible_by,
            "params_dtype": dtype.name,
            "bf16": dtype.name == "bfloat16",
            "fp16": dtype.name == "float16",
            "rotary_percent": 1.0,
            **dict.fromkeys(_TRAINING_STATE, 0),
            "seq_length": kept.get("seq_length") or arch.max_position_embeddings,
            "model_family": family,
        }
    )


def is_plain(value: Any) -> bool:
    """Tell whether a value consists of numbers, strings and containers only."""
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(map(is_plain, value))
    if isinstance(value, dict):
        return type(value) is dict and all(is_plain(k) and is_plain(v) for k, v in value.items())
    return value is None or type(value) in (bool, int, float, str)
