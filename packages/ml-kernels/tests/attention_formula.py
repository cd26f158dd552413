"""The formula of attention, one row after the other, and inputs for its tests.

Shapes: `(B, N, S, D)` unless a layout says otherwise.
"""

from __future__ import annotations

import pytest
import torch
from oracle import random

COMPILES_FLEX = pytest.mark.filterwarnings(
    "ignore:<class 'torch.autograd.function.Function'> should not be instantiated",
    "ignore:The .grad attribute of a Tensor that is not a leaf",
)
"""Torch warns of what it does itself when it compiles flex attention, as CUDA runs do."""

LAYOUTS = ["SBND", "SBH", "BSH", "BSND", "BNSD"]
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
LENGTHS = {"square": (5, 5), "one query": (1, 5), "more keys": (3, 5), "more queries": (5, 3)}
SEEN = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 2},
    "masked": {"mask": random(2, 4, 5, 5) < 0.2},
    "row slopes": {"causal": True, "alibi_slopes": SLOPES, "alibi_form": "row"},
    "square slopes": {"alibi_slopes": SLOPES},
    "slopes in a window": {"causal": True, "window": 2, "alibi_slopes": SLOPES},
    "everything": {
        "causal": True,
        "window": 3,
        "mask": random(2, 1, 5, 5) < 0.2,
        "alibi_slopes": SLOPES,
        "scale": 0.3,
    },
}


def sized(seen, queries, keys):
    """Cut the mask of some options to the lengths."""
    cut = {"mask": seen["mask"][..., :queries, :keys]} if "mask" in seen else {}
    return {**seen, **cut}


def on(device, options):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def tensors(queries=5, keys=5, *, batch=2, heads=4, groups=2, width=4, value_width=4, **options):
    sizes = [(heads, queries, width), (groups, keys, width), (groups, keys, value_width)]
    return [random(batch, *size, seed=s, **options) for s, size in enumerate(sizes)]


def sees(seen, batch, head, query, key, ahead):
    """Say whether a query at a position sees a key."""
    position = query + ahead
    if seen.get("causal") and key > position:
        return False
    if seen.get("window") is not None and key <= position - seen["window"]:
        return False
    mask = seen.get("mask")
    if mask is None:
        return True
    index = (batch, head, query, key)
    return not mask[tuple(i if n > 1 else 0 for i, n in zip(index, mask.shape, strict=True))]


def formula(seen):
    """Return the attention of one row after the other, and its log-sum-exp."""

    def row(q, k, v, sinks, batch, head, query):
        group, ahead = head // (q.shape[1] // k.shape[1]), k.shape[2] - q.shape[2]
        visible = [j for j in range(k.shape[2]) if sees(seen, batch, head, query, j, ahead)]
        logits = []
        for j in visible:
            score = q[batch, head, query] @ k[batch, group, j]
            score = score * seen.get("scale", q.shape[3] ** -0.5)
            if "alibi_slopes" in seen:
                start = 0 if seen.get("alibi_form") == "row" else query + ahead
                score = score + float(seen["alibi_slopes"][head]) * (j - start)
            logits.append(score)
        if not visible:
            return q.sum() * 0 + v.new_zeros(v.shape[3]), q.new_tensor(float("-inf"))
        logits = torch.stack(logits)
        total = logits.exp().sum() + (0 if sinks is None else sinks[head].exp())
        return logits.exp() @ v[batch, group, visible] / total, total.log()

    def attend(q, k, v, sinks=None):
        batch, heads, queries, _ = q.shape
        indices = torch.cartesian_prod(*(torch.arange(n) for n in (batch, heads, queries)))
        rows = [row(q, k, v, sinks, *index) for index in indices.tolist()]
        out, lse = (torch.stack(column) for column in zip(*rows, strict=True))
        return out.view(batch, heads, queries, -1), lse.view(batch, heads, queries)

    return attend


def output_of(seen):
    return lambda *inputs: formula(seen)(*inputs)[0]


def to_layout(x, layout):
    """Return `(B, N, S, D)` as the layout has it, a view."""
    if layout == "BNSD":
        return x
    if layout == "TND":
        return x[0].transpose(0, 1)
    x = x.permute(2, 0, 1, 3) if layout[0] == "S" else x.transpose(1, 2)
    return x.reshape(*x.shape[:2], -1) if layout[-1] == "H" else x


def from_layout(x, layout, heads=4):
    if layout == "BNSD":
        return x
    if layout == "TND":
        return x.transpose(0, 1)[None]
    if layout[-1] == "H":
        x = x.reshape(*x.shape[:2], heads, -1)
    return x.permute(1, 2, 0, 3) if layout[0] == "S" else x.transpose(1, 2)
