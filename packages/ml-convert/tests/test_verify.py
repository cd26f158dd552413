"""A single wrong bit is found and named, wherever it is."""

import json

import numpy as np
import pytest

from ml_convert import ConversionError, Request, VerificationError, convert
from ml_convert.ptfile import read as read_pt
from ml_convert.safetensors_file import read as read_safetensors

FC2 = "mlp.linear_fc2.weight"


def flip(path, offset, bit=0):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


@pytest.fixture
def megatron(tmp_path, make_hf):
    """A conversion to two tensor ranks and two stages, and its request."""
    hf = make_hf(files=2, tie_word_embeddings=True)
    options = {"target_tensor_parallel_size": 2, "target_pipeline_parallel_size": 2}
    request = {"load_dir": hf.path, "save_dir": tmp_path / "mg", "save_format": "mcore", **options}
    convert(Request(**request))
    return Request(**request, verify_only=True)


def extent_of(root, rank, name):
    path = root / "release" / rank / "model_optim_rng.pt"
    saved = read_pt(path)
    return saved.extent(saved.value["model"][name])


def test_an_untouched_result_verifies(megatron):
    assert convert(megatron).verified


def test_a_source_that_is_not_what_was_written_is_not_verified(megatron, tmp_path):
    extent = extent_of(megatron.save_dir, "mp_rank_01_000", f"decoder.layers.0.{FC2}")
    flip(extent.path, extent.offset)
    request = {"load_dir": megatron.save_dir, "save_dir": tmp_path / "out", "save_format": "hf"}
    for verify in ({"verify": True}, {"verify_only": True}):
        with pytest.raises(
            ConversionError, match=r"mp_rank_01_000/model_optim_rng.pt is damaged: its sha256"
        ):
            convert(Request(**request, **verify))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rank", "name", "row", "column", "source"),
    [
        # rank 1 holds groups 2 and 3 of 4; a group is 2 query heads, key, value, of 4 rows each
        ("mp_rank_01_000", "self_attention.linear_qkv.weight", 8, 3, r"k_proj.weight\[8, 3\]"),
        ("mp_rank_01_000", "self_attention.linear_qkv.weight", 31, 0, r"v_proj.weight\[15, 0\]"),
        ("mp_rank_00_000", "self_attention.linear_qkv.weight", 0, 31, r"q_proj.weight\[0, 31\]"),
        ("mp_rank_01_000", "self_attention.linear_proj.weight", 5, 2, r"o_proj.weight\[5, 18\]"),
        ("mp_rank_01_000", "mlp.linear_fc1.weight", 25, 7, r"up_proj.weight\[25, 7\]"),
        ("mp_rank_00_000", "mlp.linear_fc2.weight", 31, 23, r"down_proj.weight\[31, 23\]"),
        ("mp_rank_00_000", "input_layernorm.weight", 9, None, r"input_layernorm.weight\[9\]"),
    ],
)
def test_a_flipped_bit_is_named_with_both_elements(megatron, rank, name, row, column, source):
    extent = extent_of(megatron.save_dir, rank, f"decoder.layers.0.{name}")
    flip(extent.path, extent.offset + row * extent.row_bytes + 2 * (column or 0), bit=3)
    place = rf"\[{row}\]" if column is None else rf"\[{row}, {column}\]"
    with pytest.raises(
        VerificationError,
        match=rf"{rank}/model_optim_rng.pt: model.decoder.layers.0.{name}{place} differs from "
        rf".*model.layers.0.\S+{source}$".replace(r"\S+", r"\S*"),
    ):
        convert(megatron)


def test_layers_are_named_as_they_are_numbered_in_each_file(megatron):
    extent = extent_of(
        megatron.save_dir, "mp_rank_00_001", "decoder.layers.1.mlp.linear_fc2.weight"
    )
    flip(extent.path, extent.offset)
    with pytest.raises(
        VerificationError, match=r"model.decoder.layers.1.mlp.* differs from .*model.layers.3.mlp"
    ):
        convert(megatron)


