"""Aquila, from its published architecture: parameter names and maths, as plainly as possible."""

import torch
from torch import nn


class Aquila(nn.Module):
    """Computes logits (B, S, V) of tokens (B, S)."""

    def __init__(self, config):
        super().__init__()
        hidden, vocabulary = config["hidden_size"], config["vocab_size"]
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(vocabulary, hidden)
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.model.norm = nn.RMSNorm(hidden, config["rms_norm_eps"])
        self.lm_head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, tokens):
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x)
        return self.lm_head(self.model.norm(x))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, ffn = config["hidden_size"], config["intermediate_size"]
        self.heads = config["num_attention_heads"]
        self.groups = config.get("num_key_value_heads", self.heads)
        self.dim = hidden // self.heads
        self.base = config.get("rope_theta", 10000.0)
        attention = self.self_attn = nn.Module()
        attention.q_proj = nn.Linear(hidden, hidden, bias=False)
        attention.k_proj = nn.Linear(hidden, self.groups * self.dim, bias=False)
        attention.v_proj = nn.Linear(hidden, self.groups * self.dim, bias=False)
        attention.o_proj = nn.Linear(hidden, hidden, bias=False)
        mlp = self.mlp = nn.Module()
        mlp.gate_proj = nn.Linear(hidden, ffn, bias=False)
        mlp.up_proj = nn.Linear(hidden, ffn, bias=False)
        mlp.down_proj = nn.Linear(ffn, hidden, bias=False)
        self.input_layernorm = nn.RMSNorm(hidden, config["rms_norm_eps"])
        self.post_attention_layernorm = nn.RMSNorm(hidden, config["rms_norm_eps"])

    def forward(self, x):
        x = x + self.attend(self.input_layernorm(x))
        y = self.post_attention_layernorm(x)
        gate, up = self.mlp.gate_proj(y), self.mlp.up_proj(y)
        return x + self.mlp.down_proj(nn.functional.silu(gate) * up)

    def attend(self, x):
        batch, length, _ = x.shape

        def heads(y):  # (B, S, N * D) -> (B, N, S, D)
            return y.view(batch, length, -1, self.dim).transpose(1, 2)

        query = self.turn(heads(self.self_attn.q_proj(x)))
        key = self.turn(heads(self.self_attn.k_proj(x)))
        value = heads(self.self_attn.v_proj(x))
        share = self.heads // self.groups
        key, value = (y.repeat_interleave(share, dim=1) for y in (key, value))
        scores = query @ key.transpose(-1, -2) / self.dim**0.5
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        return self.self_attn.o_proj((weights @ value).transpose(1, 2).reshape(x.shape))

    def turn(self, x):
        """Turn channel i with channel i + D/2 by position times base^(-2i/D)."""
        frequencies = self.base ** (-torch.arange(0, self.dim, 2).double() / self.dim)
        angles = torch.outer(torch.arange(x.shape[-2]).double(), frequencies)
        cos, sin = angles.cos().float(), angles.sin().float()
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
