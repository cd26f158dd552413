"""Hugging Face directories are read strictly: nothing missing, nothing unknown, nothing torn."""

import json

import numpy as np
import pytest
import torch

from ml_convert import ConversionError, Request, convert
from ml_convert.huggingface import is_hugging_face, open_model


def open_hf(path):
    return open_model(path, model_type=None)


def assert_all_found(hf):
    checkpoint = open_hf(hf.path).checkpoint
    assert {stored.name for stored in checkpoint.layout.tensors} == hf.tensors.keys()
    for stored, extent in zip(checkpoint.layout.tensors, checkpoint.extents, strict=True):
        content = extent.path.read_bytes()[extent.offset : extent.offset + extent.nbytes]
        assert content == hf.tensors[stored.name].tobytes()


@pytest.mark.parametrize("files", [1, 3])
def test_every_tensor_is_found_where_it_is(make_hf, files):
    hf = make_hf(files=files)
    assert_all_found(hf)
    source = open_hf(hf.path)
    assert source.family.name == "llama"
    assert source.config["bos_token_id"] == 7


def test_weights_saved_by_torch_are_found_too(make_hf):
    hf = make_hf()
    (hf.path / "model.safetensors").unlink()
    tensors = {n: torch.from_numpy(t).view(torch.bfloat16) for n, t in hf.tensors.items()}
    names = list(tensors)
    weight_map = {}
    for number in range(2):
        part = {name: tensors[name] for name in names[number::2]}
        torch.save(part, hf.path / f"pytorch_model-{number}.bin")
        weight_map |= dict.fromkeys(part, f"pytorch_model-{number}.bin")
    index = hf.path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_all_found(hf)
    index.unlink()
    torch.save(tensors, hf.path / "pytorch_model.bin")
    assert_all_found(hf)


def test_rotary_frequencies_of_old_files_are_no_weights(make_hf):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    hf = make_hf(extra={name: np.zeros(2, np.uint16)})
    assert name not in {stored.name for stored in open_hf(hf.path).checkpoint.layout.tensors}


def test_a_tied_output_layer_that_is_stored_all_the_same_counts_as_a_copy(make_hf):
    plain = make_hf("plain", tie_word_embeddings=True)
    table = plain.tensors["model.embed_tokens.weight"]
    hf = make_hf(tie_word_embeddings=True, extra={"lm_head.weight": table})
    (copy,) = (s for s in open_hf(hf.path).checkpoint.layout.tensors if s.copy_of is not None)
    assert copy.name == "lm_head.weight"


def edit_index(hf, change):
    path = hf.path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 3, None]
)
def test_an_index_that_points_elsewhere_is_refused(make_hf, file):
    hf = make_hf(files=2)
    edit_index(hf, lambda weight_map: weight_map.update({"lm_head.weight": file}))
    with pytest.raises(ConversionError, match=r"index.json: .* is no name of a file beside it"):
        open_hf(hf.path)


def test_a_missing_shard_is_named(make_hf):
    hf = make_hf(files=3)
    (hf.path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"model-00002-of-00003.safetensors: missing, though"):
        open_hf(hf.path)


def test_a_torn_shard_is_named(make_hf):
    hf = make_hf(files=3)
    path = hf.path / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConversionError, match=r"model-00002-of-00003.safetensors: torn"):
        open_hf(hf.path)


def test_an_index_that_disagrees_with_its_files_is_refused(make_hf):
    first = "model-00001-of-00002.safetensors"
    hf = make_hf("one", files=2)
    edit_index(hf, lambda weight_map: weight_map.update({"extra.weight": first}))
    with pytest.raises(ConversionError, match=f"{first}: extra.weight is not in it"):
        open_hf(hf.path)
    hf = make_hf("two", files=2)
    edit_index(hf, lambda weight_map: weight_map.pop("model.embed_tokens.weight"))
    with pytest.raises(ConversionError, match=f"{first}: model.embed_tokens.weight is not listed"):
        open_hf(hf.path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, r"hf: config.json: model_type 'bert'"),
        ({"hidden_act": "gelu"}, r"hf: config.json: hidden_act is 'gelu'"),
        ({"rope_scaling": {"rope_type": "axial"}}, "of type 'axial' are not supported"),
        ({"num_key_value_heads": 3}, r"hf: --num-query-groups 3: must divide"),
    ],
)
def test_models_that_cannot_be_represented_are_refused_by_key(make_hf, changes, message):
    hf = make_hf()
    (hf.path / "config.json").write_text(json.dumps({**hf.config, **changes}))
    with pytest.raises(ConversionError, match=message):
        open_hf(hf.path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 5}, r"9 tensors, such as model.layers.4.* are missing"),
        ({"num_hidden_layers": 3}, r"9 tensors, such as model.layers.3.* are not part of this"),
        ({"vocab_size": 100}, r"embed_tokens.weight has shape \[99, 32\], .* asks for \[100, 32\]"),
        ({"attention_bias": True, "mlp_bias": True}, r"28 tensors, such as .*bias, are missing"),
    ],
)
def test_weights_of_another_model_are_refused(make_hf, changes, message):
    hf = make_hf()
    (hf.path / "config.json").write_text(json.dumps({**hf.config, **changes}))
    with pytest.raises(ConversionError, match=message):
        open_hf(hf.path)


