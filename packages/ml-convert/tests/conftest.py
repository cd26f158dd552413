"""Tiny models on disk, written and cut by code that shares nothing with what is tested.

Weights are random bit patterns, infinities and NaNs included: a conversion that keeps every bit
keeps these, too. The oracle follows the published layout rules with whole arrays.
"""

import argparse
import json
import struct

import numpy as np
import pytest
import torch

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 99,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 7,
}
ITEMSIZE = {"BF16": 2, "F16": 2, "F32": 4}


def write_safetensors(path, tensors, dtype="BF16"):
    """Write arrays of unsigned words."""
    header, data = {}, b""
    for name, words in tensors.items():
        begin, data = len(data), data + words.tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(words.shape),
            "data_offsets": [begin, len(data)],
        }
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_safetensors(path):
    """Read arrays of unsigned words, and check dtype and size on the way."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert (8 + length) % 8 == 0
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        words = np.frombuffer(content[8 + length :][begin:end], f"u{ITEMSIZE[entry['dtype']]}")
        found[name] = words.reshape(entry["shape"])
    return found


def read_model(directory):
    """Read all tensors of a Hugging Face directory, through its index if it has one."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return read_safetensors(directory / "model.safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    found = {}
    for file in sorted(set(weight_map.values())):
        tensors = read_safetensors(directory / file)
        assert all(weight_map[name] == file for name in tensors)
        found |= tensors
    assert found.keys() == weight_map.keys()
    return found


def llama_tensors(config, word="u2", seed=0):
    """Make random bit patterns under the names transformers gives them."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    queries, keys = heads * head, config["num_key_value_heads"] * head
    vocab = config["vocab_size"]
    shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for n in range(config["num_hidden_layers"]):
        linear = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
        for module, shape in linear.items():
            shapes[f"model.layers.{n}.{module}.weight"] = shape
            if config.get("attention_bias"):
                shapes[f"model.layers.{n}.{module}.bias"] = shape[:1]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{n}.{norm}.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    numbers = np.random.default_rng(seed)
    top = 1 << (8 * int(word[1:]))
    return {n: numbers.integers(0, top, shape, np.dtype(word)) for n, shape in shapes.items()}


class Hf:
    """A Hugging Face model on disk."""

    def __init__(self, path, config, tensors):
        self.path, self.config, self.tensors = path, config, tensors


@pytest.fixture
def make_hf(tmp_path):
    """Write a model: files > 1 are shards with an index."""

    def make(name="hf", *, files=1, dtype="BF16", extra=None, **changes):
        config = {**CONFIG, **changes}
        tensors = llama_tensors(config, word=f"u{ITEMSIZE[dtype]}") | (extra or {})
        path = tmp_path / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        if files == 1:
            write_safetensors(path / "model.safetensors", tensors, dtype)
            return Hf(path, config, tensors)
        weight_map = {}
        for number in range(files):
            file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
            part = {n: tensors[n] for n in list(tensors)[number::files]}
            write_safetensors(path / file, part, dtype)
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        return Hf(path, config, tensors)

    return make


def cut_llama(hf, *, tp, stages, padded):
    """Cut a model the slow way.

    Returns:
        {(tp_rank, pp_rank): [tensors of each chunk by name]}
    """
    config, found = hf.config, {}
    for tp_rank in range(tp):
        for pp_rank, chunks in enumerate(stages):
            found[tp_rank, pp_rank] = [
                _chunk(
                    hf.tensors,
                    config,
                    layers,
                    tp=tp,
                    tp_rank=tp_rank,
                    padded=padded,
                    first=pp_rank == 0 and number == 0,
                    last=pp_rank == len(stages) - 1 and number == len(chunks) - 1,
                )
                for number, layers in enumerate(chunks)
            ]
    return found


def _chunk(hf, config, layers, *, tp, tp_rank, padded, first, last):
    def vocabulary(array):
        return np.split(np.pad(array, [(0, padded - len(array)), (0, 0)]), tp)[tp_rank]

    found = {}
    if first:
        table = hf["model.embed_tokens.weight"]
        found["embedding.word_embeddings.weight"] = vocabulary(table)
    for local, n in enumerate(layers):
        found |= _layer(hf, config, f"model.layers.{n}", f"decoder.layers.{local}", tp, tp_rank)
    if last:
        found["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
        tied = config["tie_word_embeddings"]
        if not tied:
            found["output_layer.weight"] = vocabulary(hf["lm_head.weight"])
        elif not first:
            found["output_layer.weight"] = vocabulary(hf["model.embed_tokens.weight"])
    return found


def _layer(hf, config, theirs, ours, tp, tp_rank):
    def rows(array):
        return np.split(array, tp, axis=0)[tp_rank]

    def columns(array):
        return np.split(array, tp, axis=1)[tp_rank] if array.ndim == 2 else array

    found = {
        f"{ours}.input_layernorm.weight": hf[f"{theirs}.input_layernorm.weight"],
        f"{ours}.pre_mlp_layernorm.weight": hf[f"{theirs}.post_attention_layernorm.weight"],
    }
    for kind in ("weight", "bias") if config.get("attention_bias") else ("weight",):
        q, k, v = (hf[f"{theirs}.self_attn.{p}_proj.{kind}"] for p in "qkv")
        groups = config["num_key_value_heads"]
        parts = [part.reshape(groups, -1, *part.shape[1:]) for part in (q, k, v)]
        qkv = np.concatenate(parts, axis=1).reshape(-1, *q.shape[1:])
        gate, up = (hf[f"{theirs}.mlp.{p}_proj.{kind}"] for p in ("gate", "up"))
        found |= {
            f"{ours}.self_attention.linear_qkv.{kind}": rows(qkv),
            f"{ours}.self_attention.linear_proj.{kind}": columns(
                hf[f"{theirs}.self_attn.o_proj.{kind}"]
            ),
            f"{ours}.mlp.linear_fc1.{kind}": np.concatenate([rows(gate), rows(up)]),
            f"{ours}.mlp.linear_fc2.{kind}": columns(hf[f"{theirs}.mlp.down_proj.{kind}"]),
        }
    return found


def rank_name(tp_rank, pp_rank, pp_size):
    """Name the directory of a rank."""
    return f"mp_rank_{tp_rank:02d}" + (f"_{pp_rank:03d}" if pp_size > 1 else "")


def load_rank(path, dtype=torch.bfloat16):
    """Load a rank's file with torch; returns args and the chunks as arrays of words."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, weights_only=True)
    keys = [key for key in content if key.startswith("model")]
    assert keys in (["model"], [f"model{n}" for n in range(len(keys))])
    word = {torch.bfloat16: torch.uint16, torch.float16: torch.uint16}.get(dtype, torch.uint32)
    chunks = []
    for key in keys:
        assert {tensor.dtype for tensor in content[key].values()} == {dtype}
        chunks.append({name: t.view(word).numpy() for name, t in content[key].items()})
    assert content["checkpoint_version"] == 3.0
    return content["args"], chunks


