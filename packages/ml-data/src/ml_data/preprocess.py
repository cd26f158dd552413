"""`ml-data preprocess`: a command line of ModelLink's `preprocess_data.py`, whole.

The handler says which command it is for; the flags are passed on to it, and the new command line is
printed, to be used from then on. Nothing else happens here.
"""

from __future__ import annotations

import dataclasses
import logging
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, get_args

from ml_data import handlers
from ml_data.handlers.dataset_info import datasets
from ml_data.instruction.mixing import MixStrategy
from ml_data.pretraining.pretrain_text import PretrainHandler
from ml_data.tokenizer.loading import FILES, TokenizerType
from ml_models.commands import did_you_mean, run_command
from ml_models.flags import UsageError, parse

logger = logging.getLogger(__name__)

Command = Literal["pretrain", "instruct", "preference", "merge"]

_PRETRAIN: tuple[str, ...] = get_args(PretrainHandler)


@dataclass(frozen=True, kw_only=True)
class Input:
    """Input data."""

    input: tuple[str, ...]
    """Files, directories; of LlamaFactoryInstructionHandler, names in dataset_info.json; to merge,
    a directory of datasets."""
    handler_name: str = _PRETRAIN[0]
    """What the records are, by ModelLink's names."""
    json_keys: tuple[str, ...] = field(default=("text",), metadata={"aliases": "--json-key"})
    """Columns of text for pre-training."""
    split_sentences: bool = False
    """Split documents into sentences."""
    keep_newlines: bool = False
    """Keep line breaks between sentences."""
    prompt_type: str | None = None
    """Template of conversations."""
    map_keys: str | None = None
    """Names of columns: a JSON object."""
    dataset_dir: str | None = None
    """Directory of dataset_info.json."""
    mix_strategy: MixStrategy = "concat"
    """How several datasets become one."""
    interleave_probs: tuple[float, ...] | None = None
    """Probability of each dataset."""
    max_samples: int | None = None
    """The most records of a dataset."""
    seed: int = 1234
    """Seed of the mixing."""
    pack: bool = False
    """Put several samples into a row of --seq-length tokens."""
    hf_datasets_params: str | None = None
    """Not supported: it is for `datasets`, which is not used."""
    streaming: bool = False
    """No effect: input is always streamed."""
    cache_dir: str = "~/tmp"
    """No effect: nothing is cached."""
    overwrite_cache: bool = False
    """No effect: nothing is cached."""


@dataclass(frozen=True, kw_only=True)
class TokenizerFlags:
    """Tokenizer."""

    tokenizer_type: TokenizerType | None = None
    """How to read it."""
    tokenizer_name_or_path: str | None = None
    """Directory or file."""
    tokenizer_not_use_fast: bool = False
    """Use the slow tokenizer of transformers."""
    vocab_file: str | None = None
    """Vocabulary of a tokenizer of Megatron's names."""
    merge_file: str | None = None
    """Merges of a GPT2BPETokenizer."""
    append_eod: bool = False
    """End every document with the tokenizer's end-of-text token."""
    seq_length: int | None = None
    """Leave out what is longer."""
    make_vocab_size_divisible_by: int = 128
    """No effect: the vocabulary is padded for training."""
    pad_vocab_size_to: int | None = None
    """No effect: the vocabulary is padded for training."""


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """Output data."""

    output_prefix: str
    """Path of the files without what follows in their names."""
    merge_group_keys: tuple[str, ...] = ()
    """Merge the datasets in --input that have these in their names."""
    workers: int | None = None
    """Processes that encode; by default one for each processor."""
    n_subs: int = 1
    """Accepted; the files are the same for any number."""
    log_interval: int | None = None
    """Without a terminal, records between two lines of progress."""
    dataset_impl: Literal["mmap"] = "mmap"
    """No effect: there is no other."""


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """Run the command that a command line of ModelLink's preprocess_data.py stands for."""

    data: Input
    tokenizer: TokenizerFlags
    output: OutputFlags