def test_an_untied_model_without_an_output_layer_is_refused(make_hf):
    hf = make_hf(tie_word_embeddings=True)
    (hf.path / "config.json").write_text(json.dumps({**hf.config, "tie_word_embeddings": False}))
    with pytest.raises(ConversionError, match=r"has no lm_head.weight, though its config.json"):
        open_hf(hf.path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", r"config.json: no JSON"),
        ("config.json", "[]", r"config.json: holds no JSON object"),
        ("config.json", None, r"config.json: missing"),
        ("model.safetensors", None, r"holds none of model.safetensors.index.json, model.safet"),
        ("model.safetensors.index.json", "{}", r"index.json: has no weight_map"),
    ],
)
def test_directories_that_are_no_model_are_refused(make_hf, name, content, message):
    hf = make_hf()
    (hf.path / name).unlink(missing_ok=True)
    if content is not None:
        (hf.path / name).write_text(content)
    with pytest.raises(ConversionError, match=message):
        open_hf(hf.path)


def test_a_pytorch_file_that_holds_no_tensors_by_name_is_refused(make_hf):
    hf = make_hf()
    (hf.path / "model.safetensors").unlink()
    torch.save([torch.ones(1)], hf.path / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=r"pytorch_model.bin: holds no state dict"):
        open_hf(hf.path)


def test_a_directory_is_recognised(make_hf, tmp_path):
    assert is_hugging_face(make_hf().path)
    assert not is_hugging_face(tmp_path)


def test_the_family_may_be_forced(make_hf):
    hf = make_hf()
    (hf.path / "config.json").write_text(json.dumps({**hf.config, "model_type": "yi"}))
    assert open_model(hf.path, model_type="llama2").family.name == "llama"
    with pytest.raises(ConversionError, match=r"--model-type-hf gpt9: .*known: llama"):
        open_model(hf.path, model_type="gpt9")


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 0},
        {"vocab_size": 10**30},
        {"num_hidden_layers": 10**4},
        {"num_hidden_layers": 10**10},
        {"num_hidden_layers": 10**30},
        {"model_type": "mixtral", "num_local_experts": 10**9, "num_experts_per_tok": 2},
    ],
)
def test_sizes_that_no_file_can_have_are_refused_before_anything_is_made_of_them(make_hf, changes):
    hf = make_hf()
    (hf.path / "config.json").write_text(json.dumps({**hf.config, **changes}))
    with pytest.raises(ConversionError, match=r"config.json: .* does not fit "):
        open_hf(hf.path)


@pytest.mark.parametrize("files", [1, 2])
def test_an_earlier_export_is_checked_against_its_manifest(make_hf, tmp_path, files):
    hf, export = make_hf(), tmp_path / "export"
    size = "5GB" if files == 1 else "10KB"
    convert(Request(load_dir=hf.path, save_dir=export, save_format="hf", max_shard_size=size))
    damaged = sorted(export.glob("*.safetensors"))[-1]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)

    def again(**options):
        convert(Request(load_dir=export, save_dir=tmp_path / "out", save_format="mcore", **options))

    with pytest.raises(ConversionError, match=rf"{damaged.name} is damaged: its sha256 .* remove"):
        again()
    assert not (tmp_path / "out").exists()
    again(verify="none")
    (export / "manifest.json").write_text("{}")
    with pytest.raises(ConversionError, match=r"manifest.json is damaged.* remove it"):
        again()
