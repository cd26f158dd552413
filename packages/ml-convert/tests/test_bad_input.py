"""Every kind of bad input gives one clear line, the right exit code, and leaves nothing behind.

Full disks, Ctrl-C and kills are in test_output.py and test_resume.py.
"""

import json
import re
import shutil
import struct

import numpy as np
import pytest

from ml_convert.cli import main

SHARD = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def rewrite(path, change):
    """Change the header of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    text = change(content[8 : 8 + length].decode())
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + content[8 + length :])


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(hf):
    path = hf.path / SHARD
    path.write_bytes(path.read_bytes()[:-1])


def corrupt(hf):
    rewrite(hf.path / SHARD, lambda text: text.replace('"shape"', '"shipe"', 1))


def duplicate(hf):
    name = next(n for n, f in weight_map(hf).items() if f == SHARD)
    rewrite(
        hf.path / SHARD,
        lambda text: text.replace("}}", '}, "%s": {}}' % name, 1),  # noqa: UP031
    )


def weight_map(hf):
    return json.loads((hf.path / INDEX).read_text())["weight_map"]


def rename(hf, old, new):
    file = weight_map(hf)[old]
    rewrite(hf.path / file, lambda text: text.replace(f'"{old}"', f'"{new}"'))
    names = {new if name == old else name: f for name, f in weight_map(hf).items()}
    edit_json(hf.path / INDEX, weight_map=names)


def integers(hf):
    for file in set(weight_map(hf).values()):
        rewrite(hf.path / file, lambda text: text.replace('"BF16"', '"I16"'))


def mix(hf, oracle):
    """Keys in another dtype than queries and values."""
    files = {}
    for name, file in weight_map(hf).items():
        files.setdefault(file, []).append(name)
    for file, names in files.items():
        oracle.write_safetensors(hf.path / file, {n: hf.tensors[n] for n in names})
        for name in names:
            if name.endswith("layers.1.self_attn.k_proj.weight"):
                entry = f'"{name}": {{"dtype": "BF16"'
                rewrite(
                    hf.path / file,
                    lambda text, entry=entry: text.replace(entry, entry.replace("BF16", "F16")),
                )


CASES = {
    "truncated": (truncate, r"model-00002-of-00002.safetensors: torn, \d+ bytes instead of \d+"),
    "corrupt": (corrupt, r"model-00002-of-00002.safetensors: its header is damaged \('shape'\)"),
    "duplicate": (duplicate, r"00002.safetensors: its header is damaged \(a name is there twice\)"),
    "missing shard": (
        lambda hf: (hf.path / SHARD).unlink(),
        rf"{SHARD}: missing, though {INDEX} lists it",
    ),
    "index names another file": (
        lambda hf: edit_json(
            hf.path / INDEX, weight_map={**weight_map(hf), "lm_head.weight": "x.safetensors"}
        ),
        r"x.safetensors: missing, though|lm_head.weight is not listed",
    ),
    "unknown tensor": (
        lambda hf: rename(hf, "model.norm.weight", "model.extra.weight"),
        r"hf: model.norm.weight is missing$",
    ),
    "vocabulary": (
        lambda hf: edit_json(hf.path / "config.json", vocab_size=100),
        r"model.embed_tokens.weight has shape \[99, 32\], .* asks for \[100, 32\]",
    ),
    "no config": (
        lambda hf: (hf.path / "config.json").unlink(),
        r"config.json: missing",
    ),
    "config is a directory": (
        lambda hf: [(hf.path / "config.json").unlink(), (hf.path / "config.json").mkdir()],
        r"config.json: is a directory, not a file",
    ),
    "a name that no file can have": (
        lambda hf: edit_json(hf.path / INDEX, weight_map=dict.fromkeys(weight_map(hf), "x" * 300)),
        rf"{INDEX}: 'x+\.\.\.x+' is no name of a file beside it",
    ),
    "integers": (
        lambda hf: integers(hf),
        r"model.*.safetensors: \S+ is int16, which no weight is; quantized weights are not",
    ),
    "no JSON": (
        lambda hf: (hf.path / "config.json").write_text("{"),
        r"config.json: no JSON",
    ),
}


def run(hf, tmp_path, capfd, *more):
    """Convert; returns exit code and what was printed to the error stream."""
    words = ["--load-dir", hf.path, "--save-dir", tmp_path / "out", "--save-format", "mcore"]
    code = main([*map(str, words), *map(str, more)])
    printed = capfd.readouterr()
    assert not printed.out
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    (line,) = printed.err.splitlines()
    return code, line


@pytest.mark.parametrize("case", CASES)
def test_files_that_are_damaged_or_of_something_else(tmp_path, make_hf, capfd, case):
    damage, message = CASES[case]
    hf = make_hf(files=2)
    damage(hf)
    code, line = run(hf, tmp_path, capfd)
    assert code == 2
    assert re.search(message, line), line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--target-tensor-parallel-size", 3), "--target-tensor-parallel-size 3: must divide"),
        (("--target-expert-parallel-size", 2), "--target-expert-parallel-size 2"),
        (
            ("--target-pipeline-parallel-size", 2, "--num-layer-list", "1,2"),
            "--num-layer-list 1,2: ",
        ),
        (("--target-pipeline-parallel-size", 3), "--target-pipeline-parallel-size 3: "),
        (("--true-vocab-size", 98), "--true-vocab-size 98: "),
    ],
)
def test_layouts_that_do_not_fit(tmp_path, make_hf, capfd, flags, message):
    code, line = run(make_hf(), tmp_path, capfd, *flags)
    assert code == 2
    assert message in line


def test_parts_of_a_parameter_in_different_dtypes(tmp_path, make_hf, oracle, capfd):
    hf = make_hf(files=2)
    mix(hf, oracle)
    code, line = run(hf, tmp_path, capfd)
    assert code == 2
    assert "k_proj.weight is float16, but another part of decoder.layers.1.self_attention." in line


def test_a_rank_that_is_missing(tmp_path, make_hf, make_megatron, capfd):
    hf = make_hf("other")
    root = make_megatron(hf, "hf", tp=2, padded=256)
    shutil.rmtree(hf.path)
    shutil.rmtree(root / "iter_0000005" / "mp_rank_00")
    hf.path = root
    code, line = run(hf, tmp_path, capfd)
    assert code == 2
    assert "mp_rank_00: missing" in line


def test_an_output_that_exists_stays_as_it_is(tmp_path, make_hf, capfd):
    hf, out = make_hf(), tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("data")
    words = ["--load-dir", hf.path, "--save-dir", out, "--save-format", "hf"]
    assert main([*map(str, words)]) == 2
    assert "out: is not empty (it holds precious)" in capfd.readouterr().err
    assert [path.name for path in out.iterdir()] == ["precious"]


def test_numbers_that_do_not_fit_the_dtype(tmp_path, make_hf, oracle, capfd):
    hf = make_hf(dtype="F32")
    # One tensor only: several threads write, and which of two would be found first is not said.
    words = {name: np.zeros_like(word) for name, word in hf.tensors.items()}
    words["model.embed_tokens.weight"] += np.float32(1e30).view(np.uint32)
    oracle.write_safetensors(hf.path / "model.safetensors", words, "F32")
    code, line = run(hf, tmp_path, capfd, "--params-dtype", "fp16")
    assert code == 2
    assert "embedding.word_embeddings.weight: 1e+30 is too large for float16" in line
