"""From records to a trained step: what `ml-data instruct` writes is what `ml-train` learns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from ml_data.instruction.sample_info import read_sample_info

MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64 --swiglu "
    "--max-position-embeddings 64 --normalization RMSNorm --disable-bias-linear --seq-length 64 "
    "--train-iters 1 --lr 1e-3 --split 1 --device cpu --is-instruction-dataset"
)
RECORDS = 24


def run(program: str, *words: str) -> None:
    command = [str(Path(sys.executable).with_name(program)), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def save_tokenizer(folder: Path) -> None:
    """Train a small tokenizer that ends texts."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["Human: Assistant: " * 2] * 2, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')


def first_step(prefix: Path, metrics: Path, rows: int, *more: str) -> dict[str, Any]:
    words = [*MODEL.split(), "--data-path", str(prefix), "--global-batch-size", str(rows)]
    run("ml-train", "pretrain", *words, "--metrics-file", str(metrics), *more)
    entries = map(json.loads, metrics.read_text().splitlines())
    (step,) = (entry for entry in entries if entry["kind"] == "step")
    return dict(step)


@pytest.mark.slow
def test_packed_samples_train_as_those_that_are_not_packed(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer")
    records = [
        {"instruction": f"{n}?", "input": "", "output": f"{n * n}. " * (1 + n % 3)}
        for n in range(RECORDS)
    ]
    source = tmp_path / "records.jsonl"
    source.write_text("\n".join(map(json.dumps, records)))
    given = ["--input", str(source), "--tokenizer-name-or-path", str(tmp_path / "tokenizer")]
    given += ["--handler-name", "AlpacaStyleInstructionHandler", "--prompt-type", "default"]
    steps = {}
    for name, more in (("alone", []), ("rows", ["--pack"])):
        prefix = tmp_path / name
        run(
            "ml-data",
            "instruct",
            *given,
            "--seq-length",
            "64",
            "--output-prefix",
            f"{prefix}",
            *more,
        )
        info = read_sample_info(prefix)
        assert info is not None
        assert info.samples == RECORDS
        assert (info.rows < 20) == (name == "rows")
        steps[name] = first_step(prefix, tmp_path / f"{name}.jsonl", info.rows)
    for value in ("loss", "grad_norm"):
        assert steps["rows"][value] == pytest.approx(steps["alone"][value], rel=1e-5)
