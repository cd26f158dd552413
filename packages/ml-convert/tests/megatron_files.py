"""Megatron checkpoints of tiny models, cut by code that shares nothing with what is tested.

Weights are random bit patterns under the names transformers gives them. `cut` follows the published
layout rules with whole arrays, in every dialect:

    mcore      local layer spec            te         Transformer Engine
    stacked    grouped GEMM of the local   te grouped its grouped GEMM
               implementation              legacy     Megatron-Legacy
"""

import argparse
import itertools
import json

import numpy as np
import torch

DENSE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
EXPERTS = {
    **DENSE,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "router_aux_loss_coef": 0.02,
}


class Model:
    """A model: its config.json, and its tensors as Hugging Face has them."""

    def __init__(self, config, seed=0):
        self.config = config
        self.experts = config.get("num_local_experts", 0)
        numbers = np.random.default_rng(seed)
        shapes = dict(_shapes(config))
        self.tensors = {n: numbers.integers(0, 1 << 16, s, np.uint16) for n, s in shapes.items()}

    def write(self, path, write_safetensors):
        """Write a Hugging Face directory."""
        path.mkdir()
        (path / "config.json").write_text(json.dumps(self.config))
        write_safetensors(path / "model.safetensors", self.tensors)
        return path


def _shapes(config):
    hidden, ffn, vocab = (
        config["hidden_size"],
        config["intermediate_size"],
        config["vocab_size"],
    )
    head = hidden // config["num_attention_heads"]
    keys = head * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for n in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{n}."
        for name, rows in (("q", hidden), ("k", keys), ("v", keys), ("o", hidden)):
            yield f"{prefix}self_attn.{name}_proj.weight", (rows, hidden)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{norm}.weight", (hidden,)
        experts = config.get("num_local_experts", 0)
        if experts:
            yield f"{prefix}block_sparse_moe.gate.weight", (experts, hidden)
        for part in _mlps(prefix, experts):
            names = ("w1", "w3", "w2") if experts else ("gate_proj", "up_proj", "down_proj")
            for name in names[:2]:
                yield f"{part}{name}.weight", (ffn, hidden)
            yield f"{part}{names[2]}.weight", (hidden, ffn)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, hidden)


def _mlps(prefix, experts):
    if not experts:
        return [f"{prefix}mlp."]
    return [f"{prefix}block_sparse_moe.experts.{e}." for e in range(experts)]


# Cutting


def cut(model, *, tp=1, ep=1, stages=None, padded=None, style="mcore", fill="zeros"):
    """Cut a model.

    Args:
        model: The model.
        tp: Number of tensor-parallel ranks.
        ep: Number of expert-parallel ranks.
        stages: Layers of each chunk of each stage.
        padded: Rows of the vocabulary with padding.
        style: Dialect.
        fill: What padding holds.

    Returns:
        {directory of the rank: {key of the chunk: {dotted name: words}}}
    """
    stages = stages or [[range(model.config["num_hidden_layers"])]]
    padded = padded or model.config["vocab_size"]
    found = {}
    for t, (p, chunks), e in itertools.product(range(tp), enumerate(stages), range(ep)):
        name = f"mp_rank_{t:02d}"
        name += f"_{p:03d}" if len(stages) > 1 else ""
        name += f"_{e:03d}" if ep > 1 else ""
        found[name] = {}
        for c, layers in enumerate(chunks):
            rank = _Rank(model, style, (t, tp), (e, ep), padded, fill)
            first = (p, c) == (0, 0)
            last = (p, c) == (len(stages) - 1, len(chunks) - 1)
            key = "model" if len(chunks) == 1 else f"model{c}"
            found[name][key] = dict(rank.chunk(layers, first=first, last=last))
    return found


