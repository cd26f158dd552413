"""Megatron checkpoints of every cut are found out from their files."""

import argparse
import json
import shutil

import numpy as np
import pytest
import torch

from ml_convert import ConversionError, Request, convert
from ml_convert.layout import check_complete
from ml_convert.megatron import open_checkpoint
from ml_convert.ranks import layout
from ml_models.weights import parameters

CUTS = {
    "whole": (1, [[range(4)]]),
    "tensor": (2, [[range(4)]]),
    "more ranks than groups": (8, [[range(4)]]),
    "pipeline": (1, [[range(2)], [range(2, 4)]]),
    "both": (4, [[range(2)], [range(2, 4)]]),
    "list": (2, [[range(1)], [range(1, 4)]]),
    "interleaved": (2, [[range(1), range(2, 3)], [range(1, 2), range(3, 4)]]),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("cut", CUTS)
def test_any_cut_is_read_to_the_same_hugging_face_model(
    tmp_path, make_hf, make_megatron, oracle, cut, tied
):
    tp, stages = CUTS[cut]
    hf = make_hf(tie_word_embeddings=tied)
    root = make_megatron(hf, tp=tp, stages=stages, padded=1024)
    report = convert(Request(load_dir=root, save_dir=tmp_path / "out", save_format="hf"))
    assert report.source == root / "iter_0000005"
    found = oracle.read_model(tmp_path / "out")
    assert found.keys() == hf.tensors.keys()
    for name, words in hf.tensors.items():
        np.testing.assert_array_equal(found[name], words, err_msg=name)


@pytest.mark.parametrize("cut", CUTS)
def test_layouts_are_complete_and_agree_with_the_oracle_on_names_and_shapes(
    make_hf, make_megatron, oracle, cut
):
    tp, stages = CUTS[cut]
    hf = make_hf(tie_word_embeddings=True)
    source = open_checkpoint(
        make_megatron(hf, padded=99) / "iter_0000005", default=None, true_vocab_size=None
    )
    stages = tuple(map(tuple, stages))
    found = layout(source.arch, stages, tensor_parallel_size=tp, padded_vocab_size=1024)
    check_complete(found, parameters(source.arch))
    expected = {}
    for (tp_rank, pp_rank), chunks in oracle.cut_llama(
        hf, tp=tp, stages=stages, padded=1024
    ).items():
        file = f"{oracle.rank_name(tp_rank, pp_rank, len(stages))}/model_optim_rng.pt"
        for number, chunk in enumerate(chunks):
            key = "model" if len(chunks) == 1 else f"model{number}"
            expected |= {(file, f"{key}.{name}"): words.shape for name, words in chunk.items()}
    assert {(s.file, s.name): s.shape for s in found.tensors} == expected


def to_hf(root, tmp_path, **options):
    return convert(Request(load_dir=root, save_dir=tmp_path / "out", save_format="hf", **options))


def test_names_of_transformer_engine_and_its_extra_states_are_understood(
    tmp_path, make_hf, make_megatron, oracle
):
    def rename(_rank, content):
        model = {}
        for name, tensor in content["model"].items():
            name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
            name = name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
            model[name] = tensor
        model["decoder.layers.0.self_attention.linear_qkv._extra_state"] = None
        model["decoder.layers.0.mlp.linear_fc1._extra_state"] = torch.zeros(3, dtype=torch.uint8)
        content["model"] = model

    hf = make_hf()
    to_hf(make_megatron(hf, tp=2, padded=1024, edit=rename), tmp_path)
    found = oracle.read_model(tmp_path / "out")
    for name, words in hf.tensors.items():
        np.testing.assert_array_equal(found[name], words, err_msg=name)


def test_a_checkpoint_with_optimizer_and_unknown_classes_is_read(tmp_path, make_hf, make_megatron):
    def add(_rank, content):
        content["optimizer"] = {"state": {0: {"exp_avg": torch.ones(3)}}, "kind": torch.optim.SGD}
        content["rng_state"] = [{"np_rng_state": np.random.default_rng(0).bit_generator.state}]

    to_hf(make_megatron(make_hf(), edit=add), tmp_path)
    assert (tmp_path / "out" / "model.safetensors").exists()


def edit_args(**changes):
    def edit(_rank, content):
        args = vars(content["args"])
        for name, value in changes.items():
            if value is ...:
                del args[name]
            else:
                args[name] = value

    return edit


def edit_rank(rank, **changes):
    def edit(found, content):
        if found == rank:
            for name, change in changes.items():
                content["model"][name] = change(content["model"][name])

    return edit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"edit": edit_args(num_layers=5)},
            "iter_0000005: its files hold 4 layers, its args say num_layers=5",
        ),
        ({"edit": edit_args(num_experts=8)}, r"mlp.router.weight .* are missing"),
        ({"edit": edit_args(mtp_num_layers=1)}, "args say mtp_num_layers=1, which is not"),
        ({"edit": edit_args(hidden_size=...)}, "args describe no supported model"),
        (
            {"edit": edit_args(hidden_size=64, kv_channels=4)},
            r"has shape \[\d+, 32\], the model's description asks for \[\d+, 64\]",
        ),
        (
            {"edit": lambda _, content: content["model"].update(surprise=torch.ones(1))},
            r"model.surprise \(mp_rank_00/model_optim_rng.pt\) is not part of this model",
        ),
        (
            {"edit": lambda _, c: c["model"].pop("decoder.final_layernorm.weight")},
            r"model.decoder.final_layernorm.weight .* is missing",
        ),
        (
            {"edit": lambda _, c: c["model"].pop("embedding.word_embeddings.weight")},
            "embedding.word_embeddings.weight is missing",
        ),
        (
            {"edit": lambda _, content: content["model"].update(odd=3)},
            "model_optim_rng.pt: odd is no tensor",
        ),
        (
            {"edit": lambda _, content: content.update(checkpoint_version=1.0)},
            "checkpoint_version 1.0 stores query, key and value in another order",
        ),
        (
            {"edit": lambda _, content: content["model"].update({3: torch.ones(1)})},
            "model_optim_rng.pt: 3 is no name of a tensor",
        ),
        ({"edit": lambda _, content: content.pop("model")}, "model_optim_rng.pt: holds no model"),
        (
            {"edit": edit_args(vocab_size=None)},
            "how many of the 128 rows .* --true-vocab-size, or --hf-config",
        ),
        ({"edit": edit_args(vocab_size=500)}, "how many of the 128 rows"),
        (
            {
                "tp": 2,
                "padded": 256,
                "edit": edit_rank((1, 0), **{"decoder.final_layernorm.weight": lambda t: -t}),
            },
            r"mp_rank_01/.*: model.decoder.final_layernorm.weight should repeat .*mp_rank_00/",
        ),
        (
            {"edit": edit_args(untie_embeddings_and_output_weights=False)},
            "output_layer.weight .* is not part of this model",
        ),
    ],
)
def test_checkpoints_of_something_else_are_refused_by_name(
    tmp_path, make_hf, make_megatron, options, message
):
    root = make_megatron(make_hf(), **options)
    with pytest.raises(ConversionError, match=message):
        to_hf(root, tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_tied_output_layer_that_drifted_from_the_embedding_is_found(
    tmp_path, make_hf, make_megatron
):
    def drift(rank, content):
        if rank == (0, 1):
            content["model"]["output_layer.weight"][98, 31] = 0.5

    hf = make_hf(tie_word_embeddings=True)
    root = make_megatron(hf, stages=[[range(2)], [range(2, 4)]], edit=drift)
    with pytest.raises(
        ConversionError,
        match=r"mp_rank_00_001/.*output_layer.weight should repeat .*word_embeddings.weight of .*"
        r"mp_rank_00_000/",
    ):
        to_hf(root, tmp_path)


def test_padding_of_a_tied_copy_may_differ(tmp_path, make_hf, make_megatron):
    def fill(rank, content):
        if rank == (0, 1):
            content["model"]["output_layer.weight"][99:] = 0.5

    hf = make_hf(tie_word_embeddings=True)
    to_hf(make_megatron(hf, stages=[[range(2)], [range(2, 4)]], edit=fill), tmp_path)


def test_the_vocabulary_may_be_given_by_hand_or_by_a_config(
    tmp_path, make_hf, make_megatron, oracle
):
    hf = make_hf()
    root = make_megatron(hf, edit=edit_args(vocab_size=None))
    to_hf(root, tmp_path, true_vocab_size=99)
    assert oracle.read_model(tmp_path / "out")["lm_head.weight"].shape == (99, 32)
    request = Request(
        load_dir=root, save_dir=tmp_path / "out2", save_format="hf", hf_config=hf.path
    )
    convert(request)
    assert oracle.read_model(tmp_path / "out2")["lm_head.weight"].shape == (99, 32)


def test_a_checkpoint_without_args_needs_a_config(tmp_path, make_hf, make_megatron, oracle):
    hf = make_hf()
    root = make_megatron(hf, edit=lambda _, content: content.pop("args"))
    with pytest.raises(ConversionError, match="args describe no supported model"):
        to_hf(root, tmp_path)
    to_hf(root, tmp_path, hf_config=hf.path)
    np.testing.assert_array_equal(
        oracle.read_model(tmp_path / "out")["lm_head.weight"], hf.tensors["lm_head.weight"]
    )


# Directories


def test_the_latest_checkpoint_is_read_unless_another_is_asked_for(
    tmp_path, make_hf, make_megatron
):
    hf = make_hf()
    root = make_megatron(hf)
    (root / "iter_0000005").rename(root / "iter_0000009")
    make_megatron(hf)
    assert to_hf(root, tmp_path).source.name == "iter_0000005"  # the tracker's
    (tmp_path / "out").rename(tmp_path / "out1")
    assert to_hf(root, tmp_path, iteration=9).source.name == "iter_0000009"
    (tmp_path / "out").rename(tmp_path / "out2")
    (root / "latest_checkpointed_iteration.txt").unlink()
    assert to_hf(root, tmp_path).source.name == "iter_0000009"
    (tmp_path / "out").rename(tmp_path / "out3")
    assert to_hf(root / "iter_0000005", tmp_path).source.name == "iter_0000005"


def test_an_iteration_that_is_not_there_is_answered_with_those_that_are(
    tmp_path, make_hf, make_megatron
):
    root = make_megatron(make_hf())
    with pytest.raises(ConversionError, match=r"--iteration 7: .*iter_0000005, not iter_0000007"):
        to_hf(root, tmp_path, iteration=7)


def test_a_tracker_that_points_nowhere_is_no_reason_to_take_another(
    tmp_path, make_hf, make_megatron
):
    root = make_megatron(make_hf())
    (root / "latest_checkpointed_iteration.txt").write_text("8")
    with pytest.raises(ConversionError, match=r"iter_0000008 does not exist; choose .*--iteration"):
        to_hf(root, tmp_path)
    (root / "latest_checkpointed_iteration.txt").write_text("what?")
    with pytest.raises(ConversionError, match=r"holds 'what\?'.*--iteration"):
        to_hf(root, tmp_path)


def test_ranks_that_are_missing_are_named(tmp_path, make_hf, make_megatron):
    hf = make_hf()
    root = make_megatron(hf, tp=2, stages=[[range(2)], [range(2, 4)]], padded=256)
    gone = root / "iter_0000005" / "mp_rank_00_001"
    gone.rename(tmp_path / "aside")
    with pytest.raises(ConversionError, match=r"mp_rank_00_001: missing, though .*mp_rank_01_001"):
        to_hf(root, tmp_path)
    gone.mkdir()
    with pytest.raises(ConversionError, match=r"mp_rank_00_001/model_optim_rng.pt is missing"):
        to_hf(root, tmp_path)


def test_a_file_that_is_cut_short_is_named(tmp_path, make_hf, make_megatron):
    root = make_megatron(make_hf(), tp=2, padded=256)
    path = root / "iter_0000005" / "mp_rank_01" / "model_optim_rng.pt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConversionError, match=r"mp_rank_01/model_optim_rng.pt is torn"):
        to_hf(root, tmp_path)


def test_a_changed_file_of_a_checkpoint_with_a_manifest_is_named(tmp_path, make_hf):
    hf = make_hf()
    convert(Request(load_dir=hf.path, save_dir=tmp_path / "mg", save_format="mcore"))
    path = tmp_path / "mg" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ConversionError, match=r"model_optim_rng.pt is torn: .*--iteration"):
        to_hf(tmp_path / "mg", tmp_path)


