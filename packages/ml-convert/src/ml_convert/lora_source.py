"""Opening what `--lora-load` names, or an adapter that lies in the files of `--load-dir`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ml_convert import huggingface, lora, lora_megatron, lora_peft, megatron
from ml_convert.errors import ConversionError, VerificationError
from ml_convert.lora import Adapter, Settings
from ml_convert.rank_files import read_ranks
from ml_convert.request import Request
from ml_convert.source import Source
from ml_models.families.family import Family
from ml_parallel import checkpoint as directories
from ml_parallel.checkpoint import CheckpointError


def with_adapter(request: Request, source: Source) -> Source:
    """Return the source with its adapter merged; with `--lora-only`, the adapter in its place.

    Raises:
        ConversionError: The adapter cannot be read, or does not fit; or there is none.
    """
    found = _adapter(request, source)
    if found is None:
        return source
    if request.lora_only:
        return replace(source, checkpoint=found.checkpoint, adapter=found)
    return lora.merged(source, found)


def open_result(request: Request, source: Source, directory: Path) -> Source:
    """Open the adapter that a request has led to, from its files alone.

    Raises:
        ConversionError: They cannot be read.
        VerificationError: It has another scale.
    """
    given = Settings()
    assert source.adapter is not None
    if request.save_format == "hf":
        family = family_of(request, source)
        found = lora_peft.open_adapter(directory, family, source.arch, given)
    else:
        files = read_ranks(directory)
        found = lora_megatron.open_adapter(files, source.arch, given)
    if abs(found.scale - source.adapter.scale) > 1e-9 * source.adapter.scale:
        raise VerificationError(
            f"{directory}: alpha / r is {found.scale:g}, but {source.adapter.scale:g} in "
            f"{source.adapter.path}"
        )
    return replace(source, path=found.path, checkpoint=found.checkpoint, adapter=found)


def family_of(request: Request, source: Source) -> Family:
    """Find the family, whose modules PEFT names.

    Raises:
        ConversionError: Nobody says it.
    """
    if request.model_type_hf:
        return huggingface.family(request.model_type_hf)
    if source.family is None:
        raise ConversionError(
            f"{source.path}: does not say which model family it is of, whose modules a PEFT "
            "adapter names; give --model-type-hf, or --hf-config"
        )
    return source.family


def _adapter(request: Request, source: Source) -> Adapter | None:
    given = Settings(
        rank=request.lora_r, alpha=request.lora_alpha, modules=request.lora_target_modules
    )
    inside = source.rank_files
    if inside is not None:
        if request.lora_load is not None:
            raise ConversionError(
                f"--lora-load {request.lora_load}: {source.path} holds an adapter already"
            )
        return lora_megatron.open_adapter(inside, source.arch, given)
    if request.lora_load is not None:
        return _open(request, source, given)
    if given != Settings() or request.lora_only:
        flag = "--lora-only" if request.lora_only else "--lora-r, --lora-alpha"
        raise ConversionError(f"{flag}: {source.path} holds no adapter; name one with --lora-load")
    return None


def _open(request: Request, source: Source, given: Settings) -> Adapter:
    path = request.lora_load
    assert path is not None
    if not path.is_dir():
        raise ConversionError(f"--lora-load {path}: no such directory")
    if lora_peft.is_peft(path):
        return lora_peft.open_adapter(path, family_of(request, source), source.arch, given)
    if not megatron.is_megatron(path):
        raise ConversionError(
            f"--lora-load {path}: holds neither an adapter of PEFT (adapter_config.json) nor "
            "Megatron checkpoints (latest_checkpointed_iteration.txt, iter_*, release, mp_rank_*)"
        )
    directory = megatron.checkpoint_directory(path, None)
    try:
        directories.verify(directory, hashes=request.compares_bits, only=directories.MODEL_FILE)
    except CheckpointError as error:
        raise ConversionError(str(error)) from None
    files = read_ranks(directory)
    if not lora_megatron.is_alone(files):
        raise ConversionError(
            f"--lora-load {path}: holds a model besides its adapter; name it with --load-dir alone"
        )
    return lora_megatron.open_adapter(files, source.arch, given)
