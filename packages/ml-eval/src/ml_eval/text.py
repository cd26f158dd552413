"""Text in, text out, as it comes: what generation, chat and serving have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ml_data.tokenizer import Tokenizer
from ml_eval.config import Ending, Sampling
from ml_eval.decode import Finish, generate
from ml_eval.engine import Engine
from ml_eval.stream import Detokenizer, StopText


class Piece(NamedTuple):
    """What one more token adds to a text."""

    text: str
    """Often empty: the text of a token can depend on the next one."""
    token: int
    finish: Finish | None
    """Set on the last piece."""


def complete(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    *,
    sampling: Sampling,
    ending: Ending,
    eos_ids: frozenset[int],
) -> Iterator[Piece]:
    """Continue a prompt; yields a piece for each token, as soon as it is chosen.

    The texts of all pieces together are the continuation, without what ended it.

    Args:
        engine: The model.
        tokenizer: Its tokenizer.
        prompt: Ids to continue.
        sampling: How to choose tokens.
        ending: Where to end, `add_eos_token` apart.
        eos_ids: Tokens that end the text.
    """
    detokenizer = Detokenizer(tokenizer.decode, prompt)
    stop = StopText(ending.stop)
    for token in generate(
        engine,
        [prompt],
        sampling=sampling,
        max_new_tokens=ending.max_new_tokens,
        max_length=ending.max_length,
        eos_ids=eos_ids,
    ):
        text = stop.push("" if token.id in eos_ids else detokenizer.push(token.id))
        if token.finish:
            text += stop.push(detokenizer.finish()) + stop.finish()
        finish = "stop" if stop.found else token.finish
        yield Piece(text, token.id, finish)
        if finish:
            return
