"""Latent attention and shared experts in each dialect, against tensors put together by hand."""

import argparse

import pytest
import torch

from ml_convert import ConversionError, Request, convert
from ml_convert.dialects import Dialect, recognize
from ml_models.architecture import Architecture

SIZES = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "ffn_hidden_size": 8,
    "vocab_size": 20,
    "max_position_embeddings": 8,
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": True,
    "multi_latent_attention": True,
    "q_lora_rank": 6,
    "kv_lora_rank": 8,
    "qk_head_dim": 4,
    "qk_pos_emb_head_dim": 2,
    "v_head_dim": 3,
    "qk_layernorm": True,
    "num_experts": 2,
    "moe_ffn_hidden_size": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "norm_topk_prob": True,
}
ATTENTION = "decoder.layers.{}.self_attention."


def latent_model(*, q_lora=True, seed=0):
    """Make the tensors of a model like DeepSeek-V3 on one rank, names as in Megatron-Core."""
    torch.manual_seed(seed)
    shapes = {"embedding.word_embeddings.weight": (20, 16)}
    for n in range(2):
        ours, attention = f"decoder.layers.{n}.", ATTENTION.format(n)
        shapes[f"{ours}input_layernorm.weight"] = (16,)
        if q_lora:
            shapes[f"{attention}linear_q_down_proj.weight"] = (6, 16)
            shapes[f"{attention}q_layernorm.weight"] = (6,)
            shapes[f"{attention}linear_q_up_proj.weight"] = (24, 6)
        else:
            shapes[f"{attention}linear_q_proj.weight"] = (24, 16)
        shapes[f"{attention}linear_kv_down_proj.weight"] = (10, 16)
        shapes[f"{attention}kv_layernorm.weight"] = (8,)
        shapes[f"{attention}linear_kv_up_proj.weight"] = (28, 8)
        shapes[f"{attention}linear_proj.weight"] = (16, 12)
        shapes[f"{ours}pre_mlp_layernorm.weight"] = (16,)
    shapes["decoder.layers.0.mlp.linear_fc1.weight"] = (16, 16)
    shapes["decoder.layers.0.mlp.linear_fc2.weight"] = (16, 8)
    shapes["decoder.layers.1.mlp.router.weight"] = (2, 16)
    for mlp in ("experts.local_experts.0", "experts.local_experts.1", "shared_experts"):
        shapes[f"decoder.layers.1.mlp.{mlp}.linear_fc1.weight"] = (8, 16)
        shapes[f"decoder.layers.1.mlp.{mlp}.linear_fc2.weight"] = (16, 4)
    shapes["decoder.final_layernorm.weight"] = (16,)
    shapes["output_layer.weight"] = (20, 16)
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    return tensors | {"decoder.layers.1.mlp.router.expert_bias": torch.randn(2)}


def save(root, model, **changes):
    directory = root / "iter_0000001" / "mp_rank_00"
    directory.mkdir(parents=True)
    args = argparse.Namespace(**{**SIZES, **changes})
    content = {"args": args, "checkpoint_version": 3.0, "model": model}
    torch.save(content, directory / "model_optim_rng.pt")
    return root


def load(path):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path / "model_optim_rng.pt", weights_only=True)["model"]


def rename(model, **names):
    """Rename modules."""
    found = {}
    for name, tensor in model.items():
        for ours, theirs in names.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        found[name] = tensor
    return found


def mindspeed(model):
    """Put the projections down, or that of queries, on top of each other."""
    found = dict(model)
    for n in range(2):
        attention = ATTENTION.format(n)
        first = "linear_q_down_proj" if f"{attention}linear_q_down_proj.weight" in model else None
        queries = found.pop(f"{attention}{first or 'linear_q_proj'}.weight")
        keys = found.pop(f"{attention}linear_kv_down_proj.weight")
        found[f"{attention}linear_qkv.weight"] = torch.cat([queries, keys])
    return found


def modellink(model):
    names = {"linear_q_up_proj": "linear_qb", "linear_kv_up_proj": "linear_kvb"}
    return rename(mindspeed(model), **names, kv_layernorm="k_layernorm")


def transformer_engine(model):
    """Norms of latent vectors are fused, those before attention and experts are not."""
    found = {}
    for name, tensor in model.items():
        name = name.replace("kv_layernorm.weight", "linear_kv_up_proj.layer_norm_weight")
        name = name.replace(".q_layernorm.weight", ".linear_q_up_proj.layer_norm_weight")
        if name == "decoder.layers.0.pre_mlp_layernorm.weight":
            name = "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"
        found[name] = tensor
    return found


