"""Opening the checkpoint to read, of whichever format it is."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from ml_convert import companions, huggingface, lora_source, megatron, output, pickles, torch_dist
from ml_convert.errors import ConversionError
from ml_convert.request import Request
from ml_convert.source import Source
from ml_models.architecture import Architecture


def open_source(request: Request) -> Source:
    """Open `--load-dir`.

    Raises:
        ConversionError: It holds no checkpoint, or one that cannot be read.
    """
    with pickles.refusing_unknown_names() if request.strict_pickle else nullcontext():
        return lora_source.with_adapter(request, _open(request))


def _open(request: Request) -> Source:
    if not request.load_dir.is_dir():
        raise ConversionError(f"--load-dir {request.load_dir}: no such directory")
    found = _format(request)
    if found in output.MEGATRON_FORMATS:
        return _open_megatron(request)
    source = huggingface.open_model(
        request.load_dir,
        model_type=request.model_type_hf,
        hashes=request.compares_bits or request.verify_only,
    )
    if request.true_vocab_size not in (None, source.arch.vocab_size):
        raise ConversionError(
            f"--true-vocab-size {request.true_vocab_size}: {request.load_dir} says "
            f"{source.arch.vocab_size}"
        )
    return source


def open_result(request: Request, directory: Path, source: Source) -> Source:
    """Open what a request has led to, from its files alone; an adapter, for the source's model."""
    if source.adapter is not None:
        return lora_source.open_result(request, source, directory)
    if request.save_format == "hf":
        return huggingface.open_model(directory, model_type=None)
    source = _open_megatron_directory(directory, request.save_format)
    return with_repeated_last_row(source) if request.pad_vocab == "last-row" else source


def _open_megatron_directory(
    directory: Path,
    kind: str,
    *,
    default: Architecture | None = None,
    true_vocab_size: int | None = None,
    hashes: bool = False,
) -> Source:
    """Open one checkpoint of Megatron; see `megatron.open_checkpoint`."""
    is_torch_dist = torch_dist.is_torch_dist(directory)
    if kind == "torch_dist" and not is_torch_dist:
        raise ConversionError(f"{directory}: is not of the format torch_dist, it has no .metadata")
    if is_torch_dist and kind in ("auto", "torch_dist"):
        return torch_dist.open_checkpoint(
            directory, default=default, true_vocab_size=true_vocab_size, hashes=hashes
        )
    return megatron.open_checkpoint(
        directory, default=default, true_vocab_size=true_vocab_size, kind=kind, hashes=hashes
    )


def with_repeated_last_row(source: Source) -> Source:
    """Say of a checkpoint that its padding holds what the last row holds."""
    layout = replace(source.checkpoint.layout, repeats_last_row=True)
    return replace(source, checkpoint=replace(source.checkpoint, layout=layout))


def skeleton(request: Request) -> dict[str, Any]:
    """Read the config.json of `--hf-config`; empty if there is none.

    Raises:
        ConversionError: The directory does not exist.
    """
    if request.hf_config is None:
        return {}
    if not request.hf_config.is_dir():
        raise ConversionError(f"--hf-config {request.hf_config}: no such directory")
    if not (request.hf_config / huggingface.CONFIG).exists():
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
    source = _open_megatron_directory(
        directory,
        request.load_format,
        default=known,
        true_vocab_size=request.true_vocab_size,
        hashes=request.compares_bits or request.verify_only,
    )
    if known is not None and request.hf_config is not None:
        companions.check_skeleton(request.hf_config, known, source.arch)
    return replace(source, family=family or source.family, config=config)
