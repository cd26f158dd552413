"""Baichuan and Baichuan 2, 7B and 13B, from their published codes, which differ in two switches."""

import math

import torch
from torch import nn


class Baichuan(nn.Module):
    """Computes logits (B, S, V) of tokens (B, S)."""

    def __init__(self, config, *, alibi, norm_head):
        super().__init__()
        hidden, vocabulary = config["hidden_size"], config["vocab_size"]
        self.norm_head = norm_head
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(vocabulary, hidden)
        self.model.layers = nn.ModuleList(
            Layer(config, alibi) for _ in range(config["num_hidden_layers"])
        )
        self.model.norm = nn.RMSNorm(hidden, config["rms_norm_eps"])
        self.lm_head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, tokens):
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x)
        head = self.lm_head.weight
        if self.norm_head:
            head = head / head.norm(dim=1, keepdim=True)
        return self.model.norm(x) @ head.T


class Layer(nn.Module):
    def __init__(self, config, alibi):
        super().__init__()
        hidden, ffn = config["hidden_size"], config["intermediate_size"]
        self.heads, self.alibi = config["num_attention_heads"], alibi
        self.self_attn = nn.Module()
        self.self_attn.W_pack = nn.Linear(hidden, 3 * hidden, bias=False)
        self.self_attn.o_proj = nn.Linear(hidden, hidden, bias=False)
        self.mlp = nn.Module()
        self.mlp.gate_proj = nn.Linear(hidden, ffn, bias=False)
        self.mlp.up_proj = nn.Linear(hidden, ffn, bias=False)
        self.mlp.down_proj = nn.Linear(ffn, hidden, bias=False)
        self.input_layernorm = nn.RMSNorm(hidden, config["rms_norm_eps"])
        self.post_attention_layernorm = nn.RMSNorm(hidden, config["rms_norm_eps"])

    def forward(self, x):
        x = x + self.attend(self.input_layernorm(x))
        y = self.post_attention_layernorm(x)
        gated = nn.functional.silu(self.mlp.gate_proj(y)) * self.mlp.up_proj(y)
        return x + self.mlp.down_proj(gated)

    def attend(self, x):
        batch, length, hidden = x.shape
        packed = self.self_attn.W_pack(x).view(batch, length, 3, self.heads, -1)
        query, key, value = packed.permute(2, 0, 3, 1, 4)  # (B, N, S, D) each
        if not self.alibi:
            query, key = turned(query), turned(key)
        scores = query @ key.mT / math.sqrt(hidden // self.heads)
        if self.alibi:
            scores = scores + torch.tensor(slopes(self.heads))[:, None, None] * torch.arange(length)
        scores = scores + torch.full((length, length), -torch.inf).triu(1)
        context = scores.softmax(-1) @ value
        return self.self_attn.o_proj(context.transpose(1, 2).reshape(x.shape))


def turned(x):
    """Turn channel i with channel i + D/2 by position * 10000^(-2i/D), as complex numbers."""
    length, dim = x.shape[-2:]
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.arange(length)[:, None] * frequencies
    pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((pairs.real, pairs.imag), dim=-1)


def slopes(heads):
    """Powers of 2^(-8/n) for the next lower power of two n, then every other one of 2n."""
    lower = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-8 * (i + 1) / lower) for i in range(lower)]
    return first if lower == heads else first + slopes(2 * lower)[0::2][: heads - lower]


def build(*, alibi, norm_head):
    """Return the constructor of one of the four models."""
    return lambda config: Baichuan(config, alibi=alibi, norm_head=norm_head)
