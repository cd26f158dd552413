"""Designing an adapter to be written by itself, in the form that goes with a format."""

from __future__ import annotations

from argparse import Namespace
from typing import NamedTuple

from ml_convert import lora_peft, lora_table, ranks
from ml_convert.errors import ConversionError
from ml_convert.layout import Layout
from ml_convert.lora import LEGACY_MODULES, Adapter
from ml_convert.lora_megatron import DEFAULT
from ml_convert.lora_source import family_of
from ml_convert.request import Request
from ml_convert.source import Source


class Form(NamedTuple):
    """How an adapter will be stored."""

    layout: Layout
    config: lora_peft.Config | None = None
    """What goes with it in PEFT's form."""


def form(request: Request, source: Source) -> Form:
    """Choose how the adapter of a source will be stored.

    Raises:
        ConversionError: It cannot be stored this way.
    """
    adapter, arch = source.adapter, source.arch
    assert isinstance(adapter, Adapter)
    weights = [weight.name for weight in adapter.weights]
    if request.save_format == "hf":
        family = family_of(request, source)
        config = lora_peft.config(family, arch, adapter, base=str(source.path))
        return Form(lora_peft.layout(family, arch, weights, adapter.rank), config)
    if request.save_format == "torch_dist":
        raise ConversionError("--lora-only: --save-format torch_dist has no form of adapters")
    base = ranks.layout(
        arch,
        request.stages(arch),
        tensor_parallel_size=request.target_tensor_parallel_size,
        padded_vocab_size=request.padded_vocabulary(arch),
        expert_parallel_size=request.target_expert_parallel_size,
        dialect=request.dialect,
    )
    return Form(lora_table.layout(base, weights, adapter.rank, DEFAULT))


def with_settings(args: Namespace, adapter: Adapter, *, is_legacy: bool) -> Namespace:
    """Add what ModelLink keeps of an adapter to the args of a checkpoint."""
    modules = dict.fromkeys(weight.name.split(".")[-2] for weight in adapter.weights)
    theirs = {ours: name for name, ours in LEGACY_MODULES.items()} if is_legacy else {}
    return Namespace(
        **{
            **vars(args),
            "lora_r": adapter.rank,
            "lora_alpha": adapter.alpha,
            "lora_target_modules": [theirs.get(name, name) for name in modules],
        }
    )
