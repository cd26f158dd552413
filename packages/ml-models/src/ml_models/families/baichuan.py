"""Baichuan and Baichuan 2: Llama with one matrix for query, key and value.

The 7B models have rotary positions, the 13B models ALiBi; Baichuan 2 divides each row of the output
layer by its length. Four different codes of the models' repositories stand behind one model type,
and no published config.json says which. What tells them apart:

  positions   the code of the 7B models has `max_position_embeddings`, that of the 13B models only
              `model_max_length`
  norm head   Baichuan has 64000 tokens, Baichuan 2 has 125696; its code also has `z_loss_weight`

A config.json that we write says it by itself, as `position_embedding_type` and `norm_head`, and
these keys decide where they are. Where the width of a published model says otherwise than the first
rule, nothing is guessed.
"""

from __future__ import annotations

from ml_models.architecture import Architecture
from ml_models.families import decoder
from ml_models.families.config_json import Config, must_be, value_of
from ml_models.families.decoder import shape, size
from ml_models.families.entries import Custom, Entry, Fields
from ml_models.families.family import Family
from ml_models.families.rope import Rope
from ml_models.families.rules import FlatQkv

_POSITIONS, _LENGTH, _NORM_HEAD = "max_position_embeddings", "model_max_length", "norm_head"
_TYPE = "position_embedding_type"
_WIDTHS = {4096: "rope", 5120: "alibi"}
_LARGE_VOCABULARY = 100_000  # between those of Baichuan and Baichuan 2, with some tokens added


def _read_kind(config: Config) -> Fields:
    must_be(config, _TYPE, "rope", "alibi")
    length = _LENGTH if config.get(_POSITIONS) is None else _POSITIONS
    if config.get(length) is None:
        raise ValueError(f"config.json: {_POSITIONS} (or, with ALiBi, {_LENGTH}) is missing")
    large = value_of(config, "vocab_size", int) >= _LARGE_VOCABULARY
    second = large or "z_loss_weight" in config
    return {
        "position_embedding_type": config.get(_TYPE) or _guess(config, length),
        "max_position_embeddings": value_of(config, length, int),
        "norm_head": value_of({_NORM_HEAD: second, **config}, _NORM_HEAD, bool),
    }


def _guess(config: Config, length: str) -> str:
    kind = "rope" if length == _POSITIONS else "alibi"
    width = config.get("hidden_size")
    expected = _WIDTHS.get(width, kind) if isinstance(width, int) else kind
    if kind != expected:
        raise ValueError(
            f"config.json: {length} is that of a Baichuan with {kind}, hidden_size {width} that of "
            f'one with {expected}; add "{_TYPE}": "rope" or "alibi"'
        )
    return kind


def _write_kind(arch: Architecture) -> Fields:
    rotary = arch.position_embedding_type == "rope"
    written: Fields = {_POSITIONS: arch.max_position_embeddings} if rotary else {}
    return written | {
        _LENGTH: arch.max_position_embeddings,
        _TYPE: arch.position_embedding_type,
        _NORM_HEAD: arch.norm_head,
    }


def _is_length(entry: Entry) -> bool:
    return getattr(entry, "key", None) == _POSITIONS


_7B = {**shape(32, 4096, 11008, 32), _POSITIONS: 4096}
_13B = {**shape(40, 5120, 13696, 40), _LENGTH: 4096}

BAICHUAN = Family(
    name="baichuan",
    aliases=("baichuan2",),
    model_types=("baichuan",),
    architectures=("BaichuanForCausalLM", "BaiChuanForCausalLM"),
    config=(
        *(entry for entry in decoder.LLAMA_LIKE if not _is_length(entry)),
        Rope(),
        Custom(_read_kind, _write_kind),
        decoder.NO_BIASES,
    ),
    rules=(
        *(rule for rule in decoder.LLAMA_RULES if rule is not decoder.QKV),
        FlatQkv(decoder.QKV.module, f"{decoder.HF_LAYER}.self_attn.W_pack"),
    ),
    ignored=decoder.NO_FREQUENCIES,
    sizes=(
        size("baichuan-7b", 7_000_559_616, _7B, vocab_size=64000),
        size("baichuan-13b", 13_264_901_120, _13B, vocab_size=64000),
        size("baichuan2-7b", 7_505_973_248, _7B, vocab_size=125696),
        size("baichuan2-13b", 13_896_668_160, _13B, vocab_size=125696),
    ),
)
