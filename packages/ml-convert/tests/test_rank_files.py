"""The files of ranks are found and numbered, whatever their names leave out."""

import argparse
import shutil

import megatron_files as files
import pytest
import torch

from ml_convert import ConversionError, Request, convert
from ml_convert.rank_files import Coordinates, read_ranks

EXPERTS = files.Model(files.EXPERTS)
DENSE = files.Model(files.DENSE)
STAGES = [[range(2)], [range(2, 4)]]


def to_hf(root, tmp_path, **options):
    return convert(Request(load_dir=root, save_dir=tmp_path / "out", save_format="hf", **options))


@pytest.mark.parametrize("style", ["mcore", "legacy"])
@pytest.mark.parametrize("said", [True, False])
def test_the_second_number_is_a_stage_or_an_expert_rank(tmp_path, style, said):
    def sizes(stages, experts):
        names = ("pipeline_model_parallel_size", "expert_model_parallel_size")
        return dict(zip(names, (stages, experts), strict=True)) if said else {}

    root = files.write(tmp_path / "e", EXPERTS, tp=2, ep=2, style=style, saved_args=sizes(1, 2))
    found = read_ranks(root / "iter_0000005")
    assert found.sizes == (2, 1, 2)
    assert found.ranks[Coordinates(1, 0, 1)].path.parent.name == "mp_rank_01_001"
    assert found.file(Coordinates(1, 0, 1)) == "mp_rank_01_001/model_optim_rng.pt"
    root = files.write(tmp_path / "p", EXPERTS, stages=STAGES, style=style, saved_args=sizes(2, 1))
    assert read_ranks(root / "iter_0000005").sizes == (1, 2, 1)
    root = files.write(tmp_path / "both", EXPERTS, stages=STAGES, ep=4, style=style)
    found = read_ranks(root / "iter_0000005")
    assert found.sizes == (1, 2, 4)
    assert found.file(Coordinates(0, 1, 3)) == "mp_rank_00_001_003/model_optim_rng.pt"


@pytest.mark.parametrize("style", ["mcore", "legacy"])
def test_a_rank_that_is_missing_is_named(tmp_path, style):
    root = files.write(tmp_path / "mg", EXPERTS, tp=2, ep=2, stages=STAGES, style=style)
    shutil.rmtree(root / "iter_0000005" / "mp_rank_01_000_001")
    with pytest.raises(ConversionError, match=r"mp_rank_01_000_001: missing, though there are mp_"):
        to_hf(root, tmp_path)


def test_the_last_ranks_are_missed_where_args_say_that_there_were_some(tmp_path):
    said = {"tensor_model_parallel_size": 4}
    root = files.write(tmp_path / "mg", DENSE, tp=2, padded=52, saved_args=said)
    with pytest.raises(ConversionError, match=r"ranks are missing, args say tensor_.*size=4, but"):
        to_hf(root, tmp_path)


def test_ranks_of_different_sizes_are_named(tmp_path):
    def cut(name, content):
        if name == "mp_rank_01":
            table = content["model"]["embedding.word_embeddings.weight"]
            content["model"]["embedding.word_embeddings.weight"] = table[:20].clone()

    root = files.write(tmp_path / "mg", DENSE, tp=2, padded=52, edit=cut)
    with pytest.raises(ConversionError, match=r"mp_rank_01/.* has 20 rows, but 26 on the first"):
        to_hf(root, tmp_path)


def test_tensors_of_another_shape_on_a_later_rank_are_named(tmp_path):
    def cut(name, content):
        if name == "mp_rank_01":
            norm = content["model"]["decoder.final_layernorm.weight"]
            content["model"]["decoder.final_layernorm.weight"] = norm[:8].clone()

    root = files.write(tmp_path / "mg", DENSE, tp=2, padded=52, edit=cut)
    with pytest.raises(ConversionError, match=r"mp_rank_01/.*final_layernorm.weight has shape \[8"):
        to_hf(root, tmp_path)


@pytest.mark.parametrize("style", ["mcore", "legacy"])
def test_expert_ranks_must_agree_on_what_is_no_expert(tmp_path, style):
    def drift(name, content):
        if name == "mp_rank_00_001":
            chunk = content["model"]
            chunk = chunk["language_model"]["encoder"] if style == "legacy" else chunk
            chunk[next(key for key in chunk if "final_" in key)][3] = 7

    root = files.write(tmp_path / "mg", EXPERTS, ep=2, style=style, edit=drift)
    with pytest.raises(ConversionError, match=r"mp_rank_00_001/.* should repeat .*mp_rank_00_000/"):
        to_hf(root, tmp_path)


@pytest.mark.parametrize("style", ["mcore", "legacy"])
def test_a_tied_copy_must_repeat_the_embedding(tmp_path, style):
    def drift(name, content):
        if name == "mp_rank_00_001":
            chunk = content["model"]
            if style == "legacy":
                chunk["word_embeddings_for_head"]["weight"][3, 3] = 7
            else:
                chunk["output_layer.weight"][3, 3] = 7

    model = files.Model({**files.DENSE, "tie_word_embeddings": True})
    root = files.write(tmp_path / "mg", model, stages=STAGES, style=style, edit=drift)
    with pytest.raises(ConversionError, match=r"should repeat .*word_embeddings.weight of .*_000/"):
        to_hf(root, tmp_path)


