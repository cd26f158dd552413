"""A request that cannot be is refused in the words of its flags."""

from pathlib import Path

import pytest

from ml_convert import ConversionError, Request, convert
from ml_models.architecture import Architecture

PATHS = {"load_dir": Path("in"), "save_dir": Path("out"), "save_format": "mcore"}


def llama(**changes):
    sizes = {
        "num_layers": 8,
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "ffn_hidden_size": 96,
        "vocab_size": 1000,
        "max_position_embeddings": 64,
    }
    return Architecture(**{**sizes, **changes})


def test_a_request_knows_the_stages_and_the_padded_vocabulary():
    request = Request(**PATHS, target_tensor_parallel_size=2, target_pipeline_parallel_size=2)
    assert request.stages(llama()) == ((range(4),), (range(4, 8),))
    assert request.padded_vocabulary(llama()) == 1024
    assert request.dtype is None
    request = Request(**PATHS, make_vocab_size_divisible_by=1, params_dtype="bf16")
    assert request.padded_vocabulary(llama()) == 1000
    assert request.dtype.name == "bfloat16"


def test_experts_are_dealt_out_evenly_or_not_at_all():
    experts = {"num_experts": 6, "moe_ffn_hidden_size": 48, "add_bias_linear": False}
    request = Request(**PATHS, target_expert_parallel_size=3)
    assert request.stages(llama(**experts)) == ((range(8),),)
    request = Request(**PATHS, target_expert_parallel_size=4)
    with pytest.raises(
        ConversionError,
        match=r"--target-expert-parallel-size 4: must divide --num-experts 6 .*1, 2, 3, 6",
    ):
        request.stages(llama(**experts))
    request = Request(**PATHS, target_tensor_parallel_size=2)
    with pytest.raises(ConversionError, match="must divide --moe-ffn-hidden-size 25"):
        request.stages(llama(**experts | {"moe_ffn_hidden_size": 25}))


def test_the_padded_vocabulary_may_be_given():
    assert Request(**PATHS, padded_vocab_size=1001).padded_vocabulary(llama()) == 1001
    with pytest.raises(ConversionError, match=r"--padded-vocab-size 999: must be at least .* 1000"):
        Request(**PATHS, padded_vocab_size=999).padded_vocabulary(llama())
    request = Request(**PATHS, padded_vocab_size=1001, target_tensor_parallel_size=2)
    with pytest.raises(ConversionError, match="--padded-vocab-size 1001: must be divisible by"):
        request.padded_vocabulary(llama())


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("5GB", 5 * 10**9), ("300 KB", 300_000), ("2GiB", 2**31), ("17", 17), ("1MiB", 2**20)],
)
def test_shard_sizes_are_written_with_units(text, nbytes):
    assert Request(**PATHS, max_shard_size=text).max_shard_bytes == nbytes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_tensor_parallel_size": 0}, "--target-tensor-parallel-size 0: must be at least 1"),
        ({"target_pipeline_parallel_size": -1}, "--target-pipeline-parallel-size -1"),
        ({"make_vocab_size_divisible_by": 0}, "--make-vocab-size-divisible-by 0: must be at least"),
        ({"true_vocab_size": 0}, "--true-vocab-size 0: must be at least 1"),
        ({"workers": -1}, "--workers -1: must be at least 0"),
        ({"iteration": -1}, "--iteration -1: must be at least 0"),
        ({"max_shard_size": "big"}, "--max-shard-size big: must be a size such as 5GB"),
        ({"max_shard_size": "0GB"}, "--max-shard-size 0GB"),
        ({"save_format": "hf", "target_tensor_parallel_size": 2}, "hf is not cut into ranks"),
        ({"save_format": "hf", "num_layer_list": (4, 4)}, "leave out .*--num-layer-list"),
        ({"dry_run": True, "verify_only": True}, "--dry-run and --verify-only exclude"),
        (
            {"target_pipeline_parallel_size": 2, "num_layer_list": (4, 2, 2)},
            "--num-layer-list 4,2,2: .*--target-pipeline-parallel-size 2, not 3",
        ),
        ({"save_format": "hf", "pad_vocab": "last-row"}, "leave out --pad-vocab"),
        ({"save_format": "legacy", "moe_grouped_gemm": True}, "legacy: has no --moe-grouped-gemm"),
        ({"target_expert_parallel_size": 0}, "--target-expert-parallel-size 0: must be at least"),
        (
            {"num_layers_per_virtual_pipeline_stage": 2},
            "--num-layers-per-virtual-pipeline-stage 2: needs at least 2",
        ),
    ],
)
def test_values_that_cannot_be_are_refused_by_flag(changes, message):
    with pytest.raises(ConversionError, match=message):
        Request(**{**PATHS, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target_tensor_parallel_size": 4},
            r"--target-tensor-parallel-size 4: must divide --num-attention-heads 6 .*1, 2, 6\)",
        ),
        (
            {"target_pipeline_parallel_size": 3},
            r"--target-pipeline-parallel-size 3: must divide --num-layers 8 \(valid: 1, 2, 4, 8\)",
        ),
        (
            {"target_pipeline_parallel_size": 2, "num_layer_list": (4, 5)},
            "--num-layer-list 4,5: must add up to --num-layers 8, not 9",
        ),
        (
            {"target_pipeline_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 3},
            r"--num-layers-per-virtual-pipeline-stage 3: must divide the 4 layers .* 1, 2\)",
        ),
        (
            {"save_format": "legacy", "target_tensor_parallel_size": 6},
            "--target-tensor-parallel-size 6: must divide --num-query-groups 2 with --save-format",
        ),
        (
            {"target_expert_parallel_size": 2},
            "--target-expert-parallel-size 2: the model has no experts",
        ),
    ],
)
def test_layouts_the_model_does_not_allow_are_refused_with_the_valid_ones(changes, message):
    with pytest.raises(ConversionError, match=message):
        Request(**{**PATHS, **changes}).stages(llama())


def test_paths_may_be_strings(make_hf, tmp_path):
    source, target = str(make_hf().path), str(tmp_path / "out")
    found = Request(load_dir=source, save_dir=target, save_format="hf", hf_config=source)
    assert found.hf_config == found.load_dir == Path(source)
    assert convert(found).path == Path(target)
