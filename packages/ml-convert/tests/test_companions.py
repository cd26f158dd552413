"""What goes with exported weights: config.json, the index, the tokenizer."""

import json
import logging

import pytest

from ml_convert import ConversionError, Request, companions, convert


def export(root, tmp_path, name="out", **options):
    out = tmp_path / name
    convert(Request(load_dir=root, save_dir=out, save_format="hf", **options))
    return out, json.loads((out / "config.json").read_text())


def test_tensors_fill_files_up_to_the_limit_in_order():
    sizes = {"a": 4, "b": 4, "c": 4, "huge": 20, "d": 1}
    assert companions.shards(sizes, 100) == dict.fromkeys(sizes, "model.safetensors")
    assert companions.shards(sizes, 8) == {
        "a": "model-00001-of-00004.safetensors",
        "b": "model-00001-of-00004.safetensors",
        "c": "model-00002-of-00004.safetensors",
        "huge": "model-00003-of-00004.safetensors",
        "d": "model-00004-of-00004.safetensors",
    }


def test_several_files_have_an_index_with_the_true_totals(tmp_path, make_hf, make_megatron, oracle):
    hf = make_hf()
    out, _ = export(make_megatron(hf), tmp_path, max_shard_size="10KB")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    numel = sum(words.size for words in hf.tensors.values())
    assert index["metadata"] == {"total_parameters": numel, "total_size": 2 * numel}
    assert oracle.read_model(out).keys() == hf.tensors.keys()
    for file in set(index["weight_map"].values()):
        tensors = oracle.read_safetensors(out / file)
        assert len(tensors) == 1 or sum(words.nbytes for words in tensors.values()) <= 10_000


def test_without_a_config_one_is_written_from_the_checkpoint(tmp_path, make_hf, make_megatron):
    _, config = export(make_megatron(make_hf()), tmp_path)
    expected = {"model_type": "llama", "num_key_value_heads": 4, "dtype": "bfloat16"}
    expected |= {"vocab_size": 99, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize("ids", [{"eos_token_id": [1, 2], "pad_token_id": None}, {}])
def test_ids_of_special_tokens_come_back_from_every_megatron_form(tmp_path, make_hf, ids):
    """Also what was not said, as it is not the same as null."""
    hf = make_hf(**ids)
    before = hf.path
    for number, save_format in enumerate(("mcore", "legacy", "torch_dist", "hf")):
        after = tmp_path / str(number)
        convert(Request(load_dir=before, save_dir=after, save_format=save_format))
        before = after
    config = json.loads((before / "config.json").read_text())
    expected = {name: value for name, value in hf.config.items() if name.endswith("_token_id")}
    assert {n: v for n, v in config.items() if n.endswith("_token_id")} == expected
    assert expected.keys() == {"bos_token_id", *ids}


def test_a_config_is_kept_with_fields_we_do_not_know(tmp_path, make_hf, make_megatron):
    hf = make_hf(torch_dtype="float32", field_of_the_future=[1], eos_token_id=[1, 2])
    _, config = export(make_megatron(hf), tmp_path, hf_config=hf.path)
    assert config == {**hf.config, "torch_dtype": "bfloat16"}


def test_what_the_checkpoint_knows_better_replaces_the_config_and_is_reported(
    tmp_path, make_hf, make_megatron, caplog
):
    hf = make_hf(field_of_the_future=1)
    root = make_megatron(hf, rotary_base=500000, max_position_embeddings=4096)
    with caplog.at_level(logging.WARNING):
        _, config = export(root, tmp_path, hf_config=hf.path)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500000
    assert (config["max_position_embeddings"], config["field_of_the_future"]) == (4096, 1)
    assert "config.json: rotary_base is 500000 as in the checkpoint, not 10000.0" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 6}, "num_layers is 6 there and 4 in the checkpoint"),
        ({"num_key_value_heads": 8}, "num_query_groups is 8 there and 4"),
        ({"tie_word_embeddings": True}, "untie_embeddings_and_output_weights is False there"),
    ],
)
def test_the_config_of_another_model_is_refused(tmp_path, make_hf, make_megatron, changes, message):
    hf = make_hf()
    root = make_megatron(hf)
    (hf.path / "config.json").write_text(json.dumps({**hf.config, **changes}))
    with pytest.raises(ConversionError, match=f"describes another model, {message}"):
        export(root, tmp_path, hf_config=hf.path)
    assert not (tmp_path / "out").exists()


