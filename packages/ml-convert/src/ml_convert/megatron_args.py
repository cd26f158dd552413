"""The `args` of a Megatron checkpoint: the command line of a training, in a namespace.

Megatron rebuilds a model from them, so what is written is complete and true, under the names of
Megatron-LM and of ModelLink (`ml_convert.args_spelling`). What is read may be of either, and is
checked for switches that would make the weights mean something else than they seem to.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from ml_convert import args_spelling
from ml_convert.dialects import Dialect
from ml_convert.errors import ConversionError
from ml_convert.tensor import Dtype
from ml_models.architecture import Architecture
from ml_models.architecture.experts import Experts
from ml_parallel.topology import Topology

Fields = dict[str, Any]

# Switches, and values when they are off, with which a model is not one that can be described.
_MUST_BE_OFF: Mapping[str, tuple[object, ...]] = {
    "apply_residual_connection_post_layernorm": (False,),
    "attention_output_gate": (False,),
    "dim_model_base": (),
    "experimental_attention_variant": (),
    "heterogeneous_layers_config_path": (),
    "is_hybrid_model": (False,),
    "mla_mm_split": (False,),
    "moe_latent_size": (),
    "moe_tp_extend_ep": (False,),
    "mtp_num_layers": (0,),
    "noop_layers": (),
    "scale_depth": (),
    "scale_emb": (1,),
    "schedules_method": (),
    "squared_relu": (False,),
}
_MOST = 1 << 16
_KINDS = {"int": (int,), "float": (int, float), "bool": (bool,)}
# Not taken from args: derived from other fields, or false in args although rope is used.
_NOT_READ = {"group_query_attention", "use_rotary_position_embeddings"}
_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
_STRETCHED = (
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "rope_scaling_factor",
    "rope_scaling_short_factors",
    "rope_scaling_long_factors",
)
_ROTARY = (
    "rotary_base",
    "rotary_percent",
    "rotary_interleaved",
    "no_rope_freq",
    "rope_scaling_type",
)
# Megatron's rotary scaling of Llama 3 has these built in.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Belongs to a training, of which a converted checkpoint holds nothing.
_TRAINING_STATE = (
    "iteration",
    "consumed_train_samples",
    "consumed_train_tokens",
    "consumed_valid_samples",
)
# Other ways to say which stage has which layers, and which rank which experts.
_OTHER_CUTS = (
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "pipeline_model_parallel_layout",
)


# Reading


def architecture(args: Namespace, default: Architecture | None, where: str) -> Architecture:
    """Read the description of the model.

    Args:
        args: What the checkpoint says.
        default: What to take where it says nothing.
        where: The checkpoint's name, for messages.

    Raises:
        ConversionError: It says too little, or describes a model that is not supported.
    """
    given = {name: value for name, value in vars(args).items() if value is not None}
    try:
        _refuse_unsupported(given)
        fields = {} if default is None else dataclasses.asdict(default)
        fields |= _named(given)
        for read in (_attention, _windows, _positions, _rope_scaling, _experts, _activation):
            read(given, fields)
    except ValueError as error:
        raise ConversionError(f"{where}: {error}") from None
    except (TypeError, LookupError, ArithmeticError) as error:  # values of any kind may be there
        raise ConversionError(f"{where}: args describe no model ({error!r})") from None
    try:
        return Architecture(**fields)
    except (TypeError, ValueError) as error:
        raise ConversionError(f"{where}: args describe no supported model ({error})") from None


def _refuse_unsupported(given: Mapping[str, Any]) -> None:
    for name, off in _MUST_BE_OFF.items():
        if name in given and given[name] not in off:
            raise ValueError(_not_supported(name, given[name]))
    for name in ("num_layers", "num_experts"):  # lists of this length are made
        value = given.get(name)
        if isinstance(value, (int, float)) and value > _MOST:
            raise ValueError(_not_supported(name, value))
    experts = given.get("expert_tensor_parallel_size")
    if experts not in (None, given.get("tensor_model_parallel_size", experts)):
        raise ValueError(_not_supported("expert_tensor_parallel_size", experts))


def _not_supported(name: str, value: object) -> str:
    return f"args say {name}={value!r}, which is not supported"


def _named(given: Mapping[str, Any]) -> Fields:
    """Take the fields that args have, under any name."""
    fields: Fields = {}
    for field in dataclasses.fields(Architecture):
        if field.name in _NOT_READ:
            continue
        names = args_spelling.names(field.name)
        found = {name: given[name] for name in names if _is_simple(given.get(name))}
        if not found:
            continue
        _check_types(str(field.type).partition(" ")[0], found)
        is_sequence = "tuple" in str(field.type)
        values = [_sequence(value) if is_sequence else value for value in found.values()]
        if any(value is True for value in values):
            fields[field.name] = True
        elif any(value != values[0] for value in values) and not args_spelling.has_default(names):
            said = ", ".join(f"{name}={value!r}" for name, value in found.items())
            raise ValueError(f"args contradict themselves: {said}")
        else:
            fields[field.name] = values[0]
    return fields


def _check_types(kind: str, found: Mapping[str, Any]) -> None:
    """Check numbers and switches; lists are for those who know what to do with them."""
    for name, value in found.items():
        is_list = isinstance(value, (list, tuple))
        if kind in _KINDS and not is_list and type(value) not in _KINDS[kind]:
            raise ValueError(f"args say {name}={value!r}, which is no {kind}")


def _is_simple(value: Any) -> bool:
    items = value if isinstance(value, (list, tuple)) else [value]
    return all(isinstance(item, (bool, int, float, str)) for item in items)


def _sequence(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _drop(fields: Fields, names: tuple[str, ...]) -> None:
    for name in names:
        fields.pop(name, None)


def _attention(given: Mapping[str, Any], fields: Fields) -> None:
    if given.get("group_query_attention") is False:
        fields["num_query_groups"] = None  # Megatron ignores the number then
    if not fields.get("multi_latent_attention"):
        _drop(fields, _LATENT)  # Megatron has defaults for them
    scalar = given.get("query_pre_attn_scalar")
    if scalar and "softmax_scale" not in given:
        fields["softmax_scale"] = scalar**-0.5


def _windows(given: Mapping[str, Any], fields: Fields) -> None:
    """Megatron-Core counts the keys before a query, ModelLink the query's own, too."""
    window = given.get("window_size")
    if isinstance(window, (list, tuple)) and "sliding_window" not in given and window[0] >= 0:
        fields["sliding_window"] = int(window[0]) + 1
    if not fields.get("sliding_window"):
        _drop(fields, ("window_attn_skip_freq",))


