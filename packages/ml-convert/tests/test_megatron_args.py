"""Args of Megatron checkpoints are read with care and written in full."""

import argparse
import dataclasses
import enum

import pytest

from ml_convert.errors import ConversionError
from ml_convert.megatron_args import architecture, is_plain, namespace
from ml_convert.tensor import DTYPES
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
        data_path=["a", 1],
        kind=Kind.A,
        nested=[Kind.A],
        num_layers=99,
    )
    args = vars(written(inherited=source))
    assert (args["lr"], args["seq_length"], args["data_path"]) == (1e-4, 32, ["a", 1])
    assert args["num_layers"] == 4
    assert args["iteration"] == args["consumed_train_samples"] == 0  # of a training that is over
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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_experts", 8),
        ("use_rope_scaling", True),
        ("rope_scaling_type", "yarn"),
        ("rotary_percent", 0.5),
        ("apply_layernorm_1p", True),
        ("qk_layernorm", True),
        ("multi_latent_attention", True),
        ("embed_layernorm", True),
    ],
)
def test_switches_that_change_what_weights_mean_are_refused(name, value):
    args = argparse.Namespace(**{**vars(written()), name: value})
    with pytest.raises(ConversionError, match=f"ckpt: args say {name}={value!r}, which is not"):
        architecture(args, None, "ckpt")


def test_args_that_say_too_little_are_refused():
    with pytest.raises(ConversionError, match=r"ckpt: args describe no supported model .*hidden_s"):
        architecture(argparse.Namespace(num_layers=2), None, "ckpt")