DIALECTS = {
    "mindspeed": (mindspeed, {"mla_names": "mindspeed"}),
    "modellink": (modellink, {"mla_names": "modellink"}),
    "te": (transformer_engine, {"transformer_impl": "transformer_engine"}),
}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("q_lora", [True, False])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_latent_attention_is_written_and_read_in_each_dialect(tmp_path, dialect, q_lora):
    theirs, options = DIALECTS[dialect]
    model = latent_model(q_lora=q_lora)
    changes = {} if q_lora else {"q_lora_rank": None}
    root = save(tmp_path / "in", model, **changes)
    request = Request(
        load_dir=root,
        save_dir=tmp_path / "theirs",
        save_format="mcore",
        make_vocab_size_divisible_by=1,
        **options,
    )
    assert_same(load(convert(request).path / "mp_rank_00"), theirs(model))
    request = Request(
        load_dir=save(tmp_path / "other", theirs(model), **changes),
        save_dir=tmp_path / "ours",
        save_format="mcore",
        make_vocab_size_divisible_by=1,
    )
    assert_same(load(convert(request).path / "mp_rank_00"), model)


@pytest.mark.parametrize("q_lora", [True, False])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_projections_down_are_on_every_rank_and_those_up_are_cut(tmp_path, dialect, q_lora):
    theirs, options = DIALECTS[dialect]
    model = latent_model(q_lora=q_lora)
    changes = {} if q_lora else {"q_lora_rank": None}
    request = Request(
        load_dir=save(tmp_path / "in", model, **changes),
        save_dir=tmp_path / "out",
        save_format="mcore",
        target_tensor_parallel_size=2,
        target_expert_parallel_size=2,
        make_vocab_size_divisible_by=1,
        **options,
    )
    path = convert(request).path
    back = Request(
        load_dir=tmp_path / "out",
        save_dir=tmp_path / "back",
        save_format="mcore",
        make_vocab_size_divisible_by=1,
    )
    assert_same(load(convert(back).path / "mp_rank_00"), model)
    expected = theirs(model)
    for tp_rank in range(2):
        for ep_rank in range(2):
            rank = load(path / f"mp_rank_{tp_rank:02d}_{ep_rank:03d}")
            for name in ("linear_qkv", "linear_q_down_proj", "linear_kv_down_proj"):
                full = f"{ATTENTION.format(1)}{name}.weight"
                assert (full in rank) == (full in expected)
                if full in rank:
                    assert torch.equal(rank[full], expected[full])
            up = ATTENTION.format(1)
            up += "linear_kvb.weight" if dialect == "modellink" else "linear_kv_up_proj.weight"
            assert torch.equal(rank[up], expected[up].chunk(2)[tp_rank])
            shared = "decoder.layers.1.mlp.shared_experts.linear_fc2.weight"
            assert torch.equal(rank[shared], expected[shared].chunk(2, dim=1)[tp_rank])
            local = "decoder.layers.1.mlp.experts.local_experts.0.linear_fc2.weight"
            theirs_ = f"decoder.layers.1.mlp.experts.local_experts.{ep_rank}.linear_fc2.weight"
            assert torch.equal(rank[local], expected[theirs_].chunk(2, dim=1)[tp_rank])


def test_biases_of_the_router_stay_float32_in_another_dtype(tmp_path):
    root = save(tmp_path / "in", latent_model())
    request = Request(
        load_dir=root, save_dir=tmp_path / "out", save_format="mcore", params_dtype="fp16"
    )
    found = load(convert(request).path / "mp_rank_00")
    kept = {name for name, tensor in found.items() if tensor.dtype == torch.float32}
    assert kept == {"decoder.layers.1.mlp.router.expert_bias"}


def test_tensors_of_different_dtypes_are_not_put_into_one(tmp_path):
    model = latent_model()
    name = f"{ATTENTION.format(0)}linear_kv_down_proj.weight"
    model[name] = model[name].float()
    request = Request(
        load_dir=save(tmp_path / "in", model),
        save_dir=tmp_path / "out",
        save_format="mcore",
        mla_names="mindspeed",
    )
    message = r"linear_qkv.weight would hold .*q_down.*, which is bfloat16, and .*, which is float3"
    with pytest.raises(ConversionError, match=message):
        convert(request)
    assert not (tmp_path / "out").exists()


def test_names_of_mindspeed_and_transformer_engine_exclude_each_other(tmp_path):
    request = Request(
        load_dir=save(tmp_path / "in", latent_model()),
        save_dir=tmp_path / "out",
        save_format="mcore",
        mla_names="mindspeed",
        transformer_impl="transformer_engine",
    )
    with pytest.raises(ConversionError, match="--mla-names mindspeed: has no --transformer-impl"):
        convert(request)


def test_a_dialect_shows_in_names():
    arch = Architecture(**{k: v for k, v in SIZES.items() if k != "q_lora_rank"})
    names = list(latent_model(q_lora=False))
    assert recognize(names, arch) == Dialect()
    for dialect, (theirs, _) in DIALECTS.items():
        found = recognize(theirs(latent_model()), arch)
        expected = Dialect(fused_norms=True) if dialect == "te" else Dialect(latent=dialect)
        assert found == expected
    assert recognize(["a.mlp.experts.weight1"], arch).experts == "stacked"
    assert recognize(["a.mlp.experts.linear_fc1.weight0"], arch).experts == "grouped"
    assert recognize(["language_model.encoder.final_norm.weight"], arch) == Dialect(legacy=True)