def test_tokenizer_files_are_copied_as_they_are_and_weights_are_not(
    tmp_path, make_hf, make_megatron
):
    hf = make_hf()
    files = {
        "tokenizer.json": b"{}",
        "tokenizer.model": b"\x00\x01",
        "tokenizer_config.json": b"{}",
        "special_tokens_map.json": b"{ }",
        "generation_config.json": b"{  }",
        "chat_template.jinja": b"{{ x }}",
        "modeling_custom.py": b"raise SystemExit\n",
    }
    for name, content in files.items():
        (hf.path / name).write_bytes(content)
    (hf.path / "README.md").write_text("not ours")
    out, _ = export(make_megatron(hf), tmp_path, hf_config=hf.path)
    assert {name: (out / name).read_bytes() for name in files} == files
    assert {path.name for path in out.iterdir()} == {
        *files,
        "config.json",
        "model.safetensors",
        "manifest.json",
    }


def test_links_are_followed_as_in_the_cache_of_hugging_face(tmp_path, make_hf, make_megatron):
    hf = make_hf()
    (tmp_path / "blob").write_bytes(b"{}")
    (hf.path / "tokenizer.json").symlink_to(tmp_path / "blob")
    out, _ = export(make_megatron(hf), tmp_path, hf_config=hf.path)
    assert not (out / "tokenizer.json").is_symlink()
    assert (out / "tokenizer.json").read_bytes() == b"{}"


@pytest.mark.parametrize("place", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_alone_gives_the_ids_of_begin_and_end(tmp_path, make_hf, make_megatron, place):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    tokens = {"<s>": 11, "</s>": 12}
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    if place == "tokenizer.json":
        added = [{"content": text, "id": number} for text, number in tokens.items()]
        (tokenizer / place).write_text(json.dumps({"added_tokens": added}))
    else:
        decoder = {str(number): {"content": text} for text, number in tokens.items()}
        settings["added_tokens_decoder"] = decoder
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    out, config = export(make_megatron(make_hf()), tmp_path, hf_config=tokenizer)
    assert (config["bos_token_id"], config["eos_token_id"]) == (11, 12)
    assert (out / "tokenizer_config.json").exists()


def test_a_config_directory_that_does_not_exist_is_named(tmp_path, make_hf, make_megatron):
    with pytest.raises(ConversionError, match=r"--hf-config .*nowhere: no such directory"):
        export(make_megatron(make_hf()), tmp_path, hf_config=tmp_path / "nowhere")


def test_a_checkpoint_that_does_not_say_its_family_needs_it_to_be_given(
    tmp_path, make_hf, make_megatron
):
    hf = make_hf()
    root = make_megatron(hf, model_family=None)
    with pytest.raises(ConversionError, match="give --model-type-hf, or --hf-config"):
        export(root, tmp_path)
    export(root, tmp_path, "first", model_type_hf="llama2")
    export(root, tmp_path, "second", hf_config=hf.path)


def test_a_model_the_family_cannot_represent_is_refused(tmp_path, make_hf, make_megatron):
    hf = make_hf(attention_bias=True, mlp_bias=True)

    def only_qkv(_rank, content):
        content["args"].add_bias_linear, content["args"].add_qkv_bias = False, True
        model = content["model"]
        for name in list(model):
            if name.endswith("bias") and "linear_qkv" not in name:
                del model[name]

    with pytest.raises(ConversionError, match=r"not a llama model: .*--add-qkv-bias"):
        export(make_megatron(hf, edit=only_qkv), tmp_path)
    assert not (tmp_path / "out").exists()
