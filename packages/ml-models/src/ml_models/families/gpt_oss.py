"""gpt-oss: a softmax with a logit for nothing, windows in turn, biases, stacked experts.

The matrices of all experts of a layer are one tensor, transposed, with the rows of gate and up in
turn. The published files are quantized to MXFP4, which is refused: transformers dequantizes them.
"""

from __future__ import annotations

from ml_models.architecture import Architecture
from ml_models.families import decoder
from ml_models.families.config_json import Config
from ml_models.families.decoder import ATTENTION, HF_LAYER, MLP
from ml_models.families.entries import Always, Custom, Entry, Fields, Must, Value
from ml_models.families.experts import BALANCE, EXPERT
from ml_models.families.family import Family
from ml_models.families.quantization import Unquantized
from ml_models.families.rope import Rope
from ml_models.families.rules import ExpertStack, Same
from ml_models.families.windows import Windows

_HF_EXPERTS = f"{HF_LAYER}.mlp.experts"
_STACKED = {"weight": "", "bias": "_bias"}


def _read_scaling(config: Config) -> Fields:
    """Missing, it means YaRN to some versions of transformers, and null means nothing to others."""
    if not config.get("rope_scaling") and not config.get("rope_parameters"):
        raise ValueError("config.json: rope_scaling (or rope_parameters) is missing")
    return {}


def _write_nothing(arch: Architecture) -> Fields:  # noqa: ARG001
    return {}


_CONFIG: tuple[Entry, ...] = (
    *decoder.SIZES,
    Value("max_position_embeddings", "max_position_embeddings", default=131072),
    Value("num_key_value_heads", "num_query_groups", default=8),
    Value("head_dim", "kv_channels", default=64),
    Value("rms_norm_eps", "norm_epsilon", float, default=1e-5),
    decoder.UNTIED,
    Custom(_read_scaling, _write_nothing),
    Rope(default_base=150_000.0),
    Windows(128),
    Value("num_local_experts", "num_experts", also=("num_experts",)),
    Value("num_experts_per_tok", "moe_router_topk", default=4),
    BALANCE,
    Value("swiglu_limit", "activation_func_clamp_value", float, default=7.0),
    Must("swiglu_alpha", 1.702),
    Must("attention_bias", True),
    Must("hidden_act", "silu"),
    Unquantized("load them with transformers (Mxfp4Config(dequantize=True)) and save them"),
    Always(
        normalization="RMSNorm",
        quick_geglu=True,
        glu_linear_offset=1.0,
        softmax_type="learnable",
        add_bias_linear=True,
    ),
)


_PUBLISHED = {
    "vocab_size": 201088,
    "num_key_value_heads": 8,
    "rope_theta": 150_000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}

GPT_OSS = Family(
    name="gpt_oss",
    model_types=("gpt_oss",),
    architectures=("GptOssForCausalLM",),
    config=_CONFIG,
    rules=(
        decoder.EMBEDDING,
        *decoder.NORMS,
        decoder.QKV,
        Same(
            f"{ATTENTION}.core_attention",
            f"{HF_LAYER}.self_attn",
            suffixes={"softmax_offset": ".sinks"},
        ),
        decoder.ATTENTION_OUTPUT,
        Same(f"{MLP}.router", f"{HF_LAYER}.mlp.router"),
        ExpertStack(
            f"{EXPERT}.linear_fc1",
            f"{_HF_EXPERTS}.gate_up_proj",
            interleaved=2,
            suffixes=_STACKED,
            transposed=True,
        ),
        ExpertStack(
            f"{EXPERT}.linear_fc2",
            f"{_HF_EXPERTS}.down_proj",
            suffixes=_STACKED,
            transposed=True,
        ),
        *decoder.HEAD,
    ),
    sizes=(  # https://huggingface.co/openai/gpt-oss-20b, gpt-oss-120b
        decoder.size(
            "gpt-oss-20b",
            20_914_757_184,
            decoder.shape(24, 2880, 2880, 64),
            num_local_experts=32,
            **_PUBLISHED,
        ),
        decoder.size(
            "gpt-oss-120b",
            116_829_156_672,
            decoder.shape(36, 2880, 2880, 64),
            num_local_experts=128,
            **_PUBLISHED,
        ),
    ),
)
