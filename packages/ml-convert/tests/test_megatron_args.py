"""Args of Megatron checkpoints are read with care and written in full."""

import argparse
import dataclasses
import enum

import pytest

from ml_convert.args_spelling import spelled
from ml_convert.dialects import Dialect
from ml_convert.errors import ConversionError
from ml_convert.megatron_args import architecture, is_plain, namespace
from ml_convert.tensor import DTYPES
from ml_models import registry
from ml_models.architecture import Architecture
from ml_parallel.topology import Topology

ARCH = Architecture(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=8,
    num_query_groups=4,
    ffn_hidden_size=48,
    vocab_size=99,
    max_position_embeddings=64,
    normalization="RMSNorm",
    swiglu=True,
    add_bias_linear=False,
    untie_embeddings_and_output_weights=True,
)


def written(topology=None, inherited=None):
    return namespace(
        ARCH,
        topology or Topology(),
        dtype=DTYPES["bfloat16"],
        padded_vocab_size=128,
        make_vocab_size_divisible_by=128,
        family="llama",
        inherited=inherited or argparse.Namespace(),
    )


def test_what_is_written_is_read_back_as_the_same_model():
    assert architecture(written(), None, "ckpt") == ARCH


def test_megatrons_names_of_everything_are_written():
    topology = Topology(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        num_layers_per_virtual_pipeline_stage=1,
    )
    args = vars(written(topology))
    expected = {
        "num_layers": 4,
        "group_query_attention": True,
        "num_query_groups": 4,
        "kv_channels": 4,
        "padded_vocab_size": 128,
        "vocab_size": 99,
        "make_vocab_size_divisible_by": 128,
        "params_dtype": "bfloat16",
        "bf16": True,
        "fp16": False,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "num_layers_per_virtual_pipeline_stage": 1,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "model_family": "llama",
    }
    assert {name: args[name] for name in expected} == expected
    assert {f.name for f in dataclasses.fields(Architecture)} <= args.keys()
    assert all(map(is_plain, args.values()))


def test_plain_values_of_the_source_are_kept_and_others_left_behind():
    class Kind(enum.IntEnum):
        A = 1

    source = argparse.Namespace(
        lr=1e-4,
        seq_length=32,
        iteration=70,
        consumed_train_samples=700,
        consumed_train_tokens=70_000,
        data_path=["a", 1],
        kind=Kind.A,
        nested=[Kind.A],
        num_layers=99,
    )
    args = vars(written(inherited=source))
    assert (args["lr"], args["seq_length"], args["data_path"]) == (1e-4, 32, ["a", 1])
    assert args["num_layers"] == 4
    # Of a training that is over.
    assert args["iteration"] == 0
    assert args["consumed_train_samples"] == args["consumed_train_tokens"] == 0
    assert not {"kind", "nested"} & args.keys()


def test_what_args_do_not_say_is_taken_from_the_default():
    args = argparse.Namespace(num_layers=2, rotary_base=500000)
    found = architecture(args, ARCH, "ckpt")
    assert found == dataclasses.replace(ARCH, num_layers=2, rotary_base=500000)


def test_the_number_of_groups_means_nothing_without_grouped_attention():
    args = argparse.Namespace(**{**vars(written()), "group_query_attention": False})
    args.num_query_groups = 1  # Megatron's default
    assert architecture(args, None, "ckpt").num_query_groups == 8


def test_megatrons_older_switch_of_rotary_positions_is_understood():
    args = argparse.Namespace(**vars(written()))
    args.use_rotary_position_embeddings = True
    args.position_embedding_type = "learned_absolute"
    assert architecture(args, None, "ckpt") == ARCH
    args.use_rotary_position_embeddings = False
    assert architecture(args, None, "ckpt").position_embedding_type == "learned_absolute"


def published():
    for name in registry.names():
        family = registry.family(name)
        yield from (pytest.param(family.size(size), id=size.name) for size in family.sizes)


@pytest.mark.parametrize("dialect", [Dialect(), Dialect(latent="modellink")])
@pytest.mark.parametrize("arch", list(published()))
def test_every_published_model_is_written_and_read_back_as_the_same(arch, dialect):
    args = namespace(
        arch,
        Topology(),
        dtype=DTYPES["bfloat16"],
        padded_vocab_size=arch.vocab_size,
        make_vocab_size_divisible_by=1,
        family=None,
        inherited=argparse.Namespace(),
        dialect=dialect,
    )
    assert architecture(args, None, "ckpt") == arch
    assert all(map(is_plain, vars(args).values()))