def test_directories_that_are_no_ranks_or_of_another_format_are_named(
    tmp_path, make_hf, make_megatron
):
    root = make_megatron(make_hf())
    rank = root / "iter_0000005" / "mp_rank_00"
    shutil.copytree(rank, rank.with_name("mp_rank_00_000_001"))
    with pytest.raises(ConversionError, match=r"different kinds of names \(mp_rank_00, mp_rank_00"):
        to_hf(root, tmp_path)
    rank.with_name("mp_rank_00_000_001").rename(rank.with_name("mp_rank_x"))
    with pytest.raises(ConversionError, match="mp_rank_x: no name of a rank, which is mp_rank_TT"):
        to_hf(root, tmp_path)


def test_stages_with_different_numbers_of_chunks_are_refused(tmp_path, make_hf, make_megatron):
    def merge(rank, content):
        if rank == (0, 1):
            content["model"] = content.pop("model0") | content.pop("model1")

    root = make_megatron(make_hf(), stages=CUTS["interleaved"][1], edit=merge)
    with pytest.raises(ConversionError, match="stages have different numbers of chunks"):
        to_hf(root, tmp_path)


# Writing


def test_a_written_checkpoint_is_read_by_torch_with_a_full_description(tmp_path, make_hf, oracle):
    hf = make_hf()
    request = Request(
        load_dir=hf.path,
        save_dir=tmp_path / "mg",
        save_format="mcore",
        target_tensor_parallel_size=2,
    )
    convert(request)
    root = tmp_path / "mg"
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "release"
    args, _ = oracle.load_rank(root / "release" / "mp_rank_01" / "model_optim_rng.pt")
    assert isinstance(args, argparse.Namespace)
    assert (args.padded_vocab_size, args.vocab_size) == (256, 99)
    assert (args.tensor_model_parallel_size, args.model_family) == (2, "llama")
    manifest = json.loads((root / "release" / "manifest.json").read_text())
    assert set(manifest["files"]) == {
        "mp_rank_00/model_optim_rng.pt",
        "mp_rank_01/model_optim_rng.pt",
    }
    assert manifest["metadata"]["tool"] == "ml-convert"
