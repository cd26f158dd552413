"""Qwen (1), from its published code, for sequences up to `seq_length`."""

import torch
from torch import nn


class Qwen(nn.Module):
    """Computes logits (B, S, V) of tokens (B, S)."""

    def __init__(self, config):
        super().__init__()
        hidden, epsilon = config["hidden_size"], config["layer_norm_epsilon"]
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config["vocab_size"], hidden),
                "h": nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"])),
                "ln_f": nn.RMSNorm(hidden, epsilon),
            }
        )
        self.lm_head = nn.Linear(hidden, config["vocab_size"], bias=False)

    def forward(self, tokens):
        x = self.transformer["wte"](tokens)
        for layer in self.transformer["h"]:
            x = x + layer.attn(layer.ln_1(x))
            x = x + layer.mlp(layer.ln_2(x))
        return self.lm_head(self.transformer["ln_f"](x))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, epsilon = config["hidden_size"], config["layer_norm_epsilon"]
        self.ln_1, self.ln_2 = nn.RMSNorm(hidden, epsilon), nn.RMSNorm(hidden, epsilon)
        self.attn, self.mlp = Attention(config), MLP(config)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, ffn = config["hidden_size"], config["intermediate_size"] // 2
        bias = not config["no_bias"]
        self.w1 = nn.Linear(hidden, ffn, bias=bias)
        self.w2 = nn.Linear(hidden, ffn, bias=bias)
        self.c_proj = nn.Linear(ffn, hidden, bias=bias)

    def forward(self, x):
        return self.c_proj(self.w1(x) * nn.functional.silu(self.w2(x)))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.dim = config["num_attention_heads"], config["kv_channels"]
        self.turning = int(self.dim * config["rotary_pct"])
        self.base = config["rotary_emb_base"]
        projected = self.heads * self.dim
        self.c_attn = nn.Linear(config["hidden_size"], 3 * projected)
        self.c_proj = nn.Linear(projected, config["hidden_size"], bias=not config["no_bias"])

    def forward(self, x):
        batch, length, _ = x.shape
        query, key, value = (
            part.view(batch, length, self.heads, self.dim).transpose(1, 2)
            for part in self.c_attn(x).split(self.heads * self.dim, dim=-1)
        )
        context = nn.functional.scaled_dot_product_attention(
            self.rotate(query), self.rotate(key), value, is_causal=True
        )
        return self.c_proj(context.transpose(1, 2).reshape(batch, length, -1))

    def rotate(self, x):
        """Turn channels i and i + R/2 of the first R; the others stay."""
        steps = torch.arange(0, self.turning, 2).float() / self.turning
        angles = torch.outer(torch.arange(x.shape[2]).float(), 1.0 / self.base**steps)
        emb = torch.cat((angles, angles), dim=-1)
        turning, rest = x[..., : self.turning], x[..., self.turning :]
        first, second = turning.chunk(2, dim=-1)
        turned = turning * emb.cos() + torch.cat((-second, first), dim=-1) * emb.sin()
        return torch.cat((turned, rest), dim=-1)
