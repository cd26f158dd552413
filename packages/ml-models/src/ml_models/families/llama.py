"""Llama: RMSNorm, rotary positions, grouped-query attention, a gated MLP.

Also Llama 2 and 3, Code Llama, Yi, SmolLM2, TinyLlama and everything else whose config.json says
`llama`.
"""

from __future__ import annotations

from ml_models.families import decoder
from ml_models.families.decoder import shape, size
from ml_models.families.entries import Must
from ml_models.families.family import Family
from ml_models.families.rope import Rope

_LLAMA = {"vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
_LLAMA2 = {"vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_CODE = {"max_position_embeddings": 16384, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
_LLAMA3 = {
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
}


def _llama31(factor: float) -> dict[str, object]:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return {**_LLAMA3, "max_position_embeddings": 131072, "rope_scaling": scaling}


_LLAMA31 = _llama31(8.0)
_LLAMA32 = {**_llama31(32.0), "tie_word_embeddings": True}
_YI = {
    "vocab_size": 64000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e6,
}
_SMOL = {
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e5,
    "tie_word_embeddings": True,
}
_7B = shape(32, 4096, 11008, 32)
_8B = shape(32, 4096, 14336, 32, 8)
_13B = shape(40, 5120, 13824, 40)
_34B = shape(48, 8192, 22016, 64, 8)
_70B = shape(80, 8192, 28672, 64, 8)

LLAMA = Family(
    name="llama",
    aliases=("llama2", "llama3", "llama3.1", "llama3.2", "codellama", "yi", "smollm2", "tinyllama"),
    model_types=("llama",),
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    config=(
        *decoder.LLAMA_LIKE,
        decoder.GROUPS,
        decoder.HEAD_DIM,
        Rope(),
        decoder.BIASES,
        Must("pretraining_tp", *range(1, 65), written=False),
    ),
    rules=decoder.LLAMA_RULES,
    ignored=decoder.NO_FREQUENCIES,
    sizes=(
        size("llama-7b", 6_738_415_616, _7B, _LLAMA),
        size("llama-13b", 13_015_864_320, _13B, _LLAMA),
        size("llama-33b", 32_528_943_616, shape(60, 6656, 17920, 52), _LLAMA),
        size("llama-65b", 65_285_660_672, shape(80, 8192, 22016, 64), _LLAMA),
        size("llama2-7b", 6_738_415_616, _7B, _LLAMA2),
        size("llama2-13b", 13_015_864_320, _13B, _LLAMA2),
        # Its weights were never released; Code Llama 34B was made from them.
        size("llama2-34b", 33_743_970_304, _34B, _LLAMA2),
        size("llama2-70b", 68_976_648_192, _70B, _LLAMA2),
        size("codellama-7b", 6_738_546_688, _7B, _CODE, vocab_size=32016),
        size("codellama-13b", 13_016_028_160, _13B, _CODE, vocab_size=32016),
        size("codellama-34b", 33_743_970_304, _34B, _CODE, vocab_size=32000),
        size("llama3-8b", 8_030_261_248, _8B, _LLAMA3),
        size("llama3-70b", 70_553_706_496, _70B, _LLAMA3),
        size("llama3.1-8b", 8_030_261_248, _8B, _LLAMA31),
        size("llama3.1-70b", 70_553_706_496, _70B, _LLAMA31),
        size("llama3.1-405b", 405_853_388_800, shape(126, 16384, 53248, 128, 8), _LLAMA31),
        # Tied: the embedding counts once.
        size("llama3.2-1b", 1_235_814_400, shape(16, 2048, 8192, 32, 8), _LLAMA32),
        size("llama3.2-3b", 3_212_749_824, shape(28, 3072, 8192, 24, 8), _LLAMA32),
        size("yi-6b", 6_061_035_520, shape(32, 4096, 11008, 32, 4), _YI),
        size("yi-34b", 34_388_917_248, shape(60, 7168, 20480, 56, 8), _YI),
        size(
            "tinyllama-1.1b", 1_100_048_384, shape(22, 2048, 5632, 32, 4), _LLAMA, rms_norm_eps=1e-5
        ),
        size("smollm2-135m", 134_515_008, shape(30, 576, 1536, 9, 3), _SMOL),
        size("smollm2-360m", 361_821_120, shape(32, 960, 2560, 15, 5), _SMOL),
        size("smollm2-1.7b", 1_711_376_384, shape(24, 2048, 8192, 32, 32), _SMOL, rope_theta=1.3e5),
    ),
)
