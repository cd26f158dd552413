"""Which rank stores what, by the reference's own numbers; every element is somewhere once."""

import pytest

from ml_convert.dialects import Dialect
from ml_convert.errors import ConversionError
from ml_convert.layout import check_complete
from ml_convert.ranks import layout
from ml_models.architecture import Architecture
from ml_models.weights import parameters
from ml_parallel.stages import stage_layers
from ml_parallel.topology import Topology

LLAMA2_7B = Architecture(
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    ffn_hidden_size=11008,
    vocab_size=32000,
    max_position_embeddings=4096,
    normalization="RMSNorm",
    swiglu=True,
    add_bias_linear=False,
    untie_embeddings_and_output_weights=True,
)
EXPERTS = Architecture(
    num_layers=4,
    hidden_size=16,
    num_attention_heads=4,
    ffn_hidden_size=24,
    vocab_size=50,
    max_position_embeddings=64,
    swiglu=True,
    add_bias_linear=False,
    num_experts=8,
    moe_ffn_hidden_size=12,
    first_k_dense_replace=1,
)


def shapes(arch, topology, **options):
    """Give the shape of every tensor by directory and name."""
    found = layout(
        arch,
        stage_layers(arch.num_layers, topology),
        tensor_parallel_size=topology.tensor_model_parallel_size,
        expert_parallel_size=topology.expert_model_parallel_size,
        padded_vocab_size=options.pop("padded", arch.vocab_size),
        **options,
    )
    check_complete(found, parameters(arch))
    by_rank = {}
    for stored in found.tensors:
        directory, file = stored.file.split("/")
        assert file == "model_optim_rng.pt"
        by_rank.setdefault(directory, {})[stored.name] = stored.shape
    return by_rank


def test_llama2_7b_on_eight_tensor_parallel_ranks():
    found = shapes(LLAMA2_7B, Topology(tensor_model_parallel_size=8))
    assert sorted(found) == [f"mp_rank_{rank:02d}" for rank in range(8)]
    for rank in found.values():
        layer = "model.decoder.layers.31."
        assert rank["model.embedding.word_embeddings.weight"] == (4000, 4096)
        assert rank["model.output_layer.weight"] == (4000, 4096)
        assert rank[f"{layer}self_attention.linear_qkv.weight"] == (1536, 4096)
        assert rank[f"{layer}self_attention.linear_proj.weight"] == (4096, 512)
        assert rank[f"{layer}mlp.linear_fc1.weight"] == (2752, 4096)
        assert rank[f"{layer}mlp.linear_fc2.weight"] == (4096, 1376)
        assert rank[f"{layer}input_layernorm.weight"] == (4096,)
        assert rank["model.decoder.final_layernorm.weight"] == (4096,)
        assert len(rank) == 32 * 6 + 3


def test_llama2_7b_of_megatron_legacy_on_interleaved_stages():
    topology = Topology(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=4,
        num_layers_per_virtual_pipeline_stage=2,
    )
    found = shapes(LLAMA2_7B, topology, dialect=Dialect(legacy=True))
    assert len(found) == 8
    first, last = found["mp_rank_01_000"], found["mp_rank_00_003"]
    table = "language_model.embedding.word_embeddings.weight"
    layer = "language_model.encoder.layers.1."
    assert first[f"model0.{table}"] == (16000, 4096)
    assert first[f"model3.{layer}self_attention.query_key_value.weight"] == (6144, 4096)
    assert first[f"model0.{layer}mlp.dense_h_to_4h.weight"] == (11008, 4096)
    assert first[f"model0.{layer}mlp.dense_4h_to_h.weight"] == (4096, 5504)
    assert last["model3.language_model.encoder.final_norm.weight"] == (4096,)
    assert last["model3.language_model.output_layer.weight"] == (16000, 4096)
    # four chunks of two layers, numbered from 0 in each
    for rank in found.values():
        layers = {name.split(".self_attention")[0] for name in rank if "query_key_value" in name}
        assert layers == {
            f"model{chunk}.language_model.encoder.layers.{n}" for chunk in range(4) for n in (0, 1)
        }
    middle = {name for name in found["mp_rank_00_001"] if "encoder.layers" not in name}
    assert not middle


def test_a_layer_list_gives_each_stage_its_layers():
    topology = Topology(pipeline_model_parallel_size=4, num_layer_list=(6, 8, 8, 10))
    found = shapes(LLAMA2_7B, topology)
    counts = [sum("linear_qkv" in name for name in found[f"mp_rank_00_{n:03d}"]) for n in range(4)]
    assert counts == [6, 8, 8, 10]


