"""Safetensors files are written to the letter of the format, and read with suspicion.

The reader of the oracle (conftest) is written from the format's description.
"""

import json
import os
import struct

import numpy as np
import pytest

from ml_convert.errors import ConversionError
from ml_convert.safetensors_file import SafetensorsFile, read
from ml_convert.tensor import DTYPES


def write(path, header, data=b"", *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_what_is_written_is_read_by_the_letter_of_the_format(tmp_path, oracle):
    path = tmp_path / "x.safetensors"
    tensors = {
        "odd": np.arange(3, dtype=np.uint16),
        "wide": np.arange(6, dtype=np.uint32).reshape(2, 3),
    }
    shapes = {
        "odd": (DTYPES["bfloat16"], (3,)),
        "wide": (DTYPES["float32"], (2, 3)),
    }
    file = SafetensorsFile(shapes)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    for offset, words in zip(file.offsets, tensors.values(), strict=True):
        os.pwrite(descriptor, words.tobytes(), offset)
    file.finish(descriptor, [])
    os.close(descriptor)
    assert path.stat().st_size == file.size
    assert file.offsets[1] % 4 == 0  # aligned although an odd tensor was listed before it
    found = oracle.read_safetensors(path)
    for name, words in tensors.items():
        np.testing.assert_array_equal(found[name], words)
    extents = read(path)
    assert [extents[name].offset for name in tensors] == list(file.offsets)
    assert extents["wide"].shape == (2, 3)
    assert extents["odd"].dtype.name == "bfloat16"


def test_tensors_of_no_elements_and_metadata_are_fine(tmp_path):
    path = tmp_path / "x.safetensors"
    header = {"__metadata__": {"a": "b"}, "e": entry(0, 0, [0, 4]), "w": entry(0, 4, [])}
    write(path, header, bytes(4))
    assert read(path)["w"].shape == ()


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"w": entry(0, 8, [2])}, 7, r"torn, \d+ bytes instead of \d+"),
        ({"w": entry(0, 8, [2])}, 9, "torn"),
        ({"w": entry(0, 8, [3])}, 8, r"shape \[3\] of float32 does not fill 8 bytes"),
        ({"w": entry(0, 8, [2]), "v": entry(4, 12, [2])}, 12, r"\(v overlaps another tensor\)"),
        ({"w": entry(0, 8, [2]), "v": entry(12, 20, [2])}, 20, r"\(v follows a gap\)"),
        ({"w": entry(4, 12, [2])}, 12, r"\(w follows a gap\)"),
        ({"w": entry(-8, 0, [2])}, 8, "whole numbers from 0 up"),
        ({"w": entry(0, 8, [-2])}, 8, "whole numbers from 0 up"),
        ({"w": entry(0, 8, [2.0])}, 8, "whole numbers from 0 up"),
        ({"w": entry(0, 8, [True, 2])}, 8, "whole numbers from 0 up"),
        ({"w": entry(0, 8, [2], "F4")}, 8, "dtype F4 is not supported"),
        ({"w": {"dtype": "F32"}}, 8, "its header is damaged"),
        ({"w": 3}, 8, "its header is damaged"),
        ([1, 2], 8, "its header is damaged"),
        (b'{"w": ', 8, "its header is damaged"),
        (b'{"w": {}, "w": {}}', 8, "a name is there twice"),
        (b"\xff\xfe\x00", 8, "its header is damaged"),
    ],
)
def test_damaged_headers_are_refused_with_the_name_of_the_file(tmp_path, header, data, message):
    path = tmp_path / "bad.safetensors"
    write(path, header, bytes(data))
    with pytest.raises(ConversionError, match=f"bad.safetensors: .*{message}"):
        read(path)


@pytest.mark.parametrize("length", [0, 1, 1000, 2**40, 2**64 - 1])
def test_a_length_that_cannot_be_is_refused_before_anything_is_read(tmp_path, length):
    path = tmp_path / "bad.safetensors"
    write(path, {"w": entry(0, 8, [2])}, bytes(8), length=length)
    with pytest.raises(ConversionError, match=r"bad.safetensors: torn, or no safetensors file"):
        read(path)


def test_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "bad.safetensors"
    write(path, {"w": entry(0, 8, [2]), "v": entry(8, 16, [2])}, bytes(16))
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ConversionError, match=r"bad.safetensors"):
            read(path)
