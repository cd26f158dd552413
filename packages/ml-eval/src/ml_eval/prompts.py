"""What goes into a model and what ends its texts, in ids: where tokenizer and model must agree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ml_convert.huggingface import read_json
from ml_data.tokenizer import Tokenizer
from ml_eval.config import Prompts
from ml_models.architecture import Architecture
from ml_models.flags import UsageError

GENERATION_CONFIG = "generation_config.json"


def read_prompts(config: Prompts) -> list[str]:
    """Return the texts to continue; empty lines of a file and its byte order mark are left out.

    Raises:
        UsageError: The file cannot be read, or has no text.
    """
    path = config.prompt_file
    if path is None:
        return list(config.prompt)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UsageError(f"--prompt-file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompt-file {path}: not UTF-8 ({error})") from error
    prompts = [line.removesuffix("\r") for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"--prompt-file {path}: has no line with text")
    return prompts


def encode(
    tokenizer: Tokenizer, texts: Sequence[str], arch: Architecture, *, max_length: int | None
) -> list[list[int]]:
    """Return the ids of each text, as the tokenizer begins texts.

    Raises:
        UsageError: A text has no tokens, or one that the model does not know, or so many that
            there is no room for another one.
    """
    limits = [(arch.max_position_embeddings, "the model's max_position_embeddings")]
    if max_length is not None:
        limits.append((max_length, "--max-length"))
    limit, name = min(limits)
    prompts = tokenizer.encode_batch(texts)
    for text, ids in zip(texts, prompts, strict=True):
        shown = text if len(text) <= 40 else f"{text[:37]}..."
        if not ids:
            raise UsageError(f"prompt {shown!r}: has no tokens, and this tokenizer adds none")
        if max(ids) >= arch.vocab_size:
            token = tokenizer.decode([max(ids)], skip_special_tokens=False)
            raise UsageError(
                f"prompt {shown!r}: its token {token!r} has the id {max(ids)}, and those of the "
                f"model end at {arch.vocab_size - 1}; is {tokenizer.path} the model's tokenizer?"
            )
        if len(ids) >= limit:
            raise UsageError(
                f"prompt {shown!r}: {len(ids)} tokens leave no room for another one; {name} is "
                f"{limit}"
            )
    return prompts


def eos_ids(
    directory: Path, config: Mapping[str, object], tokenizer: Tokenizer, more: Iterable[str]
) -> frozenset[int]:
    """Find the tokens that end a text.

    The first that names any decides: generation_config.json, config.json, the tokenizer.

    Args:
        directory: The model's.
        config: Its config.json, empty for a Megatron checkpoint.
        tokenizer: The model's tokenizer.
        more: Other tokens that end a text.

    Raises:
        UsageError: One of `more` is no single token.
    """
    path = directory / GENERATION_CONFIG
    generation = read_json(path) if path.is_file() else {}
    named = (described.get("eos_token_id") for described in (generation, config))
    found = next((ids for ids in named if ids is not None), tokenizer.eod)
    ids = [*(found if isinstance(found, list) else [found])]
    ids += [_single_token(tokenizer, text) for text in more]
    return frozenset(id_ for id_ in ids if isinstance(id_, int))


def _single_token(tokenizer: Tokenizer, text: str) -> int:
    """Return the token that stands for a text, or else the one the vocabulary spells like it.

    The text comes first: GPT-2's vocabulary spells the byte E9 "é", and this letter "Ã©".
    """
    (ids,) = tokenizer.encode_batch([text], add_special_tokens=False)
    # Twice, as sentencepiece hides the space at the start of a text: one "▁." would be "." as well.
    if len(ids) == 1 and tokenizer.decode(ids * 2, skip_special_tokens=False) == text * 2:
        return ids[0]
    spelled = tokenizer.token_id(text)
    if spelled is None:
        raise UsageError(
            f"--add-eos-token {text!r}: is not a single token of this tokenizer; to end at a text "
            "give --stop"
        )
    return spelled
