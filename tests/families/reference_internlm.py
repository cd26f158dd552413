"""InternLM (1), from its published code: biases in attention, a rotary base that grows."""

import torch
from torch import nn


class InternLM(nn.Module):
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
            x = x + layer.attend(layer.input_layernorm(x))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.lm_head(self.model.norm(x))


class MLP(nn.Module):
    def __init__(self, hidden, ffn):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, hidden, bias=False)
        self.up_proj = nn.Linear(hidden, ffn, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden = config["hidden_size"]
        self.heads, self.rotary = config["num_attention_heads"], config["rotary"]
        self.longest = config["max_position_embeddings"]
        self.self_attn = nn.ModuleDict(
            {
                f"{name}_proj": nn.Linear(hidden, hidden, bias=config["bias"])
                for name in ("q", "k", "v", "o")
            }
        )
        self.mlp = MLP(hidden, config["intermediate_size"])
        self.input_layernorm = nn.RMSNorm(hidden, config["rms_norm_eps"])
        self.post_attention_layernorm = nn.RMSNorm(hidden, config["rms_norm_eps"])

    def attend(self, x):
        batch, length, hidden = x.shape
        query, key, value = (
            self.self_attn[f"{name}_proj"](x).view(batch, length, self.heads, -1)
            for name in ("q", "k", "v")
        )
        query, key = (y * self.cos(y) + halves_turned(y) * self.sin(y) for y in (query, key))
        scores = torch.einsum("bqnd,bknd->bnqk", query, key) * query.shape[-1] ** -0.5
        scores += torch.full((length, length), float("-inf")).triu(1)
        context = torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), value)
        return self.self_attn["o_proj"](context.reshape(batch, length, hidden))

    def angles(self, x):
        """Return position * frequency, (S, 1, D); `dynamic` raises the base of long sequences."""
        length, dim = x.shape[1], x.shape[3]
        base = self.rotary["base"]
        if self.rotary["type"] == "dynamic" and length > self.longest:
            base *= (length / self.longest) ** (dim / (dim - 2))
        frequencies = 1.0 / (base ** (torch.arange(0, dim, 2).float() / dim))
        angles = torch.einsum("i,j->ij", torch.arange(length).float(), frequencies)
        return torch.cat((angles, angles), dim=-1)[:, None]

    def cos(self, x):
        return self.angles(x).cos()

    def sin(self, x):
        return self.angles(x).sin()


def halves_turned(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)
