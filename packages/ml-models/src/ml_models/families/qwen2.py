"""Qwen 1.5, 2 and 2.5: Llama with biases of query, key and value, and optional windows."""

from __future__ import annotations

from ml_models.architecture import Architecture
from ml_models.families import decoder
from ml_models.families.config_json import Config, value_of
from ml_models.families.decoder import shape, size
from ml_models.families.entries import Always, Custom, Entry, Fields, Value
from ml_models.families.family import Family
from ml_models.families.rope import Rope
from ml_models.families.windows import Windows

_FIRST = "max_window_layers"


def _read_windows(config: Config) -> Fields:
    """Windows count only where they are switched on; `layer_types` came with transformers 4.53."""
    if not config.get("use_sliding_window") or config.get("sliding_window", 4096) is None:
        return {}
    types = config.get("layer_types")
    if types is None:
        first = value_of({_FIRST: 28, **config}, _FIRST, int)
        layers = range(value_of(config, "num_hidden_layers", int))
        types = [f"{'sliding' if layer >= first else 'full'}_attention" for layer in layers]
    return _WINDOWS.read({**config, "layer_types": types})


def _write_windows(arch: Architecture) -> Fields:
    """Older files say only how many layers come before the first with a window."""
    windows = [window is not None for window in arch.windows]
    full = windows.index(True) if any(windows) else arch.num_layers
    return {"use_sliding_window": any(windows), **_WINDOWS.write(arch), _FIRST: full}


_WINDOWS = Windows(4096)
LENGTH = Value("max_position_embeddings", "max_position_embeddings", default=32768)
WINDOWS: tuple[Entry, ...] = (Custom(_read_windows, _write_windows),)

_SMALL = {"vocab_size": 151936, "max_position_embeddings": 32768, "rope_theta": 1e6}
_LARGE = {**_SMALL, "vocab_size": 152064}
_LONG = {**_LARGE, "max_position_embeddings": 131072}
_TIED = {"tie_word_embeddings": True}  # the embedding counts once, where files store it twice, too
_EPSILON = {"rms_norm_eps": 1e-5}
_05B = shape(24, 896, 4864, 14, 2)
_15B = shape(28, 1536, 8960, 12, 2)
_7B = shape(28, 3584, 18944, 28, 4)
_72B = shape(80, 8192, 29568, 64, 8)

QWEN2 = Family(
    name="qwen2",
    aliases=("qwen1.5", "qwen15", "qwen2.5"),
    model_types=("qwen2",),
    architectures=("Qwen2ForCausalLM",),
    config=(
        *decoder.LLAMA_LIKE,
        LENGTH,
        decoder.GROUPS,
        Rope(),
        *WINDOWS,
        Always(add_bias_linear=False, add_qkv_bias=True),
    ),
    rules=decoder.LLAMA_RULES,
    ignored=decoder.NO_FREQUENCIES,
    sizes=(
        size("qwen1.5-0.5b", 463_987_712, shape(24, 1024, 2816, 16), _SMALL, _TIED),
        size("qwen1.5-1.8b", 1_836_828_672, shape(24, 2048, 5504, 16), _SMALL),
        size("qwen1.5-4b", 3_950_369_280, shape(40, 2560, 6912, 20), _SMALL, rope_theta=5e6),
        size("qwen1.5-7b", 7_721_324_544, shape(32, 4096, 11008, 32), _SMALL),
        size("qwen1.5-14b", 14_167_290_880, shape(40, 5120, 13696, 40), _LARGE),
        size("qwen1.5-32b", 32_512_218_112, shape(64, 5120, 27392, 40, 8), _LARGE),
        size("qwen1.5-72b", 72_287_920_128, shape(80, 8192, 24576, 64), _LARGE),
        size("qwen2-0.5b", 494_032_768, _05B, _LONG, _TIED, vocab_size=151936),
        size("qwen2-1.5b", 1_543_714_304, _15B, _LONG, _TIED, vocab_size=151936),
        size("qwen2-7b", 7_615_616_512, _7B, _LONG),
        size("qwen2-72b", 72_706_203_648, _72B, _LONG, _EPSILON),
        size("qwen2.5-0.5b", 494_032_768, _05B, _SMALL, _TIED),
        size("qwen2.5-1.5b", 1_543_714_304, _15B, _LONG, _TIED, vocab_size=151936),
        size("qwen2.5-3b", 3_085_938_688, shape(36, 2048, 11008, 16, 2), _SMALL, _TIED),
        size("qwen2.5-7b", 7_615_616_512, _7B, _LONG),
        size("qwen2.5-14b", 14_770_033_664, shape(48, 5120, 13824, 40, 8), _LONG, _EPSILON),
        size("qwen2.5-32b", 32_763_876_352, shape(64, 5120, 27648, 40, 8), _LONG, _EPSILON),
        size("qwen2.5-72b", 72_706_203_648, _72B, _LONG, _EPSILON),
    ),
)
