"""Names of Megatron-Legacy, and how they are nested."""

import pytest

from ml_convert.legacy import adapter_name, flat, gate_and_up, name, path

ENCODER = "language_model.encoder."


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("embedding.word_embeddings.weight", "language_model.embedding.word_embeddings.weight"),
        ("output_layer.weight", "language_model.output_layer.weight"),
        ("decoder.final_layernorm.bias", f"{ENCODER}final_norm.bias"),
        ("decoder.layers.12.input_layernorm.weight", f"{ENCODER}layers.12.input_norm.weight"),
        (
            "decoder.layers.3.self_attention.linear_qkv.bias",
            f"{ENCODER}layers.3.self_attention.query_key_value.bias",
        ),
        ("decoder.layers.3.mlp.linear_fc2.weight", f"{ENCODER}layers.3.mlp.dense_4h_to_h.weight"),
        (
            "decoder.layers.3.mlp.router.weight",
            f"{ENCODER}layers.3.mlp.block.moe_layer.gate.weight.weight",
        ),
        (
            "decoder.layers.3.mlp.experts.local_experts.7.linear_fc2.weight",
            f"{ENCODER}layers.3.mlp.block.moe_layer.experts.experts.7.w2.weight",
        ),
        ("decoder.layers.3.mlp.router.expert_bias", None),
        ("decoder.layers.3.mlp.experts.local_experts.7.linear_fc2.bias", None),
        ("decoder.layers.3.post_attn_norm.weight", None),
    ],
)
def test_a_parameter_has_one_name_or_none(ours, theirs):
    assert name(ours) == theirs


def test_an_expert_has_gate_and_up_apart():
    ours = "decoder.layers.3.mlp.experts.local_experts.7.linear_fc1.weight"
    experts = f"{ENCODER}layers.3.mlp.block.moe_layer.experts.experts.7"
    assert gate_and_up(ours) == (f"{experts}.w1.weight", f"{experts}.w3.weight")
    assert gate_and_up(ours.replace("fc1", "fc2")) is None
    assert gate_and_up("decoder.layers.3.mlp.linear_fc1.weight") is None


def test_names_are_paths_and_back():
    nested = {
        "language_model": {
            "embedding": {"word_embeddings": {"weight": 1, "norm.weight": 2}},
            "encoder": {"layers.0.mlp.dense_h_to_4h.weight": 3, "final_norm.weight": 4},
            "output_layer": {"weight": 5},
        },
        "word_embeddings_for_head": {"weight": 6},
    }
    found = dict(flat(nested))
    assert found["language_model.embedding.word_embeddings.norm.weight"] == 2
    rebuilt = {}
    for dotted, value in found.items():
        *parents, last = path(dotted)
        parent = rebuilt
        for key in parents:
            parent = parent.setdefault(key, {})
        parent[last] = value
    assert rebuilt == nested


def test_adapters_get_the_module_names_of_the_core():
    theirs = f"{ENCODER}layers.1.self_attention.query_key_value.lora_A.default.weight"
    ours = "decoder.layers.1.self_attention.linear_qkv.lora_A.default.weight"
    assert adapter_name(theirs) == ours
    other = f"{ENCODER}layers.1.unknown.lora_A.default.weight"
    assert adapter_name(other) == other
