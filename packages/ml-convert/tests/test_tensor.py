"""Casts round as torch does, and refuse what would become infinite."""

import itertools

import numpy as np
import pytest
import torch

from ml_convert.casting import cast
from ml_convert.errors import ConversionError
from ml_convert.tensor import DTYPES

FLOATS = ("float32", "float16", "bfloat16")


def as_bytes(tensor):
    return tensor.contiguous().view(torch.uint8).numpy()


def random_numbers(dtype):
    """Numbers of all magnitudes that float16 can hold, halfway cases, zeros, infinities, NaN."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(64, 512, generator=generator) * torch.logspace(-6, 3.5, 512)
    numbers[0, :6] = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-8])
    bits = torch.arange(512, dtype=torch.int32) * 0x80 + 0x3F800000  # ties of bfloat16
    numbers[1] = bits.view(torch.float32)
    return numbers.to(getattr(torch, dtype))


@pytest.mark.parametrize(("source", "target"), list(itertools.product(FLOATS, FLOATS)))
def test_casts_are_bit_equal_to_those_of_torch(source, target):
    numbers = random_numbers(source)
    expected = numbers.to(getattr(torch, target))
    found = cast(as_bytes(numbers), DTYPES[source], DTYPES[target])
    if source != target:
        found_numbers = torch.from_numpy(found.copy()).view(getattr(torch, target))
        assert torch.equal(found_numbers.isnan(), expected.isnan())
        found, expected = found_numbers.nan_to_num(7.0), expected.nan_to_num(7.0)
        assert torch.equal(found, expected)
        assert torch.equal(found.signbit(), expected.signbit())
    else:
        np.testing.assert_array_equal(found, as_bytes(numbers))


def test_every_bfloat16_pattern_survives_a_visit_to_float32():
    words = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    words = words[(words & 0x7F80 != 0x7F80).all(axis=1)]  # rows without NaN and infinity
    wide = cast(words.view(np.uint8), DTYPES["bfloat16"], DTYPES["float32"])
    back = cast(wide, DTYPES["float32"], DTYPES["bfloat16"])
    np.testing.assert_array_equal(back, words.view(np.uint8))


def test_a_number_that_would_become_infinite_is_refused():
    numbers = np.array([[1.0, 70000.0]], np.float32).view(np.uint8)
    with pytest.raises(ConversionError, match="70000 is too large for float16"):
        cast(numbers, DTYPES["float32"], DTYPES["float16"])


def test_only_floating_point_numbers_are_cast():
    with pytest.raises(ConversionError, match="int64 cannot be converted to float32"):
        cast(np.zeros((1, 8), np.uint8), DTYPES["int64"], DTYPES["float32"])
