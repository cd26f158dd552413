"""GPT-2 and GPT-3: learned positions, biases everywhere, matrices stored transposed.

GPT-3 was never published; it is GPT-2 in its sizes (https://arxiv.org/abs/2005.14165, table 2.1).
The published files of GPT-2 leave out the first part of all names.
"""

from __future__ import annotations

from ml_models.families import decoder
from ml_models.families.decoder import ATTENTION, LAYER, MLP
from ml_models.families.entries import Always, Choice, Entry, Must, Not, Value
from ml_models.families.family import Family, Size
from ml_models.families.rules import FlatQkv, Same

_HF_LAYER = "transformer.h.*"

_CONFIG: tuple[Entry, ...] = (
    Value("vocab_size", "vocab_size"),
    Value("n_embd", "hidden_size"),
    Value("n_inner", "ffn_hidden_size", default=None),
    Value("n_layer", "num_layers"),
    Value("n_head", "num_attention_heads"),
    Value("n_positions", "max_position_embeddings", default=1024),
    Value("layer_norm_epsilon", "norm_epsilon", float, default=1e-5),
    Value("initializer_range", "init_method_std", float, default=0.02),
    Not("tie_word_embeddings", "untie_embeddings_and_output_weights", default=True),
    Choice(
        "activation_function",
        {
            "gelu_new": {"approximate_gelu": True},
            "gelu_pytorch_tanh": {"approximate_gelu": True},
            "gelu": {"approximate_gelu": False},
        },
        default="gelu_new",
    ),
    Must("scale_attn_weights", True),
    Must("scale_attn_by_inverse_layer_idx", False),
    Must("add_cross_attention", False),
    decoder.NOT_QUANTIZED,
    Always(
        position_embedding_type="learned_absolute",
        normalization="LayerNorm",
        add_bias_linear=True,
    ),
)


def _size(name: str, hidden: int, layers: int, heads: int, parameters: int) -> Size:
    """Describe a model of OpenAI's; GPT-2 has half the positions of GPT-3."""
    config = {
        "vocab_size": 50257,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": 1024 if name.startswith("gpt2") else 2048,
    }
    return Size(name=name, config=config, parameters=parameters)


GPT2 = Family(
    name="gpt2",
    aliases=("gpt3",),
    model_types=("gpt2",),
    architectures=("GPT2LMHeadModel",),
    config=_CONFIG,
    rules=(
        Same("embedding.word_embeddings", "transformer.wte"),
        Same("embedding.position_embeddings", "transformer.wpe"),
        Same(f"{LAYER}.input_layernorm", f"{_HF_LAYER}.ln_1"),
        FlatQkv(f"{ATTENTION}.linear_qkv", f"{_HF_LAYER}.attn.c_attn", transposed=True),
        Same(f"{ATTENTION}.linear_proj", f"{_HF_LAYER}.attn.c_proj", transposed=True),
        Same(f"{LAYER}.pre_mlp_layernorm", f"{_HF_LAYER}.ln_2"),
        Same(f"{MLP}.linear_fc1", f"{_HF_LAYER}.mlp.c_fc", transposed=True),
        Same(f"{MLP}.linear_fc2", f"{_HF_LAYER}.mlp.c_proj", transposed=True),
        Same("decoder.final_layernorm", "transformer.ln_f"),
        Same("output_layer", "lm_head"),
    ),
    ignored=("transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias"),  # causal masks
    optional_prefix="transformer.",
    sizes=(
        _size("gpt2", 768, 12, 12, 124_439_808),
        _size("gpt2-xl", 1600, 48, 25, 1_557_611_200),
        _size("gpt3-15b", 12288, 8, 96, 15_139_540_992),  # ModelLink's, 8 layers of the largest
        _size("gpt3-175b", 12288, 96, 96, 174_604_259_328),  # 175.0 billion in the paper
    ),
)