# What Megatron-LM saves of a training has these, whatever the model.
DEFAULTS = {
    "group_query_attention": False,
    "num_query_groups": 1,
    "rope_scaling_factor": 8.0,
    "use_rope_scaling": False,
    "rotary_scaling_factor": 1.0,
    "rope_type": None,
    "multi_latent_attention": False,
    "kv_lora_rank": 32,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
    "moe_router_topk": 2,
    "moe_router_score_function": "softmax",
    "moe_router_load_balancing_type": "aux_loss",
    "moe_router_pre_softmax": False,
    "moe_aux_loss_coeff": 0.0,
    "moe_layer_freq": 1,
    "bias_gelu_fusion": True,
    "mtp_num_layers": None,
    "window_size": None,
    "window_attn_skip_freq": None,
    "no_rope_freq": None,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "output_multiplier_scale": None,
}
SIZES = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 8,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "add_bias_linear": False,
    "swiglu": True,
    "normalization": "RMSNorm",
    "ffn_hidden_size": 48,
}
LATENT = {
    "multi_latent_attention": True,
    "kv_lora_rank": 8,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 12,
}
MOE = {"num_experts": 8, "moe_ffn_hidden_size": 16}


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        # Megatron-LM
        ({}, {}),
        ({"swiglu": False}, {"swiglu": False, "approximate_gelu": True}),
        ({"swiglu": False, "bias_gelu_fusion": False}, {"swiglu": False}),
        (
            {"swiglu": False, "bias_gelu_fusion": False, "openai_gelu": True},
            {"swiglu": False, "approximate_gelu": True},
        ),
        ({"apply_layernorm_1p": True}, {"add_rmsnorm_offset": True}),
        ({"window_size": (7, 0)}, {"sliding_window": 8}),
        (
            {"window_size": (7, 0), "window_attn_skip_freq": [0, 1, 1, 1]},
            {"sliding_window": 8, "window_attn_skip_freq": (0, 1, 1, 1)},
        ),
        (
            {"window_size": (7, 0), "window_attn_skip_freq": 2},
            {"sliding_window": 8, "window_attn_skip_freq": (2,)},
        ),
        ({"no_rope_freq": 4}, {"no_rope_freq": (4,)}),
        (
            {"use_rope_scaling": True, "rope_scaling_factor": 32.0},
            {
                "rope_scaling_type": "llama3",
                "rope_scaling_factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        (
            {"rotary_seq_len_interpolation_factor": 4},
            {"rope_scaling_type": "linear", "rope_scaling_factor": 4.0},
        ),
        (
            {
                "position_embedding_type": "yarn",
                "yarn_rotary_scaling_factor": 32.0,
                "yarn_original_max_position_embeddings": 4096,
                "yarn_correction_range_round_to_int": False,
            },
            {
                "rope_scaling_type": "yarn",
                "rope_scaling_factor": 32.0,
                "original_max_position_embeddings": 4096,
                "rope_scaling_truncate": False,
            },
        ),
        (
            LATENT
            | {"rope_type": "yarn", "rotary_scaling_factor": 40, "mscale": 0.7, "beta_fast": 16},
            LATENT
            | {
                "rope_scaling_type": "yarn",
                "rope_scaling_factor": 40,
                "original_max_position_embeddings": 4096,
                "rope_scaling_beta_fast": 16,
                "rope_scaling_mscale": 0.7,
            },
        ),
        (MOE | {"moe_layer_freq": [0, 1, 1, 1]}, MOE | {"first_k_dense_replace": 1}),
        (MOE | {"moe_layer_freq": 2}, MOE | {"moe_layer_freq": (2,)}),
        (
            MOE
            | {
                "moe_router_score_function": "sigmoid",
                "moe_router_num_groups": 4,
                "moe_router_group_topk": 2,
                "moe_router_topk": 4,
                "moe_router_topk_scaling_factor": 2.5,
                "moe_router_enable_expert_bias": True,
                "moe_shared_expert_intermediate_size": 24,
            },
            MOE
            | {
                "moe_router_score_function": "sigmoid",
                "norm_topk_prob": True,
                "moe_router_num_groups": 4,
                "moe_router_group_topk": 2,
                "moe_router_group_score": "top2_sum",
                "moe_router_topk": 4,
                "routed_scaling_factor": 2.5,
                "moe_router_enable_expert_bias": True,
                "moe_shared_expert_intermediate_size": 24,
            },
        ),
        (
            {"quick_geglu": True, "swiglu": False, "glu_linear_offset": 1.0},
            {"quick_geglu": True, "swiglu": False, "glu_linear_offset": 1.0},
        ),
        # ModelLink
        (
            {
                "multi_head_latent_attention": True,
                "kv_lora_rank": 8,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 4,
                "v_head_dim": 12,
            },
            LATENT,
        ),
        (
            {
                "num_experts": 8,
                "moe_intermediate_size": 16,
                "first_k_dense_replace": 1,
                "n_shared_experts": 2,
                "moe_router_load_balancing_type": "group_limited_greedy",
                "topk_group": 2,
                "expert_model_parallel_size": 4,
                "routed_scaling_factor": 16.0,
            },
            MOE
            | {
                "first_k_dense_replace": 1,
                "n_shared_experts": 2,
                "moe_router_pre_softmax": True,
                "moe_router_num_groups": 4,
                "moe_router_group_topk": 2,
                "moe_router_group_score": "max",
                "routed_scaling_factor": 16.0,
            },
        ),
        (
            MOE | {"moe_router_load_balancing_type": "softmax_topk"},
            MOE | {"moe_router_pre_softmax": True},
        ),
        (
            {"use_partial_rope": True, "rotary_percent": 0.5},
            {"rotary_interleaved": True, "rotary_percent": 0.5},
        ),
        (
            {
                "rope_scaling_type": "yarn",
                "rope_scaling_original_max_position_embeddings": 4096,
                "rope_scaling_factor": 40.0,
            },
            {
                "rope_scaling_type": "yarn",
                "original_max_position_embeddings": 4096,
                "rope_scaling_factor": 40.0,
            },
        ),
        ({"sliding_window": 8}, {"sliding_window": 8}),
        ({"geglu": True, "swiglu": False}, {"geglu": True, "swiglu": False}),
        (
            {"post_norm": True, "input_embeds_norm": True, "add_qkv_bias": True},
            {"post_norm": True, "input_embeds_norm": True, "add_qkv_bias": True},
        ),
        ({"position_embedding_type": "alibi"}, {"position_embedding_type": "alibi"}),
        ({"query_pre_attn_scalar": 16}, {"softmax_scale": 0.25}),
    ],
)
def test_the_spellings_of_megatron_and_modellink_are_read(given, fields):
    rope = {"position_embedding_type": "rope", "add_bias_linear": False}
    args = argparse.Namespace(**{**DEFAULTS, **SIZES, **rope, **given})
    assert architecture(args, None, "ckpt") == Architecture(**{**SIZES, **rope, **fields})