@pytest.mark.parametrize("style", ["mcore", "legacy"])
def test_parts_in_different_dtypes_are_refused(tmp_path, style):
    def widen(name, content):
        if name == "mp_rank_01":
            chunk = content["model"]
            chunk = chunk["language_model"]["encoder"] if style == "legacy" else chunk
            name = next(key for key in chunk if "dense.weight" in key or "proj.weight" in key)
            chunk[name] = chunk[name].float()

    root = files.write(tmp_path / "mg", DENSE, tp=2, padded=52, style=style, edit=widen)
    with pytest.raises(ConversionError, match=r"is float32, but another part of .* is bfloat16"):
        to_hf(root, tmp_path)


@pytest.mark.parametrize("style", ["mcore", "legacy"])
def test_a_vocabulary_that_contradicts_the_tensor_is_refused(tmp_path, style):
    root = files.write(tmp_path / "mg", DENSE, style=style, saved_args={"vocab_size": 51})
    with pytest.raises(ConversionError, match="how many of the 50 rows of the vocabulary are padd"):
        to_hf(root, tmp_path)


def test_older_legacy_names_are_read(tmp_path, oracle):
    older = {
        "input_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "final_norm": "final_layernorm",
        "self_attention": "attention",
    }

    def rename(_name, content):
        model = content["model"]["language_model"]
        encoder = {}
        for name, tensor in model.pop("encoder").items():
            for newer, old in older.items():
                name = name.replace(newer, old)
            encoder[name] = tensor
        model["transformer"] = encoder
        content["checkpoint_version"] = 2.0

    root = files.write(tmp_path / "mg", DENSE, style="legacy", edit=rename)
    to_hf(root, tmp_path)
    found = oracle.read_model(tmp_path / "out")
    assert all((found[name] == words).all() for name, words in DENSE.tensors.items())


def test_a_name_that_is_there_twice_is_refused(tmp_path):
    def repeat(_name, content):
        encoder = content["model"]["language_model"]["encoder"]
        encoder["final_layernorm.weight"] = encoder["final_norm.weight"]

    root = files.write(tmp_path / "mg", DENSE, style="legacy", edit=repeat)
    with pytest.raises(ConversionError, match=r"encoder.final_norm.weight is there twice"):
        to_hf(root, tmp_path)


@pytest.mark.parametrize("style", ["mcore", "legacy"])
def test_a_format_that_was_asked_for_has_to_be_there(tmp_path, style):
    root = files.write(tmp_path / "mg", DENSE, style=style)
    to_hf(root, tmp_path, load_format=style)
    other = {"mcore": "legacy", "legacy": "mcore"}[style]
    with pytest.raises(ConversionError, match=f"is of the format {style}, not {other}"):
        convert(
            Request(
                load_dir=root,
                save_dir=tmp_path / "other",
                save_format="hf",
                load_format=other,
            )
        )


@pytest.mark.parametrize("style", ["mcore", "legacy"])
def test_adapters_are_set_aside_under_the_names_of_the_core(tmp_path, style):
    module = {
        "mcore": "decoder.layers.0.self_attention.linear_proj",
        "legacy": "layers.0.self_attention.dense",
    }[style]

    def wrap(_name, content):
        chunk = content["model"]
        chunk = chunk["language_model"]["encoder"] if style == "legacy" else chunk
        chunk[f"{module}.base_layer.weight"] = chunk.pop(f"{module}.weight")
        chunk[f"{module}.lora_A.default.weight"] = torch.ones(2, 16).bfloat16()
        chunk[f"{module}.lora_B.default.weight"] = torch.ones(16, 2).bfloat16()

    root = files.write(tmp_path / "mg", DENSE, style=style, edit=wrap)
    found = read_ranks(root / "iter_0000005").ranks[Coordinates(0, 0, 0)]
    name = "decoder.layers.0.self_attention.linear_proj.lora_"
    shapes = {f"{name}A.default.weight": (2, 16), f"{name}B.default.weight": (16, 2)}
    assert {name: extent.shape for name, extent in found.adapters[0].items()} == shapes
    assert not any("lora" in name or "base_layer" in name for name in found.chunks[0])


def test_ranks_without_a_model_of_their_own_are_read(tmp_path):
    directory = tmp_path / "mp_rank_00"
    directory.mkdir()
    content = {"model": {}, "checkpoint_version": 3.0, "args": argparse.Namespace(a=1)}
    torch.save(content, directory / "model_optim_rng.pt")
    found = read_ranks(tmp_path)
    assert found.sizes == (1, 1, 1)
    assert found.args.a == 1
    directory.rename(tmp_path / "mp_rank_01")
    with pytest.raises(ConversionError, match="mp_rank_00: missing"):
        read_ranks(tmp_path)
    (tmp_path / "mp_rank_01").rename(tmp_path / "aside")
    with pytest.raises(ConversionError, match=r"holds no ranks \(mp_rank_\*\)"):
        read_ranks(tmp_path)
