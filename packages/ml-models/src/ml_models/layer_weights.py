"""The parameters of one transformer layer under their Megatron-Core names (local layer spec).

Two linear layers face each other wherever there is tensor parallelism: the first has its output
features cut (`_column`), the second its input features (`_row`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ml_models.architecture import Architecture
from ml_models.parameter import Init, Parameter, Split


def layer_parameters(arch: Architecture, layer: int) -> Iterator[Parameter]:
    """List the parameters of a layer in the order of the forward pass."""
    prefix = f"decoder.layers.{layer}"
    yield from _numbered(layer, norm(arch, f"{prefix}.input_layernorm"))
    attention = _latent_attention if arch.multi_latent_attention else _attention
    yield from _numbered(layer, attention(arch, f"{prefix}.self_attention"))
    if arch.post_norm:
        yield from _numbered(layer, norm(arch, f"{prefix}.post_attn_norm"))
    yield from _numbered(layer, norm(arch, f"{prefix}.pre_mlp_layernorm"))
    mlp = _experts if arch.has_experts(layer) else _dense
    yield from _numbered(layer, mlp(arch, f"{prefix}.mlp"))
    if arch.post_norm:
        yield from _numbered(layer, norm(arch, f"{prefix}.post_mlp_layernorm"))


def norm(arch: Architecture, module: str) -> Iterator[Parameter]:
    """List the parameters of a norm of the residual stream."""
    yield from _norm(arch, module, arch.hidden_size)


def _numbered(layer: int, found: Iterator[Parameter]) -> Iterator[Parameter]:
    return (replace(parameter, layer=layer) for parameter in found)


# Attention


def _attention(arch: Architecture, module: str) -> Iterator[Parameter]:
    head, queries = arch.head_dim, arch.num_attention_heads * arch.head_dim
    qkv = (queries + 2 * arch.query_groups * head, arch.hidden_size)
    yield from _column(f"{module}.linear_qkv", qkv, bias=arch.has_qkv_bias)
    if arch.qk_layernorm:
        yield from _norm(arch, f"{module}.q_layernorm", head)
        yield from _norm(arch, f"{module}.k_layernorm", head)
    if arch.softmax_type == "learnable":
        yield Parameter(
            name=f"{module}.core_attention.softmax_offset",
            shape=(arch.num_attention_heads,),
            split=Split(0),
            init="zeros",
        )
    yield from _row(f"{module}.linear_proj", (arch.hidden_size, queries), bias=arch.has_dense_bias)


def _latent_attention(arch: Architecture, module: str) -> Iterator[Parameter]:
    """Down to the latent vectors on every rank, up from them by heads (DeepSeek-V2)."""
    hidden, heads = arch.hidden_size, arch.num_attention_heads
    kv_rank, value = arch.kv_lora_rank or 0, arch.value_head_dim
    queries = heads * arch.query_head_dim
    if arch.q_lora_rank is None:
        yield from _column(f"{module}.linear_q_proj", (queries, hidden), bias=False)
    else:
        yield _whole(f"{module}.linear_q_down_proj.weight", (arch.q_lora_rank, hidden))
        if arch.qk_layernorm:
            yield from _norm(arch, f"{module}.q_layernorm", arch.q_lora_rank)
        up = (queries, arch.q_lora_rank)
        yield from _column(f"{module}.linear_q_up_proj", up, bias=False)
    down = (kv_rank + (arch.qk_pos_emb_head_dim or 0), hidden)
    yield _whole(f"{module}.linear_kv_down_proj.weight", down)
    if arch.qk_layernorm:
        yield from _norm(arch, f"{module}.kv_layernorm", kv_rank)
    up = (heads * ((arch.qk_head_dim or 0) + value), kv_rank)
    yield from _column(f"{module}.linear_kv_up_proj", up, bias=False)
    yield from _row(f"{module}.linear_proj", (hidden, heads * value), bias=arch.has_dense_bias)


# MLP


def _dense(arch: Architecture, module: str) -> Iterator[Parameter]:
    yield from _mlp(arch, module, arch.ffn_size, bias=arch.add_bias_linear)


def _experts(arch: Architecture, module: str) -> Iterator[Parameter]:
    """The router on every rank, then expert by expert, then the one MLP that all tokens take."""
    experts = arch.num_experts or 0
    yield _whole(f"{module}.router.weight", (experts, arch.hidden_size))
    if arch.add_bias_linear:
        yield _whole(f"{module}.router.bias", (experts,), init="zeros")
    if arch.moe_router_enable_expert_bias:
        bias = _whole(f"{module}.router.expert_bias", (experts,), init="zeros")
        yield replace(bias, float32=True)
    for expert in range(experts):
        name = f"{module}.experts.local_experts.{expert}"
        for parameter in _mlp(arch, name, arch.expert_size, bias=arch.add_bias_linear):
            yield replace(parameter, expert=expert)
    if arch.shared_expert_size:
        shared = f"{module}.shared_experts"
        yield from _mlp(arch, shared, arch.shared_expert_size, bias=arch.add_bias_linear)
        if arch.moe_shared_expert_gate:
            yield _whole(f"{shared}.gate_weight", (1, arch.hidden_size))


def _mlp(arch: Architecture, module: str, size: int, *, bias: bool) -> Iterator[Parameter]:
    blocks = 2 if arch.is_gated else 1
    fc1 = (blocks * size, arch.hidden_size)
    yield from _column(f"{module}.linear_fc1", fc1, bias=bias, blocks=blocks)
    yield from _row(f"{module}.linear_fc2", (arch.hidden_size, size), bias=bias)


# Small parts


def _norm(arch: Architecture, module: str, size: int) -> Iterator[Parameter]:
    start: Init = "zeros" if arch.add_rmsnorm_offset else "ones"
    yield _whole(f"{module}.weight", (size,), init=start)
    if arch.normalization == "LayerNorm":
        yield _whole(f"{module}.bias", (size,), init="zeros")


def _whole(name: str, shape: tuple[int, ...], *, init: Init = "normal") -> Parameter:
    """A tensor that every tensor-parallel rank holds."""
    return Parameter(name=name, shape=shape, split=None, init=init)


def _column(
    module: str, shape: tuple[int, int], *, bias: bool, blocks: int = 1
) -> Iterator[Parameter]:
    """Output features are cut: weight and bias along dim 0."""
    split = Split(0, blocks)
    yield Parameter(name=f"{module}.weight", shape=shape, split=split, init="normal")
    if bias:
        yield Parameter(name=f"{module}.bias", shape=shape[:1], split=split, init="zeros")


def _row(module: str, shape: tuple[int, int], *, bias: bool) -> Iterator[Parameter]:
    """Input features are cut: weight along dim 1; the bias joins after the sum: all have it."""
    yield Parameter(name=f"{module}.weight", shape=shape, split=Split(1), init="scaled_normal")
    if bias:
        yield _whole(f"{module}.bias", shape[:1], init="zeros")
