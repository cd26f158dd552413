"""The names of Megatron-Legacy, the implementation before Megatron-Core.

A rank's `model` is nested there, and has names of its own:

    language_model
        embedding
            word_embeddings         weight; norm.weight, norm.bias (Bloom)
            position_embeddings     weight
        encoder                     layers.0.self_attention.query_key_value.weight, ...
        output_layer                weight, of a model that is not tied
    word_embeddings_for_head        weight, on the last pipeline stage of a tied model

Everywhere else a name is the path joined by dots. Experts keep gate (w1) and up (w3) apart. Older
checkpoints say `input_layernorm`, `post_attention_layernorm`, `final_layernorm`, `attention` and
`transformer`; they are read, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

ROOT = "language_model"

_DICTS = (
    f"{ROOT}.embedding.word_embeddings",
    f"{ROOT}.embedding.position_embeddings",
    f"{ROOT}.encoder",
    f"{ROOT}.output_layer",
    "word_embeddings_for_head",
)
_MODULES = {
    "embedding.word_embeddings": f"{ROOT}.embedding.word_embeddings",
    "embedding.word_embeddings.norm": f"{ROOT}.embedding.word_embeddings.norm",
    "embedding.position_embeddings": f"{ROOT}.embedding.position_embeddings",
    "decoder.final_layernorm": f"{ROOT}.encoder.final_norm",
    "output_layer": f"{ROOT}.output_layer",
}
TIED_OUTPUT_LAYER = "word_embeddings_for_head.weight"
"""The copy of the embedding on the last stage of a tied model."""

_LAYER_MODULES = {
    "input_layernorm": "input_norm",
    "self_attention.linear_qkv": "self_attention.query_key_value",
    "self_attention.linear_proj": "self_attention.dense",
    "pre_mlp_layernorm": "post_attention_norm",
    "mlp.linear_fc1": "mlp.dense_h_to_4h",
    "mlp.linear_fc2": "mlp.dense_4h_to_h",
    "mlp.router": "mlp.block.moe_layer.gate.weight",
}
_OURS = {theirs: ours for ours, theirs in _LAYER_MODULES.items()}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)\.(\w+)")
_EXPERT = re.compile(r"decoder\.layers\.(\d+)\.mlp\.experts\.local_experts\.(\d+)\.(\w+)\.weight")
_OLDER = (
    (re.compile(rf"^{ROOT}\.transformer\."), f"{ROOT}.encoder."),
    (re.compile(r"\.attention\."), ".self_attention."),
    (re.compile(r"\.input_layernorm\."), ".input_norm."),
    (re.compile(r"\.post_attention_layernorm\."), ".post_attention_norm."),
    (re.compile(rf"^{ROOT}\.encoder\.final_layernorm\."), f"{ROOT}.encoder.final_norm."),
)


# Names


def name(ours: str) -> str | None:
    """Return the legacy name of a parameter; None if there is none.

    The first layer of a gated expert has two: `gate_and_up`.
    """
    expert = _EXPERT.fullmatch(ours)
    if expert is not None:
        layer, number, module = expert.groups()
        return _expert(layer, number, "w1" if module == "linear_fc1" else "w2")
    layer_name = _LAYER.fullmatch(ours)
    if layer_name is None:
        module, _, kind = ours.rpartition(".")
        return f"{_MODULES[module]}.{kind}" if module in _MODULES else None
    layer, module, kind = layer_name.groups()
    if module not in _LAYER_MODULES or (module == "mlp.router" and kind != "weight"):
        return None
    return f"{ROOT}.encoder.layers.{layer}.{_LAYER_MODULES[module]}.{kind}"


def gate_and_up(ours: str) -> tuple[str, str] | None:
    """Return the names of the gate and of the rest of an expert's first layer; else None."""
    expert = _EXPERT.fullmatch(ours)
    if expert is None or expert[3] != "linear_fc1":
        return None
    return _expert(expert[1], expert[2], "w1"), _expert(expert[1], expert[2], "w3")


def _expert(layer: str, number: str, part: str) -> str:
    experts = f"{ROOT}.encoder.layers.{layer}.mlp.block.moe_layer.experts.experts"
    return f"{experts}.{number}.{part}.weight"


def adapter_name(theirs: str) -> str:
    """Return the name in Megatron-Core of an adapter's tensor, by the module it belongs to."""
    match = re.fullmatch(rf"{ROOT}\.encoder\.layers\.(\d+)\.(.+?)\.(lora_.*)", theirs)
    if match is None or match[2] not in _OURS:
        return theirs
    return f"decoder.layers.{match[1]}.{_OURS[match[2]]}.{match[3]}"


# Nesting


def path(dotted: str) -> tuple[str, ...]:
    """Return the keys that lead to a tensor within a rank's `model`."""
    for prefix in _DICTS:
        if dotted.startswith(f"{prefix}."):
            return (*prefix.split("."), dotted[len(prefix) + 1 :])
    raise AssertionError(f"{dotted} is no legacy name")


def flat(chunk: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """List the values of a nested `model` by name, older names replaced."""
    for dotted, value in _flat(chunk, ""):
        for pattern, newer in _OLDER:
            dotted = pattern.sub(newer, dotted)
        yield dotted, value


def _flat(chunk: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in chunk.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