def test_the_spellings_of_both_are_written():
    arch = Architecture(
        **{**SIZES, **LATENT, **MOE},
        first_k_dense_replace=1,
        n_shared_experts=2,
        routed_scaling_factor=2.5,
        rope_scaling_type="yarn",
        rope_scaling_factor=40.0,
        original_max_position_embeddings=4096,
    )
    args = spelled(arch, Dialect(fused_norms=True, experts="grouped"))
    expected = {
        "multi_head_latent_attention": True,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 4,
        "moe_layer_freq": [0, 1, 1, 1],
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 32,
        "moe_router_topk_scaling_factor": 2.5,
        "rope_type": "yarn",
        "rotary_scaling_factor": 40.0,
        "rotary_base": 10000,
        "transformer_impl": "transformer_engine",
        "moe_grouped_gemm": True,
        "use_mcore_models": True,
    }
    assert {name: args[name] for name in expected} == expected
    assert spelled(arch, Dialect(latent="mindspeed"))["moe_layer_freq"] == 1
    window = dataclasses.replace(ARCH, sliding_window=8, window_attn_skip_freq=(2,))
    args = spelled(window, Dialect(legacy=True))
    assert (args["window_size"], args["window_attn_skip_freq"]) == ((7, 0), 2)
    assert args["use_mcore_models"] is False
    assert type(args["rotary_base"]) is int


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mtp_num_layers": 1}, "args say mtp_num_layers=1, which is not supported"),
        ({"squared_relu": True}, "args say squared_relu=True, which is not supported"),
        ({"noop_layers": "0,63"}, "args say noop_layers='0,63', which is not supported"),
        ({"mla_mm_split": True}, "args say mla_mm_split=True"),
        (
            {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
            "args say expert_tensor_parallel_size=1, which is not",
        ),
        (
            MOE | {"moe_router_load_balancing_type": "sinkhorn"},
            "args say moe_router_load_balancing_type='sinkhorn', which is not",
        ),
        (
            MOE | {"moe_intermediate_size": 24},
            "args contradict themselves: moe_ffn_hidden_size=16, moe_intermediate_size=24",
        ),
        ({"rope_scaling_type": "yarn"}, "no supported model .*original-max-position-embeddings"),
        ({"apply_layernorm_1p": True, "normalization": "LayerNorm"}, "--add-rmsnorm-offset: needs"),
        ({"position_embedding_type": "relative"}, "--position-embedding-type relative: valid are"),
        ({"num_layers": 10**9}, "args say num_layers=1000000000, which is not"),
        (MOE | {"num_experts": 10**9}, "args say num_experts=1000000000, which is not"),
        ({"window_size": ()}, "args describe no model .IndexError"),
        ({"position_embedding_type": "yarn"}, "args describe no model .KeyError"),
        ({"hidden_size": "wide"}, "args say hidden_size='wide', which is no int"),
        ({"num_layers": 4.0}, r"args say num_layers=4.0, which is no int"),
        ({"swiglu": 1}, "args say swiglu=1, which is no bool"),
        ({"norm_epsilon": True}, "args say norm_epsilon=True, which is no float"),
        (
            MOE | {"moe_router_num_groups": 4, "moe_router_group_topk": 1, "moe_router_topk": 6},
            "args say moe_router_group_topk=1, which is not",
        ),
    ],
)
def test_models_that_cannot_be_described_are_refused(given, message):
    args = argparse.Namespace(**{**DEFAULTS, **SIZES, "position_embedding_type": "rope", **given})
    with pytest.raises(ConversionError, match=f"ckpt: .*{message}"):
        architecture(args, None, "ckpt")


def test_args_that_say_too_little_are_refused():
    with pytest.raises(ConversionError, match=r"ckpt: args describe no supported model .*hidden_s"):
        architecture(argparse.Namespace(num_layers=2), None, "ckpt")
