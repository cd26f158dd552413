"""The torch_dist format: all forms that torch.distributed.checkpoint writes are read, ours is read
by it, and what is damaged is named. (tests/test_torch_dist.py has megatron-core's own.)"""

import argparse
import json
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex

from ml_convert import distcp, torch_dist_metadata
from ml_convert.conversion import convert
from ml_convert.errors import ConversionError
from ml_convert.request import Request

LAYERS = 4


def run(source, target, save_format, **options):
    return convert(
        Request(load_dir=source, save_dir=target, save_format=save_format, **options)
    ).path


def as_tensor(words):
    return torch.from_numpy(words.copy()).view(torch.bfloat16)


@pytest.fixture
def hf(make_hf):
    return make_hf()


@pytest.fixture
def weights(oracle, hf):
    """The model's tensors as megatron-core names them, with all layers apart."""
    (chunks,) = oracle.cut_llama(hf, tp=1, stages=[[range(LAYERS)]], padded=128).values()
    return {name: as_tensor(words) for name, words in chunks[0].items()}


TE = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def renamed(name):
    for ours, theirs in TE.items():
        name = name.replace(ours, theirs)
    return name


def stacked(weights):
    """All layers in one tensor."""
    found = {n: t for n, t in weights.items() if ".layers." not in n}
    for name in [n for n in weights if ".layers.0." in n]:
        layers = [weights[name.replace(".layers.0.", f".layers.{n}.")] for n in range(LAYERS)]
        found[renamed(name.replace(".layers.0.", ".layers."))] = torch.stack(layers)
    return found


def apart(weights):
    """A tensor for each layer, under the names of the local layer spec, gate and up apart."""
    found = {}
    for name, tensor in weights.items():
        if "linear_fc1" in name:
            found[f"{name}_w"], found[f"{name}_v"] = tensor.chunk(2)
        else:
            found[name] = tensor
    return found


def prefixed(weights):
    """As other tools do it, beside the state of an optimizer."""
    found = {f"module.model.{name}": tensor for name, tensor in stacked(weights).items()}
    return found | {"optimizer.state.exp_avg.x": torch.ones(3), "rng_state": [1, 2]}


@pytest.fixture
def save(tmp_path, oracle, hf):
    """Save tensors with torch.distributed.checkpoint, without Megatron."""

    def save(tensors, *, args=None):
        path = tmp_path / "saved"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(tensors, checkpoint_id=path, no_dist=True)
        said = args or oracle.megatron_args(hf.config)
        torch.save({"args": said, "iteration": 5}, path / "common.pt")
        return path

    return save


@pytest.mark.parametrize("form", [stacked, apart, prefixed])
def test_what_torch_writes_is_read(form, weights, save, hf, oracle, tmp_path):
    result = run(save(form(weights)), tmp_path / "out", "hf")
    found = oracle.read_model(result)
    assert found.keys() == hf.tensors.keys()
    assert all((found[name] == words).all() for name, words in hf.tensors.items())


def test_torch_reads_what_is_written(hf, weights, tmp_path):
    path = run(hf.path, tmp_path / "out", "torch_dist", max_shard_size="40KB")
    assert len(list(path.glob("*.distcp"))) > 1
    expected = stacked(weights)
    found = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(found, checkpoint_id=path, no_dist=True)
    for name, tensor in expected.items():
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name
    assert json.loads((path / "metadata.json").read_text())["sharded_backend"] == "torch_dist"
    with torch.serialization.safe_globals([argparse.Namespace]):
        common = torch.load(path / "common.pt", weights_only=True)
    assert common["args"].num_layers == LAYERS
    assert common["content_metadata"]["non_homogeneous_layers"] is False


