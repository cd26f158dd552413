"""Grok-1 as xAI published it, under the names of the community's port to Hugging Face.

Written from https://github.com/xai-org/grok-1/blob/main/model.py. Shapes: `B` batch, `S` sequence,
`N` heads, `D` channels of a head, `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Norm(nn.Module):
    """RMSNorm, whose weight is called scale."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.scale, self.epsilon = nn.Parameter(torch.ones(size)), epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon) * self.scale


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Attention(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        hidden, self.heads = config["hidden_size"], config["num_attention_heads"]
        self.size, self.groups = hidden // self.heads, config["num_key_value_heads"]
        self.q_proj = linear(hidden, self.heads * self.size)
        self.k_proj = linear(hidden, self.groups * self.size)
        self.v_proj = linear(hidden, self.groups * self.size)
        self.o_proj = linear(self.heads * self.size, hidden)
        self.scale, self.cap = config["attn_output_multiplier"], config["max_attn_value"]

    def turn(self, x: Tensor) -> Tensor:
        """Turn pairs (i, i + D/2) of (B, N, S, D) by the position."""
        frequencies = 10000.0 ** (-torch.arange(0, self.size, 2) / self.size)
        angles = (torch.arange(x.shape[2])[:, None] * frequencies).tile(1, 2)  # (S, D)
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        def heads(projected: Tensor, number: int) -> Tensor:
            split = projected.unflatten(-1, (number, self.size)).transpose(1, 2)  # (B, N, S, D)
            return split.repeat_interleave(self.heads // number, dim=1)

        q = self.turn(heads(self.q_proj(x), self.heads))
        k = self.turn(heads(self.k_proj(x), self.groups))
        v = heads(self.v_proj(x), self.groups)
        scores = self.cap * torch.tanh(q @ k.transpose(-1, -2) * self.scale / self.cap)
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        shares = scores.masked_fill(later, -1e30).softmax(-1)
        return self.o_proj((shares @ v).transpose(1, 2).flatten(2))


class Expert(nn.Module):
    def __init__(self, hidden: int, size: int) -> None:
        super().__init__()
        self.linear, self.linear_v = linear(hidden, size), linear(hidden, size)
        self.linear_1 = linear(size, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_1(functional.gelu(self.linear(x), approximate="tanh") * self.linear_v(x))


class Experts(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        hidden, number = config["hidden_size"], config["num_experts"]
        self.gate, self.chosen = linear(hidden, number), config["num_experts_per_tok"]
        self.experts = nn.ModuleList(
            Expert(hidden, config["intermediate_size"]) for _ in range(number)
        )

    def forward(self, x: Tensor) -> Tensor:
        shares = self.gate(x).softmax(-1)  # over all experts; those of the chosen stay as they are
        top = torch.zeros_like(shares).scatter(-1, shares.topk(self.chosen).indices, 1.0)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-1)  # (B, S, H, experts)
        return (outputs * (shares * top)[:, :, None]).sum(-1)


class Layer(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.attn, self.moe_block = Attention(config), Experts(config)
        for name in ("pre_attn_norm", "post_attn_norm", "pre_moe_norm", "post_moe_norm"):
            self.add_module(name, Norm(config["hidden_size"], config["rms_norm_eps"]))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.post_attn_norm(self.attn(self.pre_attn_norm(x)))
        return x + self.post_moe_norm(self.moe_block(self.pre_moe_norm(x)))


class Grok1(nn.Module):
    """Logits (B, S, V) of tokens (B, S); the embedding is also the output layer."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config, self.model = config, nn.Module()
        self.model.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.model.norm = Norm(config["hidden_size"], config["rms_norm_eps"])

    def forward(self, tokens: Tensor) -> Tensor:
        table = self.model.embed_tokens
        x = table(tokens) * self.config["embedding_multiplier_scale"]
        for layer in self.model.layers:
            x = layer(x)
        logits = functional.linear(self.model.norm(x), table.weight)
        return logits * self.config["output_multiplier_scale"]
