"""Conversions keep every bit, whatever the cut, in little memory."""

import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from ml_convert import ConversionError, Request, convert

CUTS = {
    "whole": ({}, (1, [[range(4)]])),
    "tensor": ({"target_tensor_parallel_size": 4}, (4, [[range(4)]])),
    "more ranks than groups": ({"target_tensor_parallel_size": 8}, (8, [[range(4)]])),
    "pipeline": ({"target_pipeline_parallel_size": 2}, (1, [[range(2)], [range(2, 4)]])),
    "list": (
        {"target_pipeline_parallel_size": 2, "num_layer_list": (3, 1)},
        (1, [[range(3)], [range(3, 4)]]),
    ),
    "all": (
        {
            "target_tensor_parallel_size": 2,
            "target_pipeline_parallel_size": 2,
            "num_layers_per_virtual_pipeline_stage": 1,
        },
        (2, [[range(1), range(2, 3)], [range(1, 2), range(3, 4)]]),
    ),
}
MODELS = {
    "grouped": {},
    "tied": {"tie_word_embeddings": True},
    "one head each": {"num_key_value_heads": 8},
    "one key head": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 8},
    "biases": {"attention_bias": True, "mlp_bias": True},
}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, words in expected.items():
        np.testing.assert_array_equal(found[name], words, err_msg=name)


def to_megatron(hf, tmp_path, name="mg", **options):
    return convert(
        Request(load_dir=hf.path, save_dir=tmp_path / name, save_format="mcore", **options)
    )


def to_hf(root, tmp_path, name="back", **options):
    return convert(Request(load_dir=root, save_dir=tmp_path / name, save_format="hf", **options))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("cut", CUTS)
def test_every_rank_holds_what_the_slow_oracle_cuts_for_it_and_comes_back_bit_for_bit(
    tmp_path, make_hf, oracle, model, cut
):
    options, (tp, stages) = CUTS[cut]
    hf = make_hf(files=3, **MODELS[model])
    to_megatron(hf, tmp_path, **options)
    padded = 128 * tp
    ranks = oracle.cut_llama(hf, tp=tp, stages=stages, padded=padded)
    for (tp_rank, pp_rank), chunks in ranks.items():
        rank = oracle.rank_name(tp_rank, pp_rank, len(stages))
        path = tmp_path / "mg" / "release" / rank / "model_optim_rng.pt"
        _, found = oracle.load_rank(path)
        assert len(found) == len(chunks)
        for ours, theirs in zip(found, chunks, strict=True):
            assert_same(ours, theirs)
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
    to_hf(tmp_path / "mg", tmp_path)
    assert_same(oracle.read_model(tmp_path / "back"), hf.tensors)


@pytest.mark.parametrize("tied", [False, True])
def test_a_megatron_checkpoint_is_cut_anew_without_a_detour(
    tmp_path, make_hf, make_megatron, oracle, tied
):
    hf = make_hf(tie_word_embeddings=tied)
    stages = [[range(1), range(2, 3)], [range(1, 2), range(3, 4)]]
    root = make_megatron(hf, "old", tp=4, stages=stages, padded=512, lr=0.5, model_family=None)
    convert(
        Request(
            load_dir=root,
            save_dir=tmp_path / "new",
            save_format="mcore",
            target_tensor_parallel_size=2,
            target_pipeline_parallel_size=2,
            num_layer_list=(3, 1),
            make_vocab_size_divisible_by=1,
        )
    )
    stages = [[range(3)], [range(3, 4)]]
    for (tp_rank, pp_rank), (chunk,) in oracle.cut_llama(
        hf, tp=2, stages=stages, padded=100
    ).items():
        rank = oracle.rank_name(tp_rank, pp_rank, 2)
        args, (found,) = oracle.load_rank(
            tmp_path / "new" / "release" / rank / "model_optim_rng.pt"
        )
        assert_same(found, chunk)
        assert (args.lr, args.padded_vocab_size, args.num_layer_list) == (0.5, 100, (3, 1))


