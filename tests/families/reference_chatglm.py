"""ChatGLM 3, from its published code: half of each head turns, neighbouring channels as a pair."""

import torch
from torch import nn


class ChatGLM(nn.Module):
    """Computes logits (B, S, V) of tokens (B, S)."""

    def __init__(self, config):
        super().__init__()
        hidden, vocabulary = config["hidden_size"], config["padded_vocab_size"]
        self.transformer = nn.Module()
        self.transformer.embedding = nn.Module()
        self.transformer.embedding.word_embeddings = nn.Embedding(vocabulary, hidden)
        self.transformer.rotary_pos_emb = nn.Module()  # published files hold it; nothing reads it
        self.transformer.rotary_pos_emb.register_buffer("inv_freq", torch.ones(1))
        self.transformer.encoder = nn.Module()
        self.transformer.encoder.layers = nn.ModuleList(
            Layer(config) for _ in range(config["num_layers"])
        )
        self.transformer.encoder.final_layernorm = nn.RMSNorm(hidden, config["layernorm_epsilon"])
        self.transformer.output_layer = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, tokens):
        x = self.transformer.embedding.word_embeddings(tokens)
        for layer in self.transformer.encoder.layers:
            x = x + layer.self_attention(layer.input_layernorm(x))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.transformer.output_layer(self.transformer.encoder.final_layernorm(x))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, epsilon = config["hidden_size"], config["layernorm_epsilon"]
        self.input_layernorm = nn.RMSNorm(hidden, epsilon)
        self.post_attention_layernorm = nn.RMSNorm(hidden, epsilon)
        self.self_attention, self.mlp = Attention(config), MLP(config)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, ffn, bias = (
            config[key] for key in ("hidden_size", "ffn_hidden_size", "add_bias_linear")
        )
        self.dense_h_to_4h = nn.Linear(hidden, 2 * ffn, bias=bias)
        self.dense_4h_to_h = nn.Linear(ffn, hidden, bias=bias)

    def forward(self, x):
        gate, up = torch.chunk(self.dense_h_to_4h(x), 2, dim=-1)
        return self.dense_4h_to_h(nn.functional.silu(gate) * up)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, bias = config["hidden_size"], config["add_bias_linear"]
        self.dim, self.heads = config["kv_channels"], config["num_attention_heads"]
        several = config["multi_query_attention"]
        self.groups = config["multi_query_group_num"] if several else self.heads
        self.base = 10000 * config.get("rope_ratio", 1)
        rows = (self.heads + 2 * self.groups) * self.dim
        self.query_key_value = nn.Linear(hidden, rows, bias=bias or config["add_qkv_bias"])
        self.dense = nn.Linear(self.heads * self.dim, hidden, bias=bias)

    def forward(self, x):
        batch, length, _ = x.shape
        sizes = [self.heads * self.dim, self.groups * self.dim, self.groups * self.dim]
        query, key, value = (
            part.reshape(batch, length, -1, self.dim)
            for part in self.query_key_value(x).split(sizes, dim=-1)
        )
        query, key = self.rotate(query), self.rotate(key)
        # Query head n belongs to group n // (heads per group).
        query = query.reshape(batch, length, self.groups, -1, self.dim)
        scores = torch.einsum("bqgnd,bkgd->bgnqk", query, key) / self.dim**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        context = torch.einsum("bgnqk,bkgd->bqgnd", scores.softmax(-1), value)
        return self.dense(context.reshape(batch, length, -1))

    def rotate(self, x):
        """Turn channels 2i and 2i + 1 of the first half of the head."""
        half = self.dim // 2
        theta = 1.0 / (self.base ** (torch.arange(0, half, 2).float() / half))
        angles = torch.outer(torch.arange(x.shape[1]).float(), theta)[:, None]  # (S, 1, D/4)
        pairs = x[..., :half].unflatten(-1, (-1, 2))
        even, odd = pairs.unbind(-1)
        cos, sin = angles.cos(), angles.sin()
        turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
        return torch.cat((turned.flatten(-2), x[..., half:]), dim=-1)