def _positions(given: Mapping[str, Any], fields: Fields) -> None:
    is_rotary = given.get("use_rotary_position_embeddings")
    if is_rotary or fields.get("position_embedding_type") == "yarn":
        fields["position_embedding_type"] = "rope"
    if given.get("use_partial_rope"):
        fields["rotary_interleaved"] = True
        if fields.get("rotary_percent", 1.0) == 1.0:
            fields["rotary_percent"] = 0.5


def _rope_scaling(given: Mapping[str, Any], fields: Fields) -> None:
    if not fields.get("rope_scaling_type"):
        fields |= _megatron_rope_scaling(given, fields)
    if fields.get("position_embedding_type", "rope") != "rope":
        _drop(fields, _ROTARY)
    if not fields.get("rope_scaling_type"):
        _drop(fields, _STRETCHED)  # Megatron has defaults for some


def _megatron_rope_scaling(given: Mapping[str, Any], fields: Fields) -> Fields:
    """Read the scaling as Megatron-LM says it; empty if there is none."""
    factor = given.get("rope_scaling_factor", 8.0)
    if given.get("use_rope_scaling"):
        return {"rope_scaling_type": "llama3", "rope_scaling_factor": factor, **_LLAMA3}
    if given.get("position_embedding_type") == "yarn":
        return _yarn(given, "yarn_rotary_scaling_factor", "yarn_") | {
            "rope_scaling_truncate": given.get("yarn_correction_range_round_to_int", True)
        }
    is_latent = fields.get("multi_latent_attention") and given.get("rope_type") == "yarn"
    if is_latent and given.get("rotary_scaling_factor", 1.0) != 1.0:
        return _yarn(given, "rotary_scaling_factor", "")
    linear = given.get("rotary_seq_len_interpolation_factor", 1)
    if linear != 1:
        return {"rope_scaling_type": "linear", "rope_scaling_factor": float(linear)}
    return {}


def _yarn(given: Mapping[str, Any], factor: str, prefix: str) -> Fields:
    names = {
        "rope_scaling_beta_fast": ("beta_fast", 32.0),
        "rope_scaling_beta_slow": ("beta_slow", 1.0),
        "rope_scaling_mscale": ("mscale", 1.0),
        "rope_scaling_mscale_all_dim": ("mscale_all_dim", 0.0),
        "original_max_position_embeddings": ("original_max_position_embeddings", 4096),
    }
    fields = {field: given.get(prefix + name, other) for field, (name, other) in names.items()}
    return {"rope_scaling_type": "yarn", "rope_scaling_factor": given[factor], **fields}


