"""What `kernels.py` times: for each operator the same work done by ours and by its peers.

A side is a function of no arguments that runs forward and backward once. Shapes: `S` sequence, `B`
batch, `H` hidden, `N` heads, `G` groups, `D` head dimension, `F` feed-forward, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn import functional as F

import ml_kernels

Side = Callable[[], object]
Forward = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Sizes:
    """The shapes of all cases."""

    sequence: int
    batch: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    vocab: int
    experts: int = 8
    per_token: int = 2


TINY = Sizes(64, 1, 64, 176, 4, 2, 16, 512, experts=4)
SMALL = Sizes(2048, 1, 1024, 2816, 16, 4, 64, 32000)
"""A small Llama, for two cores."""
LARGE = Sizes(4096, 4, 4096, 14336, 32, 8, 128, 128256)
"""A layer of Llama-3-8B, for a GPU."""


@dataclass(frozen=True)
class Case:
    """One operator: its inputs, ours and its peers, which take the same inputs."""

    name: str
    title: str
    inputs: Callable[[Sizes], Sequence[torch.Tensor]]
    """Random tensors, floating ones with gradients; integer ones are passed as they are."""
    ours: Forward
    peers: dict[str, Forward]
    passes: int = 0
    """How often the first input's size is read or written at least; 0 if it computes more."""
    apart: Callable[[Sizes], Sequence[torch.Tensor]] | None = None
    """The inputs of peers that keep apart what ours has in one tensor."""

    def sides(self, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> dict[str, Side]:
        """Build the sides for a device and a dtype."""
        forwards = {**self.peers_on(device), "ours": self.ours}
        return {
            name: _forward_backward(forward, self._inputs(name, sizes, device, dtype))
            for name, forward in forwards.items()
        }

    def peers_on(self, device: torch.device) -> dict[str, Forward]:
        """Return the peers; on a GPU a compiler and a library of kernels are others."""
        if device.type != "cuda":
            return self.peers
        more = {"torch.compile": torch.compile(self.peers["eager"])}
        if self.name in LIGER and has_liger(device):
            more["Liger"] = LIGER[self.name]
        return {**self.peers, **more}

    def _inputs(
        self, side: str, sizes: Sizes, device: torch.device, dtype: torch.dtype
    ) -> list[torch.Tensor]:
        torch.manual_seed(0)
        make = self.apart if self.apart and side in ("Hugging Face", "Liger") else self.inputs
        return [
            tensor.to(device, dtype).requires_grad_()
            if tensor.is_floating_point()
            else tensor.to(device)
            for tensor in make(sizes)
        ]

    def elements_moved(self, sizes: Sizes) -> int:
        """Return how many elements must be read or written, forward and backward together."""
        return self.passes * self.inputs(sizes)[0].numel()


def _forward_backward(forward: Forward, inputs: list[torch.Tensor]) -> Side:
    def tuple_of(result: Any) -> tuple[torch.Tensor, ...]:
        return result if isinstance(result, tuple) else (result,)

    with torch.no_grad():
        upstream = [torch.randn_like(t) for t in tuple_of(forward(*inputs))]

    def side() -> None:
        for tensor in inputs:
            tensor.grad = None
        torch.autograd.backward(tuple_of(forward(*inputs)), upstream)

    return side


def _llama() -> Any:
    from transformers.models.llama import modeling_llama  # when needed: see kernels.py

    return modeling_llama


# Attention: query (S, B, N, D), key and value (S, B, G, D)


def _attention_inputs(sizes: Sizes) -> list[torch.Tensor]:
    heads = (sizes.heads, sizes.groups, sizes.groups)
    batch = max(1, sizes.batch // 2)  # for the matrix of scores of its peers
    return [torch.randn(sizes.sequence, batch, n, sizes.head_dim) for n in heads]


def _attention_eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v))
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1, dtype=torch.float32)
    return (weights.to(q.dtype) @ v).permute(2, 0, 1, 3)