def test_a_wrong_copy_is_found(megatron):
    extent = extent_of(
        megatron.save_dir, "mp_rank_01_000", "decoder.layers.1.input_layernorm.weight"
    )
    flip(extent.path, extent.offset)
    with pytest.raises(VerificationError, match=r"mp_rank_01_000/.*layernorm.weight should repeat"):
        convert(megatron)
    flip(extent.path, extent.offset)
    extent = extent_of(megatron.save_dir, "mp_rank_00_001", "output_layer.weight")
    flip(extent.path, extent.offset + 5)
    with pytest.raises(VerificationError, match=r"output_layer.weight should repeat .*embeddings"):
        convert(megatron)


def test_padding_that_is_not_zero_is_found(megatron):
    name = "embedding.word_embeddings.weight"
    extent = extent_of(megatron.save_dir, "mp_rank_01_000", name)
    flip(extent.path, extent.offset + extent.nbytes - 1)
    with pytest.raises(VerificationError, match=rf"row 127 of model.{name} is padding, but not"):
        convert(megatron)


def test_a_flipped_bit_outside_of_tensors_is_found_by_the_manifest(megatron):
    path = megatron.save_dir / "release" / "mp_rank_00_001" / "model_optim_rng.pt"
    flip(path, path.read_bytes().index(b"FB") + 6)  # in the padding of a zip header
    with pytest.raises(VerificationError, match=r"mp_rank_00_001/model_optim_rng.pt is damaged"):
        convert(megatron)


def test_another_description_is_found(tmp_path, make_hf):
    hf = make_hf()
    request = {"load_dir": hf.path, "save_dir": tmp_path / "copy", "save_format": "hf"}
    convert(Request(**request))
    config = tmp_path / "copy" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rope_theta": 5e5}))
    with pytest.raises(VerificationError, match=r"rotary_base is 500000.0, but 10000.0 in"):
        convert(Request(**request, verify_only=True))


def test_a_result_in_another_dtype_is_found(tmp_path, make_hf, oracle):
    hf = make_hf(dtype="F32")
    words = {n: np.ones(w.shape, np.float32).view(np.uint32) for n, w in hf.tensors.items()}
    oracle.write_safetensors(hf.path / "model.safetensors", words, "F32")
    request = {"load_dir": hf.path, "save_dir": tmp_path / "copy", "save_format": "hf"}
    convert(Request(**request, params_dtype="bf16"))
    convert(Request(**request, params_dtype="bf16", verify_only=True))
    with pytest.raises(VerificationError, match=r"embeddings.weight is bfloat16, not float32"):
        convert(Request(**request, verify_only=True))


def test_the_other_side_may_be_the_damaged_one(tmp_path, make_hf):
    hf = make_hf()
    request = {"load_dir": hf.path, "save_dir": tmp_path / "copy", "save_format": "hf"}
    convert(Request(**request))
    extent = read_safetensors(hf.path / "model.safetensors")["lm_head.weight"]
    flip(extent.path, extent.offset + 100)
    with pytest.raises(
        VerificationError, match=r"lm_head.weight\[1, 18\] differs from .*lm_head.weight\[1, 18\]"
    ):
        convert(Request(**request, verify_only=True))


def test_what_fails_verification_gets_no_name(tmp_path, make_hf, monkeypatch):
    """A disk that stores something else than what was written."""
    from ml_convert.files import Files

    write = Files.write

    def faulty(files, path, offset, content):
        if content.nbytes == 64:  # a norm
            content = content ^ 1
        write(files, path, offset, content)

    monkeypatch.setattr(Files, "write", faulty)
    hf = make_hf()
    for save_format in ("mcore", "hf"):
        with pytest.raises(VerificationError, match=r"norm.weight"):
            convert(
                Request(
                    load_dir=hf.path,
                    save_dir=tmp_path / "out",
                    save_format=save_format,
                )
            )
        assert [path.name for path in tmp_path.iterdir()] == ["hf"]