def _experts(given: Mapping[str, Any], fields: Fields) -> None:
    count = fields.get("num_experts")
    if isinstance(count, (list, tuple)) and len(count) == 1:
        fields["num_experts"] = count[0]
    if fields.get("num_experts") in (None, 0, 1):
        shared = {field.name for field in dataclasses.fields(Experts)} - {"num_layers"}
        _drop(fields, tuple(shared))
        return
    fields |= _balancing(given, fields)
    if "norm_topk_prob" not in given and "moe_router_score_function" in given:
        # megatron-core divides by the sum with the sigmoid, and never else
        is_sigmoid = fields["moe_router_score_function"] == "sigmoid"
        fields["norm_topk_prob"] = is_sigmoid and fields.get("moe_router_topk", 2) > 1
    if fields.get("moe_router_group_topk") and "moe_router_group_score" not in given:
        fields.setdefault("moe_router_group_score", _group_score(given, fields))
    size, number = (
        fields.get("moe_shared_expert_intermediate_size"),
        fields.get("n_shared_experts"),
    )
    if size and number and size == number * fields.get("moe_ffn_hidden_size", 0):
        _drop(fields, ("moe_shared_expert_intermediate_size",))  # says nothing new


def _balancing(given: Mapping[str, Any], fields: Fields) -> Fields:
    """Read ModelLink's kinds of routing, which it calls kinds of balancing."""
    kind = given.get("moe_router_load_balancing_type", "aux_loss")
    kind = kind[0] if isinstance(kind, (list, tuple)) and len(kind) == 1 else kind
    coeff = fields.get("moe_aux_loss_coeff", 0.0)
    fields["moe_aux_loss_coeff"] = coeff[0] if isinstance(coeff, (list, tuple)) else coeff
    by_sequence = "seq_aux_loss" if given.get("seq_aux") else "aux_loss"
    if kind in ("aux_loss", "global_aux_loss"):
        return {"moe_router_load_balancing_type": "aux_loss"}
    if kind in ("seq_aux_loss", "none"):
        return {"moe_router_load_balancing_type": kind}
    if kind == "softmax_topk":
        return {"moe_router_load_balancing_type": "none", "moe_router_pre_softmax": True}
    if kind == "group_limited_greedy":
        groups = fields.get("moe_router_num_groups") or given.get("expert_model_parallel_size")
        return {
            "moe_router_load_balancing_type": by_sequence,
            "moe_router_pre_softmax": True,
            "moe_router_num_groups": groups,
            "moe_router_group_score": "max",
        }
    if kind == "noaux_tc":
        return {
            "moe_router_load_balancing_type": "none",
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_group_score": "top2_sum",
        }
    raise ValueError(_not_supported("moe_router_load_balancing_type", kind))


def _group_score(given: Mapping[str, Any], fields: Fields) -> str:
    """Megatron-Core scores a group by as many experts as it may give to a token."""
    count = fields.get("moe_router_topk", 2) // fields["moe_router_group_topk"]
    if count not in (1, 2):
        value = given.get("moe_router_group_topk", given.get("topk_group"))
        raise ValueError(_not_supported("moe_router_group_topk", value))
    return "max" if count == 1 else "top2_sum"


def _activation(given: Mapping[str, Any], fields: Fields) -> None:
    """Megatron's fused and OpenAI's gelu are the tanh approximation."""
    is_gated = any(fields.get(name) for name in ("swiglu", "geglu", "quick_geglu"))
    if is_gated:
        fields["approximate_gelu"] = False
    elif "approximate_gelu" not in given and {"openai_gelu", "bias_gelu_fusion"} & given.keys():
        approximate = given.get("openai_gelu") or given.get("bias_gelu_fusion")
        fields["approximate_gelu"] = bool(approximate)
    if not fields.get("quick_geglu"):
        _drop(fields, ("activation_func_clamp_value", "glu_linear_offset"))


# Writing


def namespace(
    arch: Architecture,
    topology: Topology,
    *,
    dtype: Dtype,
    padded_vocab_size: int,
    make_vocab_size_divisible_by: int,
    family: str | None,
    inherited: Namespace,
    dialect: Dialect | None = None,
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
        dialect: How the weights are named; default as in Megatron-Core's local layer spec.
    """
    kept = {name: value for name, value in vars(inherited).items() if is_plain(value)}
    per_chunk = topology.num_layers_per_virtual_pipeline_stage
    per_stage = arch.num_layers // topology.pipeline_model_parallel_size
    return Namespace(
        **{
            **kept,
            **dict.fromkeys(_OTHER_CUTS),
            **args_spelling.spelled(arch, dialect or Dialect()),
            **dataclasses.asdict(topology),
            "expert_tensor_parallel_size": topology.tensor_model_parallel_size,
            "virtual_pipeline_model_parallel_size": per_chunk and per_stage // per_chunk,
            "padded_vocab_size": padded_vocab_size,
            "make_vocab_size_divisible_by": make_vocab_size_divisible_by,
            "params_dtype": dtype.name,
            "bf16": dtype.name == "bfloat16",
            "fp16": dtype.name == "float16",
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
