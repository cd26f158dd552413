"""torch itself reads what is written, and what torch writes is read."""

import argparse
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch

from ml_convert.errors import ConversionError
from ml_convert.ptfile import NewTensor, PtFile, read
from ml_convert.tensor import DTYPES

TENSORS = {
    "bfloat16": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "float32": torch.randn(5, generator=torch.Generator().manual_seed(0)),
    "float16": torch.ones(1, 2, 3, dtype=torch.float16),
    "float64": torch.tensor([[1.5]], dtype=torch.float64),
    "int64": torch.arange(3),
    "bool": torch.tensor([True, False]),
    "uint8": torch.arange(255, dtype=torch.uint8),
}
VALUE = {"args": argparse.Namespace(a=1, b="x", c=None), "iteration": 5}


def write(path, tensors):
    """Write tensors under their dtype's name, last first."""
    value = {
        **VALUE,
        "model": {n: NewTensor(DTYPES[n], tuple(t.shape)) for n, t in tensors.items()},
    }
    file = PtFile(value, archive=path.stem)
    contents = [t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors.values()]
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    for offset, content in reversed(list(zip(file.offsets, contents, strict=True))):
        os.pwrite(descriptor, content, offset)
    file.finish(descriptor, [zlib.crc32(content) for content in contents])
    os.close(descriptor)
    return file


@pytest.mark.parametrize("options", [{}, {"mmap": True}])
def test_torch_loads_what_is_written_without_trusting_it(tmp_path, options):
    path = tmp_path / "model.pt"
    write(path, TENSORS)
    with torch.serialization.safe_globals([argparse.Namespace]):
        found = torch.load(path, weights_only=True, **options)
    assert {key: found[key] for key in VALUE} == VALUE
    assert list(found["model"]) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert found["model"][name].dtype == tensor.dtype
        assert torch.equal(found["model"][name], tensor)


def test_the_archive_is_sound_and_as_large_as_announced(tmp_path):
    path = tmp_path / "model.pt"
    file = write(path, TENSORS)
    assert path.stat().st_size == file.size
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {name.partition("/")[0] for name in archive.namelist()} == {"model"}
        assert archive.read("model/byteorder") == b"little"
    assert all(offset % 64 == 0 for offset in file.offsets)


def test_a_wrong_checksum_would_be_noticed(tmp_path):
    path = tmp_path / "model.pt"
    file = write(path, TENSORS)
    with path.open("r+b") as stream:
        stream.seek(file.offsets[1])
        stream.write(b"\xff")
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() == "model/data/1"


def test_tensors_and_files_beyond_4_gib_have_64_bit_sizes(tmp_path):
    """The file is sparse: its tensors are holes."""
    path = tmp_path / "model.pt"
    rows = (5 << 30) // 1024
    value = {n: NewTensor(DTYPES["uint8"], (rows, 1024)) for n in ("first", "second")}
    value["last"] = NewTensor(DTYPES["uint8"], (3,))
    file = PtFile(value, archive="model")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    os.pwrite(descriptor, b"\x01\x02\x03", file.offsets[2])
    file.finish(descriptor, [0, 0, zlib.crc32(b"\x01\x02\x03")])
    os.close(descriptor)
    assert path.stat().st_size == file.size > 10 << 30
    found = torch.load(path, mmap=True, weights_only=True)
    assert found["first"].shape == found["second"].shape == (rows, 1024)
    assert found["last"].tolist() == [1, 2, 3]
    assert int(found["second"][-1].sum()) == 0
    saved = read(path)
    extent = saved.extent(saved.value["last"])
    assert (extent.offset, extent.shape) == (file.offsets[2], (3,))
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("model/data/1").file_size == 5 << 30
        assert archive.read("model/data/2") == b"\x01\x02\x03"


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_torch_saves_is_found_in_the_file(tmp_path, wrapped):
    path = tmp_path / "saved.pt"
    tensors = dict(TENSORS)
    if wrapped:
        tensors = {n: torch.nn.Parameter(t, requires_grad=False) for n, t in tensors.items()}
    torch.save({**VALUE, "model": tensors, "step": torch.optim.SGD}, path)
    saved = read(path)
    assert {key: saved.value[key] for key in VALUE} == VALUE
    content = path.read_bytes()
    for name, tensor in TENSORS.items():
        extent = saved.extent(saved.value["model"][name])
        assert (extent.dtype.name, extent.shape) == (name, tuple(tensor.shape))
        expected = tensor.reshape(-1).view(torch.uint8).numpy()
        found = np.frombuffer(content, np.uint8)[extent.offset : extent.offset + extent.nbytes]
        np.testing.assert_array_equal(found, expected)