def test_the_last_row_may_be_repeated(hf, tmp_path):
    path = run(hf.path, tmp_path / "out", "torch_dist", pad_vocab="last-row")
    found = {"output_layer.weight": torch.zeros(128, 32, dtype=torch.bfloat16)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(found, checkpoint_id=path, no_dist=True)
    rows = found["output_layer.weight"].view(torch.int16)
    assert (rows[99:] == rows[98]).all()


def test_the_format_is_found_and_may_be_demanded(weights, save, tmp_path):
    saved = save(stacked(weights))
    again = run(saved, tmp_path / "a", "mcore", load_format="torch_dist")
    with pytest.raises(ConversionError, match="is not of the format torch_dist"):
        run(again, tmp_path / "b", "hf", load_format="torch_dist")
    with pytest.raises(ConversionError, match="is of the format torch_dist"):
        run(saved, tmp_path / "b", "hf", load_format="mcore")


# Damage


def change_metadata(path, change):
    """Rewrite `.metadata`."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


EMBEDDING = MetadataIndex("embedding.word_embeddings.weight", torch.Size([0, 0]))


def set_place(**fields):
    def change(metadata):
        index = next(i for i in metadata.storage_data if i.fqn == EMBEDDING.fqn)
        for name, value in fields.items():
            setattr(metadata.storage_data[index], name, value)

    return lambda path: change_metadata(path, change)


def set_size(path):
    def change(metadata):
        metadata.state_dict_metadata[EMBEDDING.fqn].size = torch.Size([128, 33])

    change_metadata(path, change)


def truncate(path):
    file = path / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-2000])


def corrupt_metadata(path):
    content = (path / ".metadata").read_bytes()
    (path / ".metadata").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "__0_0.distcp").unlink(), r"__0_0\.distcp: missing, though \.metadata"),
        (truncate, r"__0_0\.distcp: torn, \.metadata says that"),
        (set_place(offset=1 << 40), r"ends at byte 10\d+, but it has"),
        (set_place(offset=-5), "begins or ends before it"),
        (set_place(length=50), "no file of torch.save"),
        (set_place(relative_path="../x.distcp"), "is no name of a file beside it"),
        (set_place(transform_descriptors=["zstd"]), "compressed, which is not supported"),
        (set_size, r"the chunks of embedding.word_embeddings.weight hold 4096 elements"),
        (corrupt_metadata, "its pickle is damaged"),
        (lambda p: (p / ".metadata").write_bytes(pickle.dumps({"a": 1})), "it holds dict"),
        (lambda p: (p / "common.pt").unlink(), r"common\.pt: missing"),
        (
            lambda p: (p / "metadata.json").write_text('{"sharded_backend_version": 2}'),
            "sharded_backend_version is 2; 1 is supported",
        ),
        (lambda p: (p / "metadata.json").write_text('{"sharded_backend": "zarr"}'), "'zarr'"),
        (lambda p: (p / "metadata.json").write_text("{"), "no JSON"),
    ],
)
def test_damage_is_named(damage, message, weights, save, tmp_path):
    path = save(stacked(weights))
    damage(path)
    with pytest.raises(ConversionError, match=message):
        run(path, tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()


def test_a_wrong_tensor_in_a_file_is_named(weights, save, tmp_path):
    path = save(stacked(weights))

    def swap(metadata):
        places = metadata.storage_data
        first, second = [i for i in places if "final" in i.fqn or "embedding" in i.fqn]
        places[first], places[second] = places[second], places[first]

    change_metadata(path, swap)
    with pytest.raises(ConversionError, match="is not the bfloat16 tensor of shape"):
        run(path, tmp_path / "out", "hf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("decoder.final_layernorm.weight"), "final_layernorm.weight is missing"),
        (lambda t: t.update({"decoder.x": torch.ones(2)}), "decoder.x is not part of this model"),
        (
            lambda t: t.update({"decoder.final_layernorm.weight": torch.ones(31).bfloat16()}),
            r"has shape \[31\], the model's description asks for \[32\]",
        ),
        (lambda t: t.pop("embedding.word_embeddings.weight"), "word_embeddings.weight is missing"),
        (
            lambda t: t.update(
                {"decoder.final_layernorm.weight": torch.ones(32).to(torch.complex64)}
            ),
            "dtype that is not supported",
        ),
    ],
)
def test_other_tensors_than_the_models_are_named(change, message, weights, save, tmp_path):
    tensors = stacked(weights)
    change(tensors)
    with pytest.raises(ConversionError, match=message):
        run(save(tensors), tmp_path / "out", "hf")


def test_the_number_of_layers_must_be_that_of_the_args(weights, save, hf, oracle, tmp_path):
    args = oracle.megatron_args(hf.config, num_layers=5)
    with pytest.raises(ConversionError, match=r"has shape \[4, .*asks for \[5, "):
        run(save(stacked(weights), args=args), tmp_path / "out", "hf")


class Malicious:
    def __reduce__(self):
        return (pytest.fail, ("executed",))


def test_nothing_in_a_pickle_is_executed(weights, save, hf, oracle, tmp_path, caplog):
    args = oracle.megatron_args(hf.config, evil=Malicious())
    path = save(stacked(weights), args=args)

    def add(metadata):
        metadata.planner_data = Malicious()

    change_metadata(path, add)
    run(path, tmp_path / "out", "hf")
    assert "holds objects that were not loaded: _pytest" in caplog.text
    with pytest.raises(ConversionError, match=r"its pickle names _pytest.*--strict-pickle"):
        run(path, tmp_path / "strict", "hf", strict_pickle=True)


def test_harmless_pickles_pass_strictly(weights, save, tmp_path):
    path = save(stacked(weights))
    run(path, tmp_path / "out", "torch_dist", strict_pickle=True)
    run(tmp_path / "out", tmp_path / "again", "hf", strict_pickle=True)


def test_layers_of_different_dtypes_do_not_fit_one_tensor(weights, tmp_path, save):
    tensors = apart(weights)
    name = "decoder.layers.2.self_attention.linear_proj.weight"
    tensors[name] = torch.nan_to_num(tensors[name].float())
    path = save(tensors)
    with pytest.raises(ConversionError, match=r"would hold .*; give --params-dtype"):
        run(path, tmp_path / "out", "torch_dist")


def test_no_mutation_of_the_metadata_crashes(weights, save):
    path = save(stacked(weights))
    content = (path / ".metadata").read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        changed = bytearray(content)
        for place in random.integers(0, len(content), random.integers(1, 4)):
            changed[place] = random.integers(256)
        (path / ".metadata").write_bytes(changed)
        try:
            metadata = torch_dist_metadata.read(path)
            distcp.tensors(path, metadata, metadata.tensors)
        except ConversionError:
            refused += 1
    assert refused > 100
