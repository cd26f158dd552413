"""What the files of some families have, besides names of their own, comes through a conversion."""

import json

import numpy as np
import pytest

from ml_convert import ConversionError, Request, convert
from ml_convert.huggingface import open_model
from ml_models import registry

GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8, "vocab_size": 11}
BLOOM = {"n_embed": 16, "n_layer": 2, "num_attention_heads": 2, "vocab_size": 11}
DEEPSEEK = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 11,
    "max_position_embeddings": 8,
    "q_lora_rank": 6,
    "kv_lora_rank": 4,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
GPT_OSS = {
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 11,
    "rope_theta": 10000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def words_of(config):
    """Make random bit patterns for all tensors of a model."""
    family = registry.family_for(config)
    numbers = np.random.default_rng(0)
    return {
        name: numbers.integers(0, 1 << 16, tensor.shape, np.uint16)
        for name, tensor in family.tensors(family.from_hf(config)).items()
    }


class Folder:
    """Where a model is written, converted to Megatron, and converted back."""

    def __init__(self, path, oracle):
        self.path, self.oracle = path, oracle

    def write(self, config, tensors, float32=()):
        """Write a model of two files: one of bfloat16, one of float32."""
        path = self.path / "hf"
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        wide = {name: tensors[name] for name in float32}
        narrow = {name: tensor for name, tensor in tensors.items() if name not in wide}
        self.oracle.write_safetensors(path / "a.safetensors", narrow)
        self.oracle.write_safetensors(path / "b.safetensors", wide, "F32")
        weight_map = dict.fromkeys(narrow, "a.safetensors") | dict.fromkeys(wide, "b.safetensors")
        index = path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))

    def open(self):
        return open_model(self.path / "hf", model_type=None)

    def there_and_back(self, **sizes):
        """Convert to Megatron and back to Hugging Face; return the tensors."""
        hf, megatron, back = (self.path / name for name in ("hf", "megatron", "back"))
        sizes |= {"make_vocab_size_divisible_by": 1, "save_format": "mcore"}
        convert(Request(load_dir=hf, save_dir=megatron, **sizes))
        convert(Request(load_dir=megatron, save_dir=back, save_format="hf"))
        return self.oracle.read_model(back)


@pytest.fixture
def folder(tmp_path, oracle):
    return Folder(tmp_path, oracle)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, words in expected.items():
        assert found[name].tobytes() == words.tobytes(), name


@pytest.mark.parametrize(("model_type", "sizes"), [("gpt2", GPT2), ("bloom", BLOOM)])
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_published_files_may_leave_out_the_first_part_of_all_names(
    folder, model_type, sizes, prefix
):
    config = {"model_type": model_type, **sizes}
    tensors = words_of(config)
    stored = {f"{prefix}{n.removeprefix('transformer.')}": words for n, words in tensors.items()}
    folder.write(config, stored)
    assert_same(folder.there_and_back(target_tensor_parallel_size=2), tensors)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_causal_masks_of_gpt2_are_no_weights(folder, prefix):
    config = {"model_type": "gpt2", **GPT2}
    tensors = words_of(config)
    stored = {f"{prefix}{n.removeprefix('transformer.')}": words for n, words in tensors.items()}
    mask = {f"{prefix}h.{n}.attn.bias": np.zeros((1, 1, 8, 8), np.uint16) for n in range(2)}
    folder.write(config, stored | mask)
    assert_same(folder.there_and_back(), tensors)


def test_a_name_with_and_without_its_first_part_is_an_error(folder):
    config = {"model_type": "gpt2", **GPT2}
    tensors = words_of(config)
    again = {"wte.weight": tensors["transformer.wte.weight"]}
    folder.write(config, tensors | again)
    with pytest.raises(ConversionError, match=r"wte.weight \(a.safetensors\) is not part of"):
        folder.open()


def test_gpt2_is_transposed_and_its_query_key_and_value_are_grouped(folder):
    config = {"model_type": "gpt2", **GPT2}
    tensors = words_of(config)
    folder.write(config, tensors)
    checkpoint = folder.open().checkpoint
    places = checkpoint.layout.primary("decoder.layers.1.self_attention.linear_qkv.weight")
    # Of 2 heads of 8 channels: query, key, value of the first, then of the second.
    first = [(r.parameter_row, r.place.start[2], r.place.column_axis) for r in places]
    assert first == [(0, 0, 1), (8, 16, 1), (16, 32, 1), (24, 8, 1), (32, 24, 1), (40, 40, 1)]


def test_biases_of_the_choice_of_experts_stay_float32(folder):
    config = {"model_type": "deepseek_v3", **DEEPSEEK}
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors = words_of(config) | {name: np.arange(4, dtype=np.uint32) + (1 << 30) + 1}
    folder.write(config, tensors, float32=(name,))
    assert_same(folder.there_and_back(target_expert_parallel_size=2), tensors)


def test_the_layer_of_deepseek_v3_that_predicts_a_second_token_is_left_out(folder):
    config = {"model_type": "deepseek_v3", **DEEPSEEK}
    tensors = words_of(config)
    extra = {f"model.layers.61.{name}": np.zeros((2, 2), np.uint16) for name in ("eh_proj", "x")}
    folder.write(config, tensors | extra)
    assert_same(folder.there_and_back(target_pipeline_parallel_size=2), tensors)


def test_stacked_experts_are_dealt_out_and_put_together_again(folder):
    config = {"model_type": "gpt_oss", **GPT_OSS}
    tensors = words_of(config)
    folder.write(config, tensors)
    sizes = {"target_tensor_parallel_size": 2, "target_expert_parallel_size": 2}
    assert_same(folder.there_and_back(**sizes), tensors)


@pytest.mark.parametrize(
    ("model_type", "sizes", "method", "advice"),
    [
        ("deepseek_v3", DEEPSEEK, "fp8", "fp8_cast_bf16.py"),
        ("gpt_oss", GPT_OSS, "mxfp4", r"Mxfp4Config\(dequantize=True\)"),
        ("bloom", BLOOM, "gptq", "dequantize and save them"),
    ],
)
def test_quantized_weights_are_refused_with_advice(folder, model_type, sizes, method, advice):
    config = {"model_type": model_type, **sizes, "quantization_config": {"quant_method": method}}
    folder.write(config, {})
    with pytest.raises(ConversionError, match=rf"weights are quantized \({method}, .*{advice}"):
        folder.open()
