"""What the documentation of `npu_fusion_attention` says, on CPU tensors, and its gradient.

Written from the operator's documentation only. Where that promises nothing (a query that sees no
key), these functions return nonsense on purpose; where it forbids something, they refuse it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from npu_simulator import semantics

NOTHING = -1e30
COMPRESSED = (2048, 2048)
NONSENSE = 7.0


class Part(NamedTuple):
    """A batch, or one of several sequences; heads first, the groups repeated."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    rest: tuple[torch.Tensor, ...]
    number: int


class Statistics(NamedTuple):
    out: torch.Tensor
    maximum: torch.Tensor
    total: torch.Tensor


def split(x: torch.Tensor, layout: str, heads: int) -> torch.Tensor:
    """Return `(B, N, S, D)`."""
    if layout == "BNSD":
        return x
    if layout == "BSND":
        return x.transpose(1, 2)
    x = x.unflatten(-1, (heads, -1))
    return x.transpose(1, 2) if layout == "BSH" else x.permute(1, 2, 0, 3)


def joined(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "BNSD":
        return x
    if layout == "BSND":
        return x.transpose(1, 2)
    return x.transpose(1, 2).flatten(2) if layout == "BSH" else x.permute(2, 0, 1, 3).flatten(2)


def parts(arguments: dict[str, Any], *rest: torch.Tensor) -> list[Part]:
    """Cut the tensors as the layout says; `rest` are shaped like the query."""
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    layout, heads = arguments["input_layout"], arguments["head_num"]
    assert query.dtype == key.dtype == value.dtype
    assert key.shape == value.shape
    assert layout in ("BSH", "SBH", "BSND", "BNSD", "TND")
    if layout == "TND":
        return sequences(arguments, *rest)
    assert arguments["actual_seq_qlen"] is None
    assert arguments["actual_seq_kvlen"] is None
    width = query.shape[-1] // heads if layout in ("BSH", "SBH") else query.shape[-1]
    groups = key.shape[-1] // width
    q, k, v = split(query, layout, heads), split(key, layout, groups), split(value, layout, groups)
    return [grouped(arguments, q, k, v, tuple(split(x, layout, heads) for x in rest), 0)]


def sequences(arguments: dict[str, Any], *rest: torch.Tensor) -> list[Part]:
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    ends_q, ends_k = arguments["actual_seq_qlen"], arguments["actual_seq_kvlen"]
    assert ends_q[-1] == query.shape[0]
    assert ends_k[-1] == key.shape[0]
    assert len(ends_q) == len(ends_k)
    starts = zip([0, *ends_q], [0, *ends_k], strict=True)
    found = []
    for number, ((q, k), q_end, k_end) in enumerate(zip(starts, ends_q, ends_k, strict=False)):
        some = (x[q:q_end].transpose(0, 1)[None] for x in (query, *rest))
        both = (x[k:k_end].transpose(0, 1)[None] for x in (key, value))
        first, *others = some
        found.append(grouped(arguments, first, *both, tuple(others), number))
    return found


def grouped(arguments, query, key, value, rest, number) -> Part:
    assert query.shape[1] == arguments["head_num"] <= 256
    assert query.shape[-1] <= 768
    repeats, remainder = divmod(query.shape[1], key.shape[1])
    assert remainder == 0
    key, value = (x.float().repeat_interleave(repeats, 1) for x in (key, value))
    return Part(query.float(), key, value, tuple(x.float() for x in rest), number)


def hidden_keys(arguments: dict[str, Any], part: Part) -> torch.Tensor | None:
    mask, mode = arguments["atten_mask"], arguments["sparse_mode"]
    if mask is None:
        return None  # sparse_mode, pre_tockens and next_tockens do not take effect
    assert mask.dtype == torch.bool
    (batch, heads, queries, _), keys = part.query.shape, part.key.shape[2]
    query, key = torch.arange(queries)[:, None], torch.arange(keys)
    before, after = arguments["pre_tockens"], arguments["next_tockens"]
    if mode in (0, 1):
        full = (queries, keys)
        allowed = [full, (1, 1, *full), (batch, 1, *full), (batch, heads, *full)]
        assert tuple(mask.shape) in (allowed if arguments["input_layout"] != "TND" else [full])
        hidden = mask if mode else mask | (key > query + after) | (key < query - before)
        assert not hidden.all(-1).any(), "what happens to a query without keys is not documented"
        return hidden
    assert mode in (2, 3, 4)
    assert mask.shape == COMPRESSED
    assert torch.equal(mask, torch.ones(COMPRESSED, dtype=torch.bool).triu(1))
    query = query if mode == 2 else query + keys - queries
    if mode == 4:
        return (key > query + after) | (key < query - before)
    return key > query


def biases(arguments: dict[str, Any], part: Part) -> torch.Tensor | float:
    pse = arguments["pse"]
    if pse is None:
        return 0.0
    assert pse.dtype == arguments["query"].dtype
    assert arguments["input_layout"] != "TND", "only triangles, compressed: we do not use it"
    (batch, heads, queries, _), keys = part.query.shape, part.key.shape[2]
    if queries > 1024 and pse.shape[2] == 1024:
        assert queries == keys
        assert arguments["sparse_mode"] in (0, 2, 3)
        assert tuple(pse.shape) in [(batch, heads, 1024, keys), (1, heads, 1024, keys)]
        distance = torch.arange(queries)[:, None] - torch.arange(keys)
        return pse[:, :, -1].float()[..., (keys - 1 - distance).clamp(0, keys - 1)]
    square = (queries, keys)
    allowed = [(batch, heads, *square), (1, heads, *square), (batch, heads, 1, keys)]
    assert tuple(pse.shape) in allowed
    return pse.float()


def scores_of(arguments: dict[str, Any], part: Part, scale: float) -> torch.Tensor:
    scores = scale * (biases(arguments, part) + part.query @ part.key.mT)
    hidden = hidden_keys(arguments, part)
    return scores if hidden is None else scores.masked_fill(hidden, NOTHING)


def kept(arguments: dict[str, Any], part: Part, weights: torch.Tensor) -> torch.Tensor | float:
    probability = arguments["keep_prob"]
    assert 0 < probability <= 1
    if probability == 1:
        return 1.0
    generator = torch.Generator().manual_seed(1234 + part.number)
    return (torch.rand(weights.shape, generator=generator) < probability) / probability


def attention(arguments: dict[str, Any], part: Part) -> Statistics:
    scores = scores_of(arguments, part, arguments["scale"])
    sink = arguments["sink"]
    maximum = scores.amax(-1)
    if sink is not None:
        assert sink.dtype == torch.float32
        assert sink.shape == (part.query.shape[1],)
        maximum = torch.maximum(maximum, sink[:, None])
    total = (scores - maximum[..., None]).exp().sum(-1)
    if sink is not None:
        total = total + (sink[:, None] - maximum).exp()
    weights = (scores - maximum[..., None]).exp() / total[..., None]
    out = (weights * kept(arguments, part, weights)) @ part.value
    blind = (scores <= NOTHING).all(-1)
    out, maximum, total = (
        x.masked_fill(blind if x.dim() == 3 else blind[..., None], NONSENSE)
        for x in (out, maximum, total)
    )
    return Statistics(out, maximum, total)


@semantics("npu_fusion_attention")
def npu_fusion_attention(**arguments):
    layout = arguments["input_layout"]
    found = [attention(arguments, part) for part in parts(arguments)]
    if layout == "TND":
        out = torch.cat([one.out[0].transpose(0, 1) for one in found])
        # (T, N) if asked for, else the numbers lie as (N, T) in a tensor that says it is (T, N).
        across = 1 if arguments["softmax_layout"] == "TND" else 2
        statistics = [torch.cat([one[n][0].mT for one in found]) for n in (1, 2)]
        if across == 2:
            statistics = [x.mT.reshape(x.shape) for x in statistics]
    else:
        assert arguments["softmax_layout"] == ""
        out = joined(found[0].out, layout)
        statistics = [found[0].maximum, found[0].total]
    maximum, total = (x[..., None].expand(*x.shape, 8).contiguous() for x in statistics)
    out = out.to(arguments["query"].dtype).contiguous()
    return out, maximum, total, torch.empty(0), 0, 0, 0


def gradients(arguments: dict[str, Any], part: Part, statistics: tuple[torch.Tensor, ...]):
    gradient, out = part.rest
    scale, sink = arguments["scale_value"], arguments["sink"]
    maximum, total = statistics
    assert maximum.shape == total.shape == part.query.shape[:3]
    scores = scores_of(arguments, part, scale)
    weights = (scores - maximum[..., None]).exp() / total[..., None]
    keep = kept(arguments, part, weights)
    mean = (gradient * out).sum(-1, keepdim=True)
    of_scores = weights * (gradient @ part.value.mT * keep - mean)
    of_sink = None
    if sink is not None:
        of_sink = -((sink[:, None] - maximum).exp() / total * mean[..., 0]).sum((0, 2))
    of_key, of_value = of_scores.mT @ part.query * scale, (weights * keep).mT @ gradient
    return of_scores @ part.key * scale, of_key, of_value, of_sink


@semantics("npu_fusion_attention_grad")
def npu_fusion_attention_grad(**arguments):
    layout, key = arguments["input_layout"], arguments["key"]
    known = [arguments[name][..., 0] for name in ("softmax_max", "softmax_sum")]
    found = []
    for part in parts(arguments, arguments["dy"], arguments["attention_in"]):
        if layout == "TND":
            assert arguments["softmax_layout"] == "TND"
            end = arguments["actual_seq_qlen"][part.number]
            some = [x[end - part.query.shape[2] : end].mT[None] for x in known]
        else:
            some = known
        found.append(gradients(arguments, part, tuple(some)))
    columns = zip(*found, strict=True)
    if layout == "TND":
        query, k, v = (torch.cat([x[0].transpose(0, 1) for x in next(columns)]) for _ in range(3))
        k, v = (x.unflatten(1, (key.shape[1], -1)).sum(2) for x in (k, v))
    else:
        groups = {"BNSD": 1, "BSND": 2}.get(layout)
        width = arguments["query"].shape[-1] // arguments["head_num"]
        number = key.shape[groups] if groups else key.shape[-1] // width
        query, *both = (next(columns)[0] for _ in range(3))
        k, v = (joined(x.unflatten(1, (number, -1)).sum(2), layout) for x in both)
        query = joined(query, layout)
    sinks = [x for x in next(columns) if x is not None]
    of_sink = torch.stack(sinks).sum(0) if sinks else torch.empty(0)
    dtype = key.dtype
    return query.to(dtype), k.to(dtype), v.to(dtype), torch.empty(0), of_sink
