"""Families whose code is in the repository of their weights: nothing runs it, so one page does.

Each `reference_<family>.py` was written from the published architecture and shares nothing with us.
"""

from __future__ import annotations

import pytest
import reference_baichuan
from harness import VOCABULARY, Case, check_gradients, check_logits, check_round_trip, every_layout
from reference_aquila import Aquila
from reference_chatglm import ChatGLM
from reference_internlm import InternLM
from reference_qwen import Qwen

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 160,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
AQUILA = {"architectures": ["AquilaForCausalLM"], "model_type": "aquila", **SIZES}
INTERNLM = {"architectures": ["InternLMForCausalLM"], "model_type": "internlm", **SIZES}
BAICHUAN = {"architectures": ["BaichuanForCausalLM"], "model_type": "baichuan", **SIZES}
# Six heads are no power of two, so their slopes come from two series.
BAICHUAN_13B = {**BAICHUAN, "hidden_size": 96, "num_attention_heads": 6, "model_max_length": 256}
del BAICHUAN_13B["max_position_embeddings"]
QWEN = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "hidden_size": 64,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "vocab_size": VOCABULARY,
    "seq_length": 256,
    "max_position_embeddings": 256,
    "layer_norm_epsilon": 1e-6,
    "initializer_range": 0.02,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "no_bias": True,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
}
CHATGLM = {
    "architectures": ["ChatGLMModel"],
    "model_type": "chatglm",
    "hidden_size": 64,
    "ffn_hidden_size": 160,
    "num_layers": 2,
    "num_attention_heads": 4,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "kv_channels": 32,
    "padded_vocab_size": VOCABULARY,
    "seq_length": 256,
    "layernorm_epsilon": 1e-5,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "rope_ratio": 50,
    "rmsnorm": True,
    "post_layer_norm": True,
    "original_rope": True,
    "apply_residual_connection_post_layernorm": False,
    "apply_query_key_layer_scaling": True,
    "tie_word_embeddings": False,
}

SINGLE = ("single",)  # where another case of the family is cut every way

CASES = (
    Case(name="aquila", config=AQUILA, reference=Aquila, layouts=SINGLE),
    Case(
        name="aquila 2",
        config={**AQUILA, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
        reference=Aquila,
    ),
    Case(
        name="internlm",
        # The rotary base grows: the sequence is longer than this.
        config={
            **INTERNLM,
            "max_position_embeddings": 96,
            "bias": True,
            "rotary": {"base": 10000, "type": "dynamic"},
        },
        reference=InternLM,
    ),
    Case(
        name="internlm 20b",
        config={**INTERNLM, "bias": False, "rotary": {"base": 10000, "type": "origin"}},
        reference=InternLM,
        layouts=SINGLE,
    ),
    Case(
        name="baichuan 7b",
        config=BAICHUAN,
        reference=reference_baichuan.build(alibi=False, norm_head=False),
        layouts=SINGLE,
    ),
    Case(
        name="baichuan 13b",
        config=BAICHUAN_13B,
        reference=reference_baichuan.build(alibi=True, norm_head=False),
        layouts=SINGLE,
    ),
    # The vocabulary is not that of Baichuan 2, so config.json says what it is.
    Case(
        name="baichuan 2 7b",
        config={**BAICHUAN, "norm_head": True},
        reference=reference_baichuan.build(alibi=False, norm_head=True),
    ),
    Case(
        name="baichuan 2 13b",
        config={**BAICHUAN_13B, "norm_head": True},
        reference=reference_baichuan.build(alibi=True, norm_head=True),
    ),
    Case(name="qwen", config=QWEN, reference=Qwen, layouts=SINGLE),
    Case(
        name="qwen biases",
        config={**QWEN, "no_bias": False, "kv_channels": 32, "rotary_pct": 0.5},
        reference=Qwen,
    ),
    Case(name="chatglm 3", config=CHATGLM, reference=ChatGLM),
)
WITH_GRADIENTS = [case for case in CASES if case.name in ("baichuan 2 13b", "chatglm 3")]


@pytest.mark.parametrize(("case", "layout"), every_layout(CASES))
def test_logits_are_those_of_the_published_model(case, layout, tmp_path_factory):
    check_logits(case, layout, tmp_path_factory)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_and_config_come_back(case, tmp_path_factory):
    check_round_trip(case, tmp_path_factory)


@pytest.mark.parametrize(("case", "layout"), every_layout(WITH_GRADIENTS))
def test_gradients_are_those_of_the_published_model(case, layout, tmp_path_factory):
    check_gradients(case, layout, tmp_path_factory)
