"""Train a Llama with the Hugging Face Trainer and print the seconds of every step as JSON.

The other side of `tools/bench/train.py`, which starts it in a process of its own. Its settings are
the fastest that are honest: sdpa attention, the fused optimizer, autocast to bfloat16 with float32
weights (what `ml-train --bf16` does as well), and no evaluation, logging or saving.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ml_data.indexed import IndexedDataset


class Samples(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The documents of a Megatron dataset, cut to the same length; the Trainer shifts labels."""

    def __init__(self, prefix: str, length: int) -> None:
        self._documents = IndexedDataset(prefix)
        self._length = length

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.from_numpy(self._documents[index][: self._length].astype("int64"))
        return {"input_ids": tokens, "labels": tokens}


class Clock(TrainerCallback):
    """Notes when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        """Take the time; the step has been waited for, because its gradient norm has been read."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def train(options: argparse.Namespace, output: str) -> Clock:
    """Train for the steps asked for."""
    config = LlamaConfig.from_dict({**json.loads(options.model), "use_cache": False})
    model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, attn_implementation="sdpa"
    )
    clock = Clock()
    cpu = not torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=output,
        max_steps=options.steps,
        per_device_train_batch_size=options.micro_batch_size,
        gradient_accumulation_steps=options.accumulation,
        bf16=options.dtype == "bf16",
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and "RANK" in os.environ else None,
        optim="adamw_torch_fused",
        learning_rate=options.lr,
        weight_decay=0.1,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    samples = Samples(options.data, options.seq_length)
    Trainer(model=model, args=arguments, train_dataset=samples, callbacks=[clock]).train()
    return clock


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", required=True, help="prefix of a Megatron dataset")
    parser.add_argument("--model", required=True, help="a config.json")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), required=True)
    for name in ("--seq-length", "--steps", "--micro-batch-size", "--accumulation"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as output:
        ends = train(options, output).ends
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(json.dumps([end - start for start, end in itertools.pairwise(ends)]))


if __name__ == "__main__":
    main()