def test_a_tensor_that_is_a_part_of_another_is_found_within_it(tmp_path):
    path = tmp_path / "saved.pt"
    whole = torch.arange(20, dtype=torch.float32).reshape(5, 4)
    torch.save({"whole": whole, "rows": whole[2:4]}, path)
    saved = read(path)
    found = saved.extent(saved.value["rows"])
    assert found.offset == saved.extent(saved.value["whole"]).offset + 2 * 16
    torch.save({"columns": whole[:, 1:3]}, path)
    with pytest.raises(ConversionError, match=r"saved.pt: .* is not contiguous"):
        read(path)


def test_a_storage_that_is_missing_or_short_is_named(tmp_path):
    path, broken = tmp_path / "model.pt", tmp_path / "broken.pt"
    write(path, TENSORS)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(broken, "w") as new:
        for info in old.infolist():
            if info.filename != "model/data/1":
                new.writestr(
                    info.filename, old.read(info)[: 10 if "data/0" in info.filename else None]
                )
    saved = read(broken)
    for name, key in (("bfloat16", 0), ("float32", 1)):
        with pytest.raises(ConversionError, match=f"broken.pt: storage {key} is missing or cut"):
            saved.extent(saved.value["model"][name])


def rewrite(path, members, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members:
            archive.writestr(name, content)


def test_files_that_are_no_sound_archive_are_refused(tmp_path):
    path = tmp_path / "bad.pt"
    write(path, TENSORS)
    whole = path.read_bytes()
    for size in (0, 10, 1000, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ConversionError, match=r"bad.pt: torn, or no file of torch.save"):
            read(path)
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ConversionError, match=r"bad.pt: torn, or no file of torch.save"):
        read(path)


@pytest.mark.parametrize(
    ("members", "options", "message"),
    [
        ([("m/version", b"3")], {}, "has no data.pkl"),
        ([("m/data.pkl", b"\x80\x02}."), ("m/byteorder", b"big")], {}, "big-endian"),
        (
            [("m/data.pkl", b"\x80\x02}."), ("m/data/0", b"1234" * 100)],
            {"compression": zipfile.ZIP_DEFLATED},
            "m/data.pkl is compressed",
        ),
        ([("m/data.pkl", b"\x80\x02}."), ("n/data.pkl", b"\x80\x02}.")], {}, "the same name"),
    ],
)
def test_archives_of_another_kind_are_refused(tmp_path, members, options, message):
    path = tmp_path / "bad.pt"
    rewrite(path, members, **options)
    with pytest.raises(ConversionError, match=f"bad.pt: .*{message}"):
        read(path)


def test_a_member_that_claims_to_be_longer_than_the_file_is_refused(tmp_path):
    path = tmp_path / "bad.pt"
    rewrite(path, [("m/data.pkl", b"\x80\x02}."), ("m/data/0", b"12345678")])
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02")
    content[entry + 20 : entry + 28] = struct.pack("<II", 10_000, 10_000)
    path.write_bytes(content)
    with pytest.raises(ConversionError, match="storage data/0 is compressed or cut short"):
        read(path)
