"""What megatron-core calls the parameters of a model in a torch.distributed checkpoint.

    decoder.layers.self_attention.linear_proj.weight (L, H, H)    layers are stacked
    decoder.layers.3.self_attention.linear_proj.weight (H, H)     unless they differ, as with some
                                                                  layers of experts
    decoder.layers.mlp.experts.experts.linear_fc1.weight (L, E, 2F, H)   experts are stacked, too
    decoder.layers.3.mlp.experts.experts.7.linear_fc1.weight_w (F, H)    or not: w gate, v up

Norms have the names of the Transformer Engine, whichever implementation wrote them (but not with
latent attention, where the Transformer Engine has other names than these for some):

    input_layernorm    self_attention.linear_qkv.layer_norm_weight
    pre_mlp_layernorm  mlp.linear_fc1.layer_norm_weight

Tensors are whole: how a model was cut over ranks shows in the chunks only. Gate and up are one
tensor [gate; up] of the whole model.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from ml_models.architecture import Architecture
from ml_models.weights import Parameter, parameters

Axis = Literal["layer", "expert"]

_PREFIX = re.compile(r"(?:module\.|model\.)+")
_LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.+)")
_EXPERT = re.compile(r"mlp\.experts\.experts\.(?:(\d+)\.)?(linear_fc[12]\.(?:weight|bias))")
_HALF = re.compile(r"(.*linear_fc1\.(?:weight|bias))_([wv])")
_LOCAL_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.")
_WRITTEN = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
_READ = {
    **{theirs: ours for ours, theirs in _WRITTEN.items()},
    "self_attention.linear_q_up_proj.layer_norm_": "self_attention.q_layernorm.",
    "self_attention.linear_kv_up_proj.layer_norm_": "self_attention.kv_layernorm.",
}


class Key(NamedTuple):
    """What a stored tensor holds."""

    name: str
    """The parameter, with * for the number of a layer and @ for that of an expert."""
    axes: tuple[Axis, ...] = ()
    """The first axes of the tensor, which run over parameters."""
    half: int | None = None
    """It holds only the first or second half of the rows."""

    def parameter(self, numbers: tuple[int, ...]) -> str:
        """Name the parameter at these indices of the axes."""
        name = self.name
        for axis, number in zip(self.axes, numbers, strict=True):
            name = name.replace("*" if axis == "layer" else "@", str(number))
        return name


def parse(key: str) -> Key:
    """Read the key of a stored tensor."""
    prefix = _PREFIX.match(key)
    key = key[prefix.end() :] if prefix else key
    layer = _LAYER.fullmatch(key)
    if layer is None:
        return Key(key)
    number, name = layer.groups()
    axes: tuple[Axis, ...] = () if number else ("layer",)
    halved = _HALF.fullmatch(name)
    half = None
    if halved is not None:
        name, half = halved[1], "wv".index(halved[2])
    expert = _EXPERT.fullmatch(name)
    if expert is not None:
        axes += () if expert[1] else ("expert",)
        name = f"mlp.experts.local_experts.{expert[1] or '@'}.{expert[2]}"
    for theirs, ours in _READ.items():
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
    return Key(f"decoder.layers.{number or '*'}.{name}", axes, half)


def is_stacked(arch: Architecture) -> bool:
    """Tell whether all layers have the same tensors, so that they can be stacked."""
    layers: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
    for parameter in parameters(arch):
        if parameter.layer is not None:
            name = parameter.name.split(".", 3)[3]
            layers.setdefault(parameter.layer, []).append((name, parameter.shape))
    return all(found == layers[0] for found in layers.values())


class Written(NamedTuple):
    """Where a parameter is written."""

    key: str
    offsets: tuple[int, ...]
    """Its index along each axis that runs over parameters."""
    sizes: tuple[int, ...]
    """Length of these axes."""

    @property
    def extra_state(self) -> str:
        """The key of the extra state of the module that the parameter belongs to."""
        offsets, sizes = self.offsets or (0,), self.sizes or (1,)
        shard = ".".join(map(str, offsets)) + "_" + ".".join(map(str, sizes))
        return f"{self.key.rpartition('.')[0]}._extra_state/shard_{shard}"


def written(parameter: Parameter, arch: Architecture, *, stacked: bool) -> Written:
    """Tell where a parameter is written."""
    if parameter.layer is None:
        return Written(parameter.name, (), ())
    name = parameter.name.split(".", 3)[3]
    renamed = {} if arch.multi_latent_attention else _WRITTEN
    for ours, theirs in renamed.items():
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
    prefix = f"decoder.layers.{parameter.layer}"
    offsets: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    if stacked:
        offsets, sizes, prefix = (parameter.layer,), (arch.num_layers,), "decoder.layers"
    if parameter.expert is not None:
        offsets, sizes = (*offsets, parameter.expert), (*sizes, arch.num_experts or 0)
        name = _LOCAL_EXPERT.sub("mlp.experts.experts.", name)
    return Written(f"{prefix}.{name}", offsets, sizes)


def has_extra_state(parameter: Parameter) -> bool:
    """Tell whether megatron-core stores extra state, which is empty, beside a parameter."""
    *_, module, kind = parameter.name.split(".")
    return parameter.layer is not None and kind == "weight" and module.startswith("linear_")
