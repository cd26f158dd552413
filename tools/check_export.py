"""Check that an exported Hugging Face model is the one that was trained.

    python tools/check_export.py HUGGING_FACE_DIRECTORY <the flags of ml-train pretrain>

Two questions, on the samples that the run's last evaluation used: does transformers, reading the
export, give the logits that megatron-core gives from the checkpoint in --save (both in float32)?
And does it find the loss that the run itself has noted?
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ml_convert import Request
from ml_convert.input import open_source
from ml_models.flags import UsageError, parse, run_command
from ml_train.config import PretrainConfig, check_world
from ml_train.history import read_history

if TYPE_CHECKING:
    import torch

LOGITS_TOLERANCE = 1e-4
LOSS_TOLERANCE = 0.02
"""Wider, as the run computes in bfloat16."""


def main(argv: Sequence[str]) -> int:
    """Answer both questions; returns 0 if the answers are yes."""
    exported, flags = Path(argv[0]), argv[1:]
    config = parse(PretrainConfig, flags, prog="check_export")
    config = check_world(config, config.launch.world_size)
    save, metrics = config.checkpoint.save, config.log.metrics_path(config.checkpoint.save)
    if save is None or metrics is None:
        raise UsageError("missing --save, where the checkpoints are")
    tokens, difference, loss = measure(exported, save, config)
    noted = read_history(metrics).evaluations[-1].loss
    same_logits, same_loss = difference <= LOGITS_TOLERANCE, abs(loss - noted) <= LOSS_TOLERANCE
    print(
        f"logits: {verdict(same_logits)}, transformers is off by {difference:.1e} on {tokens:,} "
        f"held-out tokens (allowed: {LOGITS_TOLERANCE:.0e})"
    )
    print(
        f"loss: {verdict(same_loss)}, {loss:.4f} in transformers, {noted:.4f} in training "
        f"(allowed: {LOSS_TOLERANCE} apart)"
    )
    return 0 if same_logits and same_loss else 1


def verdict(same: bool) -> str:
    """Return a word for it."""
    return "equal" if same else "NOT EQUAL"


def measure(exported: Path, save: Path, config: PretrainConfig) -> tuple[int, float, float]:
    """Return how many tokens were compared, how far the logits are apart, and the loss."""
    from ml_parallel import platform

    platform.import_engine()  # first, as it silences what megatron-core says when imported

    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from ml_eval import engine

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]

    source = open_source(Request(load_dir=save, save_dir=save, save_format="hf"))
    ours = engine.load(source, device="cpu", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    tokens, labels = held_out(config)
    with torch.inference_mode():
        logits = theirs(tokens).logits  # (B, S, V)
        difference = float((logits - ours.logits(tokens)).abs().max())
    loss = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    ours.close()
    return tokens.numel(), difference, loss


def held_out(config: PretrainConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens and labels of an evaluation, (B, S) int64."""
    from ml_train.data import build_datasets

    training = config.training
    batch = training.global_batch_size or 1
    counts = (training.train_iters * batch, training.eval_iters * batch, 0)
    datasets = build_datasets(
        config.data, seq_length=training.seq_length, seed=training.seed, samples=counts
    )
    if datasets.valid is None:
        raise UsageError("--eval-iters 0: the run has no evaluation to compare with")
    samples = datasets.valid.batch(range(counts[1]))
    return samples["tokens"], samples["labels"]


if __name__ == "__main__":
    sys.exit(run_command("check_export", lambda: main(sys.argv[1:])))
