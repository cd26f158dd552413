"""A small run of `ml-train pretrain`: its flags, its process, and what it leaves behind."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from token_files import describe, write_corpus

VOCABULARY = 97


def predictable_corpus(folder):
    """Return the prefix of token files in which each token follows from the one before."""
    prefix = str(folder / "text_document")
    write_corpus(Path(prefix), [200] * 60)
    tokens = Path(f"{prefix}.bin")
    ids = np.fromfile(tokens, dtype=np.int32)
    (ids * 7 % VOCABULARY).astype(np.int32).tofile(tokens)
    return describe(prefix, vocab_size=VOCABULARY)


def flags(corpus, **changes):
    """Return the command line of a small run; None leaves a flag out, True gives it bare."""
    values = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 64,
        "max_position_embeddings": 64,
        "swiglu": True,
        "normalization": "RMSNorm",
        "disable_bias_linear": True,
        "untie_embeddings_and_output_weights": True,
        "make_vocab_size_divisible_by": 8,
        "seq_length": 32,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "train_iters": 8,
        "lr": 3e-3,
        "lr_decay_style": "cosine",
        "data_path": corpus,
        "split": "90,10,0",
        "device": "cpu",
        **changes,
    }
    words = []
    for name, value in values.items():
        if value is None:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words += [str(item) for item in (value if isinstance(value, list) else [value])]
    return words


def command(words):
    """Return the installed command: `python -m` would look for modules in the current directory."""
    return [str(Path(sys.executable).with_name("ml-train")), "pretrain", *words]


def run(words, **more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(words), capture_output=True, text=True, timeout=400, env=environment, **more
    )


def started(words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command(words), stdout=pipe, stderr=pipe, text=True, env=environment)


def copied(checkpoints, folder):
    """Return a copy of a run's checkpoints, to go on from."""
    return shutil.copytree(checkpoints, folder / "checkpoints")


def wait_for_step(process, number):
    for line in process.stdout:
        if re.match(rf" iteration +{number}/", line):
            return
    raise AssertionError(process.stderr.read())


def steps(path):
    entries = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [entry for entry in entries if entry["kind"] == "step"]


def weights(folder):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return {
            (path.parent.name, name): tensor
            for path in sorted(folder.glob("mp_rank_*/model_optim_rng.pt"))
            for name, tensor in torch.load(path, weights_only=True)["model"].items()
        }


def assert_one_line(text, *parts):
    """A clear message: one line, without a traceback, that says all parts."""
    assert "Traceback" not in text
    for part in parts:
        assert part in text
    (line,) = text.splitlines()
    assert re.match(r"(\[rank \d+\] )?ml-train", line)