def test_ranks_of_nothing_but_padding_are_written_and_read(tmp_path, make_hf, oracle):
    hf = make_hf(vocab_size=20)
    to_megatron(hf, tmp_path, target_tensor_parallel_size=4)
    path = tmp_path / "mg" / "release" / "mp_rank_03" / "model_optim_rng.pt"
    _, (found,) = oracle.load_rank(path)
    table = found["embedding.word_embeddings.weight"]
    assert table.shape == (128, 32)
    assert not table.any()
    to_hf(tmp_path / "mg", tmp_path)
    assert_same(oracle.read_model(tmp_path / "back"), hf.tensors)


@pytest.mark.parametrize("workers", [1, 3])
def test_tensors_larger_than_a_band_are_put_together_right(tmp_path, make_hf, oracle, workers):
    """The vocabulary has 12 MiB, many bands; ranks share them unevenly."""
    hf = make_hf(vocab_size=101_000, hidden_size=64, num_hidden_layers=2)
    stages = [[range(1)], [range(1, 2)]]
    to_megatron(
        hf,
        tmp_path,
        target_tensor_parallel_size=2,
        target_pipeline_parallel_size=2,
        make_vocab_size_divisible_by=1,
        workers=workers,
    )
    ranks = oracle.cut_llama(hf, tp=2, stages=stages, padded=101_000)
    for (tp_rank, pp_rank), (chunk,) in ranks.items():
        rank = oracle.rank_name(tp_rank, pp_rank, 2)
        path = tmp_path / "mg" / "release" / rank / "model_optim_rng.pt"
        assert_same(oracle.load_rank(path)[1][0], chunk)
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
    to_hf(tmp_path / "mg", tmp_path, workers=workers)
    assert_same(oracle.read_model(tmp_path / "back"), hf.tensors)


@pytest.mark.parametrize(
    ("dtype", "flag"), [("float32", "fp32"), ("float16", "fp16"), ("bfloat16", "bf16")]
)
def test_another_dtype_is_that_of_torch_and_only_on_request(tmp_path, make_hf, oracle, dtype, flag):
    hf = make_hf(dtype="F32")
    numbers = {
        name: torch.randn(words.shape, generator=torch.Generator().manual_seed(0))
        for name, words in hf.tensors.items()
    }
    words = {name: tensor.numpy().view(np.uint32) for name, tensor in numbers.items()}
    oracle.write_safetensors(hf.path / "model.safetensors", words, "F32")
    to_megatron(hf, tmp_path, params_dtype=flag, target_tensor_parallel_size=2)
    args, _ = oracle.load_rank(
        tmp_path / "mg" / "release" / "mp_rank_00" / "model_optim_rng.pt", getattr(torch, dtype)
    )
    assert args.params_dtype == dtype
    to_hf(tmp_path / "mg", tmp_path)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    found = oracle.read_model(tmp_path / "back")
    for name, tensor in numbers.items():
        expected = tensor.to(getattr(torch, dtype)).view(torch.uint8).numpy()
        np.testing.assert_array_equal(found[name].view(np.uint8), expected, err_msg=name)


def test_a_cast_that_overflows_names_the_parameter(tmp_path, make_hf, oracle):
    hf = make_hf(dtype="F32")
    words = {n: np.ones(w.shape, np.float32).view(np.uint32) for n, w in hf.tensors.items()}
    words["model.norm.weight"][3] = np.float32(1e6).view(np.uint32)
    oracle.write_safetensors(hf.path / "model.safetensors", words, "F32")
    with pytest.raises(ConversionError, match=r"final_layernorm.weight: 1e\+06 is too large for"):
        to_megatron(hf, tmp_path, params_dtype="fp16")


def test_parts_of_a_parameter_in_different_dtypes_are_refused(tmp_path, make_hf, oracle):
    hf = make_hf(files=2)
    name = "model.layers.1.self_attn.k_proj.weight"
    index = hf.path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = content["weight_map"][name]
    tensors = oracle.read_safetensors(hf.path / file)
    wide = {name: tensors.pop(name).astype(np.uint32)}
    oracle.write_safetensors(hf.path / file, tensors)
    oracle.write_safetensors(hf.path / "wide.safetensors", wide, "F32")
    content["weight_map"][name] = "wide.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ConversionError, match=r"is float32, but another part of .* is bfloat16"):
        to_megatron(hf, tmp_path)


