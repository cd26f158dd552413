"""What the implementations of Megatron call and pack differently.

The parameters of a model have the names of Megatron-Core's local layer spec. A dialect says where
the rows of a rank's share of a parameter are instead:

    local                   Transformer Engine (fused_norms)
    input_layernorm         self_attention.linear_qkv.layer_norm_weight
    pre_mlp_layernorm       mlp.linear_fc1.layer_norm_weight           of layers without experts
    q_layernorm             linear_q_up_proj.layer_norm_weight         with latent attention, where
    kv_layernorm            linear_kv_up_proj.layer_norm_weight        input_layernorm stays

    local                   experts="grouped" (Transformer Engine)     experts="stacked" (local)
    local_experts.3.linear_fc1.weight   experts.linear_fc1.weight3     experts.weight1, transposed

    local                   latent="mindspeed"        latent="modellink" (MindSpeed-LLM 1.0)
    linear_q_down_proj
    linear_kv_down_proj     both are linear_qkv       both are linear_qkv
    linear_q_up_proj        linear_q_up_proj          linear_qb
    linear_kv_up_proj       linear_kv_up_proj         linear_kvb
    kv_layernorm            kv_layernorm              k_layernorm

Megatron-Legacy (`ml_convert.legacy`) is one more, with names of its own for everything. Each reads
both ways, and which one a checkpoint is in shows in its names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from ml_convert import legacy
from ml_convert.errors import ConversionError
from ml_models.architecture import Architecture
from ml_models.weights import Parameter

Experts = Literal["sequential", "grouped", "stacked"]
Latent = Literal["megatron", "mindspeed", "modellink"]

_EXPERT = re.compile(r"experts\.local_experts\.(\d+)\.(linear_fc[12])\.(weight|bias)$")
_STACK = {"linear_fc1": "experts.weight1", "linear_fc2": "experts.weight2"}
_MODELLINK = {
    "linear_q_up_proj": "linear_qb",
    "linear_kv_up_proj": "linear_kvb",
    "kv_layernorm": "k_layernorm",
}
# Modules that are rows of MindSpeed's linear_qkv, from the first on.
_DOWN = ("linear_q_proj", "linear_q_down_proj", "linear_kv_down_proj")


class Share(NamedTuple):
    """The part of a parameter that a rank stores."""

    parameter: Parameter
    name: str
    """Name with the numbers that layer and expert have on the rank."""
    shape: tuple[int, ...]
    experts: range
    """Global numbers of the rank's experts."""


class Home(NamedTuple):
    """The stored tensor that holds some rows of a share."""

    name: str
    """Name of the tensor."""
    shape: tuple[int, ...]
    """Its shape."""
    first: int
    """First row of the share."""
    rows: int
    """How many rows of the share."""
    row: int = 0
    """Where they begin in the tensor."""
    stack: tuple[int, int] | None = None
    """The tensor is a stack of so many transposed matrices, and this one is the share."""


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """One way to name and pack the parameters that a rank stores."""

    legacy: bool = False
    """Megatron-Legacy."""
    fused_norms: bool = False
    """A norm belongs to the linear layer after it."""
    experts: Experts = "sequential"
    """Experts are modules, tensors of one module, or matrices in one tensor."""
    latent: Latent = "megatron"
    """How latent attention is packed."""

    def check(self, arch: Architecture) -> None:
        """Check that a model can be stored like this.

        Raises:
            ConversionError: It cannot.
        """
        if self.experts == "stacked" and arch.num_experts and arch.add_bias_linear:
            raise ConversionError(
                "--moe-grouped-gemm: the stacked experts of the local implementation have no "
                "place for biases; write them with --transformer-impl transformer_engine"
            )
        if self.latent != "megatron" and self.fused_norms:
            raise ConversionError(
                f"--mla-names {self.latent}: has no --transformer-impl transformer_engine"
            )

    def whole(self, parameter: Parameter) -> Parameter:
        """Return a parameter as this dialect cuts it."""
        if self.latent != "megatron" and _module(parameter.name) in _DOWN:
            return replace(parameter, split=None)  # linear_qkv is on every rank
        return parameter

    def homes(self, arch: Architecture, share: Share) -> Iterator[Home]:
        """List what stores the rows of a share, top to bottom.

        Raises:
            ConversionError: Nothing does.
        """
        if self.legacy:
            yield from _in_legacy(arch, share)
            return
        expert = _EXPERT.search(share.name)
        if expert is not None and self.experts == "stacked":
            yield _in_stack(share, expert)
        elif expert is not None and self.experts == "grouped":
            number, module, kind = expert.groups()
            name = share.name[: expert.start()] + f"experts.{module}.{kind}{number}"
            yield _whole(share, name)
        elif arch.multi_latent_attention and self.latent != "megatron":
            yield self._in_mindspeed(arch, share)
        elif self.fused_norms:
            yield _whole(share, _fused(arch, share))
        else:
            yield _whole(share, share.name)

    def _in_mindspeed(self, arch: Architecture, share: Share) -> Home:
        module = _module(share.name)
        prefix, _, rest = share.name.rpartition(f"{module}.")
        if module not in _DOWN:
            names = _MODELLINK if self.latent == "modellink" else {}
            return _whole(share, f"{prefix}{names.get(module, module)}.{rest}")
        queries = arch.q_lora_rank or arch.num_attention_heads * arch.query_head_dim
        keys = (arch.kv_lora_rank or 0) + (arch.qk_pos_emb_head_dim or 0)
        shape = (queries + keys, *share.shape[1:])
        row = queries if module == "linear_kv_down_proj" else 0
        return Home(f"{prefix}linear_qkv.{rest}", shape, 0, share.shape[0], row)


