"""What most families share: Llama's keys of `config.json`, and Llama's names of weights."""

from __future__ import annotations

from ml_models.architecture import Architecture
from ml_models.families.config_json import Config, value_of
from ml_models.families.entries import Always, Custom, Entry, Fields, Must, Not, Value
from ml_models.families.family import Size
from ml_models.families.quantization import Unquantized
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

NOT_QUANTIZED = Unquantized()
LLAMA_LIKE: tuple[Entry, ...] = (
    *SIZES,
    NORM_EPSILON,
    UNTIED,
    Must("hidden_act", "silu"),
    NOT_QUANTIZED,
    Always(normalization="RMSNorm", swiglu=True),
)
"""What all families with Llama's keys say alike."""

NO_BIASES = Always(add_bias_linear=False)
ATTENTION_BIASES: dict[object, Fields] = {
    True: {"add_qkv_bias": True, "add_dense_bias": True},
    False: {"add_qkv_bias": False, "add_dense_bias": False},
}
"""What a key for the biases of all four projections of attention stands for."""


def _read_biases(config: Config) -> Fields:
    """Biases of the MLP alone have no flag in Megatron; with those of attention they have."""
    attention, mlp = (
        config.get(key) is not None and value_of(config, key, bool)
        for key in ("attention_bias", "mlp_bias")
    )
    if mlp and not attention:
        raise ValueError(
            "config.json: mlp_bias is true without attention_bias; Megatron has no such model"
        )
    fields = {"add_bias_linear": mlp}
    return fields if mlp else fields | ATTENTION_BIASES[attention]


def _write_biases(arch: Architecture) -> Fields:
    attention = arch.has_qkv_bias and arch.has_dense_bias
    return {"attention_bias": attention, "mlp_bias": arch.add_bias_linear}


BIASES = Custom(_read_biases, _write_biases)
"""`attention_bias` of the four projections of attention, `mlp_bias` of the three of the MLP."""

EMBEDDING = Same("embedding.word_embeddings", "model.embed_tokens")
QKV = GroupedQkv(
    f"{ATTENTION}.linear_qkv",
    query=f"{HF_LAYER}.self_attn.q_proj",
    key=f"{HF_LAYER}.self_attn.k_proj",
    value=f"{HF_LAYER}.self_attn.v_proj",
)
ATTENTION_OUTPUT = Same(f"{ATTENTION}.linear_proj", f"{HF_LAYER}.self_attn.o_proj")
QK_NORMS: tuple[Rule, ...] = (
    Same(f"{ATTENTION}.q_layernorm", f"{HF_LAYER}.self_attn.q_norm"),
    Same(f"{ATTENTION}.k_layernorm", f"{HF_LAYER}.self_attn.k_norm"),
)
NORMS: tuple[Rule, ...] = (
    Same(f"{LAYER}.input_layernorm", f"{HF_LAYER}.input_layernorm"),
    Same(f"{LAYER}.pre_mlp_layernorm", f"{HF_LAYER}.post_attention_layernorm"),
)
GATED_MLP: tuple[Rule, ...] = (
    Stacked(f"{MLP}.linear_fc1", (f"{HF_LAYER}.mlp.gate_proj", f"{HF_LAYER}.mlp.up_proj")),
    Same(f"{MLP}.linear_fc2", f"{HF_LAYER}.mlp.down_proj"),
)
STACKED_MLP: tuple[Rule, ...] = (
    Same(f"{MLP}.linear_fc1", f"{HF_LAYER}.mlp.gate_up_proj"),
    Same(f"{MLP}.linear_fc2", f"{HF_LAYER}.mlp.down_proj"),
)
HEAD: tuple[Rule, ...] = (
    Same("decoder.final_layernorm", "model.norm"),
    Same("output_layer", "lm_head"),
)
LLAMA_RULES: tuple[Rule, ...] = (EMBEDDING, QKV, ATTENTION_OUTPUT, *NORMS, *GATED_MLP, *HEAD)
NO_FREQUENCIES = ("model.layers.*.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")


def shape(
    layers: int, hidden: int, ffn: int, heads: int, groups: int | None = None
) -> dict[str, object]:
    """Say how large a model is, as its config.json does."""
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
    }
    return {**sizes, **({} if groups is None else {"num_key_value_heads": groups})}


def size(name: str, parameters: int, *configs: Config, **more: object) -> Size:
    """Describe a published model by parts of its config.json; a later part counts."""
    config: dict[str, object] = {}
    for part in (*configs, more):
        config |= part
    return Size(name=name, config=config, parameters=parameters)
