"""The files that go with exported weights: config.json, the index, and those of the tokenizer.

config.json is that of `--hf-config` with what the checkpoint knows better, so fields we have no use
for are kept. Without one it is written from the model's description, with the ids of special tokens
that a Megatron checkpoint keeps in its args. Tokenizer files are copied as
they are; nothing in them is executed.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from argparse import Namespace
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ml_convert.errors import ConversionError
from ml_convert.huggingface import CONFIG, INDEX, SINGLE, read_json
from ml_convert.plan import Checkpoint
from ml_convert.tensor import Dtype
from ml_models.architecture import Architecture
from ml_models.families.family import Family

logger = logging.getLogger(__name__)

_COPIED = (
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "*.py",
)
_KINDS = ("bos", "eos", "pad")
TOKEN_IDS = "hf_token_ids"
"""Name in the args of what config.json said of the ids of special tokens: Megatron has none."""
# Differences in these mean another model; the others may have been chosen anew for training.
_SHAPE = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "ffn_hidden_size",
    "untie_embeddings_and_output_weights",
    "add_bias_linear",
    "add_qkv_bias",
)


def shards(sizes: Mapping[str, int], limit: int) -> dict[str, str]:
    """Distribute tensors over files of at most `limit` bytes; returns the file of each tensor.

    A tensor that is larger gets a file of its own.
    """
    numbers: dict[str, int] = {}
    number, used = 0, 0
    for name, size in sizes.items():
        if used and used + size > limit:
            number, used = number + 1, 0
        numbers[name] = number
        used += size
    count = number + 1
    if count == 1:
        return dict.fromkeys(numbers, SINGLE)
    return {name: f"model-{n + 1:05d}-of-{count:05d}.safetensors" for name, n in numbers.items()}


def write_index(directory: Path, checkpoint: Checkpoint) -> None:
    """Write which tensor is in which file, if there are several files."""
    files = {stored.name: stored.file for stored in checkpoint.layout.tensors}
    if set(files.values()) == {SINGLE}:
        return
    metadata = {
        "total_parameters": sum(math.prod(extent.shape) for extent in checkpoint.extents),
        "total_size": sum(extent.nbytes for extent in checkpoint.extents),
    }
    weight_map = dict(sorted(files.items()))
    _write_json(directory / INDEX, {"metadata": metadata, "weight_map": weight_map})


def write_config(
    directory: Path,
    family: Family,
    arch: Architecture,
    *,
    dtype: Dtype,
    skeleton: Mapping[str, object],
    tokenizer: Path | None,
    args: Namespace,
) -> None:
    """Write config.json.

    Args:
        directory: Where to.
        family: The model's family.
        arch: The model.
        dtype: What its weights are stored in.
        skeleton: A config.json to start from; may be empty.
        tokenizer: Directory to take the ids of special tokens from when the skeleton is empty.
        args: Args of the checkpoint, which keep these ids if it was once a Hugging Face model.

    Raises:
        ConversionError: The skeleton describes another model, or the family cannot represent it.
    """
    try:
        written = family.to_hf(arch, dtype.name)
    except ValueError as error:
        raise ConversionError(str(error)) from None
    if skeleton:
        written = _merged(skeleton, family, arch, written)
    else:
        written |= _special_tokens(tokenizer, getattr(args, TOKEN_IDS, None))
    _write_json(directory / CONFIG, written)


def check_skeleton(directory: Path, known: Architecture, arch: Architecture) -> None:
    """Check that a config.json describes the model of a checkpoint.

    Raises:
        ConversionError: Names the first sizes that differ.
    """
    for name in _SHAPE:
        theirs, ours = getattr(known, name), getattr(arch, name)
        if theirs != ours:
            raise ConversionError(
                f"{directory / CONFIG}: describes another model, {name} is {theirs} there and "
                f"{ours} in the checkpoint"
            )


def copy_tokenizer(origin: Path, directory: Path) -> list[str]:
    """Copy the files of a tokenizer, and others that are neither weights nor config.json."""
    names = sorted(
        path.name
        for path in origin.iterdir()
        if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in _COPIED)
    )
    for name in names:
        shutil.copyfile(origin / name, directory / name)  # content only: links, modes stay behind
    return names


def _merged(
    skeleton: Mapping[str, object], family: Family, arch: Architecture, written: dict[str, object]
) -> dict[str, object]:
    """Return the skeleton, changed only where it says something else than the checkpoint."""
    dtypes = {key: written[key] for key in ("dtype", "torch_dtype") if key in skeleton}
    known = family.from_hf(skeleton)
    if known == arch:
        return {**skeleton, **(dtypes or {"dtype": written["dtype"]})}
    for name in vars(arch):
        if getattr(known, name) != getattr(arch, name):
            logger.warning(
                "config.json: %s is %s as in the checkpoint, not %s",
                name,
                getattr(arch, name),
                getattr(known, name),
            )
    return {**skeleton, **written}


def token_ids(config: Mapping[str, object]) -> Namespace:
    """Return args that keep what a config.json says of special tokens, and what it does not say."""
    names = (f"{kind}_token_id" for kind in _KINDS)
    return Namespace(**{TOKEN_IDS: {name: config[name] for name in names if name in config}})


def _special_tokens(tokenizer: Path | None, kept: object) -> dict[str, object]:
    """Find the ids of begin, end and padding; null when unknown, not what a class may assume.

    Args:
        tokenizer: A directory, whose tokenizer knows best, unless it is one of several ids.
        kept: What the config.json said of which the checkpoint was made.
    """
    found: dict[str, object] = {f"{kind}_token_id": None for kind in _KINDS}
    if isinstance(kept, dict):
        found = {name: kept[name] for name in found if name in kept}
    if tokenizer is None or not (tokenizer / "tokenizer_config.json").is_file():
        return found
    settings = read_json(tokenizer / "tokenizer_config.json")
    ids = _token_ids(tokenizer, settings)
    for kind in _KINDS:
        token, name = settings.get(f"{kind}_token"), f"{kind}_token_id"
        content = token.get("content") if isinstance(token, dict) else token
        number, before = ids.get(content) if isinstance(content, str) else None, found.get(name)
        if number is not None and not (isinstance(before, list) and number in before):
            found[name] = number
    return found


def _token_ids(tokenizer: Path, settings: Mapping[str, Any]) -> dict[str, int]:
    """List the ids of special tokens by their text."""
    decoder = settings.get("added_tokens_decoder") or {}
    ids = {entry["content"]: int(number) for number, entry in decoder.items()}
    if (tokenizer / "tokenizer.json").is_file():
        added = read_json(tokenizer / "tokenizer.json").get("added_tokens") or []
        ids |= {entry["content"]: entry["id"] for entry in added}
    return ids


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