def recognize(names: Iterable[str], arch: Architecture) -> Dialect:
    """Find the dialect of a checkpoint from the names of its tensors."""
    listed = list(names)
    if any(name.startswith(f"{legacy.ROOT}.") for name in listed):
        return Dialect(legacy=True)
    experts: Experts = "sequential"
    if any(re.search(r"\.experts\.weight[12]$", name) for name in listed):
        experts = "stacked"
    elif any(re.search(r"\.experts\.linear_fc[12]\.(weight|bias)\d+$", name) for name in listed):
        experts = "grouped"
    latent: Latent = "megatron"
    if arch.multi_latent_attention:
        modules = {_module(name) for name in listed}
        if "linear_kvb" in modules:
            latent = "modellink"
        elif "linear_qkv" in modules:
            latent = "mindspeed"
    fused = any(".layer_norm_weight" in name for name in listed)
    return Dialect(fused_norms=fused, experts=experts, latent=latent)


# Parts


def _whole(share: Share, name: str) -> Home:
    return Home(name, share.shape, 0, share.shape[0])


def _module(name: str) -> str:
    """Return the last module of a name."""
    return name.split(".")[-2] if "." in name else name


def _fused(arch: Architecture, share: Share) -> str:
    """Return the name of a share where norms are part of the linear layer after them."""
    name, layer, latent = share.name, share.parameter.layer, arch.multi_latent_attention
    dense = layer is not None and not arch.has_experts(layer)
    linear = {
        "input_layernorm": None if latent else "self_attention.linear_qkv",
        "pre_mlp_layernorm": "mlp.linear_fc1" if dense else None,
        "q_layernorm": "linear_q_up_proj" if latent else None,
        "kv_layernorm": "linear_kv_up_proj" if latent else None,
    }.get(_module(name))
    if linear is None or layer is None:
        return name
    return re.sub(r"\w+\.(\w+)$", rf"{linear}.layer_norm_\1", name)


def _in_stack(share: Share, expert: re.Match[str]) -> Home:
    """A matrix of `weight1` (hidden, experts * size) or `weight2` (experts * size, hidden).

    Whatever the shape says, the content is one transposed matrix after the other.
    """
    number, module, _ = expert.groups()
    (rows, columns), count = share.shape, len(share.experts)
    shape = (columns, count * rows) if module == "linear_fc1" else (count * columns, rows)
    name = share.name[: expert.start()] + _STACK[module]
    return Home(name, shape, 0, rows, stack=(int(number), count))


def _in_legacy(arch: Architecture, share: Share) -> Iterator[Home]:
    name = legacy.name(share.name)
    if name is None:
        raise ConversionError(
            f"the Megatron-Legacy format has no name for {share.parameter.name}; "
            "use --save-format mcore"
        )
    gate = legacy.gate_and_up(share.name) if arch.is_gated else None
    if gate is None:
        yield _whole(share, name)
        return
    half = share.shape[0] // 2
    for number, part in enumerate(gate):
        yield Home(part, (half, *share.shape[1:]), number * half, half)
