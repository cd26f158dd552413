"""Padding of the vocabulary: zeros, or the last row again, and nothing else."""

import megatron_files as files
import numpy as np
import pytest

from ml_convert import ConversionError, Request, VerificationError, convert
from ml_convert.rank_files import read_ranks

MODEL = files.Model(files.DENSE)


def request(root, tmp_path, **options):
    return Request(
        load_dir=root,
        save_dir=tmp_path / "out",
        save_format="mcore",
        target_tensor_parallel_size=4,
        **options,
    )


@pytest.mark.parametrize("fill", ["zeros", "last-row"])
def test_ranks_of_nothing_but_padding_are_filled(tmp_path, oracle, fill):
    """50 rows are 25 on each of the first two of four ranks of 32."""
    root = MODEL.write(tmp_path / "hf", oracle.write_safetensors)
    path = convert(request(root, tmp_path, padded_vocab_size=128, pad_vocab=fill)).path
    expected = files.cut(MODEL, tp=4, padded=128, fill=fill)
    files.assert_same(files.read(path), expected)
    args = read_ranks(path).args
    assert (args.padded_vocab_size, args.make_vocab_size_divisible_by) == (128, 32)
    last = expected["mp_rank_03"]["model"]["output_layer.weight"]
    assert last.any() == (fill == "last-row")
    # what reads it back cuts it off
    back = Request(load_dir=tmp_path / "out", save_dir=tmp_path / "back", save_format="hf")
    found = oracle.read_model(convert(back).path)
    np.testing.assert_array_equal(found["lm_head.weight"], MODEL.tensors["lm_head.weight"])


@pytest.mark.parametrize(("fill", "what"), [("zeros", "zero"), ("last-row", "a repetition of the")])
def test_other_padding_than_was_asked_for_is_found(tmp_path, oracle, fill, what):
    root = MODEL.write(tmp_path / "hf", oracle.write_safetensors)
    other = {"zeros": "last-row", "last-row": "zeros"}[fill]
    convert(request(root, tmp_path, padded_vocab_size=56, pad_vocab=other))
    again = request(root, tmp_path, padded_vocab_size=56, pad_vocab=fill, verify_only=True)
    with pytest.raises(VerificationError, match=rf"row 8 of .* is padding, but not {what}"):
        convert(again)


def test_a_vocabulary_that_cannot_be_padded_so_is_refused(tmp_path, oracle):
    root = MODEL.write(tmp_path / "hf", oracle.write_safetensors)
    with pytest.raises(ConversionError, match="--padded-vocab-size 48: must be at least the voc"):
        convert(request(root, tmp_path, padded_vocab_size=48))
    with pytest.raises(ConversionError, match="--padded-vocab-size 54: must be divisible by"):
        convert(request(root, tmp_path, padded_vocab_size=54))
