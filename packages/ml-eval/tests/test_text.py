from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ml_convert import Request
from ml_convert.input import open_source
from ml_data.tokenizer import load_tokenizer
from ml_eval.config import Ending, Sampling
from ml_eval.engine import load
from ml_eval.text import Piece, complete
from ml_parallel.testing import run_ranks

PROMPT = "The quick"


@pytest.fixture(scope="module")
def run(llama: Path) -> Any:
    """Return the pieces of texts with these endings, computed by one engine."""
    tokenizer = load_tokenizer(llama)
    (prompt,) = tokenizer.encode_batch([PROMPT])

    def job(endings: Sequence[Ending], eos: frozenset[int]) -> list[list[Piece]]:
        request = Request(load_dir=llama, save_dir=llama, save_format="hf")
        engine = load(open_source(request), device="cpu")
        options = {"sampling": Sampling(), "eos_ids": eos}
        return [list(complete(engine, tokenizer, prompt, ending=e, **options)) for e in endings]

    return lambda *endings, eos=(): run_ranks(job, 1, endings, frozenset(eos))[0]


def text(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


@pytest.fixture(scope="module")
def whole(run) -> list[Piece]:
    """What comes when nothing but the length ends it."""
    (pieces,) = run(Ending(max_new_tokens=40))
    return pieces


def test_pieces_are_the_text_of_the_tokens(whole, llama: Path) -> None:
    tokenizer = load_tokenizer(llama)
    (prompt,) = tokenizer.encode_batch([PROMPT])
    ids = [piece.token for piece in whole]
    assert PROMPT + text(whole) == tokenizer.decode([*prompt, *ids])
    assert [piece.finish for piece in whole] == [None] * 39 + ["length"]


def test_the_token_that_ends_a_text_is_not_part_of_it(run, whole, llama: Path) -> None:
    tokenizer = load_tokenizer(llama)
    (prompt,) = tokenizer.encode_batch([PROMPT])
    ids = [piece.token for piece in whole]
    eos = next(token for token in ids[9:] if "�" not in tokenizer.decode([token]))
    before = ids[: ids.index(eos)]
    (pieces,) = run(Ending(max_new_tokens=40), eos=[eos])
    assert [piece.token for piece in pieces] == [*before, eos]
    assert pieces[-1].finish == "stop"
    assert PROMPT + text(pieces) == tokenizer.decode([*prompt, *before])


def test_a_stop_text_ends_the_text_and_the_work(run, whole) -> None:
    full = text(whole)
    stop = full[8:11]
    (pieces,) = run(Ending(max_new_tokens=40, stop=(stop, "never comes")))
    assert text(pieces) == full[: full.index(stop)]
    assert pieces[-1].finish == "stop"
    assert len(pieces) < 40


def test_the_start_of_a_stop_text_that_does_not_come_is_shown_in_the_end(run, whole) -> None:
    full = text(whole)
    (pieces,) = run(Ending(max_new_tokens=40, stop=(full[-1:] + "never comes",)))
    assert text(pieces) == full
    assert pieces[-1].finish == "length"
