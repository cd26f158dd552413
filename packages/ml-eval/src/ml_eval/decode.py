"""The decoding loop: prompts in, tokens out as they are chosen.

The prompt is computed once (prefill). After that every step computes one token only, as the keys
and values of all before are in the cache. Prompts of the same length share their steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch

from ml_eval.config import Sampling
from ml_eval.engine import Engine
from ml_eval.sampling import choose

Finish = Literal["stop", "length"]
"""Why a text ended: a token or string that ends it, or the limit of its length."""


class Token(NamedTuple):
    """A token that was generated."""

    prompt: int
    """Which prompt it continues."""
    id: int
    finish: Finish | None = None
    """Set on the last token of a prompt; a token that ends the text is "stop"."""


def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    max_new_tokens: int,
    max_length: int | None = None,
    eos_ids: frozenset[int] = frozenset(),
) -> Iterator[Token]:
    """Continue prompts, yielding each token when it is chosen.

    Closing the iterator ends the work. Under tensor parallelism every rank must make the same call
    and take the same tokens.

    Args:
        engine: The model.
        prompts: Ids of each prompt, at least one and fewer than the model takes.
        sampling: How to choose tokens; prompt `n` has the seed `sampling.seed + n`.
        max_new_tokens: Most tokens to add to each prompt.
        max_length: Most tokens of a prompt and what is added; default what the model takes.
        eos_ids: Tokens that end a text.

    Raises:
        ValueError: A prompt is empty, or leaves no room for a token.
    """
    limit = min(max_length or engine.max_length, engine.max_length)
    groups: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        if not 0 < len(prompt) < limit:
            raise ValueError(f"prompt {number} has {len(prompt)} tokens, not 1 to {limit - 1}")
        groups.setdefault(len(prompt), []).append(number)
    for length, numbers in groups.items():
        ids = torch.tensor([list(prompts[number]) for number in numbers], device=engine.device)
        end = min(length + max_new_tokens, limit)
        yield from _decode(engine, ids, numbers, sampling, end, eos_ids)


def _decode(
    engine: Engine,
    ids: torch.Tensor,
    numbers: Sequence[int],
    sampling: Sampling,
    end: int,
    eos_ids: frozenset[int],
) -> Iterator[Token]:
    """Continue prompts of one length, `(B, S)` int64, up to a length of `end`."""
    generators = [torch.Generator().manual_seed(sampling.seed + number) for number in numbers]
    cache = engine.cache(batch_size=len(numbers), length=end)
    unfinished = set(range(len(numbers)))
    new = ids
    while unfinished:
        chosen = choose(engine.next_logits(new, cache), ids, sampling, generators)
        new = chosen[:, None]
        ids = torch.cat((ids, new), dim=1)
        for row, token in enumerate(chosen.tolist()):
            if row not in unfinished:
                continue  # computed with the others, but its text is over
            finish: Finish | None = None
            if token in eos_ids:
                finish = "stop"
            elif ids.shape[1] == end:
                finish = "length"
            if finish:
                unfinished.remove(row)
            yield Token(numbers[row], token, finish)