class _HeadGroups(torch.nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def _attention_hugging_face(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    size = q.shape[0]
    module = _HeadGroups(q.shape[2] // k.shape[2])
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    mask = torch.full((1, 1, size, size), torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device)
    out: torch.Tensor = _llama().eager_attention_forward(
        module, q, k, v, mask.triu(1), scaling=q.shape[-1] ** -0.5
    )[0]
    return out.transpose(0, 1)


# Elementwise and normalisation


def _rms_norm_eager(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * normed.to(x.dtype)


def _rms_norm_hugging_face(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    norm = _llama().LlamaRMSNorm(x.shape[-1], eps=1e-6)
    del norm.weight
    vars(norm)["weight"] = weight  # the leaf itself: a Parameter would get a gradient of its own
    return norm(x)


def _add_rms_norm_eager(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return _rms_norm_eager(total, weight), total


def _layer_norm_eager(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)
    return weight * normed.to(x.dtype) + bias


def _swiglu_eager(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def _geglu_eager(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def _angles(q: torch.Tensor) -> torch.Tensor:
    frequencies = ml_kernels.rotary_frequencies(q.shape[-1]).inverse
    positions = torch.arange(q.shape[0], device=q.device)
    return ml_kernels.rotary_angles(frequencies.to(q.device), positions)


def _rotary_ours(q: torch.Tensor) -> torch.Tensor:
    return ml_kernels.rotary_embedding(q, _angles(q))


def _rotary_eager(q: torch.Tensor) -> torch.Tensor:
    angles = _angles(q)
    first, second = q.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return q * angles.cos().to(q.dtype) + turned * angles.sin().to(q.dtype)


def _rotary_hugging_face(q: torch.Tensor) -> torch.Tensor:
    angles = _angles(q)[:, 0].transpose(0, 1)  # (1, S, D)
    cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
    heads = q.permute(1, 2, 0, 3)
    turned: torch.Tensor = _llama().apply_rotary_pos_emb(heads, heads[:, :0], cos, sin)[0]
    return turned.permute(2, 0, 1, 3)


def _hidden(sizes: Sizes, width: int) -> torch.Tensor:
    return torch.randn(sizes.sequence, sizes.batch, width)


# Losses and experts


def _loss_inputs(sizes: Sizes) -> list[torch.Tensor]:
    rows = sizes.sequence // 2
    return [torch.randn(rows, sizes.vocab), torch.randint(0, sizes.vocab, (rows,))]


def _cross_entropy_eager(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), target, reduction="none")


def _grouped_inputs(sizes: Sizes) -> list[torch.Tensor]:
    rows = sizes.sequence * sizes.per_token
    cuts = torch.randint(0, rows, (sizes.experts - 1,)).sort().values
    ends = torch.cat((cuts, torch.tensor([rows])))
    weight = torch.randn(sizes.experts, sizes.hidden, sizes.ffn // 4) / sizes.hidden**0.5
    return [torch.randn(rows, sizes.hidden), weight, ends.diff(prepend=torch.tensor([0]))]


def _grouped_eager(x: torch.Tensor, weight: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    parts = torch.split(x, sizes.tolist())
    return torch.cat([part @ one for part, one in zip(parts, weight, strict=True)])


CASES = (
    Case(
        "flash_attention",
        "flash_attention, causal, grouped",
        _attention_inputs,
        lambda q, k, v: ml_kernels.flash_attention(q, k, v, layout="SBND", causal=True),
        {"eager": _attention_eager, "Hugging Face": _attention_hugging_face},
    ),
    Case(
        "rms_norm",
        "rms_norm",
        lambda s: [_hidden(s, s.hidden), torch.ones(s.hidden)],
        lambda x, weight: ml_kernels.rms_norm(x, weight, eps=1e-6),
        {"eager": _rms_norm_eager, "Hugging Face": _rms_norm_hugging_face},
        passes=5,
    ),
    Case(
        "add_rms_norm",
        "add_rms_norm",
        lambda s: [_hidden(s, s.hidden), _hidden(s, s.hidden), torch.ones(s.hidden)],
        lambda x, residual, weight: ml_kernels.add_rms_norm(x, residual, weight, eps=1e-6),
        {"eager": _add_rms_norm_eager},
        passes=10,  # two of them copy the gradient of the sum: each leaf gets one of its own
    ),
    Case(
        "layer_norm",
        "layer_norm",
        lambda s: [_hidden(s, s.hidden), torch.ones(s.hidden), torch.zeros(s.hidden)],
        lambda x, weight, bias: ml_kernels.layer_norm(x, weight, bias, eps=1e-5),
        {
            "eager": _layer_norm_eager,
            "torch": lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias, 1e-5),
        },
        passes=5,
    ),
    Case(
        "swiglu",
        "swiglu",
        lambda s: [_hidden(s, 2 * s.ffn)],
        ml_kernels.swiglu,
        {"eager": _swiglu_eager, "Hugging Face": lambda gate, up: F.silu(gate) * up},
        passes=4,
        apart=lambda s: [_hidden(s, s.ffn), _hidden(s, s.ffn)],
    ),
    Case(
        "geglu",
        "geglu",
        lambda s: [_hidden(s, 2 * s.ffn)],
        ml_kernels.geglu,
        {"eager": _geglu_eager},
        passes=4,
        apart=lambda s: [_hidden(s, s.ffn), _hidden(s, s.ffn)],
    ),
    Case(
        "gelu",
        "gelu with bias",
        lambda s: [_hidden(s, s.ffn), torch.zeros(s.ffn)],
        ml_kernels.gelu,
        {"eager": lambda x, bias: F.gelu(x + bias)},
        passes=5,
    ),
    Case(
        "rotary_embedding",
        "rotary_embedding",
        lambda s: [torch.randn(s.sequence, s.batch, s.heads, s.head_dim)],
        _rotary_ours,
        {"eager": _rotary_eager, "Hugging Face": _rotary_hugging_face},
        passes=4,
    ),
    Case(
        "cross_entropy",
        "cross_entropy",
        _loss_inputs,
        ml_kernels.cross_entropy,
        {"eager": _cross_entropy_eager},
        passes=3,
    ),
    Case(
        "linear",
        "linear",
        lambda s: [_hidden(s, s.hidden), torch.randn(s.ffn, s.hidden) / s.hidden**0.5],
        ml_kernels.linear,
        {"eager": F.linear},
    ),
    Case(
        "grouped_matmul",
        "grouped_matmul, 8 experts",
        _grouped_inputs,
        ml_kernels.grouped_matmul,
        {"eager": _grouped_eager},
    ),
)


# Liger Kernel (Hsu et al. 2024, arXiv:2410.10989) on the same inputs; a CUDA GPU only


def _liger() -> Any:
    from liger_kernel.transformers import functional

    return functional


def _liger_rope(q: torch.Tensor) -> torch.Tensor:
    angles = _angles(q)[:, 0].transpose(0, 1)  # (1, S, D)
    heads = q.permute(1, 2, 0, 3)
    tables = (angles.cos().to(q.dtype), angles.sin().to(q.dtype))
    turned: torch.Tensor = _liger().liger_rope(heads, heads[:, :1].detach(), *tables)[0]
    return turned


LIGER: dict[str, Forward] = {
    "cross_entropy": lambda x, target: _liger().liger_cross_entropy(x, target, reduction="none"),
    "geglu": lambda gate, up: _liger().liger_geglu(gate, up),
    "layer_norm": lambda x, weight, bias: _liger().liger_layer_norm(x, weight, bias, 1e-5),
    "rms_norm": lambda x, weight: _liger().liger_rms_norm(x, weight, 1e-6),
    "rotary_embedding": _liger_rope,
    "swiglu": lambda gate, up: _liger().liger_swiglu(gate, up),
}


def loss_shapes(device: torch.device) -> list[str]:
    """Return which of the losses there are here."""
    there = {"torch, chunked": hasattr(F, "linear_cross_entropy"), "Liger": has_liger(device)}
    return [shape for shape in LOSS_SHAPES if there.get(shape, True)]


def has_liger(device: torch.device) -> bool:
    """Say whether Liger Kernel can be compared with."""
    return device.type == "cuda" and find_spec("liger_kernel") is not None


# Linear + cross entropy, for memory

LOSS_SHAPES = ("full logits", "torch, chunked", "Liger", "ours")


def loss_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of the comparison: what one would train in."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def loss_sides(shape: str, sizes: Sizes, device: torch.device) -> tuple[Side, Side]:
    """Return a tiny run that loads everything, and the real one."""

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=loss_dtype(device), requires_grad=True)

    def side(rows: int, vocab: int) -> Side:
        hidden = leaf(rows, sizes.hidden)
        weight = leaf(vocab, sizes.hidden)
        target = torch.randint(0, vocab, (rows,), device=device)

        def run() -> None:
            hidden.grad = weight.grad = None
            _linear_loss(shape, hidden, weight, target).backward()  # type: ignore[no-untyped-call]

        return run

    return side(8, 64), side(sizes.sequence * max(1, sizes.batch // 2), sizes.vocab)


def _linear_loss(
    shape: str, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    if shape == "ours":
        return ml_kernels.linear_cross_entropy(hidden, weight, target)
    if shape == "full logits":
        return F.cross_entropy((hidden @ weight.T).float(), target)
    if shape == "Liger":
        loss: torch.Tensor = _liger().liger_fused_linear_cross_entropy(hidden, weight, target)
        return loss
    options = torch.nn.LinearCrossEntropyOptions()  # torch 2.12
    return F.linear_cross_entropy(hidden, weight, target, options=options)
