"""Which run this is, in flags: what all ranks are given alike, and what the result follows from.

Both are JSON values by the name of the field, to send to other ranks and to keep in a checkpoint.
Nothing here needs torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from ml_train.config import PretrainConfig, flag

Flags = Mapping[str, Any]

_ALONE = ("launch", "log", "ignored")
"""Groups that a node has for itself, or that only rank 0 looks at."""
_SHOWN = {"lr_decay_iters": "--lr-decay-iters (by default --train-iters)"}
_TOKENIZER = ("tokenizer_name_or_path", "tokenizer_type")
"""Only the size of a vocabulary is looked at, and --vocab-size has it."""


def of_command(config: PretrainConfig) -> Flags:
    """Return the flags that every rank has to be given alike."""
    found: dict[str, Any] = {}
    for group in dataclasses.fields(config):
        if group.name not in _ALONE:
            found |= dataclasses.asdict(getattr(config, group.name))
    return _plain({name: value for name, value in found.items() if name not in _TOKENIZER})


def of_run(config: PretrainConfig) -> Flags:
    """Return the flags that the rest of a run follows from, besides those of model and layout."""
    training, data, rate = config.training, config.data, config.learning_rate
    names = ["seq_length", "global_batch_size", "seed", "bf16", "fp16"]
    if data.is_instruction_dataset:
        names.append("train_iters")  # the order of the samples follows from it
    found = {name: getattr(training, name) for name in names}
    found |= dataclasses.asdict(data)
    del found["data_cache_path"], found["variable_seq_lengths"], found["test_data_path"]
    for group in (config.dropout, config.optimizer, rate):
        found |= dataclasses.asdict(group)
    if rate.lr_decay_style == "constant" and rate.lr_warmup_fraction is None:
        del found["lr_decay_iters"]
    else:
        found["lr_decay_iters"] = rate.decay_iters(training.train_iters)
    return _plain(found)


def differences(before: Flags, now: Flags) -> list[tuple[str, str, str]]:
    """Return each flag that both know and that is not the same, and its two values."""
    return [
        (_SHOWN.get(name, flag(name)), _shown(before[name]), _shown(value))
        for name, value in now.items()
        if name in before and before[name] != value
    ]


def _plain(flags: Flags) -> Flags:
    plain: Flags = json.loads(json.dumps(flags, default=str))
    return plain


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
