"""Bloom: ALiBi positions, a norm after the embedding, biases everywhere.

Query, key and value are in Megatron's order already, and the published files leave out the first
part of all names.
"""

from __future__ import annotations

from ml_models.families import decoder
from ml_models.families.decoder import ATTENTION, LAYER, MLP
from ml_models.families.entries import Always, Entry, Must, Not, Value
from ml_models.families.family import Family, Size
from ml_models.families.rules import Same

_HF_LAYER = "transformer.h.*"

_CONFIG: tuple[Entry, ...] = (
    Value("vocab_size", "vocab_size"),
    Value("hidden_size", "hidden_size", also=("n_embed",)),
    Value("n_layer", "num_layers", also=("num_hidden_layers",)),
    Value("n_head", "num_attention_heads", also=("num_attention_heads",)),
    Value("seq_length", "max_position_embeddings", default=2048),
    Value("layer_norm_epsilon", "norm_epsilon", float, default=1e-5),
    Value("initializer_range", "init_method_std", float, default=0.02),
    Not("tie_word_embeddings", "untie_embeddings_and_output_weights", default=True),
    Must("apply_residual_connection_post_layernorm", False),
    decoder.NOT_QUANTIZED,
    Always(
        position_embedding_type="alibi",
        normalization="LayerNorm",
        embed_layernorm=True,
        approximate_gelu=True,
        add_bias_linear=True,
    ),
)


def _size(name: str, hidden: int, layers: int, heads: int, parameters: int) -> Size:
    """Describe a published model, such as https://huggingface.co/bigscience/bloom-7b1."""
    config = {"vocab_size": 250880, "hidden_size": hidden, "n_layer": layers, "n_head": heads}
    return Size(name=name, config=config, parameters=parameters)


BLOOM = Family(
    name="bloom",
    model_types=("bloom",),
    architectures=("BloomForCausalLM", "BloomModel"),
    config=_CONFIG,
    rules=(
        Same("embedding.word_embeddings", "transformer.word_embeddings"),
        Same("embedding.word_embeddings.norm", "transformer.word_embeddings_layernorm"),
        Same(f"{LAYER}.input_layernorm", f"{_HF_LAYER}.input_layernorm"),
        Same(f"{ATTENTION}.linear_qkv", f"{_HF_LAYER}.self_attention.query_key_value"),
        Same(f"{ATTENTION}.linear_proj", f"{_HF_LAYER}.self_attention.dense"),
        Same(f"{LAYER}.pre_mlp_layernorm", f"{_HF_LAYER}.post_attention_layernorm"),
        Same(f"{MLP}.linear_fc1", f"{_HF_LAYER}.mlp.dense_h_to_4h"),
        Same(f"{MLP}.linear_fc2", f"{_HF_LAYER}.mlp.dense_4h_to_h"),
        Same("decoder.final_layernorm", "transformer.ln_f"),
        Same("output_layer", "lm_head"),
    ),
    optional_prefix="transformer.",
    sizes=(
        _size("bloom-560m", 1024, 24, 16, 559_214_592),
        _size("bloom-7b1", 4096, 30, 32, 7_069_016_064),
        _size("bloom-176b", 14336, 70, 112, 176_247_271_424),
    ),
)
