"""Opening the checkpoint to read, of whichever format it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ml_convert import companions, huggingface, megatron
from ml_convert.errors import ConversionError
from ml_convert.request import Request
from ml_convert.source import Source


def open_source(request: Request) -> Source:
    """Open `--load-dir`.

    Raises:
        ConversionError: It holds no checkpoint, or one that cannot be read.
    """
    if not request.load_dir.is_dir():
        raise ConversionError(f"--load-dir {request.load_dir}: no such directory")
    if _format(request) == "mcore":
        return _open_megatron(request)
    source = huggingface.open_model(request.load_dir, model_type=request.model_type_hf)
    if request.true_vocab_size not in (None, source.arch.vocab_size):
        raise ConversionError(
            f"--true-vocab-size {request.true_vocab_size}: {request.load_dir} says "
            f"{source.arch.vocab_size}"
        )
    return source


def open_result(request: Request, directory: Path) -> Source:
    """Open what a request has led to, from its files alone."""
    if request.save_format == "hf":
        return huggingface.open_model(directory, model_type=None)
    return megatron.open_checkpoint(directory, default=None, true_vocab_size=None)


def skeleton(request: Request) -> dict[str, Any]:
    """Read the config.json of `--hf-config`; empty if there is none.

    Raises:
        ConversionError: The directory does not exist.
    """
    if request.hf_config is None:
        return {}
    if not request.hf_config.is_dir():
        raise ConversionError(f"--hf-config {request.hf_config}: no such directory")
    if not (request.hf_config / huggingface.CONFIG).is_file():
        return {}  # a directory with a tokenizer only
    return huggingface.read_config(request.hf_config)


def _format(request: Request) -> str:
    if request.load_format != "auto":
        return request.load_format
    if huggingface.is_hugging_face(request.load_dir):
        return "hf"
    if megatron.is_megatron(request.load_dir):
        return "mcore"
    raise ConversionError(
        f"--load-dir {request.load_dir}: holds neither a Hugging Face model (config.json) nor "
        "Megatron checkpoints (latest_checkpointed_iteration.txt, iter_*, release, mp_rank_*)"
    )


def _open_megatron(request: Request) -> Source:
    """Open a Megatron checkpoint, and check it against `--hf-config` if there is one."""
    directory = megatron.checkpoint_directory(request.load_dir, request.iteration)
    family, known, config = None, None, skeleton(request)
    if config and request.hf_config is not None:
        family, known = huggingface.describe(request.hf_config, config, request.model_type_hf)
    elif request.model_type_hf:
        family = huggingface.family(request.model_type_hf)
    source = megatron.open_checkpoint(
        directory,
        default=known,
        true_vocab_size=request.true_vocab_size,
        hashes=request.verify or request.verify_only,
    )
    if known is not None and request.hf_config is not None:
        companions.check_skeleton(request.hf_config, known, source.arch)
    return replace(source, family=family or source.family, config=config)
