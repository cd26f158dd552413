"""A transformer in plain float64 torch: what an `Architecture` says around its attention.

It reads the weights by the names of `ml_models.weights` and shares no code with the model.
Shapes: `B` batch, `S` sequence, `H` hidden.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def loss(arch, weights, tokens):
    """Return the cross entropy (B, S) of tokens (B, S + 1) in nats."""
    z = logits(arch, weights, tokens[:, :-1])
    wanted = tokens[:, 1:].flatten()
    return F.cross_entropy(z.flatten(0, 1), wanted, reduction="none").view(tokens.shape[0], -1)


def logits(arch, weights, tokens):
    """Return the logits (B, S, V) of the true vocabulary."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = embed(arch, w, tokens)
    for layer in range(arch.num_layers):
        p = f"decoder.layers.{layer}"
        h = attention(arch, w, f"{p}.self_attention", norm(arch, w, f"{p}.input_layernorm", x))
        x = x + (norm(arch, w, f"{p}.post_attn_norm", h) if arch.post_norm else h)
        h = norm(arch, w, f"{p}.pre_mlp_layernorm", x)
        mlp = experts if arch.has_experts(layer) else feed_forward
        h = mlp(arch, w, f"{p}.mlp", h)
        x = x + (norm(arch, w, f"{p}.post_mlp_layernorm", h) if arch.post_norm else h)
    x = norm(arch, w, "decoder.final_layernorm", x)
    table = w.get("output_layer.weight", w["embedding.word_embeddings.weight"])[: arch.vocab_size]
    if arch.norm_head:
        table = table / table.pow(2).sum(1, keepdim=True).sqrt()
    z = x @ table.T * arch.output_multiplier_scale
    cap = arch.final_logit_softcapping
    return z if cap is None else cap * (z / cap).tanh()


def embed(arch, w, tokens):
    x = w["embedding.word_embeddings.weight"][tokens] * arch.embedding_multiplier_scale
    if arch.input_embeds_norm:
        x = x * arch.hidden_size**0.5
    if arch.embed_layernorm:
        x = layer_norm(x, w, "embedding.word_embeddings.norm", arch.norm_epsilon)
    if arch.position_embedding_type == "learned_absolute":
        x = x + w["embedding.position_embeddings.weight"][: tokens.shape[1]]
    return x


def layer_norm(x, w, name, eps):
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def norm(arch, w, name, x):
    if arch.normalization == "LayerNorm":
        return layer_norm(x, w, name, arch.norm_epsilon)
    x = x / (x.pow(2).mean(-1, keepdim=True) + arch.norm_epsilon).sqrt()
    return x * (w[f"{name}.weight"] + (1.0 if arch.add_rmsnorm_offset else 0.0))


def linear(w, name, x):
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def attention(arch, w, name, h):
    groups, per_group = arch.query_groups, arch.num_attention_heads // arch.query_groups
    qkv = linear(w, f"{name}.linear_qkv", h)
    qkv = qkv.view(*h.shape[:2], groups, per_group + 2, arch.head_dim)
    q = qkv[..., :per_group, :].flatten(2, 3)
    k, v = qkv[..., per_group, :], qkv[..., per_group + 1, :]
    if arch.position_embedding_type == "rope":
        q, k = rotate(arch, q), rotate(arch, k)
    k, v = (t.repeat_interleave(per_group, 2) for t in (k, v))
    scores = torch.einsum("bqnd,bknd->bnqk", q, k) / arch.head_dim**0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    context = torch.einsum("bnqk,bknd->bqnd", weights, v).flatten(2)
    return linear(w, f"{name}.linear_proj", context)


def rotate(arch, x):  # (B, S, N, D)
    half = arch.head_dim // 2
    speeds = arch.rotary_base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = (torch.arange(x.shape[1])[:, None] * speeds)[None, :, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)


def feed_forward(arch, w, name, h):
    return linear(w, f"{name}.linear_fc2", activation(arch, linear(w, f"{name}.linear_fc1", h)))


def activation(arch, x):
    if not arch.is_gated:
        return F.gelu(x, approximate="tanh" if arch.approximate_gelu else "none")
    gate, up = x.chunk(2, -1)
    if arch.swiglu:
        return gate * gate.sigmoid() * up
    if arch.geglu:
        return F.gelu(gate, approximate="tanh") * up
    limit = arch.activation_func_clamp_value
    if limit is not None:  # gpt-oss: the gate from above only
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * (1.702 * gate).sigmoid() * (up + arch.glu_linear_offset)


def experts(arch, w, name, h):
    """Token by token, choice by choice."""
    scores, chosen = route(arch, w, f"{name}.router", h.flatten(0, 1))
    rows = []
    for token, weights, numbers in zip(h.flatten(0, 1), scores, chosen, strict=True):
        parts = [
            weight * feed_forward(arch, w, f"{name}.experts.local_experts.{number}", token)
            for weight, number in zip(weights, numbers.tolist(), strict=True)
        ]
        rows.append(torch.stack(parts).sum(0))
    output = torch.stack(rows).view_as(h)
    if arch.shared_expert_size:
        shared = feed_forward(arch, w, f"{name}.shared_experts", h)
        if arch.moe_shared_expert_gate:
            shared = shared * (h @ w[f"{name}.shared_experts.gate_weight"].T).sigmoid()
        output = output + shared
    return output


def route(arch, w, name, rows):
    """Return weights and numbers of the experts (T, K) of tokens (T, H), as the papers have it."""
    z = linear(w, name, rows)
    k, kind = arch.moe_router_topk, arch.moe_router_score_function
    if kind == "softmax" and not arch.moe_router_pre_softmax:  # Mixtral
        best = z.topk(k)
        return best.values.softmax(-1) * arch.routed_scaling_factor, best.indices
    scores = z.softmax(-1) if kind == "softmax" else z.sigmoid()
    choice = scores
    if arch.moe_router_enable_expert_bias:
        choice = choice + w[f"{name}.expert_bias"]
    if arch.moe_router_num_groups:
        best = 1 if arch.moe_router_group_score == "max" else 2
        groups = choice.unflatten(1, (arch.moe_router_num_groups, -1))
        worth = groups.topk(best).values.sum(-1)
        kept = torch.zeros_like(worth).scatter(1, worth.topk(arch.moe_router_group_topk).indices, 1)
        choice = groups.masked_fill(kept[..., None] == 0, -torch.inf).flatten(1)
    chosen = choice.topk(k).indices
    weights = scores.gather(1, chosen)
    if arch.norm_topk_prob:
        weights = weights / weights.sum(1, keepdim=True)
    return weights * arch.routed_scaling_factor, chosen
