"""All nine directions, with each model cut in every way, against tensors cut by hand."""

import megatron_files as files
import numpy as np
import pytest

from ml_convert import Request, convert

MODELS = {
    "dense": files.DENSE,
    "tied": {**files.DENSE, "tie_word_embeddings": True},
    "experts": files.EXPERTS,
}
INTERLEAVED = [[range(1), range(2, 3)], [range(1, 2), range(3, 4)]]
LISTED = [[range(3)], [range(3, 4)]]
# What is read: a legacy checkpoint of two interleaved stages, a core one of every kind of rank.
SOURCES = {
    "legacy": {"style": "legacy", "stages": INTERLEAVED, "padded": 64},
    "mcore": {"tp": 2, "stages": LISTED, "padded": 56},
}
# What is written: flags, and how the same is cut by hand.
TARGETS = {
    "legacy": (
        {
            "target_tensor_parallel_size": 2,
            "target_pipeline_parallel_size": 2,
            "num_layer_list": (3, 1),
            "pad_vocab": "last-row",
            "padded_vocab_size": 60,
        },
        {"style": "legacy", "tp": 2, "stages": LISTED, "padded": 60, "fill": "last-row"},
    ),
    "mcore": (
        {
            "target_tensor_parallel_size": 2,
            "target_pipeline_parallel_size": 2,
            "num_layers_per_virtual_pipeline_stage": 1,
            "make_vocab_size_divisible_by": 16,
        },
        {"tp": 2, "stages": INTERLEAVED, "padded": 64},
    ),
}


def expert_ranks(model, kind, count):
    return {"ep": count} if model.experts and kind == "mcore" else {}


@pytest.mark.parametrize("target", ["hf", "legacy", "mcore"])
@pytest.mark.parametrize("source", ["hf", "legacy", "mcore"])
@pytest.mark.parametrize("name", MODELS)
def test_every_direction_keeps_every_bit(tmp_path, oracle, name, source, target):
    model = files.Model(MODELS[name])
    if source == "hf":
        load_dir = model.write(tmp_path / "in", oracle.write_safetensors)
    else:
        how = {**SOURCES[source], **expert_ranks(model, source, 4)}
        load_dir = files.write(tmp_path / "in", model, **how)
    options, how = TARGETS.get(target, ({}, {}))
    experts = expert_ranks(model, target, 2)
    if experts:
        options = {**options, "target_expert_parallel_size": 2}
    report = convert(
        Request(load_dir=load_dir, save_dir=tmp_path / "out", save_format=target, **options)
    )
    if target == "hf":
        found = oracle.read_model(report.path)
        assert found.keys() == model.tensors.keys()
        for tensor, words in model.tensors.items():
            np.testing.assert_array_equal(found[tensor], words, err_msg=tensor)
    else:
        files.assert_same(files.read(report.path), files.cut(model, **{**how, **experts}))


@pytest.mark.parametrize("style", ["te", "stacked", "te grouped"])
@pytest.mark.parametrize("name", MODELS)
def test_dialects_of_the_core_are_read_and_written(tmp_path, name, style):
    model = files.Model(MODELS[name])
    ranks = {"ep": 2} if model.experts else {}
    root = files.write(tmp_path / "in", model, tp=2, padded=56, style=style, **ranks)
    local = convert(
        Request(
            load_dir=root,
            save_dir=tmp_path / "local",
            save_format="mcore",
            padded_vocab_size=50,
        )
    )
    files.assert_same(files.read(local.path), files.cut(model))
    options = {"target_expert_parallel_size": 2} if model.experts else {}
    report = convert(
        Request(
            load_dir=tmp_path / "local",
            save_dir=tmp_path / "out",
            save_format="mcore",
            target_tensor_parallel_size=2,
            padded_vocab_size=56,
            transformer_impl="transformer_engine" if style.startswith("te") else "local",
            moe_grouped_gemm=style in ("stacked", "te grouped"),
            **options,
        )
    )
    expected = files.cut(model, tp=2, padded=56, style=style, **ranks)
    files.assert_same(files.read(report.path), expected)