class _Rank:
    def __init__(self, model, style, tensor, expert, padded, fill):
        self.hf, self.config, self.experts = model.tensors, model.config, model.experts
        self.style, self.padded, self.fill = style, padded, fill
        (self.t, self.tp), (self.e, self.ep) = tensor, expert

    def rows(self, array):
        return np.split(array, self.tp)[self.t]

    def columns(self, array):
        return np.split(array, self.tp, axis=1)[self.t]

    def vocabulary(self, array):
        count = self.padded - len(array)
        rest = np.repeat(array[-1:] * (self.fill == "last-row"), count, axis=0)
        return self.rows(np.concatenate([array, rest]))

    def chunk(self, layers, *, first, last):
        legacy = self.style == "legacy"
        table = self.hf["model.embed_tokens.weight"]
        if first:
            prefix = "language_model." if legacy else ""
            yield f"{prefix}embedding.word_embeddings.weight", self.vocabulary(table)
        for local, n in enumerate(layers):
            layer = self.legacy_layer if legacy else self.core_layer
            yield from layer(f"model.layers.{n}.", local)
        if not last:
            return
        name = "language_model.encoder.final_norm" if legacy else "decoder.final_layernorm"
        yield f"{name}.weight", self.hf["model.norm.weight"]
        if not self.config["tie_word_embeddings"]:
            prefix = "language_model." if legacy else ""
            head = self.hf["lm_head.weight"]
            yield f"{prefix}output_layer.weight", self.vocabulary(head)
        elif not first:
            name = "word_embeddings_for_head" if legacy else "output_layer"
            yield f"{name}.weight", self.vocabulary(table)

    def qkv(self, prefix):
        groups = self.config["num_key_value_heads"]
        parts = [self.hf[f"{prefix}self_attn.{p}_proj.weight"] for p in "qkv"]
        query, key, value = (np.split(part, groups) for part in parts)
        return self.rows(np.concatenate([a[g] for g in range(groups) for a in (query, key, value)]))

    def core_layer(self, theirs, local):
        ours = f"decoder.layers.{local}."
        te = self.style.startswith("te")
        attention = f"{ours}self_attention.linear_"
        norm = f"{attention}qkv.layer_norm_weight" if te else f"{ours}input_layernorm.weight"
        yield norm, self.hf[f"{theirs}input_layernorm.weight"]
        yield f"{attention}qkv.weight", self.qkv(theirs)
        yield f"{attention}proj.weight", self.columns(self.hf[f"{theirs}self_attn.o_proj.weight"])
        fused = te and not self.experts
        name = "mlp.linear_fc1.layer_norm_weight" if fused else "pre_mlp_layernorm.weight"
        yield f"{ours}{name}", self.hf[f"{theirs}post_attention_layernorm.weight"]
        if not self.experts:
            gate, up, down = (self.hf[f"{theirs}mlp.{p}_proj.weight"] for p in _GATED)
            yield f"{ours}mlp.linear_fc1.weight", np.concatenate([self.rows(gate), self.rows(up)])
            yield f"{ours}mlp.linear_fc2.weight", self.columns(down)
            return
        yield f"{ours}mlp.router.weight", self.hf[f"{theirs}block_sparse_moe.gate.weight"]
        yield from self.core_experts(theirs, f"{ours}mlp.experts.")

    def local_experts(self, theirs):
        count = self.experts // self.ep
        for local in range(count):
            prefix = f"{theirs}block_sparse_moe.experts.{self.e * count + local}."
            w1, w3, w2 = (self.hf[f"{prefix}{w}.weight"] for w in ("w1", "w3", "w2"))
            yield local, self.rows(w1), self.rows(w3), self.columns(w2)

    def core_experts(self, theirs, ours):
        experts = list(self.local_experts(theirs))
        if self.style == "stacked":
            hidden = self.config["hidden_size"]
            first = np.stack([np.concatenate([w1, w3]).T for _, w1, w3, _ in experts])
            second = np.stack([w2.T for *_, w2 in experts])
            yield f"{ours}weight1", first.reshape(hidden, -1)
            yield f"{ours}weight2", second.reshape(-1, hidden)
            return
        grouped = self.style == "te grouped"
        for local, w1, w3, w2 in experts:
            for name, array in (("1", np.concatenate([w1, w3])), ("2", w2)):
                end = f"linear_fc{name}.weight{local}"
                whole = f"local_experts.{local}.linear_fc{name}.weight"
                yield ours + (end if grouped else whole), array

    def legacy_layer(self, theirs, local):
        ours = f"language_model.encoder.layers.{local}."
        yield f"{ours}input_norm.weight", self.hf[f"{theirs}input_layernorm.weight"]
        yield f"{ours}self_attention.query_key_value.weight", self.qkv(theirs)
        dense = self.hf[f"{theirs}self_attn.o_proj.weight"]
        yield f"{ours}self_attention.dense.weight", self.columns(dense)
        norm = self.hf[f"{theirs}post_attention_layernorm.weight"]
        yield f"{ours}post_attention_norm.weight", norm
        if not self.experts:
            gate, up, down = (self.hf[f"{theirs}mlp.{p}_proj.weight"] for p in _GATED)
            both = np.concatenate([self.rows(gate), self.rows(up)])
            yield f"{ours}mlp.dense_h_to_4h.weight", both
            yield f"{ours}mlp.dense_4h_to_h.weight", self.columns(down)
            return
        moe = f"{ours}mlp.block.moe_layer."
        yield f"{moe}gate.weight.weight", self.hf[f"{theirs}block_sparse_moe.gate.weight"]
        for number, w1, w3, w2 in self.local_experts(theirs):
            for name, array in (("w1", w1), ("w3", w3), ("w2", w2)):
                yield f"{moe}experts.experts.{number}.{name}.weight", array


