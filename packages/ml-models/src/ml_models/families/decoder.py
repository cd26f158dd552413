"""What most families share: Llama's keys of `config.json`, and Llama's names of weights."""

from __future__ import annotations

from ml_models.families.entries import Entry, Not, Value
from ml_models.families.rules import GroupedQkv, Rule, Same, Stacked

LAYER = "decoder.layers.*"
ATTENTION = f"{LAYER}.self_attention"
MLP = f"{LAYER}.mlp"
HF_LAYER = "model.layers.*"

SIZES: tuple[Entry, ...] = (
    Value("vocab_size", "vocab_size"),
    Value("hidden_size", "hidden_size"),
    Value("intermediate_size", "ffn_hidden_size"),
    Value("num_hidden_layers", "num_layers"),
    Value("num_attention_heads", "num_attention_heads"),
    Value("max_position_embeddings", "max_position_embeddings", default=2048),
    Value("initializer_range", "init_method_std", float, default=0.02),
)
GROUPS = Value("num_key_value_heads", "num_query_groups", default=None)
HEAD_DIM = Value("head_dim", "kv_channels", default=None)
NORM_EPSILON = Value("rms_norm_eps", "norm_epsilon", float, default=1e-6)
UNTIED = Not("tie_word_embeddings", "untie_embeddings_and_output_weights", default=False)

EMBEDDING = Same("embedding.word_embeddings", "model.embed_tokens")
QKV = GroupedQkv(
    f"{ATTENTION}.linear_qkv",
    query=f"{HF_LAYER}.self_attn.q_proj",
    key=f"{HF_LAYER}.self_attn.k_proj",
    value=f"{HF_LAYER}.self_attn.v_proj",
)
ATTENTION_OUTPUT = Same(f"{ATTENTION}.linear_proj", f"{HF_LAYER}.self_attn.o_proj")
NORMS: tuple[Rule, ...] = (
    Same(f"{LAYER}.input_layernorm", f"{HF_LAYER}.input_layernorm"),
    Same(f"{LAYER}.pre_mlp_layernorm", f"{HF_LAYER}.post_attention_layernorm"),
)
GATED_MLP: tuple[Rule, ...] = (
    Stacked(f"{MLP}.linear_fc1", (f"{HF_LAYER}.mlp.gate_proj", f"{HF_LAYER}.mlp.up_proj")),
    Same(f"{MLP}.linear_fc2", f"{HF_LAYER}.mlp.down_proj"),
)
HEAD: tuple[Rule, ...] = (
    Same("decoder.final_layernorm", "model.norm"),
    Same("output_layer", "lm_head"),
)
LLAMA_RULES: tuple[Rule, ...] = (EMBEDDING, QKV, ATTENTION_OUTPUT, *NORMS, *GATED_MLP, *HEAD)
NO_FREQUENCIES = ("model.layers.*.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