def megatron_args(config, **changes):
    """Args as Megatron-LM would save them."""
    args = {
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
        "add_bias_linear": bool(config.get("attention_bias")),
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
        "position_embedding_type": "rope",
        "use_rotary_position_embeddings": False,
        "rotary_base": 10000,
        "rotary_percent": 1.0,
        "num_experts": None,
        "model_family": "llama",
        "init_method_std": 0.02,
    }
    return argparse.Namespace(**{**args, **changes})


@pytest.fixture
def make_megatron(tmp_path):
    """Write a Megatron checkpoint with torch.save, cut by the oracle."""

    def make(hf, name="mg", *, tp=1, stages=None, padded=128, edit=None, **args):
        stages = stages or [[range(hf.config["num_hidden_layers"])]]
        root = tmp_path / name
        ranks = cut_llama(hf, tp=tp, stages=stages, padded=padded)
        for (tp_rank, pp_rank), chunks in ranks.items():
            directory = root / "iter_0000005" / rank_name(tp_rank, pp_rank, len(stages))
            directory.mkdir(parents=True)
            content = {
                "args": megatron_args(hf.config, **args),
                "checkpoint_version": 3.0,
                "iteration": 5,
            }
            for number, chunk in enumerate(chunks):
                key = "model" if len(chunks) == 1 else f"model{number}"
                content[key] = {
                    name: torch.from_numpy(words.copy()).view(torch.bfloat16)
                    for name, words in chunk.items()
                }
            if edit is not None:
                edit((tp_rank, pp_rank), content)
            torch.save(content, directory / "model_optim_rng.pt")
        (root / "latest_checkpointed_iteration.txt").write_text("5")
        return root

    return make


@pytest.fixture
def oracle():
    """The functions of this file."""
    import types

    names = ("cut_llama", "load_rank", "megatron_args", "rank_name", "read_model")
    names += ("read_safetensors", "write_safetensors", "llama_tensors")
    return types.SimpleNamespace(**{name: globals()[name] for name in names})