_GATED = ("gate", "up", "down")


# Files


def args(model, **changes):
    """Args as Megatron-LM would save them."""
    config = model.config
    found = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "group_query_attention": True,
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": config["hidden_size"] // config["num_attention_heads"],
        "max_position_embeddings": config["max_position_embeddings"],
        "vocab_size": config["vocab_size"],
        "normalization": "RMSNorm",
        "norm_epsilon": config["rms_norm_eps"],
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
        "position_embedding_type": "rope",
        "rotary_base": int(config["rope_theta"]),
        "num_experts": model.experts or None,
        "moe_router_topk": 2,
        "model_family": config["model_type"],
    }
    return argparse.Namespace(**{**found, **changes})


def write(root, model, *, edit=None, saved_args=None, **how):
    """Write a checkpoint with torch.save, cut by `cut`."""
    legacy = how.get("style") == "legacy"
    for name, chunks in cut(model, **how).items():
        content = {"args": args(model, **(saved_args or {})), "checkpoint_version": 3.0}
        for key, chunk in chunks.items():
            content[key] = {}
            for dotted, words in chunk.items():
                *parents, last = _nested(dotted) if legacy else (dotted,)
                parent = content[key]
                for step in parents:
                    parent = parent.setdefault(step, {})
                parent[last] = torch.from_numpy(words.copy()).view(torch.bfloat16)
        if edit is not None:
            edit(name, content)
        directory = root / "iter_0000005" / name
        directory.mkdir(parents=True)
        torch.save(content, directory / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("5")
    return root


def _nested(dotted):
    words = dotted.split(".")
    depth = 2 if words[1] == "encoder" else len(words) - 1
    return (*words[:depth], ".".join(words[depth:]))


def read(directory):
    """Read all ranks with torch, as `cut` gives them, and check that legacy ones are nested."""
    found = {}
    for path in sorted(directory.glob("mp_rank_*")):
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path / "model_optim_rng.pt", weights_only=True)
        chunks = {key: value for key, value in content.items() if key.startswith("model")}
        found[path.name] = {key: dict(_dotted(chunk)) for key, chunk in chunks.items()}
    return found


def _dotted(chunk, prefix=""):
    for key, value in chunk.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            assert value.dtype == torch.bfloat16
            yield prefix + key, value.view(torch.uint16).numpy()


def assert_same(found, expected):
    """Compare what `read` and `cut` return, name by name and bit by bit."""
    assert found.keys() == expected.keys()
    for rank, chunks in expected.items():
        assert found[rank].keys() == chunks.keys()
        for key, chunk in chunks.items():
            assert found[rank][key].keys() == chunk.keys(), rank
            for name, words in chunk.items():
                np.testing.assert_array_equal(found[rank][key][name], words, err_msg=name)
