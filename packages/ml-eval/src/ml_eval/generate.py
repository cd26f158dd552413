"""`ml-eval generate`: continue texts with a model, showing the words as they come.

Everything that can be wrong with flags and files is found before torch is imported. Standard output
holds the continuations only (with several prompts, each under a line with its prompt, as `head`
does with files); what is going on is said on standard error.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ml_convert import Request
from ml_convert.input import open_source
from ml_convert.source import Source
from ml_data.tokenizer import Tokenizer, load_tokenizer
from ml_eval.config import LARGEST_SEED, GenerateConfig, Model, Sampling
from ml_eval.prompts import encode, eos_ids, read_prompts
from ml_models.architecture import Architecture
from ml_models.flags import UsageError, parse

if TYPE_CHECKING:
    from ml_eval.engine import Engine
    from ml_eval.text import Piece

logger = logging.getLogger(__name__)

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def main(argv: Sequence[str], prog: str) -> int:
    """Run the command with the flags `argv`; return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may not have all that a text has
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return _run(argv, prog)
    except BrokenPipeError:  # the reader has enough, as in `ml-eval generate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(argv: Sequence[str], prog: str) -> int:
    config = parse(GenerateConfig, argv, prog=prog)
    source = _open(config.model)
    tokenizer = _load_tokenizer(config.model)
    texts = read_prompts(config.prompts)
    _check_seeds(config.sampling, len(texts))
    prompts = encode(tokenizer, texts, source.arch, max_length=config.ending.max_length)
    ends = eos_ids(source.path, source.config, tokenizer, config.ending.add_eos_token)
    if _is_leader():
        _warn(config.sampling, tokenizer, source.arch)
    engine = _load_engine(config.model, source)
    continuations = _continue(engine, config, tokenizer, prompts, ends)
    if _is_leader():
        logger.info("%s", _describe(config.sampling))
        _show(texts, continuations)
    else:
        for continuation in continuations:
            deque(continuation, maxlen=0)
    engine.close()
    return 0


def _is_leader() -> bool:
    """Tell whether this process is the one that shows the text; every rank computes it."""
    return os.environ.get("RANK", "0") == "0"


def _open(model: Model) -> Source:
    request = Request(
        load_dir=model.load_dir,
        save_dir=model.load_dir,  # nothing is written
        save_format="hf",
        iteration=model.iteration,
        true_vocab_size=model.true_vocab_size,
        verify="bits",  # its hashes: a damaged checkpoint would talk, too
    )
    source = open_source(request)
    if model.iteration is not None and source.path == model.load_dir:
        raise UsageError(
            f"--iteration {model.iteration}: --load-dir {model.load_dir} is one checkpoint; leave "
            "--iteration out, or give the directory of several Megatron checkpoints"
        )
    return source


def _load_tokenizer(model: Model) -> Tokenizer:
    try:
        return load_tokenizer(model.tokenizer, model.tokenizer_type)
    except UsageError as error:
        if model.tokenizer_name_or_path is not None:
            raise
        raise UsageError(f"{error}; give --tokenizer-name-or-path") from error


def _check_seeds(sampling: Sampling, prompts: int) -> None:
    """Check the seed of the last prompt, as each has the next one."""
    if sampling.seed + prompts - 1 > LARGEST_SEED:
        raise UsageError(
            f"--seed {sampling.seed}: must be from 0 to 2**63 - {prompts} with {prompts} prompts, "
            "each of which has the next seed"
        )


def _warn(sampling: Sampling, tokenizer: Tokenizer, arch: Architecture) -> None:
    """Say what is not wrong, but perhaps not meant."""
    if sampling.without_effect:
        flags = ", ".join(sampling.without_effect)
        logger.warning("without --do-sample these flags change nothing: %s", flags)
    if tokenizer.vocab_size > arch.vocab_size:  # added tokens that the model was not resized for
        logger.warning(
            "tokenizer %s: has ids up to %d, and those of the model end at %d; the others cannot "
            "be in a prompt",
            tokenizer.path,
            tokenizer.vocab_size - 1,
            arch.vocab_size - 1,
        )


def _load_engine(model: Model, source: Source) -> Engine:
    from ml_parallel import platform

    platform.import_engine()  # first, as it silences what megatron-core says when imported

    import torch

    from ml_eval.engine import load

    started = time.perf_counter()
    engine = load(
        source,
        device=model.device,
        dtype=getattr(torch, _DTYPES[model.params_dtype]) if model.params_dtype else None,
        tensor_model_parallel_size=model.tensor_model_parallel_size,
    )
    if _is_leader():
        logger.info("loaded %s in %.1f s", source.path, time.perf_counter() - started)
    return engine


def _continue(
    engine: Engine,
    config: GenerateConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    ends: frozenset[int],
) -> Iterator[Iterator[Piece]]:
    """Yield the continuation of each prompt, which is computed as it is read."""
    from ml_eval.text import complete

    for number, prompt in enumerate(prompts):
        yield complete(
            engine,
            tokenizer,
            prompt,
            sampling=replace(config.sampling, seed=config.sampling.seed + number),
            ending=config.ending,
            eos_ids=ends,
        )


def _show(texts: Sequence[str], continuations: Iterator[Iterator[Piece]]) -> None:
    """Write all continuations as they come."""
    started, tokens = time.perf_counter(), 0
    for number, (text, pieces) in enumerate(zip(texts, continuations, strict=True)):
        if len(texts) > 1:
            sys.stdout.write(_header(text, number, len(texts)))
        try:
            for piece in pieces:
                tokens += 1
                if piece.text:
                    sys.stdout.write(piece.text)
                    sys.stdout.flush()
        finally:  # also after Ctrl-C, so that the shell's prompt begins a line
            sys.stdout.write("\n")
            sys.stdout.flush()
    seconds = time.perf_counter() - started
    logger.info("Elapsed: %.2fs, %d tokens, %.1f tokens/s", seconds, tokens, tokens / seconds)


def _describe(sampling: Sampling) -> str:
    penalty = sampling.repetition_penalty
    extra = f", repetition penalty {penalty:g}" if penalty != 1 else ""
    if not sampling.do_sample:
        return f"greedy{extra}"
    return (
        f"sampling at temperature {sampling.temperature:g}, top-k {sampling.top_k}, "
        f"top-p {sampling.top_p:g}, seed {sampling.seed}{extra}"
    )


def _header(text: str, number: int, count: int) -> str:
    line = " ".join(text.split())
    shown = line if len(line) <= 60 else f"{line[:57]}..."
    return f"{chr(10) if number else ''}==> {number + 1}/{count}: {shown} <==\n"