def test_hugging_face_models_are_rewritten_with_other_files(tmp_path, make_hf, oracle):
    hf = make_hf(files=3)
    (hf.path / "tokenizer.json").write_text("{}")
    to_hf(hf.path, tmp_path, max_shard_size="20KB")
    assert_same(oracle.read_model(tmp_path / "back"), hf.tensors)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == {**hf.config, "dtype": "bfloat16"}
    assert (tmp_path / "back" / "tokenizer.json").exists()


def test_a_dry_run_writes_nothing_and_tells_the_exact_sizes(tmp_path, make_hf):
    hf = make_hf()
    options = {"target_tensor_parallel_size": 2, "target_pipeline_parallel_size": 2}
    planned = to_megatron(hf, tmp_path, **options, dry_run=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
    done = to_megatron(hf, tmp_path, **options)
    assert [(f.name, f.size) for f in planned.files] == [(f.name, f.size) for f in done.files]
    assert all((done.path / f.name).stat().st_size == f.size for f in done.files)
    assert planned.parameters == done.parameters == sum(w.size for w in hf.tensors.values())
    assert planned.padding == done.padding == 2 * (256 - 99) * 32 * 2


def test_a_dry_run_finds_what_is_impossible(tmp_path, make_hf):
    with pytest.raises(ConversionError, match="must divide --num-attention-heads 8"):
        to_megatron(make_hf(), tmp_path, target_tensor_parallel_size=3, dry_run=True)


def test_cores_are_counted_on_systems_without_affinity_too(tmp_path, make_hf, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert to_megatron(make_hf(), tmp_path).verified


def test_progress_is_told_until_everything_is_done(tmp_path, make_hf):
    done, totals = {}, {}

    def progress(what, nbytes, total):
        done[what] = done.get(what, 0) + nbytes
        totals[what] = total

    request = Request(load_dir=make_hf().path, save_dir=tmp_path / "mg", save_format="mcore")
    convert(request, progress=progress)
    assert done == totals
    assert list(done) == ["converting", "hashing", "verifying"]


def test_the_format_of_a_directory_is_found_out_or_told(tmp_path, make_hf, make_megatron):
    hf = make_hf()
    root = make_megatron(hf)
    (root / "config.json").write_text(json.dumps(hf.config))  # left there by somebody
    with pytest.raises(ConversionError, match=r"holds none of model.safetensors"):
        to_hf(root, tmp_path)
    to_hf(root, tmp_path, load_format="mcore")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match="empty: holds neither a Hugging Face model"):
        to_hf(tmp_path / "empty", tmp_path)
    with pytest.raises(ConversionError, match=r"--load-dir .*nowhere: no such directory"):
        to_hf(tmp_path / "nowhere", tmp_path)


def test_a_vocabulary_that_contradicts_the_model_is_refused(tmp_path, make_hf):
    with pytest.raises(ConversionError, match=r"--true-vocab-size 98: .* says 99"):
        to_megatron(make_hf(), tmp_path, true_vocab_size=98)


MEASURED = """
import re, sys
from pathlib import Path
from ml_convert import Request, convert

load_dir, save_dir, save_format, tp = sys.argv[1:]
convert(Request(load_dir=Path(load_dir), save_dir=Path(save_dir), save_format=save_format,
                target_tensor_parallel_size=int(tp)))
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(sorted({"torch", "transformers", "megatron"} & set(sys.modules)))
"""


def peak_mib(*words):
    words = [sys.executable, "-c", MEASURED, *map(str, words)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    peak, modules = done.stdout.splitlines()
    assert modules == "[]"
    return int(peak) / 1024


def test_memory_stays_small_and_torch_unimported(tmp_path, make_hf):
    """130 MiB of weights through 4 ranks and back."""
    hf = make_hf(
        files=2,
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=1,
        num_attention_heads=16,
    )
    assert sum(words.nbytes for words in hf.tensors.values()) > 130 << 20
    assert peak_mib(hf.path, tmp_path / "mg", "mcore", 4) < 100
    assert peak_mib(tmp_path / "mg", tmp_path / "back", "hf", 1) < 100


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path, make_hf):
    """The same bound holds for 300 MiB, and for any size."""
    hf = make_hf(
        files=2,
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
    )
    assert sum(words.nbytes for words in hf.tensors.values()) > 290 << 20
    assert peak_mib(hf.path, tmp_path / "mg", "mcore", 4) < 100
    assert peak_mib(tmp_path / "mg", tmp_path / "back", "hf", 1) < 100
