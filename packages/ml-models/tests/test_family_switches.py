"""What the keys of a published config.json mean, where they mean something unusual."""

import json
from pathlib import Path

import pytest

from ml_models import registry

FOLDER = Path(__file__).parent / "configs"


def read(family, variant, **changes):
    """Translate one of configs/<family>.json; a change to DELETED leaves the key out."""
    config = json.loads((FOLDER / f"{family}.json").read_text())[variant] | changes
    kept = {key: value for key, value in config.items() if value is not DELETED}
    return registry.family(family).from_hf(kept)


DELETED = object()


@pytest.mark.parametrize(
    ("variant", "positions", "norm_head"),
    [
        ("7B", "rope", False),
        ("13B", "alibi", False),
        ("2 7B", "rope", True),
        ("2 13B", "alibi", True),
        ("written by ml-convert", "alibi", True),
    ],
)
def test_the_four_baichuans_are_told_apart(variant, positions, norm_head):
    arch = read("baichuan", variant)
    assert (arch.position_embedding_type, arch.norm_head) == (positions, norm_head)
    assert arch.max_position_embeddings == 64


def test_what_a_baichuan_says_of_itself_decides():
    assert read("baichuan", "7B", position_embedding_type="alibi").position_embedding_type == (
        "alibi"
    )
    assert read("baichuan", "13B", position_embedding_type="rope").position_embedding_type == "rope"
    assert not read("baichuan", "2 7B", norm_head=False).norm_head
    assert read("baichuan", "7B", norm_head=True, vocab_size=64003).norm_head
    assert read("baichuan", "7B", z_loss_weight=0).norm_head


def test_a_baichuan_that_contradicts_itself_is_not_guessed():
    with pytest.raises(
        ValueError, match=r"hidden_size 5120 that of one with alibi; add \"position"
    ):
        read("baichuan", "7B", hidden_size=5120)
    explicit = read("baichuan", "7B", hidden_size=5120, position_embedding_type="alibi")
    assert explicit.position_embedding_type == "alibi"
    with pytest.raises(ValueError, match=r"max_position_embeddings .*model_max_length.* missing"):
        read("baichuan", "7B", max_position_embeddings=DELETED)
    with pytest.raises(ValueError, match="position_embedding_type is 'nope'"):
        read("baichuan", "7B", position_embedding_type="nope")


def test_a_baichuan_with_alibi_is_written_for_the_code_that_has_it():
    family = registry.family("baichuan")
    written = family.to_hf(read("baichuan", "13B"), "float32")
    assert written["model_max_length"] == 64
    assert not {"max_position_embeddings", "rope_theta"} & written.keys()


def test_qwen_counts_gate_and_up_together_and_has_biases_in_attention_only():
    arch = read("qwen", "qwen")
    assert (arch.ffn_size, arch.has_qkv_bias, arch.has_dense_bias) == (48, True, False)
    assert not arch.add_bias_linear
    assert read("qwen", "qwen", no_bias=False).add_bias_linear
    assert read("qwen", "qwen", seq_length=64).max_position_embeddings == 64


def test_qwen2_has_windows_only_where_they_are_switched_on():
    assert read("qwen2", "windows").windows == (None, None, 16, 16)
    assert read("qwen2", "windows", use_sliding_window=False).windows == (None,) * 4
    assert read("qwen2", "windows", use_sliding_window=DELETED).windows == (None,) * 4
    assert read("qwen2", "windows", max_window_layers=DELETED).windows == (None,) * 4
    assert read("qwen2", "windows of transformers 5").windows == (16, None, 16, None)
    with pytest.raises(ValueError, match=r"layer_types must be .* for each of num_hidden_layers 4"):
        read("qwen2", "windows", layer_types=["full_attention"])


def test_a_missing_window_of_mistral_is_4096_and_null_is_none():
    assert read("mistral", "window", sliding_window=DELETED).windows == (4096,) * 4
    assert read("mistral", "no window").windows == (None,) * 4


def test_smollm3_lists_the_layers_with_positions():
    assert read("smollm3", "smollm 3").layers_with_rope == (True, True, True, False)
    assert read("smollm3", "interval").layers_with_rope == (True, False, True, False)
    assert read("smollm3", "irregular").layers_with_rope == (False, True, True, False)
    default = read("smollm3", "interval", no_rope_layer_interval=DELETED)
    assert default.layers_with_rope == (True, True, True, False)
    assert not read(
        "smollm3", "interval", tie_word_embeddings=DELETED
    ).untie_embeddings_and_output_weights
    with pytest.raises(ValueError, match=r"no_rope_layers must be a list of 0 and 1, not \[2\]"):
        read("smollm3", "interval", no_rope_layers=[2])
    with pytest.raises(ValueError, match="use_sliding_window is True, only False"):
        read("smollm3", "interval", use_sliding_window=True)


def test_internlm_has_biases_and_rotary_positions_under_keys_of_its_own():
    arch = read("internlm", "7b", rotary={"base": 500, "type": "dynamic"})
    assert (arch.has_qkv_bias, arch.has_dense_bias, arch.add_bias_linear) == (True, True, False)
    assert (arch.rotary_base, arch.rope_scaling_type) == (500.0, "dynamic")
    assert arch.original_max_position_embeddings == 64
    assert read("internlm", "first release") == read("internlm", "7b")
    assert read("internlm", "origin").rope_scaling_type is None
    assert not read("internlm", "20b").has_qkv_bias
    with pytest.raises(ValueError, match="type is 'yarn', only 'dynamic' or 'origin'"):
        read("internlm", "7b", rotary={"type": "yarn"})
    with pytest.raises(ValueError, match="rotary must be an object, not 3"):
        read("internlm", "7b", rotary=3)


def test_chatglm_turns_half_of_each_head_and_multiplies_the_base():
    arch = read("chatglm", "chatglm 3 32k")
    assert (arch.rotary_base, arch.rotary_percent) == (500_000.0, 0.5)
    assert arch.rotary_interleaved
    assert (arch.query_groups, arch.head_dim, arch.vocab_size) == (2, 16, 99)
    single = read("chatglm", "chatglm 3", multi_query_attention=False)
    assert single.query_groups == 4
    with pytest.raises(ValueError, match="original_rope is False"):
        read("chatglm", "chatglm 3", original_rope=False)


def test_phi3_reads_no_scaling_that_transformers_reads_otherwise():
    arch = read("phi3", "phi 3 mini 128k")
    assert (arch.rope_scaling_type, arch.rope_scaling_factor) == ("longrope", 4.0)
    with pytest.raises(ValueError, match="type of rotary positions is 'yarn'"):
        read("phi3", "phi 4", rope_scaling={"type": "yarn", "factor": 2.0})


def test_biases_of_attention_are_not_those_of_the_mlp():
    arch = read("llama", "biases of attention")
    assert (arch.has_qkv_bias, arch.has_dense_bias, arch.add_bias_linear) == (True, True, False)
    assert read("llama", "all biases").add_bias_linear
    glm = read("glm", "glm 4")
    assert (glm.has_qkv_bias, glm.has_dense_bias) == (True, False)
