"""One call of every operator that computes something, large enough for its version of the CPU."""

from __future__ import annotations

import torch
from oracle import random

import ml_kernels


def calls():
    """Return, by name, leaves and the call on them, on the CPU in float32."""
    x, weight = random(64, 512), random(512, seed=1)
    wide = random(2048, 1024)
    target = torch.arange(64) % 32
    table = ml_kernels.rotary_frequencies(64).inverse, torch.arange(64)
    angles = ml_kernels.rotary_angles(*table)
    of_neighbours = ml_kernels.rotary_angles(*table, interleaved=True)
    heads = [random(1, 300, n, 16, seed=n) for n in (4, 2, 2)]
    mask = torch.tensor([False] * 6 + [True])
    sizes = torch.tensor([16] * 4)
    experts = random(4, 512, 8, seed=2)
    found = {
        "rms_norm": ([x, weight], lambda x, w: ml_kernels.rms_norm(x, w, eps=1e-5)),
        "add_rms_norm": (
            [x, random(64, 512, seed=3), weight],
            lambda x, r, w: ml_kernels.add_rms_norm(x, r, w, eps=1e-5),
        ),
        "layer_norm": (
            [x, weight, random(512, seed=4)],
            lambda x, w, b: ml_kernels.layer_norm(x, w, b, eps=1e-5),
        ),
        "swiglu": ([wide], ml_kernels.swiglu),
        "geglu": ([wide], ml_kernels.geglu),
        "gelu": ([wide], ml_kernels.gelu),
        "rotary_embedding": (
            [random(64, 2, 4, 64)],
            lambda x: ml_kernels.rotary_embedding(x, angles),
        ),
        "rotary_embedding of neighbours": (
            [random(64, 2, 4, 64)],
            lambda x: ml_kernels.rotary_embedding(x, of_neighbours, interleaved=True),
        ),
        "linear": ([x, random(256, 512, seed=5)], ml_kernels.linear),
        "cross_entropy": (
            [random(64, 32)],
            lambda x: ml_kernels.cross_entropy(x, target),
        ),
        "linear_cross_entropy": (
            [x, random(32, 512, seed=6)],
            lambda h, w: ml_kernels.linear_cross_entropy(h, w, target),
        ),
        "scaled_masked_softmax": (
            [random(2, 3, 5, 7)],
            lambda x: ml_kernels.scaled_masked_softmax(x, mask),
        ),
        "topk_gating": ([random(64, 8)], lambda x: ml_kernels.topk_gating(x, 2)[0]),
        "grouped_matmul": (
            [x, experts],
            lambda x, w: ml_kernels.grouped_matmul(x, w, sizes),
        ),
    }
    for name, options in ATTENTION.items():
        found[f"flash_attention, {name}"] = (
            heads,
            lambda q, k, v, options=options: ml_kernels.flash_attention(
                q, k, v, layout="BSND", **options
            ),
        )
    found["flash_attention, fewer queries"] = (
        [heads[0].detach()[:, :200].clone().requires_grad_(), *heads[1:]],
        lambda q, k, v: ml_kernels.flash_attention(q, k, v, layout="BSND", causal=True),
    )
    return found


ATTENTION = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 3},
    "mask": {"mask": torch.ones(300, 300).triu(1).bool()},
    "sinks": {"causal": True, "sinks": torch.ones(4)},
    "slopes": {"causal": True, "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
}