_INSTRUCTION = ("prompt_type", "map_keys", "dataset_dir", "max_samples", "pack")
_MIXING = ("mix_strategy", "interleave_probs", "seed")
_TOKENIZER = ("tokenizer_type", "tokenizer_name_or_path", "tokenizer_not_use_fast", "vocab_file")
_COMMON = ("handler_name", *_TOKENIZER, "merge_file", "append_eod", "seq_length", "workers")
_RUN = ("input", "output_prefix", *_COMMON, "n_subs", "log_interval")
_FLAGS: dict[Command, tuple[str, ...]] = {
    "pretrain": (*_RUN, "json_keys", "split_sentences", "keep_newlines"),
    "instruct": (*_RUN, *_INSTRUCTION, *_MIXING),
    "preference": (*_RUN, *_INSTRUCTION[:-1], *_MIXING),
    "merge": ("input", "output_prefix"),
}
"""Flags that mean something to a command, in the order they are printed."""
_SKIP = ("--on-too-long", "skip", "--on-error", "skip")
_ALWAYS: dict[Command, tuple[str, ...]] = {
    "pretrain": ("--document", "per-line", "--token-dtype", "int32"),
    "instruct": _SKIP,
    "preference": _SKIP,
    "merge": (),
}
"""What is ModelLink's way but not the default here."""


def main(argv: Sequence[str], prog: str) -> int:
    """Run the command."""
    config = parse(PreprocessConfig, argv, prog=prog)
    command, words, unused = translate(config)
    logger.info("ml-data %s", shlex.join([command, *words]))
    if unused:
        logger.info("without effect on ml-data %s: %s", command, ", ".join(unused))
    run = import_module(f"ml_data.{command}").main
    name = f"ml-data {command}"  # its messages name its own flags
    return run_command(name, lambda: run(words, name))


def translate(config: PreprocessConfig) -> tuple[Command, list[str], list[str]]:
    """Return the command that does the same, its flags, and those of ModelLink's it needs not.

    Raises:
        UsageError: there is no such handler, or what a flag says cannot be done.
    """
    if config.data.hf_datasets_params is not None:
        raise UsageError(
            f"--hf-datasets-params {config.data.hf_datasets_params}: not supported, files are read "
            "without `datasets`: write them as .jsonl, or name the columns with --map-keys"
        )
    command = _command(config)
    given = dict(_given(config))
    read = [name for name in _FLAGS[command] if name not in _unread(config)]
    passed = [word for name in read for word in given.pop(name, ())]
    if command == "merge":
        passed += ["--keys", *given.pop("merge_group_keys")[1:]]
    return command, [*passed, *_ALWAYS[command]], [words[0] for words in given.values()]


def _unread(config: PreprocessConfig) -> set[str]:
    """Return the flags that are of another handler or tokenizer than the one that is named."""
    unread = {"vocab_file", "merge_file"} - set(FILES.get(config.tokenizer.tokenizer_type, ()))
    return (
        unread if config.data.handler_name == handlers.LLAMA_FACTORY else {*unread, "dataset_dir"}
    )


def _command(config: PreprocessConfig) -> Command:
    name = config.data.handler_name
    if config.output.merge_group_keys:
        return "merge"
    if name in _PRETRAIN or not name:
        return "pretrain"
    if name in handlers.names(pairwise=False):
        return "preference" if name == handlers.LLAMA_FACTORY and _ranked(config) else "instruct"
    if name in handlers.names(pairwise=True):
        return "preference"
    known = [*_PRETRAIN, *handlers.names(pairwise=False), *handlers.names(pairwise=True)]
    known = list(dict.fromkeys(known))
    near = did_you_mean(name, known)
    raise UsageError(f"--handler-name {name}: unknown; there are {', '.join(known)}{near}")


def _ranked(config: PreprocessConfig) -> bool:
    """Return whether the datasets of a dataset_info.json are preferences."""
    try:
        return bool(datasets(config.data.input, config.data.dataset_dir, pairwise=True))
    except UsageError:  # `instruct` says what is wrong
        return False


def _given(config: PreprocessConfig) -> Iterator[tuple[str, list[str]]]:
    """Yield the words of every flag whose value is not the default, by the name of its field."""
    for group in (config.data, config.tokenizer, config.output):
        for flag in dataclasses.fields(group):
            value = getattr(group, flag.name)
            if value != flag.default and value != "":
                yield flag.name, _words(flag.name, value)


def _words(name: str, value: Any) -> list[str]:
    option = "--" + name.replace("_", "-")
    if value is True:
        return [option]
    return [option, *map(str, value)] if isinstance(value, tuple) else [option, str(value)]
