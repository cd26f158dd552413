"""`ml-convert --verify logits` runs both models and tells whether they compute the same."""

import json
from dataclasses import replace

import pytest
import torch
import transformers

from ml_convert import ConversionError, Request, VerificationError, convert, logits
from ml_convert.input import open_source
from ml_eval import compare_logits
from ml_parallel.testing import run_ranks


def compare(ours, theirs):
    """Compare in a process that may be bound to the CPU."""
    (found,) = run_ranks(outcome, 1, ours, theirs)
    if isinstance(found, VerificationError):
        raise found
    return found


def outcome(ours, theirs):
    try:
        return compare_logits.compare(ours, theirs)
    except VerificationError as error:
        return error


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A model with more layers than are compared."""
    path = tmp_path_factory.mktemp("models") / "hf"
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=99,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def megatron(hf):
    """The same converted, after its logits were compared on the way."""
    request = Request(
        load_dir=hf,
        save_dir=hf.parent / "mg",
        save_format="mcore",
        target_pipeline_parallel_size=2,
        verify="logits",
    )
    assert convert(request).verified
    return request.save_dir


def test_a_converted_model_computes_what_the_published_one_does(hf, megatron):
    ours = Request(load_dir=megatron, save_dir=megatron, save_format="hf")
    said = compare(ours, hf)
    assert said.startswith("logits of 128 tokens after 4 layers differ by ")


@pytest.mark.parametrize(("dtype", "name"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_rounding_that_was_asked_for_is_allowed_for_and_said(hf, tmp_path, dtype, name):
    request = Request(
        load_dir=hf,
        save_dir=tmp_path / "mg",
        save_format="mcore",
        params_dtype=dtype,
        verify="logits",
    )
    assert convert(request).logits.endswith(f"allowed, as weights were rounded to {name}")


def test_what_rounding_does_not_explain_is_noticed(hf, tmp_path):
    """A layer's output that is 5% too large is more than bfloat16 does to it."""
    rounded = Request(load_dir=hf, save_dir=tmp_path / "mg", save_format="mcore")
    convert(replace(rounded, params_dtype="bf16"))
    other = transformers.LlamaForCausalLM.from_pretrained(hf)
    other.lm_head.weight.data *= 1.05
    other.save_pretrained(tmp_path / "other")
    ours = Request(load_dir=tmp_path / "mg", save_dir=tmp_path, save_format="hf")
    with pytest.raises(VerificationError, match="allowed, as weights were rounded to bfloat16"):
        compare(ours, tmp_path / "other")


def test_another_rotary_base_is_noticed(hf, megatron, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for path in hf.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((hf / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    (other / "config.json").write_text(json.dumps(config))
    ours = Request(load_dir=megatron, save_dir=megatron, save_format="hf")
    with pytest.raises(
        VerificationError, match=r"mg: logits of 128 tokens .* compared with .*other"
    ):
        compare(ours, other)


def test_a_failure_reaches_the_one_who_asked(megatron, tmp_path):
    """The process that compares is told what it needs, and its last line is the message."""
    request = Request(load_dir=megatron, save_dir=tmp_path, save_format="hf", verify="logits")
    source = open_source(request)
    with pytest.raises(VerificationError, match=r"--verify logits: .*nowhere"):
        logits.check(request, source, tmp_path / "nowhere")


def test_there_must_be_two_kinds_of_models(hf, megatron, tmp_path):
    request = Request(load_dir=hf, save_dir=tmp_path / "out", save_format="hf", verify="logits")
    with pytest.raises(
        ConversionError, match="either --load-dir or --save-dir has to be a Hugging"
    ):
        convert(request)
    with pytest.raises(
        ConversionError, match="either --load-dir or --save-dir has to be a Hugging"
    ):
        convert(replace(request, load_dir=megatron, save_format="mcore"))
    assert not (tmp_path / "out").exists()


def test_a_list_that_is_as_long_as_there_are_layers_is_no_list_of_layers(tmp_path):
    config = transformers.Phi3Config(
        hidden_size=48,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        vocab_size=99,
        max_position_embeddings=256,
        original_max_position_embeddings=64,
        rope_scaling={"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6},
        initializer_range=0.2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    transformers.Phi3ForCausalLM(config).save_pretrained(tmp_path)
    ours = Request(load_dir=tmp_path, save_dir=tmp_path, save_format="hf")
    assert compare(ours, tmp_path).startswith("logits of 128 tokens after 4 layers differ by ")
