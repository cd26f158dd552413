"""How thoroughly a result is checked is chosen; what is rounded is said."""

import numpy as np
import pytest

from ml_convert import ConversionError, Request, VerificationError, convert
from ml_convert.files import Files


def request(hf, tmp_path, **options):
    options = {"target_tensor_parallel_size": 2, **options}
    return Request(load_dir=hf.path, save_dir=tmp_path / "out", save_format="mcore", **options)


@pytest.fixture
def numbers(make_hf, oracle):
    """A model in float32, of ordinary numbers."""
    hf, random = make_hf(dtype="F32"), np.random.default_rng(0)
    hf.tensors = {n: random.normal(size=w.shape).astype(np.float32).view(np.uint32)
                  for n, w in hf.tensors.items()}  # fmt: skip
    oracle.write_safetensors(hf.path / "model.safetensors", hf.tensors, "F32")
    return hf


def damaging(monkeypatch, *, when):
    """A disk that stores something else than what was written, from a moment on."""
    write, seen = Files.write, []

    def faulty(files, path, offset, content):
        seen.append(path)
        if when(path) and content.nbytes == 64:  # a norm
            content = content ^ 1
        write(files, path, offset, content)

    monkeypatch.setattr(Files, "write", faulty)
    return seen


@pytest.mark.parametrize("level", ["none", "plan", "bits", "roundtrip"])
def test_only_levels_that_read_everything_find_a_wrong_bit(tmp_path, make_hf, monkeypatch, level):
    hf = make_hf()
    damaging(monkeypatch, when=lambda path: path.suffix == ".pt")
    if level in ("none", "plan"):
        assert not convert(request(hf, tmp_path, verify=level)).verified
        return
    with pytest.raises(VerificationError, match=r"norm.weight"):
        convert(request(hf, tmp_path, verify=level))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_the_plan_of_what_was_written_is_checked_on_request(tmp_path, make_hf, monkeypatch):
    """A structure that says something else than what was meant."""
    from ml_convert import ptfile

    hf = make_hf()
    with monkeypatch.context() as patch:
        patch.setattr(ptfile, "_directory_entry", lambda _member, _crc: b"")
        with pytest.raises(ConversionError, match=r"no file of torch.save, it has no data.pkl"):
            convert(request(hf, tmp_path, verify="plan"))
    assert not (tmp_path / "out").exists()


def test_a_round_trip_finds_what_comes_back_as_something_else(tmp_path, make_hf, monkeypatch):
    hf = make_hf(files=2)
    assert convert(request(hf, tmp_path, verify="roundtrip")).verified
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]
    seen = damaging(monkeypatch, when=lambda path: path.name == "roundtrip.partial")
    back = Request(
        load_dir=tmp_path / "out", save_dir=tmp_path / "x", save_format="hf", verify="roundtrip"
    )
    with pytest.raises(
        VerificationError, match=r"mp_rank_0\d/.*norm.* comes back .* something els"
    ):
        convert(back)
    assert "roundtrip.partial" in {path.name for path in seen}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


def test_a_round_trip_through_a_wider_type_is_possible(tmp_path, make_hf, oracle):
    quiet = make_hf()
    words = {n: np.full(w.shape, 0x3F80, np.uint16) for n, w in quiet.tensors.items()}
    oracle.write_safetensors(quiet.path / "model.safetensors", words)
    report = convert(request(quiet, tmp_path, params_dtype="fp32", verify="roundtrip"))
    assert report.verified
    assert report.rounded == 0


def test_a_round_trip_of_rounded_numbers_is_refused_before_anything_is_written(tmp_path, numbers):
    with pytest.raises(ConversionError, match="weight is rounded from float32 to bfloat16"):
        convert(request(numbers, tmp_path, params_dtype="bf16", verify="roundtrip"))
    assert not (tmp_path / "out").exists()


def test_rounded_elements_are_counted(tmp_path, numbers):
    report = convert(request(numbers, tmp_path, params_dtype="bf16"))
    expected = sum(np.count_nonzero(words & 0xFFFF) for words in numbers.tensors.values())
    assert report.rounded == expected > 10_000
    again = Request(load_dir=tmp_path / "out", save_dir=tmp_path / "fp32", save_format="hf",
                    params_dtype="fp32")  # fmt: skip
    assert convert(again).rounded == 0
