"""Pickles are read without executing anything, and written so that any reader agrees."""

import argparse
import collections
import enum
import fractions
import io
import os
import pickle

import pytest

from ml_convert import pickles, torch_dist_metadata
from ml_convert.errors import ConversionError
from ml_convert.pickles import Opaque, TensorPickle, dump, load
from ml_convert.tensor import DTYPES

PLAIN = {
    "none": None,
    "yes": True,
    "no": False,
    "int": 7,
    "negative": -1,
    "large": 2**31,
    "larger": -(2**100),
    "float": 0.1,
    "text": "Grüße, 世界\n",
    "list": [1, [2.5, "x"], []],
    "tuple": (1, (), ("a",)),
    "dict": {1: {"a": {}}},
    "empty": "",
}


def test_plain_values_are_written_as_pythons_own_pickle_reads_them():
    found = pickle.loads(dump({**PLAIN, "args": argparse.Namespace(**PLAIN)}))
    assert found == {**PLAIN, "args": argparse.Namespace(**PLAIN)}
    assert all(type(found[key]) is type(value) for key, value in PLAIN.items())


def test_what_is_written_is_read_back_tensors_included():
    tensor = TensorPickle(DTYPES["bfloat16"], (3, 4), "12", 5)
    with pytest.raises(ConversionError, match="beyond its storage"):
        load(dump({"w": tensor}), "x")  # a storage holds what its tensor needs, from 0 on
    tensor = TensorPickle(DTYPES["bfloat16"], (3, 4), "12")
    assert load(dump({**PLAIN, "w": tensor}), "x") == {**PLAIN, "w": tensor}


def test_other_values_are_not_written():
    with pytest.raises(TypeError, match="Fraction cannot be written"):
        dump({"x": fractions.Fraction(1, 3)})


class Colour(enum.Enum):
    RED = 1


class Thing:
    def __init__(self):
        self.parts = [1, 2]


class Reduced:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_objects_of_unknown_classes_become_inert(protocol):
    values = {
        "enum": Colour.RED,
        "object": Thing(),
        "path": Reduced(os.path.join, ("a", "b")),
        "set": {1, 2},
        "counter": collections.Counter("aab"),
        "kept": [1, "a"],
    }
    found = load(pickle.dumps(values, protocol), "x")
    assert found["kept"] == [1, "a"]
    for name in ("enum", "object", "path", "counter"):
        assert isinstance(found[name], Opaque), name
    assert "join, not loaded" in repr(found["path"])


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_malicious_pickle_has_no_effect(tmp_path, protocol):
    mark = tmp_path / "executed"
    calls = [
        (os.system, (f"touch {mark}",)),
        (eval, (f"open({str(mark)!r}, 'w')",)),
        (exec, (f"open({str(mark)!r}, 'w')",)),
        (open, (str(mark), "w")),
        (print, ("executed",)),
    ]
    values = {str(n): Reduced(*call) for n, call in enumerate(calls)}
    found = load(pickle.dumps(values, protocol), "x")
    assert all(isinstance(value, Opaque) for value in found.values())
    assert not mark.exists()
    pickle.loads(pickle.dumps(Reduced(*calls[0])))  # the payload is real
    assert mark.exists()


def test_a_stand_in_may_be_called_and_filled_without_effect(tmp_path):
    mark = tmp_path / "executed"
    # (os.system)(...) with the callable made by another call, items set and appended to it
    program = (
        b"\x80\x02cfunctools\npartial\ncos\nsystem\n\x85R"
        + dump(f"touch {mark}")[2:-1]
        + b"\x85R"
        + b"(K\x01K\x02u(K\x03K\x04eK\x05a}b."
    )
    assert isinstance(load(program, "x"), Opaque)
    assert not mark.exists()


def tensor_pickle(*, storage=b"BFloat16Storage", kind="storage", size=12, **rebuild):
    """A pickle of one tensor with chosen fields."""
    given = {"offset": 0, "shape": (3, 4), "stride": (4, 1), **rebuild}
    out = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(("
    out += dump(kind)[2:-1] + b"ctorch\n" + storage + b"\n" + dump("0")[2:-1] + dump("cpu")[2:-1]
    out += dump(size)[2:-1] + b"tQ"
    for name in ("offset", "shape", "stride"):
        out += dump(given[name])[2:-1]
    return out + b"\x89ccollections\nOrderedDict\n)RtR."


def test_a_tensor_is_a_part_of_a_storage():
    found = load(tensor_pickle(size=20, offset=8), "x")
    assert found == TensorPickle(DTYPES["bfloat16"], (3, 4), "0", 8)
    column = load(tensor_pickle(shape=(3, 1), stride=(1, 7)), "x")
    assert column.shape == (3, 1)  # the stride of a dimension of size 1 means nothing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stride": (1, 3)}, r"file.pt: a tensor of shape \(3, 4\) is not contiguous"),
        ({"size": 11}, "reaches beyond its storage"),
        ({"offset": -1}, "reaches beyond its storage"),
        ({"shape": (-3, -4)}, "not contiguous|beyond"),
        ({"storage": b"ComplexFloatStorage"}, "tensors of type .* are not supported"),
        ({"kind": "module"}, "unknown persistent id 'module'"),
        ({"stride": (4,)}, "its pickle is damaged"),
        ({"offset": "x"}, "its pickle is damaged"),
    ],
)
def test_impossible_tensors_are_refused(changes, message):
    with pytest.raises(ConversionError, match=message):
        load(tensor_pickle(**changes), "file.pt")


def test_damage_is_reported_with_the_name_of_the_file():
    whole = dump(PLAIN)
    for end in range(0, len(whole), 7):
        with pytest.raises(ConversionError, match=r"file.pt: its pickle is damaged"):
            load(whole[:end], "file.pt")
    with pytest.raises(ConversionError, match=r"file.pt: its pickle is damaged"):
        load(b"\x80\x02]" + b"0" * 10 + b".", "file.pt")


def test_nothing_is_looked_up_in_the_registry_of_extensions():
    import copyreg

    copyreg.add_extension("os", "system", 0x7F)
    try:
        found = load(b"\x80\x02\x82\x7fX\x04\x00\x00\x00true\x85R.", "x")
    finally:
        copyreg.remove_extension("os", "system", 0x7F)
    assert isinstance(found, Opaque)


def test_dumps_are_small_streams_of_protocol_2():
    content = dump({"a": 1})
    assert content[:2] == b"\x80\x02"
    assert pickle.load(io.BytesIO(content)) == {"a": 1}


@pytest.mark.parametrize("known", [pickles._KNOWN, torch_dist_metadata._KNOWN])
def test_a_pickle_cannot_change_what_it_names(known):
    text = "X\6\0\0\0marked\x88"
    states = [f"}}{text}s", f"(N}}{text}st"]  # of attributes, and of attributes to be set
    for (module, name), value in known.items():
        for state in states:
            program = f"\x80\2c{module}\n{name}\n{state}b.".encode("latin-1")
            with pytest.raises(ConversionError):
                load(program, "x", known=known)
            assert not hasattr(value, "marked"), (module, name)
    assert not hasattr(argparse.Namespace, "marked")
