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
    """Return the texts to continue; empty lines of a file are left out.

    Raises:
        UsageError: The file cannot be read, or has no text.
    """
    path = config.prompt_file
    if path is None:
        return list(config.prompt)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
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
        UsageError: A text has no tokens, or so many that there is no room for another one.
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
        if len(ids) >= limit:
            raise UsageError(
                f"prompt {shown!r}: {len(ids)} tokens leave no room for another one; {name} is "
                f"{limit}"
            )
    return prompts


def check_vocabulary(tokenizer: Tokenizer, arch: Architecture) -> None:
    """Check that the model has an embedding for every token.

    Raises:
        UsageError: It has fewer.
    """
    if tokenizer.vocab_size > arch.vocab_size:
        raise UsageError(
            f"tokenizer {tokenizer.path}: has ids up to {tokenizer.vocab_size - 1}, but the "
            f"vocabulary of the model has {arch.vocab_size} tokens; it is not the model's tokenizer"
        )


def eos_ids(
    directory: Path, config: Mapping[str, object], tokenizer: Tokenizer, more: Iterable[str]
) -> frozenset[int]:
    """Find the tokens that end a text.

    As in transformers, generation_config.json decides, without it config.json; the tokenizer does
    where neither is.

    Args:
        directory: The model's.
        config: Its config.json, empty for a Megatron checkpoint.
        tokenizer: The model's tokenizer.
        more: Other tokens that end a text, as the tokenizer spells them.

    Raises:
        UsageError: One of `more` is no single token.
    """
    path = directory / GENERATION_CONFIG
    described = read_json(path) if path.is_file() else config
    found = described.get("eos_token_id")
    ids = list(found) if isinstance(found, list) else [found]
    if None in ids:
        ids = [tokenizer.eod]
    extra = list(more)
    for text, tokens in zip(
        extra, tokenizer.encode_batch(extra, add_special_tokens=False), strict=True
    ):
        if len(tokens) != 1:
            raise UsageError(
                f"--add-eos-token {text!r}: is {len(tokens)} tokens of this tokenizer, not one; "
                "to end at a text give --stop"
            )
        ids += tokens
    return frozenset(id_ for id_ in ids if isinstance(id_, int))