@pytest.mark.parametrize("experts", ["sequential", "grouped", "stacked"])
def test_expert_parallel_ranks_share_out_experts_and_repeat_the_rest(experts):
    topology = Topology(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        expert_model_parallel_size=4,
    )
    found = shapes(EXPERTS, topology, dialect=Dialect(experts=experts), padded=64)
    assert len(found) == 16
    assert {f"mp_rank_01_001_{rank:03d}" for rank in range(4)} <= found.keys()
    rank = found["mp_rank_01_000_003"]
    assert rank["model.decoder.layers.0.mlp.linear_fc1.weight"] == (24, 16)
    assert rank["model.decoder.layers.1.mlp.router.weight"] == (8, 16)
    mlp = "model.decoder.layers.1.mlp.experts."
    expected = {
        "sequential": {
            f"{mlp}local_experts.{e}.linear_fc{n}.weight": shape
            for e in range(2)
            for n, shape in ((1, (12, 16)), (2, (16, 6)))
        },
        "grouped": {
            f"{mlp}linear_fc{n}.weight{e}": shape
            for e in range(2)
            for n, shape in ((1, (12, 16)), (2, (16, 6)))
        },
        "stacked": {f"{mlp}weight1": (16, 24), f"{mlp}weight2": (12, 16)},
    }[experts]
    assert {name: shape for name, shape in rank.items() if name.startswith(mlp)} == expected


def test_tensors_that_every_rank_has_are_copies_of_the_first():
    stages = stage_layers(4, Topology())
    found = layout(
        EXPERTS, stages, tensor_parallel_size=2, padded_vocab_size=50, expert_parallel_size=2
    )
    originals = {}
    for index, stored in enumerate(found.tensors):
        if stored.copy_of is None:
            originals.setdefault(stored.parameter, []).append(index)
        else:
            assert found.tensors[stored.copy_of].name == stored.name
    assert len(originals["decoder.layers.1.mlp.router.weight"]) == 1
    assert len(originals["decoder.layers.1.self_attention.linear_qkv.weight"]) == 2  # by tp rank
    assert len(originals["decoder.layers.1.mlp.experts.local_experts.5.linear_fc1.weight"]) == 2


def test_experts_that_cannot_be_dealt_out_are_refused():
    with pytest.raises(ConversionError, match="--expert-model-parallel-size 3: must divide"):
        shapes(EXPERTS, Topology(expert_model_parallel_size=3))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"qk_layernorm": True}, "self_attention.q_layernorm.weight"),
        ({"post_norm": True}, "post_attn_norm.weight"),
        ({"softmax_type": "learnable"}, "self_attention.core_attention.softmax_offset"),
        (
            {"multi_latent_attention": True, "kv_lora_rank": 8, "qk_head_dim": 4}
            | {"qk_pos_emb_head_dim": 2, "v_head_dim": 4},
            "self_attention.linear_q_proj.weight",
        ),
        (
            {"num_experts": 4, "moe_ffn_hidden_size": 8, "n_shared_experts": 1},
            "mlp.shared_experts.linear_fc1.weight",
        ),
    ],
)
def test_what_legacy_has_no_name_for_is_refused(changes, name):
    sizes = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "vocab_size": 50}
    sizes["ffn_hidden_size"] = 24
    arch = Architecture(
        **{**sizes, "max_position_embeddings": 8, "swiglu": True, "add_bias_linear": False},
        **changes,
    )
    with pytest.raises(ConversionError, match=f"Megatron-Legacy .* no name for .*{name}; use --sa"):
        shapes(arch, Topology(), dialect=Dialect(legacy=True))


def test_stacked_experts_have_no_biases():
    arch = Architecture(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=4,
        vocab_size=50,
        max_position_embeddings=8,
        num_experts=4,
    )
    with pytest.raises(ConversionError, match=r"--moe-grouped-gemm: .* no place for biases"):
        shapes(arch, Topology(), dialect=Dialect(experts="stacked"))
    grouped = shapes(arch, Topology(), dialect=Dialect(experts="grouped"))["mp_rank_00"]
    assert grouped["model.decoder.layers.0.mlp.experts.linear_fc1.bias3"] == (64,)


def test_bloom_and_its_kind_have_legacy_names():
    arch = Architecture(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=4,
        vocab_size=50,
        max_position_embeddings=8,
        position_embedding_type="learned_absolute",
        embed_layernorm=True,
        approximate_gelu=True,
    )
    (rank,) = shapes(arch, Topology(), dialect=Dialect(legacy=True)).values()
    embedding = "model.language_model.embedding."
    assert rank[f"{embedding}word_embeddings.norm.bias"] == (16,)
    assert rank[f"{embedding}position_embeddings.weight"] == (8, 16)
    layer = "model.language_model.encoder.layers.1."
    assert rank[f"{layer}post_attention_norm.bias"] == (16,)
    assert rank[f"{layer}self_attention.dense.bias"] == (16,)
