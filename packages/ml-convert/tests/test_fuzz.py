"""Damaged files: readers refuse them with an error of ours, and take no memory to speak of."""

import itertools
import json
import random
import struct
import tracemalloc

import pytest

from ml_convert import ConversionError, Request, convert, pickles, ptfile, safetensors_file
from ml_convert.huggingface import open_model, read_json
from ml_convert.input import open_source
from ml_convert.megatron import open_checkpoint
from ml_convert.pickle_sizes import check_sizes

MUTATIONS = 300
EXTREME = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1)


def mutations(content, seed, places):
    """Damage a file in one to three places, most of them where its structure is."""
    numbers = random.Random(seed)
    for _ in range(MUTATIONS):
        damaged = bytearray(content)
        for _ in range(numbers.randint(1, 3)):
            first, stop = numbers.choice(places)
            place = numbers.randrange(first, min(stop, max(first + 1, len(damaged))))
            match numbers.randrange(5):
                case 0:
                    damaged[place : place + 1] = bytes([numbers.randrange(256)])
                case 1:
                    size = numbers.choice((1, 2, 4, 8))
                    value = numbers.choice(EXTREME) & ((1 << 8 * size) - 1)
                    damaged[place : place + size] = value.to_bytes(size, "little")
                case 2:
                    del damaged[place : place + numbers.choice((1, 2, 8, 100))]
                case 3:
                    damaged[place:place] = damaged[place : place + numbers.choice((1, 3, 50))]
                case 4:
                    digits = str(numbers.choice(EXTREME)).encode()
                    damaged[place : place + len(digits)] = digits
        yield bytes(damaged)


def check(path, read, contents):
    """Read each content; returns how many were refused."""
    refused = 0
    tracemalloc.start()
    try:
        for content in contents:
            path.write_bytes(content)
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            try:
                read()
            except ConversionError as error:
                refused += 1
                lines = str(error).splitlines()
                assert len(lines) == 1, lines
            assert tracemalloc.get_traced_memory()[1] - before < (1 << 20) + 100 * len(content)
    finally:
        tracemalloc.stop()
    return refused


def test_headers_of_safetensors(make_hf):
    path = make_hf().path / "model.safetensors"
    content = path.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    contents = mutations(content, 0, [(0, 8), (8, end), (8, end)])
    assert check(path, lambda: safetensors_file.read(path), contents) > MUTATIONS // 2
    path.write_bytes(struct.pack("<Q", 100_000) + b'{"a":' + b"[" * 99_990 + b"     ")
    with pytest.raises(ConversionError, match="its header is damaged"):
        safetensors_file.read(path)


def test_indices(make_hf):
    hf = make_hf(files=2)
    path = hf.path / "model.safetensors.index.json"
    content = path.read_bytes()
    contents = mutations(content, 1, [(0, len(content))])
    read = lambda: open_model(hf.path, model_type=None)  # noqa: E731
    assert check(path, read, contents) > MUTATIONS // 2
    path.write_bytes(b"[" * 100_000)
    with pytest.raises(ConversionError, match="no JSON"):
        read_json(path)


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/passwd", "", ".", "..", "a/b", 3, None, ["x"], "x\0y"]
)
def test_an_index_names_only_files_beside_it(make_hf, file):
    hf = make_hf(files=2)
    path = hf.path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = file
    path.write_text(json.dumps(index))
    with pytest.raises(ConversionError, match=r"index.json"):
        open_model(hf.path, model_type=None)


def test_files_of_torch(make_hf, make_megatron):
    root = make_megatron(make_hf(), tp=1)
    path = root / "iter_0000005" / "mp_rank_00" / "model_optim_rng.pt"
    content = path.read_bytes()
    pickled = content.index(b"\x80\x02")
    end = content.index(b"PK\x03\x04", pickled)
    directory = content.index(b"PK\x01\x02")
    places = [(0, pickled), (pickled, end), (pickled, end), (directory, len(content))]
    read = lambda: open_checkpoint(  # noqa: E731
        root / "iter_0000005", default=None, true_vocab_size=None
    )
    assert check(path, read, mutations(content, 2, places)) > MUTATIONS // 3


def test_metadata_of_torch_dist(make_hf, tmp_path):
    options = {"load_dir": make_hf().path, "save_format": "torch_dist"}
    convert(Request(**options, save_dir=tmp_path / "dist"))
    path = tmp_path / "dist" / "release" / ".metadata"
    content = path.read_bytes()
    (tmp_path / "dist" / "release" / "manifest.json").unlink()
    request = Request(load_dir=path.parent, save_dir=tmp_path / "out", save_format="hf")
    read = lambda: open_source(request)  # noqa: E731
    read()
    contents = itertools.islice(mutations(content, 3, [(0, len(content))]), 150)
    assert check(path, read, contents) > 50


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02K\x01r\xff\xff\xff\x7f.", "remembers more objects"),
        (b"\x80\x02K\x01p2147483647\n.", "remembers more objects"),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "reaches beyond the end"),
        (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.", "reaches beyond the end"),
        (b"\x80\x02K\x01", "it has no end"),
        (b"\x80\x02\x01.", "no operation"),
        (b"\x80\x02cos\nsystem", "not found"),
    ],
)
def test_numbers_in_pickles_are_checked_before_they_are_used(content, message):
    with pytest.raises(ValueError, match=message):
        check_sizes(content)


def test_a_pickle_that_asks_for_much_is_refused_before_it_is_loaded():
    with pytest.raises(ConversionError, match=r"bad.pt: its pickle is damaged .*more objects"):
        pickles.load(b"\x80\x02K\x01r\xff\xff\xff\x00.", "bad.pt")


def test_a_pickle_that_is_compressed_is_not_unpacked(tmp_path):
    import zipfile

    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(1 << 24))
    with pytest.raises(ConversionError, match=r"a/data.pkl is compressed, or longer than its file"):
        ptfile.read(path)
