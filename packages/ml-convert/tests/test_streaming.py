"""The iterators give the tensors of a Hugging Face model, from a checkpoint of any format."""

import numpy as np
import pytest
import torch

import ml_convert
from ml_convert import ConversionError, Request, convert


@pytest.fixture
def checkpoints(tmp_path, make_hf):
    """A model, and directories that hold it."""
    hf = make_hf(files=2)
    cut = {"target_tensor_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}
    convert(
        Request(
            load_dir=hf.path,
            save_dir=tmp_path / "mg",
            save_format="mcore",
            target_pipeline_parallel_size=2,
            **cut,
        )
    )
    return hf, (hf.path, tmp_path / "mg")


def test_every_tensor_comes_once_in_the_order_of_the_model(checkpoints):
    hf, places = checkpoints
    for place in places:
        found = list(ml_convert.tensors(place))
        assert [name for name, _ in found] == list(dict(found))
        assert dict(found).keys() == hf.tensors.keys()
        assert found[0][0] == "model.embed_tokens.weight"
        for name, array in found:
            assert array.dtype == np.uint16  # numpy has no bfloat16
            np.testing.assert_array_equal(array, hf.tensors[name])


def test_torch_takes_them_as_the_readme_says(checkpoints):
    hf, (_, megatron) = checkpoints
    for name, array in ml_convert.tensors(str(megatron), hf_config=str(hf.path)):
        tensor = torch.from_numpy(array)
        assert tensor.dtype == torch.uint16
        tensor = tensor.view(torch.bfloat16)
        np.testing.assert_array_equal(tensor.view(torch.uint16).numpy(), hf.tensors[name])


def test_another_dtype_on_request(make_hf, oracle):
    hf = make_hf(dtype="F32")
    numbers = {n: np.random.default_rng(0).normal(size=w.shape).astype(np.float32)
               for n, w in hf.tensors.items()}  # fmt: skip
    words = {name: array.view(np.uint32) for name, array in numbers.items()}
    oracle.write_safetensors(hf.path / "model.safetensors", words, "F32")
    for name, array in ml_convert.tensors(hf.path):
        np.testing.assert_array_equal(array, numbers[name])
    for name, array in ml_convert.tensors(hf.path, params_dtype="bf16"):
        wanted = torch.from_numpy(numbers[name]).bfloat16()
        assert torch.from_numpy(array).view(torch.bfloat16).equal(wanted)


def test_mistakes_are_those_of_a_conversion(tmp_path, make_hf):
    with pytest.raises(ConversionError, match="nowhere: no such directory"):
        next(ml_convert.tensors(tmp_path / "nowhere"))
    with pytest.raises(TypeError, match="unexpected keyword argument 'iterration'"):
        next(ml_convert.tensors(make_hf().path, iterration=3))
